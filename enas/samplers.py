"""Searches among NAS-Bench-201's cells: a controller, uniform draws, regularised evolution.

Each runs many seeds at once and returns the numbers of the cells asked for, (seeds, cells). What a
seed asks for depends on that seed alone, not on those beside it; the controllers' arithmetic is
batched over seeds, though, so that their last bits may depend on how many there are.
"""

import random
from collections import deque
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

from sn.recurrent import LSTM_PLACES, SwitchNormLSTMCell
from sn.training.run.schedule import mix_seed

from .benchmark import EDGES, Table
from .controller import Samples, reinforce_loss

WEIGHTS, DRAWS = range(2)  # what a random number is for


class CellController(nn.Module):
    """A distribution over cells: an LSTM chooses the operation of one edge after the other.

    A smaller `enas.controller.Controller`: its operations' part with the same arguments, without
    the bias for separable convolutions.
    """

    def __init__(
        self,
        operations: int,
        hidden_size: int = 64,
        norm: str = "sn_ln_gn",
        num_groups: int | None = None,
        places: Iterable[str] = LSTM_PLACES,
        per_gate: bool = False,
        tanh_constant: float | None = None,
        operation_temperature: float = 1.0,
        init: float = 0.1,
    ):
        super().__init__()
        self.tanh_constant, self.operation_temperature = tanh_constant, operation_temperature
        self.cell = SwitchNormLSTMCell(
            hidden_size,
            hidden_size,
            bias=False,
            norm=norm,
            num_groups=num_groups,
            places=list(places),
            per_gate=per_gate,
        )
        self.start = nn.Parameter(torch.empty(1, hidden_size))
        self.embedding = nn.Embedding(operations, hidden_size)
        self.score_operation = nn.Linear(hidden_size, operations)
        norms = {id(p) for p in self.cell.norms.parameters()}
        for parameter in self.parameters():
            if id(parameter) not in norms:
                nn.init.uniform_(parameter, -init, init)
        nn.init.zeros_(self.score_operation.bias)

    def forward(self, uniform: Tensor) -> Samples:
        """A cell for each row of `uniform` (B, 6), numbers in [0, 1); decisions are (B, 6)."""
        x = self.start.expand(len(uniform), -1)
        h = c = torch.zeros_like(x)
        made = []
        log_prob = entropy = x.new_zeros(len(uniform))
        for edge in range(len(EDGES)):
            h, c = self.cell(x, (h, c))
            logits = self.score_operation(h)
            if self.tanh_constant is not None:
                logits = self.tanh_constant * logits.tanh()
            log_probs = (logits / self.operation_temperature).log_softmax(-1)
            probs = log_probs.exp()
            # the inverse of the cumulative distribution; the last sum, 1, is rounded
            choice = (probs.detach().cumsum(-1)[:, :-1] <= uniform[:, edge, None]).sum(-1)
            log_prob = log_prob + log_probs.gather(-1, choice[:, None]).squeeze(-1)
            entropy = entropy - (probs * log_probs).sum(-1)
            made.append(choice)
            x = self.embedding(choice)
        return Samples(torch.stack(made, 1), log_prob, entropy)

    def places_of_norms(self) -> dict[str, str]:
        """The place of each norm by its module's name, cell.norms.<place> and what follows."""
        names = [name for name, _ in self.named_modules() if name.startswith("cell.norms.")]
        return {name: name.split(".")[2] for name in names}


def uniform_numbers(seed: int, cells: int) -> Tensor:
    """(cells, 6) in [0, 1), float64: what a seed's draws are made of."""
    generator = torch.Generator().manual_seed(mix_seed(seed, DRAWS))
    return torch.rand(cells, len(EDGES), generator=generator, dtype=torch.float64)


def make_controller(make: Callable[[], CellController], seed: int) -> CellController:
    """A controller with the weights of `seed`; those that two norms share are the same."""
    torch.manual_seed(mix_seed(seed, WEIGHTS))
    return make()


