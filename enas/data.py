"""A data set held whole on the device, its augmentation drawn per image but computed per batch."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from sn.training.classification.data import ArrayImages, ImageData
from sn.training.run.schedule import mix_seed


class DeviceImages:
    """Batches of an in-memory ImageData's part, on `device`, in the data set's own augmentation.

    The images stay uint8; a batch is made in a few operations, without a loader. What is drawn
    depends on the seed given with the call alone. Raises ValueError for images in files.
    """

    def __init__(self, data: ImageData, images: ArrayImages, device: torch.device, dtype=None):
        if not isinstance(images, ArrayImages):
            raise ValueError(f"data={data.name}: the search needs images in memory, "
                             "data=digits or data=cifar10")  # fmt: skip
        self.images = images.images.to(device)
        self.labels = torch.tensor(images.labels, device=device)
        self.normalise, self.dtype = data.evaluation.usual, dtype
        self.padding, self.flip = data.augmentation.usual.padding, data.augmentation.usual.flip

    def __len__(self) -> int:
        return len(self.labels)

    def order(self, *seed: int) -> Tensor:
        """A permutation of the images, from `seed` alone."""
        generator = torch.Generator().manual_seed(mix_seed(*seed))
        return torch.randperm(len(self), generator=generator).to(self.labels.device)

    def batch(self, indices: Tensor, augment: tuple[int, ...] | None = None):
        """Images (n, 3, H, W) and labels at `indices`; with a seed `augment`, augmented."""
        images = self.images[indices]
        if augment is not None:
            images = self._crop_and_flip(images, mix_seed(*augment))
        images = self.normalise(images).to(dtype=self.dtype)
        return images, self.labels[indices]

    def batches(self, size: int, limit: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """All images once, or the first `limit`, in order and as they are."""
        for indices in torch.arange(len(self), device=self.labels.device)[:limit].split(size):
            yield self.batch(indices)

    def _crop_and_flip(self, images: Tensor, seed: int) -> Tensor:
        """Each image shifted by -padding..padding pixels, zeros moving in, and perhaps mirrored."""
        generator = torch.Generator().manual_seed(seed)
        count, _, height, width = images.shape
        reach = 2 * self.padding + 1
        shifts = torch.randint(reach, (2, count, 1), generator=generator).to(images.device)
        mirrored = torch.rand(count, 1, generator=generator).to(images.device) < 0.5
        rows = torch.arange(height, device=images.device) + shifts[0]
        columns = torch.arange(width, device=images.device).expand(count, -1)
        if self.flip:
            columns = torch.where(mirrored, width - 1 - columns, columns)
        columns = columns + shifts[1]
        padded = F.pad(images, [self.padding] * 4)
        samples = torch.arange(count, device=images.device)
        # (n, 1, 1), (n, H, 1), (n, 1, W) pick (n, H, W, 3)
        picked = padded[samples[:, None, None], :, rows[:, :, None], columns[:, None]]
        return picked.permute(0, 3, 1, 2)
