"""The LSTM cell and layer against torch's own, a float64 formula, and their limits."""

import copy

import pytest
import torch
from torch import nn

import sn
from sn.recurrent import LSTM_NORMS

WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
GATES = ("mean_weight", "var_weight")
NORMS = [norm for norm in LSTM_NORMS if norm != "none"]


def randomise(module, seed=0):
    """Every parameter away from its initial value, gates included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.7)
    return module


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def formula(cell, x, h, c):
    """The module docstring's formula; its norms are torch's, or `switch_norm` in plain PyTorch."""

    def norm(place, vectors):
        norms = cell.norms[place]
        if isinstance(norms, nn.ModuleList):  # one for each gate
            return torch.cat([n(part) for n, part in zip(norms, vectors.chunk(4, 1))], 1)
        return norms(vectors)

    with sn.backend("reference"):
        gates = norm("input", x @ cell.weight_ih.T) + norm("hidden", h @ cell.weight_hh.T)
        gates = gates + cell.bias_ih + cell.bias_hh
        i, f, g, o = gates.split(cell.hidden_size, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * norm("cell", c).tanh(), c


# --- without a norm it is torch's


@pytest.mark.parametrize("bias", [True, False])
def test_cell_without_norm_is_torch_s(bias):
    torch.manual_seed(0)
    theirs = nn.LSTMCell(5, 6, bias)
    ours = sn.SwitchNormLSTMCell(5, 6, bias, norm="none")
    ours.load_state_dict(theirs.state_dict())
    assert [name for name, _ in ours.named_parameters()] == [
        n for n, _ in theirs.named_parameters()
    ]
    x, state = torch.randn(3, 5), (torch.randn(3, 6), torch.randn(3, 6))
    for arguments in ((x,), (x, state), (x[0],), (x[0], (state[0][0], state[1][0]))):
        for mine, wanted in zip(ours(*arguments), theirs(*arguments)):
            assert torch.equal(mine, wanted)


@pytest.mark.parametrize("batch_first", [True, False])
def test_layer_without_norm_is_torch_s(batch_first):
    torch.manual_seed(0)
    theirs = nn.LSTM(5, 6, 2, batch_first=batch_first)
    ours = sn.SwitchNormLSTM(5, 6, 2, batch_first=batch_first, norm="none")
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 3, 5)
    (y, (h, c)), (wanted, (wanted_h, wanted_c)) = ours(x), theirs(x)
    assert torch.equal(y, wanted) and torch.equal(h, wanted_h) and torch.equal(c, wanted_c)


def test_normed_step_without_places_is_torch_s():
    """The loop written here, with no norm at any place, against torch's kernel."""
    theirs = nn.LSTMCell(5, 8).double()
    ours = sn.SwitchNormLSTMCell(5, 8, norm="ln", places=[]).double()
    ours.load_state_dict(theirs.state_dict())
    x, state = torch.randn(3, 5).double(), (torch.randn(3, 8).double(), torch.randn(3, 8).double())
    for mine, wanted in zip(ours(x, state), theirs(x, state)):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-14)
    layer, torch_layer = sn.SwitchNormLSTM(5, 8, 2, norm="gn", places=[]), nn.LSTM(5, 8, 2)
    layer.load_state_dict(torch_layer.state_dict())
    x = torch.randn(6, 3, 5)
    for mine, wanted in zip((*layer(x)[1], layer(x)[0]), (*torch_layer(x)[1], torch_layer(x)[0])):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-6)


# --- with one


