"""TokenTuringParameters: names, initialisers, the public layout, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mirasol_kernels.latent_recurrence import TokenTuringParameters, token_turing_recurrence
from mirasol_kernels.latent_recurrence.modules import LearnedQueries, Linear
from tests.ops.test_token_turing import MODES, machine


def test_named_tensors_and_replace() -> None:
    p = machine(layers=2, tokens=4)
    names = dict(p.named_tensors())
    assert list(names)[:3] == ["read.norm.weight", "read.norm.bias", "read.mlp.hidden.weight"]
    assert {"process.blocks.1.attention.q.weight", "process.positions", "positions.read", "positions.write"} <= set(
        names
    )
    assert all(x.requires_grad and x.is_leaf for x in names.values())
    new = torch.zeros(8)
    changed = p.replace({"process.norm.bias": new})
    assert changed.process.norm.bias is new and changed.process.norm.weight is p.process.norm.weight
    assert changed.process.blocks[0].attention.heads == 2
    assert p.process.norm.bias is not new
    assert {x.dtype for _, x in p.to(torch.bfloat16).named_tensors()} == {torch.bfloat16}
    assert {x.device.type for _, x in p.to("meta").named_tensors()} == {"meta"}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("processor", ["transformer", "mixer", "mlp"])
def test_what_parameters_say_of_themselves(mode: str, processor: str) -> None:
    p = TokenTuringParameters.init(24, 6, 4, memory_mode=mode, processor=processor, device="meta")
    assert (p.memory_mode, p.processor, p.unit, p.width, p.read_tokens) == (mode, processor, "standard", 24, 4)
    assert p.memory_tokens == (None if mode == "AddErase" else 6)
    assert p.add_erase == "paper" and p.positions is None
    simple = TokenTuringParameters.init(24, 6, 4, processor=processor, unit="simple", device="meta")
    assert (simple.unit, simple.memory_mode, simple.memory_tokens) == ("simple", "TL", None)


def test_initialisers() -> None:
    """Moments of what is drawn: bounds are six standard errors of the sample."""
    generator = torch.Generator().manual_seed(3)
    p = TokenTuringParameters.init(
        96, 64, 8, memory_mode="MHA", tokens=100, generator=generator, dtype=torch.float64, query_std=0.5
    )
    assert isinstance(p.write, LearnedQueries) and p.positions is not None and p.positions.write is not None
    hidden: Linear = p.process.blocks[0].mlp.hidden
    bound = (6 / (96 + 512)) ** 0.5
    assert hidden.weight.abs().max() <= bound

    def assert_std(x: Tensor, std: float) -> None:
        assert abs(x.std().item() / std - 1) < 6 / x.numel() ** 0.5

    assert_std(hidden.weight, bound / 3**0.5)
    assert_std(hidden.bias, 1e-6)
    assert_std(p.process.blocks[0].attention.q.weight, (6 / 192) ** 0.5 / 3**0.5)
    assert_std(p.write.attention.k.weight, 96**-0.5)
    assert p.write.attention.k.weight.abs().max() <= 2 * 96**-0.5 / 0.8796
    assert_std(p.write.queries, 0.5)
    assert_std(p.positions.write, 0.02)
    assert not p.write.attention.k.bias.any() and (p.process.norm.weight == 1).all()
    again = TokenTuringParameters.init(
        96, 64, 8, memory_mode="MHA", tokens=100, generator=torch.Generator().manual_seed(3), dtype=torch.float64
    )
    assert torch.equal(again.process.blocks[0].mlp.out.weight, p.process.blocks[0].mlp.out.weight)


def scenic_arrays() -> dict[str, Tensor]:
    """The simplest unit in flax names: TL, no layer of the mlp processor left out."""
    arrays: dict[str, Tensor] = {}
    for i, k in enumerate((2, 3)):
        path = f"TokenLearnerModuleV11_{i}"
        arrays |= {f"{path}.LayerNorm_0.scale": torch.ones(8), f"{path}.LayerNorm_0.bias": torch.zeros(8)}
        arrays |= flax_mlp(f"{path}.token_masking", 8, 5, k)
    for i in (0, 1):
        arrays |= {f"LayerNorm_{i}.scale": torch.ones(8), f"LayerNorm_{i}.bias": torch.zeros(8)}
    return arrays | flax_mlp("MlpBlock_0", 8, 6, 8)


def flax_mlp(path: str, into: int, hidden: int, out: int) -> dict[str, Tensor]:
    return {
        f"{path}.Dense_0.kernel": torch.randn(into, hidden),
        f"{path}.Dense_0.bias": torch.randn(hidden),
        f"{path}.Dense_1.kernel": torch.randn(hidden, out),
        f"{path}.Dense_1.bias": torch.randn(out),
    }


def test_scenic_prefixes_and_copies() -> None:
    arrays = scenic_arrays()
    plain = dict(TokenTuringParameters.from_scenic(arrays).named_tensors())
    prefixed = {f"param.unit_function.{key}": x for key, x in arrays.items()} | {"in.x": torch.ones(3)}
    for name, x in TokenTuringParameters.from_scenic(prefixed).named_tensors():
        assert torch.equal(x, plain[name])
    plain["process.norm.weight"].zero_()
    assert arrays["LayerNorm_1.scale"].all()


def test_scenic_simple_unit_runs() -> None:
    """No second token learner in the names: read the input, [memory | read] is processed and cut."""
    arrays = {key: x for key, x in scenic_arrays().items() if not key.startswith("TokenLearnerModuleV11_1")}
    p = TokenTuringParameters.from_scenic(arrays)
    assert (p.unit, p.processor, p.read_tokens, p.memory_tokens) == ("simple", "mlp", 2, None)
    memory, y = token_turing_recurrence(torch.randn(1, 5, 8), torch.randn(1, 3, 4, 8), p)
    assert memory.shape == (1, 5, 8) and y.shape == (1, 3, 2, 8)


def test_scenic_positions() -> None:
    tables = {f"{name}_pos_embed.pos_embedding": torch.randn(1, n, 8) for name, n in (("read", 7), ("write", 9))}
    positions = TokenTuringParameters.from_scenic(scenic_arrays() | tables).positions
    assert positions is not None and positions.write is not None
    assert torch.equal(positions.read, tables["read_pos_embed.pos_embedding"][0])
    assert torch.equal(positions.write, tables["write_pos_embed.pos_embedding"][0])


def test_scenic_errors() -> None:
    arrays = scenic_arrays()
    with pytest.raises(ValueError, match=r"from_scenic: arrays: expected .* of one unit, got also \['extra.kernel'\]"):
        TokenTuringParameters.from_scenic(arrays | {"extra.kernel": torch.ones(1)})
    del arrays["LayerNorm_1.bias"]
    with pytest.raises(ValueError, match=r"from_scenic: arrays: expected 'LayerNorm_1\.bias', got none of that name"):
        TokenTuringParameters.from_scenic(arrays)


INIT_ERRORS = [
    ({"memory_mode": "FIFO"}, "memory_mode: expected one of TL, MHA, AddErase, got 'FIFO'"),
    ({"processor": "rnn"}, "processor: expected one of transformer, mixer, mlp, got 'rnn'"),
    ({"unit": "double"}, "unit: expected one of standard, simple, got 'double'"),
    ({"unit": "simple", "memory_mode": "MHA"}, "memory_mode, tokens: expected 'TL' and None with the simple unit"),
    (
        {"unit": "simple", "tokens": 4},
        "memory_mode, tokens: expected 'TL' and None with the simple unit, got 'TL' and 4",
    ),
    *(
        ({name: 0}, f"{name}: expected an integer of at least 1, got 0")
        for name in ("layers", "heads", "mlp", "hidden")
    ),
    ({"tokens": -1}, "tokens: expected an integer of at least 0, got -1"),
    ({"heads": 2.0}, "heads: expected an integer of at least 1, got 2.0"),
    ({"heads": 3}, "width: expected a multiple of heads = 3, got 8"),
    ({"c": 12, "memory_mode": "MHA"}, "width: expected a multiple of 8, the heads of MHA, got 12"),
]


@pytest.mark.parametrize(("options", "text"), INIT_ERRORS, ids=[text for _, text in INIT_ERRORS])
def test_init_errors(options: dict, text: str) -> None:
    with pytest.raises(ValueError, match=f"^TokenTuringParameters.init: {text}"):
        machine(**options)


def test_parameter_errors() -> None:
    p, mha, add = machine(tokens=4), machine(memory_mode="MHA"), machine(memory_mode="AddErase")
    name = "^TokenTuringParameters"
    with pytest.raises(ValueError, match=f"{name}: add_erase: expected 'paper' or 'scenic', got 'both'"):
        TokenTuringParameters(p.read, p.process, p.write, add_erase="both")
    with pytest.raises(ValueError, match=f"{name}: read, write: expected both or neither to be LearnedQueries"):
        TokenTuringParameters(p.read, p.process, mha.write)
    with pytest.raises(ValueError, match=f"{name}: positions: expected None with the simple unit"):
        TokenTuringParameters(p.read, p.process, None, p.positions)
    with pytest.raises(ValueError, match=f"{name}: positions: expected no write table with AddErase"):
        TokenTuringParameters(add.read, add.process, add.write, p.positions)
    with pytest.raises(ValueError, match=f"{name}.replace: tensors: expected names of named_tensors, got .*'nothing'"):
        p.replace({"nothing": torch.ones(1)})
