#!/usr/bin/env bash
# make demo: BN, GN and SN over three settings on scikit-learn's bundled digits, then the table and
# the figures. A proxy: 1,437 images of 8x8 say nothing about ImageNet.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=outputs_demo
cores=$(nproc 2>/dev/null || echo 1)
jobs=$((cores < 4 ? cores : 4))
echo "Nine short trainings on handwritten digits, $jobs at a time, a minute or two on 2 free cores."
finished=0
scripts/sweep_settings.sh --norms "bn gn sn" --settings "8x32 8x8 8x2" --output "$out" \
    --jobs "$jobs" -- experiment=imagenet/demo device=cpu |
    while IFS= read -r line; do # a line that starts with == is one training
        case $line in
        "== "*diverged) ;;
        "== "*)
            finished=$((finished + 1))
            line="$(printf '[%d of 9, %d:%02d]' "$finished" $((SECONDS / 60)) $((SECONDS % 60))) ${line#== }"
            ;;
        esac
        echo "$line"
    done
printf '\nThe table and the figures:\n'
python scripts/make_tables.py --runs "$out" --print
python scripts/plot_accuracy.py --runs "$out"
python scripts/plot_importance.py --runs "$out"
echo
echo "Records and figures are in $out; the curves: .venv/bin/tensorboard --logdir $out"