@pytest.mark.parametrize("per_gate", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_cell_against_the_formula(norm, per_gate):
    """Outputs and all gradients in float64."""
    cell = sn.SwitchNormLSTMCell(5, 8, norm=norm, num_groups=4, per_gate=per_gate)
    randomise(cell).double()
    x, h, c = (randn(3, n, seed=n).requires_grad_() for n in (5, 8, 8))
    results = []
    for outputs in (cell(x, (h, c)), formula(cell, x, h, c)):
        loss = sum((randn(3, 8, seed=k) * y).sum() for k, y in enumerate(outputs))
        results.append([*outputs, *torch.autograd.grad(loss, [x, h, c, *cell.parameters()])])
    for mine, wanted in zip(*results):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-11)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_layer_is_its_cells_step_by_step(norm, batch_first):
    layer = randomise(sn.SwitchNormLSTM(5, 8, 2, batch_first=batch_first, norm=norm)).double()
    x, state = randn(6, 3, 5), (randn(2, 3, 8, seed=1), randn(2, 3, 8, seed=2))
    expected, last = x, []
    for k in range(2):
        cell = sn.SwitchNormLSTMCell(expected.shape[-1], 8, norm=norm).double()
        own = {name: getattr(layer, f"{name}_l{k}") for name in WEIGHTS}
        own |= {f"norms.{name}": value for name, value in layer.norms[k].state_dict().items()}
        cell.load_state_dict(own)
        h, c = state[0][k], state[1][k]
        steps = []
        for step in expected:
            h, c = cell(step, (h, c))
            steps.append(h)
        expected = torch.stack(steps)
        last.append((h, c))
    y, (h, c) = layer(x.transpose(0, 1) if batch_first else x, state)
    assert y.shape == ((3, 6, 8) if batch_first else (6, 3, 8))
    torch.testing.assert_close(y.transpose(0, 1) if batch_first else y, expected)
    for k in range(2):
        torch.testing.assert_close((h[k], c[k]), last[k])
    alone, (h, c) = layer(x[:, 0], (state[0][:, 0], state[1][:, 0]))  # without a batch
    torch.testing.assert_close(alone, expected[:, 0])
    assert h.shape == c.shape == (2, 8)


@pytest.mark.parametrize("per_gate", [False, True])
@pytest.mark.parametrize("dominant, norm", [("ln", "ln"), ("gn", "gn")])
def test_one_dominant_gate_is_that_norm(dominant, norm, per_gate):
    """At a distance of 60 the softmax is one-hot in float64: SN is the LN or GN cell."""
    options = {"num_groups": 4, "per_gate": per_gate}
    switchable = randomise(sn.SwitchNormLSTMCell(5, 8, **options)).double()
    plain = sn.SwitchNormLSTMCell(5, 8, norm=norm, **options).double()
    for layer in switchable.modules():
        if isinstance(layer, sn.SwitchNormRecurrent):
            for gate in (layer.mean_weight, layer.var_weight):
                gate.data = torch.tensor(
                    [60.0 * (s == dominant) for s in layer.statistics]
                ).double()
    shared = {k: v for k, v in switchable.state_dict().items() if not k.endswith(GATES)}
    plain.load_state_dict(shared)
    other = sn.SwitchNormLSTMCell(5, 8, norm="gn" if norm == "ln" else "ln", **options).double()
    other.load_state_dict(shared)
    arguments = randn(3, 5), (randn(3, 8, seed=1), randn(3, 8, seed=2))
    for mine, wanted, wrong in zip(switchable(*arguments), plain(*arguments), other(*arguments)):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-12)
        assert (mine - wrong).abs().max() > 1e-2


@pytest.mark.parametrize("num_groups", [1, 2, 6])
def test_vectors_against_switch_norm(num_groups, monkeypatch):
    """The kernels, with and without the extension, against the formula."""
    norm = randomise(sn.SwitchNormRecurrent(12, num_groups)).double()
    x = (randn(4, 12) * 3 + 5).requires_grad_()
    results = []
    with sn.backend("reference"):
        outputs = [norm(x)]
    outputs.append(norm(x))  # by the extension, if it was built
    monkeypatch.setattr(sn.kernels.native, "extension", lambda: None)
    outputs.append(norm(x))
    monkeypatch.undo()
    for y in outputs:
        loss = (y * randn(4, 12, seed=1)).sum()
        results.append([y, *torch.autograd.grad(loss, [x, *norm.parameters()])])
    for wanted, *ours in zip(*results):
        for mine in ours:
            torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-11)


