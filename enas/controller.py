"""The controller: an LSTM that writes an architecture, decision by decision; REINFORCE.

For each node of the normal and then of the reduction cell it chooses an input, an operation, an
input and an operation. Inputs are scored by attention over the LSTM's outputs at earlier entries,
operations by a linear layer. Source: Pham et al. 2018 and its code; the cell's norm: section 4.4.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sn.recurrent import LSTM_PLACES, SwitchNormLSTMCell

from .space import OPERATIONS, SEPARABLE, random_decisions


@dataclass
class Samples:
    """Decisions (B, 2 cells, nodes, 4), their log-probabilities and entropies (B,), in nats."""

    decisions: Tensor
    log_prob: Tensor
    entropy: Tensor  # sum over the decisions of each one's entropy, given those before it


class Controller(nn.Module):
    """A distribution over architectures; call it to draw some, or to score given ones.

    Logits are squashed, `tanh_constant` * tanh(logits), those of operations divided by
    `operation_temperature` besides; tanh_constant None leaves them. `operation_bias` favours
    separable convolutions in the normal cell by a constant. All weights start uniform in
    +/- `init`, the norms as norms do. Source: official code.

    Differs: the LSTM is `SwitchNormLSTMCell` (without biases, as the official one); the official
    code chooses both inputs of a node before both operations; and the learnt bias of the operations
    starts at 0, where the official code favours separable ones with 10.
    """

    def __init__(
        self,
        nodes: int = 5,
        hidden_size: int = 64,
        norm: str = "sn_ln_gn",
        num_groups: int | None = None,
        places: Sequence[str] = LSTM_PLACES,
        per_gate: bool = False,
        tanh_constant: float | None = 1.10,
        operation_temperature: float = 2.5,
        operation_bias: float = 0.25,
        init: float = 0.1,
        operations: int = len(OPERATIONS),
    ):
        super().__init__()
        self.nodes, self.operations = nodes, operations
        self.tanh_constant, self.operation_temperature = tanh_constant, operation_temperature
        self.cell = SwitchNormLSTMCell(
            hidden_size,
            hidden_size,
            bias=False,
            norm=norm,
            num_groups=num_groups,
            places=places,
            per_gate=per_gate,
        )
        self.start = nn.Parameter(torch.empty(1, hidden_size))
        self.embedding = nn.Embedding(operations, hidden_size)
        self.score_operation = nn.Linear(hidden_size, operations)
        self.key = nn.Linear(hidden_size, hidden_size, bias=False)
        self.query = nn.Linear(hidden_size, hidden_size, bias=False)
        self.score_input = nn.Linear(hidden_size, 1, bias=False)
        bias = torch.full((operations,), -operation_bias)
        bias[:SEPARABLE] = operation_bias
        self.register_buffer("operation_bias", bias, persistent=False)
        norms = {id(p) for p in self.cell.norms.parameters()}
        for parameter in self.parameters():
            if id(parameter) not in norms:
                nn.init.uniform_(parameter, -init, init)
        nn.init.zeros_(self.score_operation.bias)

    def forward(self, count: int = 1, decisions: Tensor | None = None) -> Samples:
        """Draw `count` architectures, or score the given `decisions` (B, 2 cells, nodes, 4)."""
        walk = _Walk(self, count if decisions is None else len(decisions), decisions)
        for cell in range(2):
            walk.begin_cell()
            for node in range(self.nodes):
                for side in (0, 2):
                    walk.choose_input(cell, node, side)
                    walk.choose_operation(cell, node, side + 1)
                walk.end_node()
        return Samples(walk.chosen(self.nodes), walk.log_prob, walk.entropy)

    def places_of_norms(self) -> dict[str, str]:
        """The place of each norm by its module's name, cell.norms.<place> and what follows."""
        names = [name for name, _ in self.named_modules() if name.startswith("cell.norms.")]
        return {name: name.split(".")[2] for name in names}

    def squash(self, logits: Tensor, temperature: float = 1.0) -> Tensor:
        if self.tanh_constant is None:
            return logits / temperature
        return (self.tanh_constant / temperature) * logits.tanh()


