"""The normalised LSTM outside of ENAS: digits read row by row.

    python scripts/lstm_example.py                        # none, LN, GN and SN; half a minute
    python scripts/lstm_example.py --norms sn_ln_gn --epochs 30 --seeds 0 1 2

An image of scikit-learn's 1,797 bundled digits is a sequence of 8 rows of 8 pixels; the last output
of one `sn.SwitchNormLSTM` is classified. `none` is torch's nn.LSTM itself. Prints the accuracy on
360 held-out digits and, for SN, the importance weights that were learned.
"""

import argparse
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sn
from sn.recurrent import LSTM_NORMS
from sn.training.classification.data import build_data


class RowReader(nn.Module):
    """Images (B, 8, 8) to logits (B, 10), row after row."""

    def __init__(self, norm: str, hidden_size: int):
        super().__init__()
        self.lstm = sn.SwitchNormLSTM(8, hidden_size, batch_first=True, norm=norm)
        self.classifier = nn.Linear(hidden_size, 10)

    def forward(self, images: Tensor) -> Tensor:
        outputs, _ = self.lstm(images)
        return self.classifier(outputs[:, -1])


def load() -> list[tuple[Tensor, Tensor]]:
    """Training and held-out digits: (N, 8, 8) in [0, 1] and labels."""
    data = build_data("digits")
    return [
        (part.images[:, 0].float() / 255, torch.tensor(part.labels))
        for part in (data.train, data.val)
    ]


def train(
    norm: str, seed: int, epochs: int, lr: float, hidden_size: int
) -> tuple[float, nn.Module]:
    """Train with Adam, batches of 64; return the held-out accuracy in percent and the network."""
    (images, labels), (held, held_labels) = load()
    torch.manual_seed(seed)
    model = RowReader(norm, hidden_size)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(epochs):
        for batch in torch.randperm(len(labels)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    with torch.no_grad():
        correct = (model(held).argmax(1) == held_labels).double().mean().item()
    return 100 * correct, model


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--norms", nargs="+", default=list(LSTM_NORMS), choices=LSTM_NORMS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--lr", type=float, default=0.003)
    parser.add_argument("--hidden-size", type=int, default=64)
    args = parser.parse_args(argv)
    for norm in args.norms:
        for seed in args.seeds:
            start = time.process_time()
            accuracy, model = train(norm, seed, args.epochs, args.lr, args.hidden_size)
            seconds = time.process_time() - start
            print(f"{norm:9} seed {seed}  held-out {accuracy:.1f} %  {seconds:.1f} s", flush=True)
            for name, weights in sn.importance_weights(model).items():
                shares = (
                    f"{moment} {', '.join(f'{s} {share:.2f}' for s, share in found.items())}"
                    for moment, found in weights.items()
                )
                print(f"    {name}: {'; '.join(shares)}")


if __name__ == "__main__":
    main()
