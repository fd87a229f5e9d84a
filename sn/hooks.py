"""What a layer may define beyond forward, so that training code need not know its class.

    begin_step(progress)   called before each training step with the share of the training done
    micro_batches()        context manager around the forward passes that make up one step; it
                           raises ValueError if the layer cannot be computed in parts
    batch_alone()          context manager in which training forwards take the batch's statistics
                           and nothing else (`batch_average`)
    connect(model)         static: tell the layers of `model` of each other

The attribute `trains_on_running` says that training forwards use the running statistics, so that
processes must agree on them after every step.
"""

import inspect

from torch import nn


def begin_step(model: nn.Module, progress: float) -> None:
    """Announce a training step to every layer of `model` that depends on the progress.

    `progress` is the share of the training done, 0 to 1; anything else is a ValueError. Sparse
    layers set the radius of SparsestMax.
    """
    if not 0 <= progress <= 1:
        raise ValueError(f"progress={progress}; expected the share of the training done, 0 to 1")
    for layer in model.modules():
        if hasattr(layer, "begin_step"):
            layer.begin_step(progress)


def connect(model: nn.Module) -> nn.Module:
    """Let layers that depend on others (bkn) find them; return `model`.

    To be called once on a finished network; without such layers nothing happens.
    """
    found = [inspect.getattr_static(layer, "connect", None) for layer in model.modules()]
    # a network's own method of that name is something else
    for connect_layers in {f.__func__ for f in found if isinstance(f, staticmethod)}:
        connect_layers(model)
    return model
