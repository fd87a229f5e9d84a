"""Convert a checkpoint that the authors released to one of ours.

    python scripts/convert_checkpoint.py official.pth ours.pt
    python scripts/evaluate_checkpoint.py ours.pt --data imagenet --root /data/imagenet

Reads tensors alone (nothing in the file is executed). The result holds the weights, and the options
that build the network with the official layer's unbiased variances.
"""

import argparse
import sys

from sn.training.classification.official import convert_official, unfilled_statistics
from sn.training.run.checkpoint import load_network, save_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("official", help="the authors' file: ResNet-18 to 152 (v1)")
    parser.add_argument("ours", help="the file to write")
    parser.add_argument(
        "--keep-factor",
        type=float,
        default=0.9,
        help="the official layer's momentum, the share kept (default 0.9; 0.997 in older code)",
    )
    parser.add_argument("--key", help="the file's key that holds the network, if it has several")
    args = parser.parse_args()
    try:
        converted = convert_official(load_network(args.official, args.key), args.keep_factor)
    except (ValueError, OSError) as error:
        print(f"convert_checkpoint.py: {error}", file=sys.stderr)
        sys.exit(2)
    save_checkpoint(args.ours, converted)
    numbers = sum(value.numel() for value in converted["model"].values())
    what = f"{converted['build']['name']} with {'+'.join(converted['norm']['statistics'])}"
    print(f"{args.ours}: {what}, {numbers:,} numbers")
    empty = unfilled_statistics(converted["model"])
    if empty:
        print(f"note: {len(empty)} running variances are zero (first {empty[0]}): the network was "
              "trained without moving averages; only its batch average is of use")  # fmt: skip


if __name__ == "__main__":
    main()
