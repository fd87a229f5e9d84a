"""Layers as single nodes of a torch.fx graph, and a clear refusal of torch.jit.script."""

from typing import NoReturn

from torch.fx import Proxy


class Traceable:
    """Mixin of layers whose forward pass depends on the shape of its input.

    torch.fx passes proxies, which have none: `forward` then returns `as_node`.
    """

    def as_node(self, *args) -> Proxy:
        """A call of this layer as one node, as torch.fx has it for torch's own layers.

        Raises ValueError for a layer that is traced alone, or whose hooks would run twice.
        """
        tracer = next(arg for arg in args if isinstance(arg, Proxy)).tracer
        name = tracer.path_of_module(self)
        if not name:
            raise ValueError(
                f"torch.fx cannot trace a {type(self).__name__} by itself; "
                "trace the model that holds it"
            )
        if self._forward_hooks or self._forward_pre_hooks:
            raise ValueError(
                f"torch.fx would call the forward hooks of {name} while tracing and in the graph; "
                "remove them before tracing"
            )
        return tracer.create_proxy("call_module", name, args, {})

    def __prepare_scriptable__(self) -> NoReturn:
        """Called by torch.jit.script."""
        raise TypeError(
            f"torch.jit.script does not compile {type(self).__name__}; "
            "use torch.jit.trace, or torch.export.export"
        )