def draw_uniformly(count: int, nodes: int) -> Samples:
    """`count` architectures drawn uniformly, as a `Controller` draws its own."""
    choices = [(node + 2) * len(OPERATIONS) for node in range(nodes)]
    entropy = torch.full((count,), 2 * sum(2 * math.log(number) for number in choices))
    return Samples(random_decisions(count, nodes), -entropy, entropy)


class _Walk:
    """One pass of the LSTM through the decisions of a batch of architectures."""

    def __init__(self, controller: Controller, count: int, given: Tensor | None):
        self.controller, self.given, self.count = controller, given, count
        self.input = controller.start.expand(count, -1)
        self.h = self.c = self.input.new_zeros(count, self.input.shape[1])
        self.log_prob = self.entropy = self.input.new_zeros(count)
        self.made: list[Tensor] = []

    def step(self) -> None:
        self.h, self.c = self.controller.cell(self.input, (self.h, self.c))

    def begin_cell(self) -> None:
        """Two steps for the cell's inputs; their anchors are zero, their keys are not."""
        controller = self.controller
        self.input = controller.start.expand(self.count, -1)
        self.anchors, self.keys = [], []
        for _ in range(2):
            self.step()
            self.anchors.append(torch.zeros_like(self.h))
            self.keys.append(controller.key(self.h))

    def end_node(self) -> None:
        self.step()
        self.anchors.append(self.h)
        self.keys.append(self.controller.key(self.h))
        self.input = self.controller.start.expand(self.count, -1)

    def choose_input(self, cell: int, node: int, place: int) -> None:
        controller = self.controller
        self.step()
        match = torch.tanh(torch.stack(self.keys, 1) + controller.query(self.h)[:, None])
        logits = controller.score_input(match).squeeze(-1)  # (B, entries)
        choice = self.choose(controller.squash(logits), cell, node, place)
        rows = torch.arange(self.count, device=choice.device)
        self.input = torch.stack(self.anchors, 1)[rows, choice]

    def choose_operation(self, cell: int, node: int, place: int) -> None:
        controller = self.controller
        self.step()
        logits = controller.score_operation(self.h)
        logits = controller.squash(logits, controller.operation_temperature)
        if cell == 0:
            logits = logits + controller.operation_bias
        self.input = controller.embedding(self.choose(logits, cell, node, place))

    def choose(self, logits: Tensor, cell: int, node: int, place: int) -> Tensor:
        """Draw from, or read for, logits (B, choices); add up log-probability and entropy."""
        log_probs = logits.log_softmax(-1)
        probs = log_probs.exp()
        if self.given is None:
            if not log_probs.isfinite().all():
                raise FloatingPointError("the controller's probabilities are not finite")
            choice = torch.multinomial(probs.detach(), 1).squeeze(-1)
        else:
            choice = self.given[:, cell, node, place].to(logits.device)
        self.log_prob = self.log_prob + log_probs.gather(-1, choice[:, None]).squeeze(-1)
        self.entropy = self.entropy - (probs * log_probs).sum(-1)
        self.made.append(choice)
        return choice

    def chosen(self, nodes: int) -> Tensor:
        return torch.stack(self.made, 1).view(self.count, 2, nodes, 4)


class Baseline:
    """Moving average of the rewards, from 0. Source: official code, decay 0.99."""

    def __init__(self, decay: float = 0.99):
        self.decay, self.value = decay, 0.0

    def update(self, reward: float) -> float:
        """Take in `reward` and return the new average."""
        self.value += (1 - self.decay) * (reward - self.value)
        return self.value


def reinforce_loss(samples: Samples, reward: Tensor | float, baseline: Tensor | float) -> Tensor:
    """Mean over the samples of -(reward - baseline) log p, whose gradient is REINFORCE's.

    `reward` includes the entropy term as a constant, as in the official code.
    """
    return -((reward - baseline) * samples.log_prob).mean()
