"""The run's arithmetic: dtype of weights and images, autocast, loss scaling."""

import contextlib

import torch
from torch import Tensor, nn

AUTOCAST = {"fp32": None, "fp64": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """fp32, fp64 (weights and images), bf16 or fp16 (autocast; fp16 scales its losses)."""

    def __init__(self, name: str, device: torch.device, channels_last: bool = False):
        self.device, self.channels_last = device, channels_last
        self.dtype = torch.float64 if name == "fp64" else torch.float32
        self.autocast_dtype = AUTOCAST[name]
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")

    def autocast(self) -> contextlib.AbstractContextManager:
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.autocast_dtype)

    def model(self, model: nn.Module) -> nn.Module:
        """The model on the device, its weights in the run's dtype and layout."""
        model.to(self.device)
        if self.dtype == torch.float64:
            model.double()
        if self.channels_last:
            model.to(memory_format=torch.channels_last)
        return model

    def to_device(self, tensor: Tensor) -> Tensor:
        """Images (N, C, H, W) in the run's dtype and layout; numbers in its dtype; labels as is."""
        if not tensor.is_floating_point():
            return tensor.to(self.device, non_blocking=True)
        dtype = self.dtype if self.dtype == torch.float64 else None
        last = self.channels_last and tensor.dim() == 4
        layout = torch.channels_last if last else torch.preserve_format
        return tensor.to(self.device, dtype, non_blocking=True, memory_format=layout)
