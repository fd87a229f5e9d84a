#!/usr/bin/env bash
# Start an entrypoint with one process per GPU, on one machine or several (torchrun).
#
#   scripts/launch.sh 8 train_imagenet.py norm=sn setting=8x32 data=imagenet data.root=/data/imagenet
#
# On several machines run the same line on each, with
#   NNODES=2 NODE_RANK=0|1 MASTER_ADDR=first-host MASTER_PORT=29500
# MAX_RESTARTS=3 lets torchrun restart all processes after one dies; they resume by themselves.
# The exit code is 0 or 1; the line of rank 0 above torchrun's traceback says what happened.
set -euo pipefail

if [ $# -lt 2 ] || ! [[ $1 =~ ^[1-9][0-9]*$ ]]; then
    sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
    echo "usage: scripts/launch.sh PROCESSES_PER_MACHINE SCRIPT [OVERRIDE ...]" >&2
    exit 2
fi
processes=$1
shift
python=${PYTHON:-python}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[ -n "${PYTHON:-}" ] || [ ! -x "$root/.venv/bin/python" ] || python=$root/.venv/bin/python

if ! [[ ${NNODES:-1} =~ ^[1-9][0-9]*$ ]]; then
    echo "launch.sh: NNODES=$NNODES; expected the number of machines" >&2
    exit 2
fi
if [ "${NNODES:-1}" -gt 1 ]; then
    : "${NODE_RANK:?set NODE_RANK to 0..NNODES-1, another on each machine}"
    : "${MASTER_ADDR:?set MASTER_ADDR to the host of NODE_RANK 0}"
    place=(--nnodes "$NNODES" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR"
        --master-port "${MASTER_PORT:-29500}")
else
    place=(--standalone)
fi
# torchrun would keep the store of a failed attempt, and the next would look for its processes there.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}
# SIGUSR1 (Slurm: soon the time is up) would end torchrun alone, and its processes would train on.
export PET_SIGNALS_TO_HANDLE=${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1}
exec "$python" -m torch.distributed.run "${place[@]}" --nproc-per-node "$processes" \
    --max-restarts "${MAX_RESTARTS:-0}" "$@"
