#!/usr/bin/env bash
# Everything that waits for a GPU, in order of worth, within a time budget:
#
#   scripts/gpu_check.sh                    # 540 seconds, results in results/gpu
#   BUDGET=3000 OUT=/somewhere scripts/gpu_check.sh
#
# Resumable: a step that succeeded is not repeated, so call it again with the same OUT until it
# prints that all is done. Needs torch with CUDA (and Triton), numpy and pytest; torchvision for the
# networks. A line of scripts/gpu_pending.txt, if there is that file, is one more step (an
# experiment, say; its head says what GPU_DATA must hold). Each step leaves <step>.log, and <step>.done or <step>.failed.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-results/gpu}
BUDGET=${BUDGET:-540}
PYTHON=${PYTHON:-python}
START=$SECONDS
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 PYTHON OUT GPU_DATA=${GPU_DATA:-data}
mkdir -p "$OUT"

step() { # name, most seconds, command...
    local name=$1 most=$2 left=$((BUDGET - SECONDS + START))
    shift 2
    [[ -e $OUT/$name.done ]] && { echo "$name: done before"; return; }
    if ((left < 20)); then
        echo "$name: no time left"
        unfinished=1
        return
    fi
    ((most < left)) && left=$most
    echo "$name: up to $left s"
    local begin=$SECONDS
    rm -f "$OUT/$name.failed"
    if timeout "$left" "$@" >"$OUT/$name.log" 2>&1; then
        echo "$((SECONDS - begin)) s" >"$OUT/$name.done"
    else
        echo "exit $? after $((SECONDS - begin)) s" | tee "$OUT/$name.failed"
        unfinished=1
    fi
    tail -n 3 "$OUT/$name.log" | cut -c1-160
}

unfinished=0
# auto is the plain formula on CUDA until these kernels have proven themselves
bench=(env "SN_BACKEND=${SN_BACKEND:-triton}" "$PYTHON" scripts/bench_norm.py --device cuda)
plain=(env SN_BACKEND=auto "$PYTHON" scripts/bench_norm.py --device cuda)
step environment 60 "$PYTHON" -c '
import torch
assert torch.cuda.is_available(), "no GPU"
import triton
print(torch.__version__, triton.__version__, torch.cuda.get_device_properties(0))'
if [[ -e $OUT/environment.failed ]]; then
    exit 1
fi
step tests_triton 300 "$PYTHON" -m pytest -q -p no:cacheprovider tests/kernels/test_triton.py
step bench_bf16_last 240 "${bench[@]}" --dtype bfloat16 --sets resnet50 --layouts channels_last \
    --quick --only sn sn+relu bn+relu gn --output "$OUT/bench_bf16_last"
step networks_bf16 180 "${bench[@]}" --dtype bfloat16 --layouts channels_last --networks \
    --output "$OUT/networks_bf16"
step ddp_nccl 120 "$PYTHON" -m torch.distributed.run --standalone \
    --nproc_per_node="$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')" \
    scripts/gpu_ddp_smoke.py
step networks_bf16_compiled 300 "${plain[@]}" --dtype bfloat16 --layouts channels_last --networks \
    --compile --output "$OUT/networks_bf16_compiled"
step networks_bf16_compiled_operators 300 "${bench[@]}" --dtype bfloat16 \
    --layouts channels_last --networks --compile --output "$OUT/networks_bf16_compiled_operators"
step bench_fp32 300 "${bench[@]}" --batch 64 --sets resnet50 batch2 --quick --output "$OUT/bench_fp32"
step bench_small 300 "${bench[@]}" --dtype bfloat16 --sets cifar detection --output "$OUT/bench_small"
if [[ -e scripts/gpu_pending.txt ]]; then
    number=0
    while IFS= read -r line; do
        [[ -z $line || $line == \#* ]] && continue
        number=$((number + 1))
        step "pending_$number" "$BUDGET" bash -c "$line"
    done <scripts/gpu_pending.txt
fi
tar -czf "$OUT.tar.gz" -C "$(dirname "$OUT")" "$(basename "$OUT")"
if ((unfinished)); then
    echo "not everything is done: run it again ($OUT)"
    exit 2
fi
echo "all is done: $OUT"
