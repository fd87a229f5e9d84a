"""The four primitives on the CPU, built from kernels that PyTorch ships.

With one mean and variance for each instance (n, c) a layer of the SN family needs only

    moments   mean and biased variance of each instance            reads x
    affine    a x + b                                              reads x, writes y
    reduce    S = sum dy, T = sum dy (x - mean)                    reads dy, x
    affine2   a dy + p x + q                                       reads dy, x, writes dx

with a, b, p, q of shape (N, C). Two layouts of x have them: `Rows`, where an instance is a
contiguous row (N C, L), and `Columns`, where it is a column of (N, L, C): channels_last.

No PyTorch kernel does these for instances, but batch norm does for the channels of a batch of one
(seen so, N C instances are channels), and group norm with one channel per group returns moments.
Temporaries are made block by block, so that they stay in the cache.
"""

from functools import lru_cache

import torch
from torch import Tensor

aten = torch.ops.aten

BLOCK = 1 << 18  # numbers in a block: with its temporary about what a second level cache holds
TINY = 1e-30  # below every variance that matters, above float32's smallest number


@lru_cache(maxsize=256)
def _pieces(length: int, longest: int) -> int:
    """The fewest equal pieces of at most `longest` that make up `length`, 1 if there are none.

    Sums of short pieces, then of their sums: less rounding than one long running sum.
    """
    for pieces in range(-(-length // longest), length // 16 + 1):
        if length % pieces == 0:
            return pieces
    return 1


@lru_cache(maxsize=256)
def _most_pieces(length: int, most: int) -> int:
    """The most equal pieces, at most `most`, that make up `length`."""
    return next(pieces for pieces in range(most, 0, -1) if length % pieces == 0)


def _join(moments: Tensor, dim: int) -> Tensor:
    """Moments (2, ...) of equal pieces along `dim` as moments of the whole (total variance)."""
    mean, var = moments.unbind(0)
    joined = moments.mean(dim)
    spread = (mean - joined[0].unsqueeze(dim - 1)).square_().mean(dim - 1)
    joined[1].add_(spread)
    return joined


def as_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x.to(dtype), at no cost where that changes nothing: there are some twenty a step."""
    return x if x.dtype is dtype else x.to(dtype)


def _blocks(count: int, size: int) -> list[slice]:
    """Slices of range(count) whose items of `size` numbers make up about a block."""
    step = max(1, BLOCK // size)
    if count <= step + step // 2:  # one block rather than a small second one
        return [slice(0, count)]
    return [slice(i, i + step) for i in range(0, count, step)]


def _eval_batch_norm(x: Tensor, scale: Tensor, shift: Tensor, out: Tensor) -> Tensor:
    """scale x + shift for x of shape (1, channels, ...); `out` is not x."""
    zero, one, unused = torch.zeros_like(scale), torch.ones_like(scale), scale.new_empty(0)
    aten.native_batch_norm.out(
        x, scale, shift, zero, one, False, 0.0, 0.0, out=out, save_mean=unused, save_invstd=unused
    )
    return out


def _batch_norm_reduce(dy: Tensor, x: Tensor, mean: Tensor, one: Tensor) -> tuple[Tensor, Tensor]:
    """sum dy, sum dy (x - mean) over all but the channels of (1, channels, ...)."""
    _, product, total = aten.native_batch_norm_backward(
        dy, x, one, None, None, mean, one, True, 0.0, [False, True, True]
    )
    return total, product


class Rows:
    """Instances as contiguous rows: x is (N C, L), coefficients have N C numbers."""

    @staticmethod
    def view(x: Tensor) -> Tensor:
        return x.view(x.shape[0] * x.shape[1], -1)

    @staticmethod
    def per_instance(coefficient: Tensor) -> Tensor:
        return coefficient.view(-1, 1)

    @staticmethod
    def moments(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Moments (2, N C), and memory of x's size and dtype if some has come free."""
        rows, length = x.shape
        moments = torch.empty((2, rows), dtype=dtype, device=x.device)
        if length >= 256 and x.dtype == dtype:
            pieces = _pieces(length, 1600)
            count, size = rows * pieces, length // pieces
            view = x.view(1, count, size)
            free, mean, rstd = aten.native_group_norm(view, None, None, 1, count, size, count, TINY)
            pair = torch.stack((mean.view(rows, pieces), rstd.pow_(-2).view(rows, pieces)))
            return _join(pair, 2) if pieces > 1 else pair.squeeze(2), free.view(rows, length)
        for block in _blocks(rows, length):
            part = as_dtype(x[block], dtype)
            mean = torch.mean(part, 1, out=moments[0, block])
            centred = torch.sub(part, mean.unsqueeze(1)).square_()
            torch.mean(centred, 1, out=moments[1, block])
        return moments, None

    @staticmethod
    def affine(x: Tensor, a: Tensor, b: Tensor, out: Tensor) -> None:
        a, b = a.view(-1), b.view(-1)
        if out.dtype == a.dtype:
            _eval_batch_norm(x.unsqueeze(0), a, b, out.unsqueeze(0))
            return
        for block in _blocks(*x.shape):
            part = as_dtype(x[block], a.dtype)
            scaled = torch.empty_like(part)
            _eval_batch_norm(part.unsqueeze(0), a[block], b[block], scaled.unsqueeze(0))
            out[block].copy_(scaled)

    @staticmethod
    def reduce(dy: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        rows, length = x.shape
        mean = mean.view(-1)
        if dy.dtype == mean.dtype:
            pieces = _pieces(length, 800)
            shape = (1, rows * pieces, length // pieces)
            if pieces > 1:
                mean = mean.repeat_interleave(pieces)
            one = torch.ones_like(mean)
            sums = _batch_norm_reduce(dy.view(shape), x.view(shape), mean, one)
            if pieces > 1:
                sums = [s.view(rows, pieces).sum(1) for s in sums]
            return sums
        sums = torch.empty((2, rows), dtype=mean.dtype, device=x.device)
        for block in _blocks(rows, length):
            part = as_dtype(dy[block], mean.dtype)
            torch.sum(part, 1, out=sums[0, block])
            torch.sum(part.mul_(x[block] - mean[block, None]), 1, out=sums[1, block])
        return sums.unbind(0)

    @staticmethod
    def affine2(dy: Tensor, x: Tensor, a: Tensor, p: Tensor, q: Tensor, out: Tensor) -> None:
        a, p, q = a.view(-1), p.view(-1), q.view(-1)
        for block in _blocks(*x.shape):
            part = as_dtype(x[block], a.dtype)
            same = out.dtype == a.dtype
            scaled = out[block] if same else torch.empty_like(part)
            _eval_batch_norm(part.unsqueeze(0), p[block], q[block], scaled.unsqueeze(0))
            scaled.addcmul_(as_dtype(dy[block], a.dtype), a[block, None])
            if not same:
                out[block].copy_(scaled)


class Columns:
    """Instances as columns: x is (N, L, C), coefficients are (N, C)."""

    @staticmethod
    def view(x: Tensor) -> Tensor:
        return x.permute(0, *range(2, x.dim()), 1).view(x.shape[0], -1, x.shape[1])

    @staticmethod
    def per_instance(coefficient: Tensor) -> Tensor:
        return coefficient.unsqueeze(1)

    @staticmethod
    def _fold(x: Tensor) -> tuple[int, int]:
        """(rows, pieces) of a sample seen as (rows, pieces C), or (0, 0): blocks serve better.

        As if a sample had more channels: shorter sums, as far as they fit the first level cache.
        """
        length, channels = x.shape[1:]
        if length * channels < 40_000:  # the cost of a call outweighs
            return 0, 0
        pieces = _most_pieces(length, max(1, 1024 // channels))
        return (length // pieces, pieces) if length // pieces <= 2048 else (0, 0)

    @staticmethod
    def _samples(x: Tensor, rows: int) -> tuple[Tensor, ...]:
        """Each sample as a channels_last batch of one (1, pieces C, 1, rows)."""
        folded = x.view(x.shape[0], 1, 1, rows, -1)
        return folded.permute(0, 1, 4, 2, 3).unbind(0)

    @classmethod
    def moments(cls, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Moments (2, N, C), and no free memory."""
        batch, length, channels = x.shape
        rows, pieces = cls._fold(x) if x.dtype == dtype else (0, 0)
        if rows:
            pairs = [
                torch.batch_norm_update_stats(sample, None, None, 0.0)
                for sample in cls._samples(x, rows)
            ]
            moments = torch.stack([part for pair in zip(*pairs) for part in pair])
            moments = moments.view(2, batch, pieces, channels)
            return _join(moments, 2) if pieces > 1 else moments.squeeze(2), None
        moments = torch.empty((2, batch, channels), dtype=dtype, device=x.device)
        if x.dtype == dtype:
            torch.mean(x, 1, out=moments[0])
        for block in _blocks(batch, length * channels):
            part = as_dtype(x[block], dtype)
            mean = moments[0, block]
            if x.dtype != dtype:
                torch.mean(part, 1, out=mean)
            centred = torch.sub(part, mean.unsqueeze(1)).square_()
            torch.mean(centred, 1, out=moments[1, block])
        return moments, None

    @staticmethod
    def affine(x: Tensor, a: Tensor, b: Tensor, out: Tensor) -> None:
        a, b = a.unsqueeze(1), b.unsqueeze(1)
        if out.dtype == a.dtype:
            torch.addcmul(b, x, a, out=out)
            return
        for block in _blocks(x.shape[0], x.shape[1] * x.shape[2]):
            out[block].copy_(torch.addcmul(b[block], x[block].to(a.dtype), a[block]))

    @classmethod
    def reduce(cls, dy: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        batch, length, channels = x.shape
        rows, pieces = cls._fold(x) if dy.dtype == mean.dtype else (0, 0)
        if rows:
            means = mean.unsqueeze(1).expand(-1, pieces, -1).reshape(batch, -1)
            one = torch.ones_like(means[0])
            pairs = [
                _batch_norm_reduce(dy_n, x_n, mean_n, one)
                for dy_n, x_n, mean_n in zip(
                    cls._samples(dy, rows), cls._samples(x, rows), means.unbind(0)
                )
            ]
            sums = torch.stack([part for pair in zip(*pairs) for part in pair])
            sums = sums.view(2, batch, pieces, channels)
            return (sums.sum(2) if pieces > 1 else sums.squeeze(2)).unbind(0)
        sums = torch.empty((2, batch, channels), dtype=mean.dtype, device=x.device)
        mean = mean.unsqueeze(1)
        for block in _blocks(batch, length * channels):
            part = as_dtype(dy[block], mean.dtype)
            torch.sum(part, 1, out=sums[0, block])
            product = torch.sub(x[block], mean[block]).mul_(part)
            torch.sum(product, 1, out=sums[1, block])
        return sums.unbind(0)

    @staticmethod
    def affine2(dy: Tensor, x: Tensor, a: Tensor, p: Tensor, q: Tensor, out: Tensor) -> None:
        a, p, q = a.unsqueeze(1), p.unsqueeze(1), q.unsqueeze(1)
        for block in _blocks(x.shape[0], x.shape[1] * x.shape[2]):
            if out.dtype == a.dtype:
                scaled = torch.addcmul(q[block], x[block], p[block], out=out[block])
                scaled.addcmul_(dy[block], a[block])
            else:
                scaled = torch.addcmul(q[block], x[block].to(a.dtype), p[block])
                out[block].copy_(scaled.addcmul_(dy[block].to(a.dtype), a[block]))
