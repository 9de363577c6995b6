"""token_turing_recurrence: hoisted against plain, both against the public numbers, and the parameters it takes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mirasol_kernels._dispatch import explain
from mirasol_kernels.latent_recurrence import (
    TokenTuringParameters,
    cases,
    hoisted,
    parts,
    reference,
    token_turing_recurrence,
)
from mirasol_kernels.latent_recurrence.modules import AddErase, tensors_in
from mirasol_kernels.latent_recurrence.scenic import Flax
from tests.numerics import GOLDEN_GRADIENT, GOLDEN_OUTPUT, assert_close_fp64, assert_golden, golden

MODES = ("TL", "MHA", "AddErase")


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).requires_grad_()


def machine(c: int = 8, memory: int = 3, read: int = 2, **options) -> TokenTuringParameters:
    """Parameters away from their initial values, where norms are 1 and biases 0."""
    made = TokenTuringParameters.init(
        c, memory, read, **{"heads": 2, "mlp": 6, "hidden": 5, "query_std": 1.0, "dtype": torch.float64} | options
    )
    return made.replace(
        {name: (x + 0.3 * torch.randn_like(x)).detach().requires_grad_() for name, x in made.named_tensors()}
    )


@pytest.mark.parametrize("mode", MODES)
def test_steps_of_two_halves(mode: str) -> None:
    """gather, as if another rank held the same steps: states of the input are all that the steps need of it."""
    p, x, memory = machine(memory_mode=mode), draw(2, 3, 4, 8), draw(2, 3, 8)
    told = []

    def both(state: Tensor) -> Tensor:
        told.append(state.shape[2:].numel())
        return torch.cat([state, state], 1)

    results = token_turing_recurrence(memory, x, p, gather=both)
    for got, expected in zip(results, token_turing_recurrence(memory, torch.cat([x, x], 1), p), strict=True):
        assert_close_fp64(got, expected)
    write = [] if mode == "AddErase" else [3]
    heads = 8 if mode == "MHA" else 1  # of the pools
    assert sum(told) == sum(k * (8 + 2 * heads) for k in (2, *write))


# ------------------------------------------------------------------------------------------------ public numbers


def golden_files() -> list[str]:
    """Every file of a Token Turing Machine in the golden folder, which may hold more than the project knows."""
    folder = os.environ.get("MIRASOL_GOLDEN")
    found = sorted(path.stem for path in Path(folder).glob("ttm_*.npz")) if folder else []
    return found or ["ttm_unit_small_tl_transformer"]


def golden_tolerance(name: str) -> tuple[float, float]:
    """The exceptions that the README of the golden data lists."""
    if name.startswith("ttm_encoder6_small_tladderase"):
        return 5e-4, 1e-3
    if name.startswith("ttm_encoder6_medium_tladderase"):
        return 2e-2, 1e-3
    return (5e-5, 2e-4) if name == "ttm_simple_loop6_small" else (GOLDEN_OUTPUT, GOLDEN_GRADIENT)


@pytest.mark.parametrize("form", ["hoisted", "plain"])
@pytest.mark.parametrize("name", golden_files())
def test_golden(name: str, form: str) -> None:
    """One step (unit), six in a call from zeros (encoder), six calls that hand memory on (loop)."""
    z = golden(name)
    tol, grad_tol = golden_tolerance(name)
    p = TokenTuringParameters.from_scenic(z).to(torch.float64)
    p = p.replace({key: x.requires_grad_() for key, x in p.named_tensors()})
    x = torch.from_numpy(z["in.x"]).double().requires_grad_()
    given = next((key for key in ("in.memory", "in.memory0") if key in z), None)
    slots = z[given].shape[1] if given else z["mid.memory"].shape[2]
    memory = torch.from_numpy(z[given]).double() if given else torch.zeros(x.shape[0], slots, x.shape[-1]).double()
    memory.requires_grad_()

    def run(memory: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return reference.token_turing_recurrence(memory, (x,), p, None) if form == "plain" else run_public(memory, x)

    def run_public(memory: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return token_turing_recurrence(memory, x, p)

    if x.dim() == 3:
        memory_new, y = run(memory, x[:, None])
        results = {"memory_new": memory_new, "y": y[:, 0]}
    else:
        _, y = run(memory, x)
        memories, now = [], memory
        for t in range(x.shape[1]):
            now, _ = run(now, x[:, t : t + 1])
            memories.append(now)
        results = {"y": y, "memory": torch.stack(memories, 1)}
        if "mid.memory" in z:
            assert_golden(results["memory"], z["mid.memory"], tol=tol, what="memory")
    compared = [key for key in results if f"out.{key}" in z]
    assert "y" in compared
    for key in compared:
        assert_golden(results[key], z[f"out.{key}"], tol=tol, what=key)

    cotangents = [key for key in results if f"cot.{key}" in z]
    if not cotangents:
        return
    loss = sum((results[key] * torch.from_numpy(z[f"cot.{key}"])).sum() for key in cotangents)
    tensors = dict(p.named_tensors())
    grads = torch.autograd.grad(loss, [x, memory, *tensors.values()], materialize_grads=True)
    assert_golden(grads[0], z["grad_in.x"], tol=grad_tol, what="x")
    if given:
        assert_golden(grads[1], z[given.replace("in.", "grad_in.")], tol=grad_tol, what="memory")
    wanted = {key.removeprefix("grad_"): g for key, g in z.items() if key.startswith("grad_param.")}
    for grad, (key, want) in zip(grads[2:], TokenTuringParameters.from_scenic(wanted).named_tensors(), strict=True):
        assert_golden(grad, want.numpy(), tol=grad_tol, what=key)


def test_golden_learned_queries() -> None:
    z = golden("tl_mha_small")
    flax = Flax({f"pool.{key.removeprefix('param.')}": v for key, v in z.items() if key.startswith("param.")})
    pool = flax.learned_queries("pool")
    x = torch.from_numpy(z["in.x"])
    everything = torch.ones(x.shape[:2], dtype=torch.bool)
    assert_golden(reference.pool(x, everything, pool), z["out.y"])
    for valid in (None, torch.full((2, 1), 10)):
        state = hoisted.pooled(pool, (x,), (None,), valid, None)
        assert_golden(hoisted.finished(pool, state, x.dtype), z["out.y"])


def test_golden_add_erase() -> None:
    z = golden("add_erase_small")
    flax = Flax({f"write.{key.removeprefix('param.')}": v for key, v in z.items() if key.startswith("param.")})
    write = flax.add_erase("write")
    weights = [x.requires_grad_() for _, x in tensors_in(write)]
    memory, control = (torch.from_numpy(z[key]).requires_grad_() for key in ("in.memory", "in.control"))
    new = parts.add_erase(memory, control, write, "scenic")
    assert_golden(new, z["out.memory_new"])
    grads = torch.autograd.grad(new, [memory, control, *weights], torch.from_numpy(z["cot.memory_new"]))
    assert_golden(grads[0], z["grad_in.memory"], tol=GOLDEN_GRADIENT)
    assert_golden(grads[1], z["grad_in.control"], tol=GOLDEN_GRADIENT)
    wanted = Flax({f"write.{k.removeprefix('grad_param.')}": v for k, v in z.items() if k.startswith("grad_param.")})
    for grad, (name, want) in zip(grads[2:], tensors_in(wanted.add_erase("write")), strict=True):
        assert_golden(grad, want.numpy(), tol=GOLDEN_GRADIENT, what=name)


# ------------------------------------------------------------------------------------------------ hoisted = plain


@st.composite
def calls(draw_: st.DrawFn) -> dict:
    unit = draw_(st.sampled_from(["standard", "standard", "simple"]))
    mode = draw_(st.sampled_from(MODES)) if unit == "standard" else "TL"
    n = draw_(st.lists(st.integers(0, 4), min_size=1, max_size=3))
    return {
        "n": n,
        "steps": draw_(st.integers(1, 4)),
        "batch": draw_(st.integers(1, 2)),
        "memory": draw_(st.integers(1, 4)),
        "counted": draw_(st.booleans()),
        "seed": draw_(st.integers(0, 9999)),
        "options": {
            "read": draw_(st.integers(1, 4)),
            "memory_mode": mode,
            "unit": unit,
            "processor": draw_(st.sampled_from(["transformer", "mixer", "mlp"])),
            "layers": draw_(st.integers(1, 2)),
            "tokens": sum(n) if unit == "standard" and draw_(st.booleans()) else None,
            "add_erase": draw_(st.sampled_from(["paper", "scenic"])),
        },
    }


SMALL_MEMORY = {"n": [3], "steps": 3, "batch": 1, "memory": 1, "counted": False, "seed": 0}


@settings(max_examples=60)
@given(calls())
@example(SMALL_MEMORY | {"options": {"read": 4, "memory_mode": "TL"}})
@example(SMALL_MEMORY | {"options": {"read": 4, "memory_mode": "MHA"}})
@example(SMALL_MEMORY | {"options": {"read": 4, "memory_mode": "AddErase"}})
@example(SMALL_MEMORY | {"options": {"read": 4, "unit": "simple"}})
def test_hoisted_equals_plain(call: dict) -> None:
    """Final memory, outputs, and the gradient of memory, of every source and of every parameter."""
    torch.manual_seed(call["seed"])
    p = machine(memory=call["memory"], **call["options"])
    memory = draw(call["batch"], call["memory"], 8)
    sources = tuple(draw(call["batch"], call["steps"], n, 8) for n in call["n"])
    valid = None
    if call["counted"]:
        valid = torch.stack([torch.randint(0, n + 1, (call["batch"], call["steps"])) for n in call["n"]], 2)
    leaves = [memory, *sources, *(x for _, x in p.named_tensors())]
    seen = []
    for run in (
        lambda: token_turing_recurrence(memory, sources, p, valid=valid),
        lambda: reference.token_turing_recurrence(memory, sources, p, valid),
    ):
        results = run()
        torch.manual_seed(1)
        cotangents = [torch.randn_like(y) for y in results]
        grads = torch.autograd.grad(results, leaves, cotangents, materialize_grads=True)
        # Together, since a gradient of 0 may be a sum of large terms: the largest of all is the scale of rounding.
        seen.append([*results, torch.cat([g.flatten() for g in grads])])
    for got, expected in zip(*seen, strict=True):
        assert_close_fp64(got, expected)


@pytest.mark.parametrize(
    "options",
    [
        {"memory_mode": "TL", "tokens": 5},
        {"memory_mode": "MHA", "processor": "mlp"},
        {"memory_mode": "AddErase", "processor": "mixer"},
        {"memory_mode": "AddErase", "processor": "mlp", "add_erase": "scenic"},
        {"unit": "simple", "processor": "mixer"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_gradcheck(options: dict) -> None:
    p = machine(memory=2, mlp=3, hidden=2, **options)
    tensors = dict(p.named_tensors())

    def run(memory: Tensor, a: Tensor, b: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        made = p.replace(dict(zip(tensors, weights, strict=True)))
        return token_turing_recurrence(memory, (a, b), made, valid=torch.tensor([[[3, 1], [2, 2]]]))

    inputs = (draw(1, 2, 8), draw(1, 2, 3, 8), draw(1, 2, 2, 8), *tensors.values())
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("mode", MODES)
def test_streaming_is_the_whole(mode: str) -> None:
    p, memory, x = machine(memory_mode=mode), draw(2, 3, 8), draw(2, 5, 4, 8)
    end, y = token_turing_recurrence(memory, x, p)
    for cut in (0, 1, 4, 5):
        middle, early = token_turing_recurrence(memory, x[:, :cut], p)
        last, late = token_turing_recurrence(middle, x[:, cut:], p)
        assert_close_fp64(last, end)
        assert_close_fp64(torch.cat([early, late], 1), y)


@pytest.mark.parametrize("mode", MODES)
def test_no_steps(mode: str) -> None:
    p, memory = machine(memory_mode=mode), draw(2, 3, 8)
    end, y = token_turing_recurrence(memory, (torch.zeros(2, 0, 4, 8).double(), torch.zeros(2, 0, 0, 8).double()), p)
    assert end is memory and y.shape == (2, 0, 2, 8)


def test_a_later_step_changes_nothing_before_it() -> None:
    p, memory, x = machine(), draw(1, 3, 8), draw(1, 5, 4, 8)
    changed = x.detach().clone()
    changed[:, 3] += 1
    (_, before), (_, after) = (token_turing_recurrence(memory, v, p) for v in (x, changed))
    assert torch.equal(before[:, :3], after[:, :3])
    assert not torch.equal(before[:, 3], after[:, 3]) and not torch.equal(before[:, 4], after[:, 4])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("split", [(5,), (2, 3), (0, 5, 0)])
def test_sources_are_one_sequence(mode: str, split: tuple[int, ...]) -> None:
    p, memory, x = machine(memory_mode=mode, tokens=5), draw(2, 3, 8), draw(2, 3, 5, 8)
    whole = token_turing_recurrence(memory, x, p)
    for got, expected in zip(token_turing_recurrence(memory, x.split(split, 2), p), whole, strict=True):
        assert_close_fp64(got, expected)


@pytest.mark.parametrize("options", [{"memory_mode": mode} for mode in MODES] + [{"unit": "simple"}])
def test_what_does_not_count_does_not_leak(options: dict) -> None:
    """Tokens past `valid` hold NaN; a step without any token is a step of memory alone."""
    p, memory, x = machine(**options), draw(1, 3, 8), torch.randn(1, 2, 4, 8, dtype=torch.float64)
    x[:, 0, 3:], x[:, 1] = torch.nan, torch.nan
    x.requires_grad_()
    end, y = token_turing_recurrence(memory, x, p, valid=torch.tensor([[3, 0]]))
    first, y0 = token_turing_recurrence(memory, x[:, :1, :3], p)
    last, y1 = token_turing_recurrence(first, x[:, 1:, :0], p)
    assert_close_fp64(end, last)
    assert_close_fp64(y, torch.cat([y0, y1], 1))
    grads = torch.autograd.grad(y.sum() + end.sum(), [x, memory, *(w for _, w in p.named_tensors())], allow_unused=True)
    assert all(g.isfinite().all() for g in grads if g is not None)
    assert not grads[0][:, 0, 3:].any() and not grads[0][:, 1].any()


def test_add_erase_as_published() -> None:
    """M' = M prod_k (1 - w_k e_k) + sum_k w_k a_k, slot by slot and head by head; e in (0, 1)."""
    p = machine(memory_mode="AddErase").write
    assert isinstance(p, AddErase)
    memory, control = draw(1, 3, 8), draw(1, 2, 8)
    w = parts.logits(memory, p.address).softmax(1)
    erase, add = parts.mixture(control, p.erase).sigmoid(), parts.mixture(control, p.add)
    expected = []
    for slot in range(3):
        now, added = memory[0, slot], torch.zeros(8, dtype=torch.float64)
        for head in range(8):
            now = now * (1 - w[0, slot, head] * erase[0, head])
            added = added + w[0, slot, head] * add[0, head]
        expected.append(now + added)
    assert_close_fp64(parts.add_erase(memory, control, p, "paper")[0], torch.stack(expected))


