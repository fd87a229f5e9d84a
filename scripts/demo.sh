#!/usr/bin/env bash
# make demo: BN, GN and SN over three settings on scikit-learn's bundled digits, then the table and
# the figures. A proxy: 1,437 images of 8x8 say nothing about ImageNet.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=outputs_demo
cores=$(nproc 2>/dev/null || echo 1)
echo "Nine short trainings on handwritten digits, $((cores < 4 ? cores : 4)) at a time, a few minutes in all."
scripts/sweep_settings.sh --norms "bn gn sn" --settings "8x32 8x8 8x2" --output "$out" \
    --jobs "$((cores < 4 ? cores : 4))" -- experiment=imagenet/demo device=cpu
echo
python scripts/make_tables.py --runs "$out" --print
python scripts/plot_accuracy.py --runs "$out"
python scripts/plot_importance.py --runs "$out"
echo
echo "Records and figures are in $out; the curves: .venv/bin/tensorboard --logdir $out"
