"""LSTM cell and layer with LN, GN or their switchable mixture inside; none is torch's own LSTM.

    gates = norm(W_ih x) + b_ih + norm(W_hh h) + b_hh            i, f, g, o = split(gates)
    c'    = sigmoid(f) c + sigmoid(i) tanh(g)                    h' = sigmoid(o) tanh(norm(c'))

The three places are called input, hidden and cell. Each norm is over the whole vector, 4 D of the
gates and D of the cell state, as in Ba et al. 2016; `per_gate` gives each gate a norm of its own.
There are no batch statistics: a batch of one is fine, training and evaluation are the same
function. Source: section 4.4 (the ENAS controller). Differs: the paper does not say where the
norms stand; these are Ba et al.'s places.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .functional import check_num_groups, groups_of_vector
from .modules import SwitchNormRecurrent
from .norms import AutoGroupNorm, NoNorm
from .tracing import Proxy, Traceable

LSTM_NORMS = ("none", "ln", "gn", "sn_ln_gn")
LSTM_PLACES = ("input", "hidden", "cell")


class SwitchNormLSTMCell(Traceable, nn.LSTMCell):
    """nn.LSTMCell with a norm of its gates and cell state; the same parameters and arguments.

    `norm` is none, ln, gn or sn_ln_gn; `places` any subset of input, hidden, cell. `num_groups`
    (of each normalised vector) must divide `hidden_size`; None is the most up to 8 that have a
    multiple of 4 entries each (a group of one entry is always 0). The norms are `norms.input`,
    `norms.hidden`, `norms.cell`; with norm none there are no such entries, so that state dicts of
    nn.LSTMCell load. The cell state that is returned is not normalised.

    Raises ValueError for an unknown norm or place, or groups that do not divide.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        norm: str = "sn_ln_gn",
        num_groups: int | None = None,
        places: Sequence[str] = LSTM_PLACES,
        per_gate: bool = False,
        eps: float = 1e-5,
    ):
        factory = {"device": device, "dtype": dtype}
        super().__init__(input_size, hidden_size, bias, **factory)
        self.norm = norm
        self.norms = _place_norms(norm, hidden_size, num_groups, places, per_gate, eps, factory)

    def reset_parameters(self) -> None:
        """As nn.LSTMCell; gains at 1, shifts at 0, control parameters equal."""
        super().reset_parameters()
        _reset_norms(self)

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return (h', c') for input (B, input_size) or (input_size,) and hx = (h, c), else 0."""
        if isinstance(input, Proxy):
            return self.as_node(input) if hx is None else self.as_node(input, hx)
        if self.norm == "none":
            return super().forward(input, hx)
        if input.dim() not in (1, 2) or input.shape[-1] != self.input_size:
            raise ValueError(
                f"SwitchNormLSTMCell expects input of shape (B, {self.input_size}) or "
                f"({self.input_size},), got {tuple(input.shape)}"
            )
        batched = input.dim() == 2
        x = input if batched else input[None]
        if hx is None:
            h = c = x.new_zeros(x.shape[0], self.hidden_size)
        else:
            h, c = _pair(hx) if batched else map(torch.atleast_2d, _pair(hx))
        _check_states(h, c, (x.shape[0], self.hidden_size))
        driven = _input_gates(x, self.norms["input"], self.weight_ih, self.bias_ih, self.bias_hh)
        h, c = _step(driven, h, c, self.weight_hh, self.norms["hidden"], self.norms["cell"])
        return (h, c) if batched else (h[0], c[0])

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, norm={self.norm}"


class SwitchNormLSTM(Traceable, nn.LSTM):
    """nn.LSTM with a norm of its gates and cell states; see SwitchNormLSTMCell.

    Input (L, B, D), (B, L, D) with `batch_first`, (L, D) or a PackedSequence. The input's part of
    the gates and its norm are computed for the whole sequence at once. The norms of layer k and
    direction d (1: reverse) are `norms.i.input` and so on, i = k or, if `bidirectional`, 2 k + d.
    `proj_size` exists with norm none alone.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device=None,
        dtype=None,
        *,
        norm: str = "sn_ln_gn",
        num_groups: int | None = None,
        places: Sequence[str] = LSTM_PLACES,
        per_gate: bool = False,
        eps: float = 1e-5,
    ):
        if proj_size and norm != "none":
            raise ValueError(
                f"proj_size={proj_size} is not there for norm {norm!r}; use 0 or norm='none'"
            )
        factory = {"device": device, "dtype": dtype}
        super().__init__(
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            **factory,
        )
        self.norm = norm
        self.norms = nn.ModuleList(
            _place_norms(norm, hidden_size, num_groups, places, per_gate, eps, factory)
            for _ in range(num_layers * (1 + bidirectional))
        )

    def reset_parameters(self) -> None:
        """As nn.LSTM; gains at 1, shifts at 0, control parameters equal."""
        super().reset_parameters()
        _reset_norms(self)

    def forward(
        self, input: Tensor | PackedSequence, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]:
        """Return outputs and last (h, c), each (num_layers * directions, B, D), as nn.LSTM does."""
        if isinstance(input, Proxy):
            return self.as_node(input) if hx is None else self.as_node(input, hx)
        if self.norm == "none":
            return nn.LSTM.forward(self, input, hx)  # torch.compile does not follow super() here
        hx = None if hx is None else _pair(hx)
        if isinstance(input, PackedSequence):
            data, sizes, order, back = input
            self._check_size(data, 2)
            hx = None if hx is None else self.permute_hidden(hx, order)
            data, states = self._layers(data, sizes.tolist(), hx)
            return PackedSequence(data, sizes, order, back), self.permute_hidden(states, back)
        self._check_size(input, 2, 3)
        batched = input.dim() == 3
        x = input if batched else input[:, None]
        x = x.transpose(0, 1) if batched and self.batch_first else x
        if hx is not None and not batched:
            _check_states(*hx, (len(self.norms), self.hidden_size))
            hx = (hx[0][:, None], hx[1][:, None])
        length, batch = x.shape[:2]
        if length == 0:
            raise ValueError(f"SwitchNormLSTM got a sequence of no steps: {tuple(input.shape)}")
        y, (h, c) = self._layers(x.flatten(0, 1), [batch] * length, hx)
        y = y.unflatten(0, (length, batch))
        if not batched:
            return y[:, 0], (h[:, 0], c[:, 0])
        return y.transpose(0, 1) if self.batch_first else y, (h, c)

    def _check_size(self, x: Tensor, *dims: int) -> None:
        if x.dim() not in dims or x.shape[-1] != self.input_size:
            layout = "(B, L, D)" if self.batch_first else "(L, B, D)"
            raise ValueError(
                f"SwitchNormLSTM expects input of shape {layout} or (L, D), or a PackedSequence of "
                f"such, with D={self.input_size}, got {tuple(x.shape)}"
            )

    def _layers(self, x: Tensor, sizes: list[int], hx) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """All layers over packed steps x (sum of `sizes`, D): outputs and last states."""
        directions = 1 + self.bidirectional
        shape = (self.num_layers * directions, sizes[0], self.hidden_size)
        states = [x.new_zeros(shape)] * 2 if hx is None else hx
        _check_states(*states, shape)
        last = []
        for layer in range(self.num_layers):
            outputs = []
            for direction in range(directions):
                index = layer * directions + direction
                parameters = self._parameters_of(layer, direction)
                own = (states[0][index], states[1][index])
                y, *ended = _sequence(x, sizes, *own, parameters, self.norms[index], direction == 1)
                outputs.append(y)
                last.append(ended)
            x = outputs[0] if directions == 1 else torch.cat(outputs, -1)
            if self.dropout and layer < self.num_layers - 1:
                x = nn.functional.dropout(x, self.dropout, self.training)
        h, c = (torch.stack(state) for state in zip(*last))
        return x, (h, c)

    def _parameters_of(self, layer: int, direction: int) -> tuple:
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        suffix = f"_l{layer}" + ("_reverse" if direction else "")
        return tuple(getattr(self, name + suffix, None) for name in names)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, norm={self.norm}"