@pytest.mark.parametrize("norm", ["none", "ln", "gn", "sn_ln_gn"])
@pytest.mark.parametrize("per_gate", [False, True])
def test_derivatives_of_a_step(norm, per_gate):
    """Finite differences of every input in float64, first and second derivatives."""
    cell = randomise(sn.SwitchNormLSTMCell(3, 4, norm=norm, num_groups=2, per_gate=per_gate))
    names, values = zip(*cell.double().named_parameters())
    inputs = [randn(2, 3), randn(2, 4, seed=1), randn(2, 4, seed=2), *(v.detach() for v in values)]
    inputs = [t.requires_grad_() for t in inputs]

    def step(x, h, c, *parameters):
        return torch.func.functional_call(cell, dict(zip(names, parameters)), (x, (h, c)))

    assert torch.autograd.gradcheck(step, inputs)
    if norm == "sn_ln_gn" and not per_gate:
        assert torch.autograd.gradgradcheck(step, inputs)


def test_compilers_and_mixed_types_get_the_plain_form():
    cell = randomise(sn.SwitchNormLSTMCell(5, 8))
    x = torch.randn(3, 5)
    exported = torch.export.export(cell, (x,)).module()
    for mine, wanted in zip(exported(x), cell(x)):
        torch.testing.assert_close(mine, wanted)
    with torch.autocast("cpu", torch.bfloat16):
        h, c = cell(x)
    assert (h - cell(x)[0]).abs().max() < 0.1
    batched = torch.func.vmap(lambda row: cell(row[None])[0][0])(x)
    torch.testing.assert_close(batched, cell(x)[0])


def test_vectors_keep_their_digits_and_their_dtype():
    """Mean 1000, deviation 1 in float32 against float64; half precision by float32 statistics."""
    norm = sn.SwitchNormRecurrent(64, 8)
    x = 1000 + randn(8, 64)
    exact = copy.deepcopy(norm).double()(x.float().double())
    assert (norm(x.float()) - exact).abs().max() < 5e-4  # 1 ulp of 1000 is 6e-5
    half = (x / 1000).bfloat16()
    exact = copy.deepcopy(norm).double()(half.double())
    y = norm.bfloat16()(half)
    assert y.dtype == torch.bfloat16 and (y - exact).abs().max() < 0.02


# --- limits and errors


def test_zero_state_and_batch_of_one():
    """c = 0 has variance 0: the output is finite, and so are the gradients."""
    cell = sn.SwitchNormLSTMCell(5, 8)
    x = torch.zeros(1, 5, requires_grad=True)
    h, c = cell(x, (torch.zeros(1, 8), torch.zeros(1, 8)))
    (h.sum() + c.sum()).backward()
    assert torch.isfinite(h).all() and torch.isfinite(x.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in cell.parameters())


@pytest.mark.parametrize("norm", NORMS)
def test_a_sample_does_not_depend_on_its_batch(norm):
    layer = randomise(sn.SwitchNormLSTM(5, 8, norm=norm)).double()
    x = randn(6, 3, 5)
    whole = layer(x)[0]
    torch.testing.assert_close(layer(x[:, 1:2])[0], whole[:, 1:2])
    torch.testing.assert_close(layer.eval()(x)[0], whole)


def test_importance_by_place():
    """The gates are seen by the shelf's functions, one row for each place that has a norm."""
    layer = sn.SwitchNormLSTM(5, 8, places=["hidden", "cell"])
    assert list(sn.importance_weights(layer)) == ["norms.0.hidden", "norms.0.cell"]
    assert len(sn.gates(layer)) == 4
    cell = sn.SwitchNormLSTMCell(5, 8, per_gate=True)
    assert len(sn.importance_weights(cell)) == 9
    y, _ = cell(torch.randn(3, 5), (torch.randn(3, 8), torch.randn(3, 8)))
    y.square().sum().backward()
    assert all(gate.grad.abs().sum() > 0 for gate in sn.gates(cell))