def test_add_erase_of_the_public_code_adds_one_per_step() -> None:
    """A property of the published code that `add_erase="paper"` is there to avoid."""
    p = TokenTuringParameters.init(24, 4, 2, memory_mode="AddErase", add_erase="scenic", heads=4)
    memory, _ = token_turing_recurrence(torch.zeros(1, 4, 24), torch.randn(1, 3, 5, 24), p)
    assert 2 < memory.mean() < 4
    assert torch.equal(memory, memory[:, :1].expand_as(memory))  # slots never separate


# ------------------------------------------------------------------------------------------------ dtypes, compilation


@pytest.mark.parametrize(("mode", "size"), [("TL", 1e4), ("MHA", 1e2), ("AddErase", 1e4)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit(mode: str, size: float, dtype: torch.dtype) -> None:
    """Finite near the end of float16, 65504, where the result is: MHA projects its values, a mean does not."""
    p = machine(memory_mode=mode).to(dtype)
    memory, x = (size * torch.randn(1, 3, 8)).to(dtype), (size * torch.randn(1, 2, 4, 8)).to(dtype)
    results = token_turing_recurrence(memory, x, p)
    assert all(y.dtype == dtype and y.isfinite().all() for y in results)


@pytest.mark.parametrize("mode", MODES)
def test_autocast(mode: str) -> None:
    p = machine(memory_mode=mode, tokens=4).to(torch.float32)
    x = torch.randn(2, 3, 4, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        end, y = token_turing_recurrence(torch.zeros(2, 3, 8), x, p)
    assert end.dtype == y.dtype == torch.float32
    y.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all() and x.grad.any()


@pytest.mark.parametrize("mode", MODES)
def test_meta_tensors(mode: str) -> None:
    """Shapes without numbers; torch raises where one asks it about autocast of theirs."""
    p = machine(memory_mode=mode, tokens=4).to("meta")
    memory, x = (torch.empty(2, *size, 8, dtype=torch.float64, device="meta") for size in ((3,), (3, 4)))
    valid = torch.ones(2, 3, dtype=torch.int64, device="meta")
    end, y = token_turing_recurrence(memory, x.requires_grad_(), p, valid=valid)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert end.is_meta and end.shape == memory.shape and y.shape == (2, 3, 2, 8) and grad.shape == x.shape


@pytest.mark.parametrize(("mode", "compiler"), [("TL", "aot_eager"), ("MHA", "eager")])
def test_compiles_without_graph_breaks(mode: str, compiler: str) -> None:
    p, memory, x = machine(memory_mode=mode, processor="mlp"), draw(1, 3, 8), draw(1, 2, 3, 8)
    compiled = torch.compile(token_turing_recurrence, fullgraph=True, backend=compiler)
    expected = torch.autograd.grad(token_turing_recurrence(memory, x, p)[1].sum(), [memory, x])
    for got, want in zip(torch.autograd.grad(compiled(memory, x, p)[1].sum(), [memory, x]), expected, strict=True):
        assert_close_fp64(got, want)


def test_named_cases_run() -> None:
    for case in cases.cases(dtype=torch.float64):
        assert all(y.isfinite().all() for y in case.call(**case.tensors)), case.name


def test_backend_by_name() -> None:
    p, memory, x = machine(), draw(1, 3, 8), draw(1, 2, 4, 8)
    end, _ = token_turing_recurrence(memory, x, p, backend="reference")
    assert torch.equal(end, token_turing_recurrence(memory, x, p)[0])
    with pytest.raises(NotImplementedError, match="latent_recurrence: backend 'native' refuses this call"):
        token_turing_recurrence(memory, x, p, backend="native")
    assert explain(token_turing_recurrence, memory, x, p)["reference"] == "runs"


# ------------------------------------------------------------------------------------------------ errors


X = torch.zeros(2, 3, 4, 8, dtype=torch.float64)
ERRORS = [
    ({"parameters": None}, TypeError, "parameters: expected TokenTuringParameters, got NoneType"),
    ({"inputs": []}, ValueError, "inputs: expected at least one tensor, got none"),
    ({"memory": None}, TypeError, "memory: expected a tensor, got NoneType"),
    ({"memory": torch.zeros(2, 3, 8, dtype=torch.int64)}, TypeError, "memory: expected a floating dtype"),
    ({"inputs": X.float()}, TypeError, r"inputs\[0\]: expected torch.float64 like memory, got torch.float32"),
    ({"inputs": X.to("meta")}, ValueError, r"inputs\[0\]: expected a tensor on cpu like memory, got meta"),
    ({"memory": X[:, 0, :, :5]}, ValueError, r"memory: expected \(B, 3, 8\) for these parameters, got \(2, 4, 5\)"),
    ({"memory": X[:, 0]}, ValueError, r"memory: expected \(B, 3, 8\) for these parameters, got \(2, 4, 8\)"),
    ({"inputs": X[0]}, ValueError, r"inputs\[0\]: expected \(2, T, n, 8\), got \(3, 4, 8\)"),
    ({"inputs": (X, X[:, :2])}, ValueError, r"inputs\[1\]: expected \(2, 3, n, 8\), got \(2, 2, 4, 8\)"),
    ({"inputs": X[:, :, :2]}, ValueError, r"parameters.positions.read: expected \(5, 8\) for memory 3, input 2"),
    ({"gather": 2}, TypeError, "gather: expected a function of a tensor, got int"),
    ({"valid": [1]}, TypeError, "valid: expected a tensor, got list"),
    ({"valid": torch.ones(2, 3)}, TypeError, "valid: expected integers, got torch.float32"),
    ({"valid": torch.ones(2, 3, dtype=torch.int64, device="meta")}, ValueError, "valid: expected a tensor on cpu"),
    ({"valid": torch.ones(2, 4, dtype=torch.int64)}, ValueError, r"valid: expected \(2, 3, 1\), got \(2, 4\)"),
]


@pytest.mark.parametrize(("change", "error", "text"), ERRORS, ids=[text for _, _, text in ERRORS])
def test_errors(change: dict, error: type[Exception], text: str) -> None:
    call = {"memory": torch.zeros(2, 3, 8, dtype=torch.float64), "inputs": X, "parameters": machine(tokens=4)}
    call |= {"valid": None, "gather": None} | change
    options = {name: call[name] for name in ("valid", "gather")}
    with pytest.raises(error, match=f"^token_turing_recurrence: {text}"):
        token_turing_recurrence(call["memory"], call["inputs"], call["parameters"], **options)


def test_error_of_processor_positions() -> None:
    p = machine(unit="simple")
    with pytest.raises(ValueError, match=r"parameters.process.positions: expected \(6, 8\) for memory 4"):
        token_turing_recurrence(torch.zeros(2, 4, 8, dtype=torch.float64), X, p)