def search_with_controllers(
    table: Table,
    controllers: list[CellController],
    seeds: list[int],
    cells: int,
    adam: dict,
    gate_lr_factor: float = 1.0,
    entropy_weight: float = 1e-4,
    baseline_decay: float = 0.99,
) -> np.ndarray:
    """REINFORCE, an update of each controller after each of its cells; they are left trained.

    The reward is the cell's validation accuracy, 0 to 1, and `entropy_weight` times the entropy.
    `adam`: arguments of Adam, whose lr is `gate_lr_factor` times as high for control parameters.
    Raises FloatingPointError if a controller's probabilities are not finite.
    """
    weights, _ = stack_module_state(controllers)
    template, dtype = controllers[0], controllers[0].start.dtype
    control = {name for name in weights if name.endswith(("mean_weight", "var_weight"))}
    groups = [{"params": [weights[name] for name in weights if name not in control]}]
    if control:
        own = {"params": [weights[name] for name in control], "lr": adam["lr"] * gate_lr_factor}
        groups.append(own)
    optimizer = torch.optim.Adam(groups, **adam, fused=True)
    factors = torch.tensor(table.factors)
    accuracies = torch.from_numpy(table.val).to(dtype) / 100

    def loss(weights: dict[str, Tensor], uniform: Tensor, average: Tensor):
        samples = functional_call(template, weights, (uniform[None],))
        number = (samples.decisions * factors).sum(-1)
        reward = accuracies[number] + entropy_weight * samples.entropy.detach()
        average = average + (1 - baseline_decay) * (reward[0] - average)
        found = number[0], average, samples.log_prob.detach()[0]
        return reinforce_loss(samples, reward, average), found

    gradients = vmap(grad(loss, has_aux=True))
    numbers = torch.stack([uniform_numbers(seed, cells) for seed in seeds], 1).to(dtype)
    average = torch.zeros(len(seeds), dtype=dtype)  # the baseline
    asked = np.empty((len(seeds), cells), dtype=np.int64)
    for count in range(cells):
        own = {name: weight.detach() for name, weight in weights.items()}
        grads, (number, average, log_prob) = gradients(own, numbers[count], average)
        if not torch.isfinite(log_prob).all():
            raise FloatingPointError(f"a probability is not finite at cell {count + 1} of {cells}")
        asked[:, count] = number.numpy()
        for name, weight in weights.items():
            weight.grad = grads[name]
        optimizer.step()
    with torch.no_grad():
        for place, controller in enumerate(controllers):
            for name, parameter in controller.named_parameters():
                parameter.copy_(weights[name][place])
    return asked


def search_at_random(table: Table, seeds: list[int], cells: int) -> np.ndarray:
    """Cells drawn uniformly, one that was drawn before among them."""
    drawn = np.stack([uniform_numbers(seed, cells).numpy() for seed in seeds])
    decisions = (drawn * len(table.operations)).astype(np.int64)
    return decisions @ table.factors


def search_by_evolution(
    table: Table, seeds: list[int], cells: int, population: int, sample: int
) -> np.ndarray:
    """Regularised evolution. Source: Real et al. 2019.

    After `population` uniform cells each next one is the best of `sample` living ones, drawn with
    replacement, with the operation of one edge replaced by another; the oldest dies.
    """
    if len(table.operations) < 2:
        raise ValueError(f"the table has {table.operations} alone: nothing that evolution changes")
    return np.array([_evolve(table, seed, cells, population, sample) for seed in seeds])


def _evolve(table: Table, seed: int, cells: int, population: int, sample: int) -> list[int]:
    rng = random.Random(mix_seed(seed, DRAWS))
    operations = len(table.operations)
    asked = [rng.randrange(len(table)) for _ in range(min(population, cells))]
    living = deque(asked, maxlen=population)
    while len(asked) < cells:
        parent = max((rng.choice(living) for _ in range(sample)), key=table.val.__getitem__)
        factor = rng.choice(table.factors)  # of an edge
        old = parent // factor % operations
        new = (old + rng.randrange(1, operations)) % operations
        living.append(parent + (new - old) * factor)
        asked.append(living[-1])
    return asked