@pytest.mark.parametrize("norm", LSTM_NORMS)
def test_resets_as_it_was_built(norm):
    cell = randomise(sn.SwitchNormLSTMCell(5, 8, norm=norm))
    torch.manual_seed(3)
    fresh = sn.SwitchNormLSTMCell(5, 8, norm=norm)
    torch.manual_seed(3)
    cell.reset_parameters()
    for name, value in fresh.state_dict().items():
        if name.startswith("norms."):
            torch.testing.assert_close(cell.state_dict()[name], value)
    assert cell.weight_hh.abs().max() <= 8**-0.5
    assert "norm=" in repr(cell) and norm in repr(sn.SwitchNormLSTM(5, 8, norm=norm))


def test_default_groups_leave_no_group_of_one():
    for size, groups in ((64, 8), (20, 5), (8, 2), (7, 1), (100, 5), (4, 1)):
        assert sn.SwitchNormLSTMCell(3, size).norms["cell"].num_groups == groups


@pytest.mark.parametrize(
    "options, wanted",
    [
        ({"norm": "bn"}, ["'bn'", "sn_ln_gn"]),
        ({"places": ["output"]}, ["output", "hidden"]),
        ({"places": "cell"}, ["cell"]),
        ({"num_groups": 3}, ["num_groups=3", "[1, 2, 4, 8]"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", [sn.SwitchNormLSTMCell, sn.SwitchNormLSTM])
def test_bad_option_is_named(kind, options, wanted):
    with pytest.raises(ValueError) as error:
        kind(5, 8, **options)
    for words in wanted:
        assert words in str(error.value)


def test_bad_input_is_named():
    cell, layer = sn.SwitchNormLSTMCell(5, 8), sn.SwitchNormLSTM(5, 8)
    with pytest.raises(ValueError, match=r"\(B, 5\).*\(3, 6\)"):
        cell(torch.randn(3, 6))
    with pytest.raises(ValueError, match=r"c of shape \(3, 8\), got \(2, 8\)"):
        cell(torch.randn(3, 5), (torch.randn(3, 8), torch.randn(2, 8)))
    with pytest.raises(ValueError, match=r"\(L, B, D\).*D=5"):
        layer(torch.randn(4, 3, 6))
    states = (torch.zeros(1, 2, 8), torch.zeros(1, 2, 8))  # of a batch
    with pytest.raises(ValueError, match=r"h of shape \(1, 8\), got \(1, 2, 8\)"):
        layer(torch.randn(4, 5), states)
    packed = nn.utils.rnn.pack_sequence([torch.randn(4, 6), torch.randn(2, 6)])
    with pytest.raises(ValueError, match="PackedSequence.*D=5"):
        layer(packed)
    with pytest.raises(ValueError, match="no steps"):
        layer(torch.randn(0, 3, 5))
    with pytest.raises(ValueError, match="proj_size=3"):
        sn.SwitchNormLSTM(5, 8, proj_size=3)
    assert sn.SwitchNormLSTM(5, 8, proj_size=3, norm="none")(torch.randn(4, 2, 5))[0].shape[2] == 3
    for layer in (sn.SwitchNormLSTMCell(3, 8, num_groups=2), sn.SwitchNormLSTM(3, 8, num_groups=2)):
        for state in (torch.zeros(2, 8), (torch.zeros(2, 8),)):  # a GRU's
            with pytest.raises(ValueError, match=r"expected the pair \(h, c\) of an LSTM"):
                layer(torch.zeros(2, 3), state)


# --- packed sequences, two directions, dropout: without norms torch's layer, with them itself


def packed_case(lengths, size=5):
    sequences = [randn(length, size, seed=k) for k, length in enumerate(lengths)]
    return sequences, nn.utils.rnn.pack_sequence(sequences, enforce_sorted=False)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_packed_and_bidirectional_without_places_are_torch_s(given, bidirectional):
    options = {"num_layers": 2, "bidirectional": bidirectional}
    theirs = nn.LSTM(5, 8, **options).double()
    ours = sn.SwitchNormLSTM(5, 8, norm="gn", places=[], **options).double()
    ours.load_state_dict(theirs.state_dict())
    states = tuple(randn(2 + 2 * bidirectional, 4, 8, seed=k) for k in (7, 8)) if given else None
    sequences, packed = packed_case((3, 6, 1, 4))
    for x in (packed, randn(6, 4, 5)):
        x_leaf = x.data if isinstance(x, nn.utils.rnn.PackedSequence) else x
        found = []
        for layer in (ours, theirs):
            layer.zero_grad()
            y, (h, c) = layer(x, states)
            y = y.data if isinstance(y, nn.utils.rnn.PackedSequence) else y
            (y.square().sum() + h.sum() + (2 * c).sum()).backward()
            grads = {name: p.grad.clone() for name, p in layer.named_parameters()}
            found.append([y.detach(), h.detach(), c.detach(), grads])
        torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)
        assert x_leaf.grad is None


@pytest.mark.parametrize("norm", NORMS)
def test_packed_equals_each_sequence_alone(norm):
    options = {"num_layers": 2, "bidirectional": True, "norm": norm}
    layer = randomise(sn.SwitchNormLSTM(5, 8, **options)).double()
    sequences, packed = packed_case((3, 6, 1, 4))
    outputs, (h, c) = layer(packed)
    padded, lengths = nn.utils.rnn.pad_packed_sequence(outputs)
    assert lengths.tolist() == [3, 6, 1, 4]
    for k, sequence in enumerate(sequences):
        y, (own_h, own_c) = layer(sequence)
        torch.testing.assert_close(padded[: len(sequence), k], y)
        torch.testing.assert_close(h[:, k], own_h)
        torch.testing.assert_close(c[:, k], own_c)


def test_the_reverse_direction_is_the_layer_on_the_reversed_sequence():
    both = randomise(sn.SwitchNormLSTM(5, 8, bidirectional=True)).double()
    one = sn.SwitchNormLSTM(5, 8).double()
    state = both.state_dict()
    one.load_state_dict(
        {k: state[k.replace("norms.0", "norms.1")] for k in one.state_dict() if "norms" in k}
        | {f"{name}_l0": state[f"{name}_l0_reverse"] for name in WEIGHTS}
    )
    x = randn(6, 3, 5)
    y, (h, _) = both(x)
    reverse, (own_h, _) = one(x.flip(0))
    torch.testing.assert_close(y[..., 8:], reverse.flip(0))
    torch.testing.assert_close(h[1], own_h[0])


def test_dropout_stands_between_layers_in_training_alone():
    layer = sn.SwitchNormLSTM(5, 8, 2, dropout=0.5)
    x = torch.randn(4, 3, 5)
    assert not torch.equal(layer(x)[0], layer(x)[0])
    layer.eval()
    plain = sn.SwitchNormLSTM(5, 8, 2).eval()
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x)[0], plain(x)[0])


def test_without_a_norm_the_layer_compiles_as_torch_s():
    layer, x = sn.SwitchNormLSTM(4, 8, norm="none"), torch.randn(5, 2, 4)
    compiled = torch.compile(layer, backend="eager")
    torch.testing.assert_close(compiled(x), layer(x))


def test_export_with_a_free_batch_size():
    class Outputs(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = sn.SwitchNormLSTM(4, 8)

        def forward(self, x):
            return self.layer(x)[0]

    model, x = Outputs().eval(), torch.randn(5, 2, 4)
    sizes = {"x": {1: torch.export.Dim("batch")}}
    exported = torch.export.export(model, (x,), dynamic_shapes=sizes, strict=False).module()
    x = torch.randn(5, 7, 4)
    torch.testing.assert_close(exported(x), model(x))
