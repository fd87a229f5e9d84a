#!/usr/bin/env bash
# Train norms x settings x seeds, a fresh process each. The same line again skips what has finished
# and continues what was interrupted.
#
#   scripts/sweep_settings.sh --norms "bn gn sn" --settings "8x32 8x8 8x2" --seeds "0 1" \
#       -- data=cifar10 data.root=data schedule.epochs=30
#
#   --norms N      names from configs/norm                      (default: bn gn sn)
#   --settings S   GPUs x images per GPU                        (default: the nine of Table 4.1)
#   --seeds K                                                   (default: 0)
#   --output DIR   output_root of the runs; logs in DIR/logs    (default: outputs)
#   --processes P  processes per run, for P GPUs; a setting with fewer GPUs takes its own number
#   --jobs J       runs at a time, each on P GPUs of its own if there are as many   (default: 1)
#   --dry-run      print the commands
#   -- ...         Hydra overrides for every run
#
# At one image per GPU `sn` means `sn_in_ln`, as in the paper; the record says so.
# A run that another process has in hand is skipped. Exit code: 0 all finished (or diverged, which is
# a result), 1 some failed, 2 bad usage, 73 none failed, but some were skipped: the same line later.
# Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 have its runs save, and end it with 128 + the signal's number.
set -euo pipefail
shopt -s inherit_errexit

norms="bn gn sn"
settings="8x32 8x16 8x8 8x4 8x2 1x16 1x32 8x1 1x8"
seeds="0"
output="outputs"
processes=1
jobs=1
dry_run=""
usage() {
    sed -n '2,22s/^# \{0,1\}//p' "$0" >&2
    [ $# -eq 0 ] || echo "sweep_settings.sh: $1" >&2
    exit 2
}
while [ $# -gt 0 ]; do
    case $1 in
    --norms | --settings | --seeds | --output | --processes | --jobs)
        [ $# -ge 2 ] || usage "$1 needs a value"
        printf -v "${1#--}" %s "$2"
        shift 2
        ;;
    --dry-run) dry_run=yes && shift ;;
    --) shift && break ;;
    -h | --help) usage ;;
    *) usage "unknown argument '$1'; Hydra overrides come after --" ;;
    esac
done

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python}
[ -n "${PYTHON:-}" ] || [ ! -x "$root/.venv/bin/python" ] || python=$root/.venv/bin/python
for option in norms settings seeds output; do
    [[ ${!option} =~ [^[:space:]] ]] || usage "--$option is empty"
done
for number in "$processes" "$jobs"; do
    [[ $number =~ ^[1-9][0-9]*$ ]] || usage "'$number' is not a whole number of 1 or more"