class GateNorms(nn.ModuleList):
    """A norm for each of the four gates of (B, 4 D) vectors."""

    def forward(self, x: Tensor) -> Tensor:
        parts = x.chunk(4, -1)
        return torch.cat([norm(part) for norm, part in zip(self, parts)], -1)


def _place_norms(norm, hidden_size, num_groups, places, per_gate, eps, factory) -> nn.ModuleDict:
    """The norms of one layer by place; empty for none, the identity where no norm is wanted."""
    if norm not in LSTM_NORMS:
        raise ValueError(f"unknown norm {norm!r} of an LSTM; choose one of {LSTM_NORMS}")
    unknown = [place for place in places if place not in LSTM_PLACES]
    if unknown or isinstance(places, str):
        raise ValueError(f"unknown places={places!r}; choose from {LSTM_PLACES}")
    if norm == "none":
        return nn.ModuleDict()
    if num_groups is None:
        num_groups = groups_of_vector(hidden_size)
    check_num_groups(num_groups, hidden_size)

    def make(size: int) -> nn.Module:
        if norm == "sn_ln_gn":
            return SwitchNormRecurrent(size, num_groups, eps, **factory)
        return AutoGroupNorm(size, 1 if norm == "ln" else num_groups, eps, **factory)

    def gates() -> nn.Module:
        if per_gate:
            return GateNorms(make(hidden_size) for _ in range(4))
        return make(4 * hidden_size)

    makers = {"input": gates, "hidden": gates, "cell": lambda: make(hidden_size)}
    return nn.ModuleDict(
        {
            place: maker() if place in places else NoNorm(hidden_size)
            for place, maker in makers.items()
        }
    )


