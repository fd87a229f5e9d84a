#!/usr/bin/env bash
# Everything that waits for a GPU, the most decisive first, within a time budget:
#
#   python scripts/gpu_pack.py --root data      # before, where there is a network: gpu_files/
#   scripts/gpu_check.sh                        # 540 seconds, results in results/gpu
#   BUDGET=200 OUT=/somewhere scripts/gpu_check.sh
#   DRY=1 scripts/gpu_check.sh                  # on a CPU: every step, tiny; proves the script alone
#
# Resumable: a step that succeeded is not repeated. Call it again with the same OUT until it prints
# that all is done; on another machine put rest.tar.gz of the last call into gpu_files/ before. OUT
# holds eight files at most, up to date after every step, so that a call can be cut off:
#
#   steps.txt log.txt                      what was done in how many seconds; what it printed
#   kernels.json layers.json networks.json networks_compiled.json
#   rest.tar.gz                            all of it, with the experiments' runs: what a resumption needs
#
# Needs torch with CUDA (and Triton), torchvision, numpy, pytest, scipy, tqdm, tensorboard and
# scikit-learn; more than one process for the tests with pytest-xdist. gpu_files/ brings Hydra,
# pycocotools and CIFAR-10 at 16 px, and is to be copied along, for git ignores it: without them the
# steps that need them fail by name. Of results/ it reads claims.yaml alone: where not everything can
# be copied, the rest of that folder, nearly all of the clone's size, may stay behind. A line of
# scripts/gpu_pending.txt is one more step (its head says what GPU_DATA must hold).
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-results/gpu}
WORK=${WORK:-$OUT.work}
BUDGET=${BUDGET:-540}
PYTHON=${PYTHON:-$(command -v python || command -v python3)}
DRY=${DRY:-}
START=$SECONDS
mkdir -p "$OUT" "$WORK"
OUT=$(cd "$OUT" && pwd) WORK=$(cd "$WORK" && pwd)
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 PYTHON OUT=$OUT WORK
export GPU_DATA=${GPU_DATA:-$WORK/data}
export XDG_CACHE_HOME=${XDG_CACHE_HOME:-$WORK/cache}
for rest in "$OUT/rest.tar.gz" gpu_files/rest.tar.gz; do
    [[ -e $rest && ! -e $WORK/steps.txt ]] && tar -xzf "$rest" -C "$WORK"
done