done
for seed in $seeds; do [[ $seed =~ ^[0-9]+$ ]] || usage "seed '$seed' is not a whole number"; done
for norm in $norms; do
    [[ $norm != */* && -f $root/configs/norm/$norm.yaml ]] || usage "unknown norm '$norm'; there are: $(
        cd "$root/configs/norm" && ls | sed 's/\.yaml$//' | tr '\n' ' ')"
done
for setting in $settings; do
    [[ $setting =~ ^[1-9][0-9]*x[1-9][0-9]*$ ]] ||
        usage "setting '$setting' is not <gpus>x<images per gpu>, such as 8x32"
done
# several runs at a time on a CPU must not fight for the cores
[ "$jobs" -eq 1 ] || export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) > jobs ? $(nproc) / jobs : 1))}

gpus_there=() # what CUDA_VISIBLE_DEVICES may name
if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    IFS=, read -ra gpus_there <<<"$CUDA_VISIBLE_DEVICES"
elif count=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU '); then
    for ((i = 0; i < count; i++)); do gpus_there+=("$i"); done
fi
declare -A place_of # of a job by its process: the first that is free is the next one's
free_place() { # sets place
    local pid taken running
    running=$(jobs -rp)
    for ((place = 0; ; place++)); do
        taken=""
        for pid in $running; do [ "${place_of[$pid]:-}" != "$place" ] || taken=yes; done
        [ -n "$taken" ] || break
    done
}

logs=$output/logs
[ -n "$dry_run" ] || mkdir -p "$logs"
failed=$(mktemp) skipped=$(mktemp)
tell_runs() { # to save and end
    local pid
    for pid in $(jobs -p); do kill -TERM -- "-$pid" 2>/dev/null || true; done
}
stop() { # signal: a second one ends the sweep at once
    trap - INT TERM HUP USR1
    tell_runs
    wait
    echo "sweep_settings.sh: stopped by SIG$1; the same line goes on" >&2
    exit $((128 + $(kill -l "$1")))
}
for signal in INT TERM HUP USR1; do trap "stop $signal" "$signal"; done
trap 'rm -f "$failed" "$skipped"; tell_runs' EXIT

run_one() { # name, command...
    local name=$1 code=0 log=$logs/$1.log before=0
    shift
    trap : TERM # it is for the run, which saves
    [ ! -f "$log" ] || before=$(wc -c <"$log") # another sweep may be writing there: append
    if [ "$jobs" -eq 1 ]; then
        echo "== $name"
        "$@" 2>&1 | (trap '' TERM && exec tee -a "$log") || code=${PIPESTATUS[0]}
    else
        "$@" >>"$log" 2>&1 || code=$?
        echo "== $name: $(grep -v '^$' "$log" | tail -n 1)"
    fi
    if [ "$code" -eq 1 ]; then # torchrun makes every exit code a 1
        said=$(tail -c "+$((before + 1))" "$log" | grep 'train_imagenet.py' || true)
        case $said in
        *'loss is not finite'* | *'gradient is not finite'* | *'it diverged'*) code=3 ;;
        *': every step of epoch '*' was skipped'*) code=3 ;;
        *' is in use by '* | *' has ended meanwhile'*) code=73 ;;
        esac
    fi
    case $code in
    0) ;;
    3) echo "== $name diverged" ;;
    73)
        echo "== $name skipped: another process has it in hand"
        echo "$name" >>"$skipped"
        ;;
    *) echo "$name (exit code $code, $logs/$name.log)" >>"$failed" ;;
    esac
}

# as Hydra reads it, in single quotes: backslashes count before a quote alone, ${ would interpolate
quoted=$(printf %s "$output" | sed -E "s/(\\\\*)'/\\1\\1\\\\'/g; s/(\\\\+)\$/\\1\\1/; s/\\\$\\{/\\\\&/g")
quoted="'$quoted'"
started=" "
for seed in $seeds; do
    for setting in $settings; do
        gpus=${setting%x*} images=${setting#*x}
        for norm in $norms; do
            note=()
            actual=$norm
            if [ "$norm" = sn ] && [ "$images" -eq 1 ]; then
                actual=sn_in_ln
                note=("note='sn at one image per GPU: IN and LN only, as in the paper'")
            fi
            case $started in *" ${actual}_${setting}_$seed "*) continue ;; esac
            started+="${actual}_${setting}_$seed "
            count=$((processes < gpus ? processes : gpus))
            command=("$python" "$root/train_imagenet.py")
            [ "$count" -eq 1 ] || command=("$root/scripts/launch.sh" "$count" "$root/train_imagenet.py")
            command+=("norm=$actual" "setting.gpus=$gpus" "setting.images_per_gpu=$images"
                "seed=$seed" "output_root=$quoted" "${note[@]}" "$@")
            if [ -n "$dry_run" ]; then
                printf '%q ' "${command[@]}" && echo
                continue
            fi
            while [ "$(jobs -rp | wc -l)" -ge "$jobs" ]; do wait -n || true; done
            free_place
            own=""
            if [ "$jobs" -gt 1 ] && [ "${#gpus_there[@]}" -gt 1 ]; then
                for ((i = place * processes; i < place * processes + count; i++)); do
                    own+="${own:+,}${gpus_there[i % ${#gpus_there[@]}]}"
                done
                command=(env "CUDA_VISIBLE_DEVICES=$own" "${command[@]}")
            fi
            set -m # a process group of its own: Ctrl-C comes here alone, a signal to all of the run
            run_one "${actual}_${setting}_seed$seed" "${command[@]}" &
            set +m
            place_of[$!]=$place
        done
    done
done
wait
if [ -s "$failed" ]; then
    echo "failed:" >&2
    sed 's/^/  /' "$failed" >&2
    exit 1
fi
if [ -s "$skipped" ]; then
    echo "skipped, another process has them in hand:" >&2
    sed 's/^/  /' "$skipped" >&2
    exit 73
fi