def _reset_norms(module: nn.Module) -> None:
    """Undo what torch's LSTM does to every parameter it finds."""
    for norm in module.modules():
        if isinstance(norm, (SwitchNormRecurrent, AutoGroupNorm)):
            norm.reset_parameters()


def _pair(hx) -> tuple[Tensor, Tensor]:
    """h and c; a GRU has one of them."""
    if isinstance(hx, Tensor) or len(hx) != 2:
        raise ValueError(f"hx is a {type(hx).__name__}; expected the pair (h, c) of an LSTM")
    return hx[0], hx[1]


def _check_states(h: Tensor, c: Tensor, shape: tuple[int, ...]) -> None:
    for name, state in (("h", h), ("c", c)):
        if tuple(state.shape) != shape:
            raise ValueError(f"expected {name} of shape {shape}, got {tuple(state.shape)}")


def _input_gates(x, norm, weight_ih, bias_ih, bias_hh) -> Tensor:
    """The input's part of the gates with all biases: (B, D) to (B, 4 D)."""
    gates = norm(x @ weight_ih.t())
    return gates if bias_ih is None else gates + (bias_ih + bias_hh)


def _step(driven, h, c, weight_hh, hidden_norm, cell_norm) -> tuple[Tensor, Tensor]:
    """One time step; `driven` (B, 4 D) is the input's part of the gates."""
    i, f, g, o = (driven + hidden_norm(h @ weight_hh.t())).chunk(4, -1)
    c = torch.addcmul(f.sigmoid() * c, i.sigmoid(), g.tanh())
    return o.sigmoid() * cell_norm(c).tanh(), c


def _sequence(
    x: Tensor, sizes: list[int], h: Tensor, c: Tensor, parameters, norms, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer and direction over packed steps x (sum of `sizes`, D): outputs, last h and c.

    `sizes` are those of a PackedSequence: how many of the sequences, longest first, have a step t.
    """
    weight_ih, weight_hh, bias_ih, bias_hh = parameters
    driven = _input_gates(x, norms["input"], weight_ih, bias_ih, bias_hh).split(sizes)
    steps = range(len(sizes))
    outputs = [None] * len(sizes)
    for t in reversed(steps) if reverse else steps:
        size = sizes[t]
        if size == h.shape[0]:  # not len(h), which is a number in an export
            h, c = _step(driven[t], h, c, weight_hh, norms["hidden"], norms["cell"])
            outputs[t] = h
            continue
        # the others have ended or, in reverse, not yet begun: their states stay
        own_h, own_c = _step(
            driven[t], h[:size], c[:size], weight_hh, norms["hidden"], norms["cell"]
        )
        outputs[t] = own_h
        h, c = torch.cat((own_h, h[size:])), torch.cat((own_c, c[size:]))
    return torch.cat(outputs), h, c