collect() { # what is there so far, into OUT
    local name
    for name in steps.txt kernels.json layers.json networks.json networks_compiled.json; do
        [[ -e $WORK/$name ]] && cp "$WORK/$name" "$OUT/$name"
    done
    for name in "$WORK"/logs/*.log; do
        echo "=== $(basename "$name" .log)"
        tail -c 60000 "$name"
    done >"$OUT/log.txt" 2>/dev/null
    local finished # their records are all that a resumption needs
    finished=$(cd "$WORK" && find . -name summary.json -printf '--exclude=%h/*.pt\n')
    # shellcheck disable=SC2086  # one option a word
    tar -czf "$OUT/.rest" -C "$WORK" --exclude=./data --exclude=./cache --exclude=./site \
        $finished . &&
        mv "$OUT/.rest" "$OUT/rest.tar.gz"
}

step() { # name, most seconds, command...; a name that ends with + is never finished
    local name=$1 most=$2 left=$((BUDGET - SECONDS + START)) begin=$SECONDS code
    shift 2
    grep -q "^$name done" "$WORK/steps.txt" 2>/dev/null && { echo "$name: done before"; return; }
    if ((left < 15)); then
        echo "$name: no time left"
        unfinished=1
        return
    fi
    ((most < left)) && left=$most
    echo "$name: up to $left s"
    mkdir -p "$WORK/logs"
    timeout --kill-after=5 "$left" "$@" >"$WORK/logs/${name%+}.log" 2>&1
    code=$?
    if ((code == 0)) && [[ $name != *+ ]]; then
        echo "$name done in $((SECONDS - begin)) s" >>"$WORK/steps.txt"
    else
        echo "$name exit code $code after $((SECONDS - begin)) s" | tee -a "$WORK/steps.txt"
        ((code == 0)) || unfinished=1
    fi
    tail -n 3 "$WORK/logs/${name%+}.log" | cut -c1-160
    collect
}

unfinished=0
if ! "$PYTHON" -c 'import hydra' 2>/dev/null && compgen -G 'gpu_files/wheels/*.whl' >/dev/null; then
    "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade \
        --target "$WORK/site" gpu_files/wheels/*.whl
    export PYTHONPATH=$PYTHONPATH:$WORK/site
fi
if [[ -e gpu_files/cifar10_16px.npz && ! -e $GPU_DATA/cifar-10-batches-py ]]; then
    "$PYTHON" scripts/gpu_pack.py --unpack "$GPU_DATA"
fi

device=cuda
tests=(-m pytest -q --noconftest -p no:cacheprovider tests/kernels/test_triton.py)
[[ -z $DRY ]] && "$PYTHON" -c 'import xdist' 2>/dev/null && tests+=(-n 8)
check=("$PYTHON" -m sn.kernels.check)
layers=(--dtype bfloat16 --layouts channels_last --sets resnet50 --rounds 7 --quick
    --only sn sn+relu bn+relu gn)
networks=(--dtype bfloat16 --layouts channels_last --networks --only-networks ResNet-50 --rounds 5
    --only sn sn+relu)
gpus=1 jobs=8
if [[ -n $DRY ]]; then
    device=cpu jobs=1
    export TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES=
    tests+=(-k weight_or_bias)
    check=("$PYTHON" -m sn.kernels.check --child cpu)
    layers=(--layouts channels_last --sets cifar --rounds 1 --quick --only sn)
    networks=(--layouts channels_last --networks --only-networks ResNet-20 --rounds 1 --only sn)
else
    gpus=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
fi
norm=("$PYTHON" scripts/bench_norm.py --device "$device")
kernels=auto # later: forced, so that a refusal by the check is measured, not hidden by the formula
[[ -z $DRY ]] && kernels=triton

step environment 60 "$PYTHON" - "$device" <<'END'
import sys, torch, triton
print(torch.__version__, triton.__version__)
if sys.argv[1] == "cuda":
    properties = torch.cuda.get_device_properties(0)
    print(properties)
    most = properties.total_memory // 16  # three such tensors are there at a time
    x = torch.randn(min(2**30, most), device="cuda", dtype=torch.bfloat16)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
    for event in (start, start, end):  # the first round warms up
        event.record()
        for _ in range(8):
            y = x.clone()
    end.record()
    torch.cuda.synchronize()
    print(f"copy: {16 * 2 * x.nbytes / start.elapsed_time(end) / 1e9:.2f} TB/s, read and written")
END
grep -q '^environment done' "$WORK/steps.txt" || exit 1
step tests_kernels 150 "$PYTHON" "${tests[@]}"
step first_use_check 150 bash -c '"$@" >"$WORK/kernels.json"; code=$?; tail -c 3000 "$WORK/kernels.json"; exit $code' - "${check[@]}"
step layers 150 env SN_BACKEND=$kernels "${norm[@]}" "${layers[@]}" --output "$WORK/layers"
step networks 90 env SN_BACKEND=$kernels "${norm[@]}" "${networks[@]}" --output "$WORK/networks"
step networks_compiled 200 env SN_BACKEND=auto "${norm[@]}" "${networks[@]}" --compile \
    --output "$WORK/networks_compiled"
# what the check has found on another machine of this kind need not be found again
[[ -z $DRY ]] && grep -qs '"works": true' "$WORK/kernels.json" && export SN_BACKEND=triton
step steps_without_sync 90 "$PYTHON" scripts/gpu_sync_free.py "$device"
step ddp 60 "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node="$gpus" \
    scripts/gpu_ddp_smoke.py
if [[ -z $DRY ]]; then
    step layers_fp32 120 env SN_BACKEND=triton "${norm[@]}" --batch 64 --sets resnet50 --rounds 5 \
        --layouts contiguous_format --quick --only sn sn+relu gn --output "$WORK/layers_fp32"
    step style 90 "$PYTHON" scripts/bench_style.py --device cuda --size 256 --batch 4 --rounds 15 \
        --output "$WORK/style"
fi
left=$((BUDGET - SECONDS + START))
claims=("$PYTHON" scripts/run_claims.py C15 --seeds 1-40 --jobs "$jobs" --runs "$WORK/runs")
if [[ -n $DRY ]]; then
    claims+=(--list)
elif ((left > 60)); then # runs that are left save when the time is over
    claims+=(--budget "$("$PYTHON" -c "print(($left - 30) / 60)")")
fi
if ((left > 60)); then
    step claims+ "$left" "${claims[@]}" -- data.root="$GPU_DATA" device="$device"
else
    unfinished=1
fi
if [[ -z $DRY && -e scripts/gpu_pending.txt ]]; then
    number=0
    while IFS= read -r line; do
        [[ -z $line || $line == \#* ]] && continue
        number=$((number + 1))
        step "pending_$number" "$BUDGET" bash -c "$line"
    done <scripts/gpu_pending.txt
fi
collect
if ((unfinished)); then
    echo "not everything is done: run it again ($OUT)"
    exit 2
fi
echo "all is done: $OUT"
