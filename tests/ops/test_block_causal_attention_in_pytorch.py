"""block_causal_attention among PyTorch's own machinery: transforms, graphs, checkpoints, autocast, export."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from mirasol_kernels import SnippetLayout, block_causal_attention
from tests.numerics import assert_within_budget
from tests.ops.attention import BACKENDS, FUSED, ON_GPU, on_gpu, served

LAYOUT = SnippetLayout.uniform(3, 4)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return served(request.param)


def operands(*batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of LAYOUT."""
    return torch.randn(*batch, 4, 12, 8), torch.randn(*batch, 2, 12, 8), torch.randn(*batch, 2, 12, 3)


def loss_on(backend: str | None, layout: SnippetLayout = LAYOUT) -> Callable[..., Tensor]:
    def loss(q: Tensor, k: Tensor, v: Tensor, backend: str | None = backend) -> Tensor:
        out, lse = block_causal_attention(q, k, v, layout, return_lse=True, backend=backend)
        return out.square().sum() + lse.sum()

    return loss


# -------------------------------------------------------------------- torch.func


@pytest.mark.parametrize("layout", [LAYOUT, SnippetLayout.batch([LAYOUT] * 2)])
def test_vmap(backend: str, layout: SnippetLayout) -> None:
    q, k, v = operands(3, 2)
    v = v[0].unsqueeze(-1).expand(-1, -1, -1, -1, 3)  # mapped over the last dimension
    loss = loss_on(backend, layout)
    for function in (loss, torch.func.grad(loss, argnums=(0, 1, 2))):
        rows = [(q[i], k[i], v[..., i]) for i in range(3)]
        mapped = tree_leaves(torch.func.vmap(function, in_dims=(0, 0, 4))(q, k, v))
        single = zip(*[tree_leaves(function(*row)) for row in rows], strict=True)
        exact = zip(*[tree_leaves(function(*[x.double() for x in row], "reference")) for row in rows], strict=True)
        for actual, low, wide in zip(mapped, single, exact, strict=True):
            assert_within_budget(actual, torch.stack(low), torch.stack(wide))


def test_jacrev(backend: str) -> None:
    """The rows of a Jacobian are one batched backward, not one call each as torch does where it knows no better."""
    q, k, v = (x[:, :, :, :2] for x in operands(1))

    def jacobian(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return block_causal_attention(q, k, v, LAYOUT, backend=backend)

        return torch.stack([*map(torch.linalg.vector_norm, torch.func.jacrev(attend, (0, 1, 2))(q, k, v))])

    with warnings.catch_warnings():
        warnings.filterwarnings("error", "There is a performance drop")
        actual = jacobian(q, k, v, backend)
    exact = jacobian(*(x.double() for x in (q, k, v)), "reference")
    assert_within_budget(actual, jacobian(q, k, v, "reference"), exact)


def hvp(loss: Callable, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.autograd.functional.hvp(lambda q: loss(q, k, v), q, q)[1]


def twice(loss: Callable, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q.clone().requires_grad_()
    (dq,) = torch.autograd.grad(loss(q, k, v), q, create_graph=True)
    return torch.autograd.grad(dq.square().sum(), q)[0]


def dual(loss: Callable, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(loss(forward_ad.make_dual(q, torch.ones_like(q)), k, v)).tangent


DERIVATIVES: dict[str, Callable] = {
    "autograd twice": twice,
    "functional.hvp": hvp,
    "forward mode": dual,
    "grad of grad": lambda loss, q, k, v: torch.func.grad(lambda q: torch.func.grad(loss)(q, k, v).square().sum())(q),
    "jvp": lambda loss, q, k, v: torch.func.jvp(lambda q: loss(q, k, v), (q,), (q,))[1],
    "jacfwd": lambda loss, q, k, v: torch.func.jacfwd(loss)(q, k, v),
    "hessian": lambda loss, q, k, v: torch.func.hessian(loss)(q, k, v),
}


@pytest.mark.parametrize("kind", DERIVATIVES)
def test_other_derivatives(kind: str, backend: str) -> None:
    """The reference has them all (gradcheck in test_block_causal_attention); a fused backend says that it has not,
    where PyTorch on its own would hand out zeros for some."""
    q, k, v = operands(1)
    if backend == "reference":
        assert DERIVATIVES[kind](loss_on(backend), q, k, v).abs().sum() > 0
    else:
        with pytest.raises(NotImplementedError, match=f"{backend}.* not .*; backend='reference' has them all"):
            DERIVATIVES[kind](loss_on(backend), q, k, v)


def test_torch_func_inside_compile() -> None:
    """Dynamo drops a custom backward there, without a word: the reference runs instead."""
    torch._dynamo.reset()
    q, k, v = operands(1)
    exact = torch.func.grad(loss_on("reference"))(q.double(), k.double(), v.double())
    low = torch.func.grad(loss_on("reference"))(q, k, v)
    compiled = torch.compile(torch.func.grad(loss_on(None)), fullgraph=True, backend="aot_eager")
    assert_within_budget(compiled(q, k, v), low, exact)
    for name in FUSED:
        compiled = torch.compile(torch.func.grad(loss_on(served(name))), fullgraph=True, backend="aot_eager")
        with pytest.raises(Exception, match=r"torch.func inside torch.compile would lose its gradient"):
            compiled(q, k, v)


def test_a_tensor_that_left_torch_func() -> None:
    """It still leads to what it was made of, and so does the gradient."""
    q, k, v = (x.requires_grad_() for x in operands(1))
    left = []

    def leak(x: Tensor) -> Tensor:
        left.append(x)
        return x.sum()

    torch.func.grad(leak)(q)
    expected = torch.autograd.grad(loss_on(None)(q, k, v), (q, k, v))
    actual = torch.autograd.grad(loss_on(None)(left[0], k, v), (q, k, v))
    assert all(map(torch.equal, actual, expected))


# -------------------------------------------------------------------- eager, compiled, exported


def test_one_tensor_for_all(backend: str) -> None:
    """q, k and v may be one tensor, compiled too, where Dynamo would refuse it."""
    torch._dynamo.reset()
    x = torch.randn(2, 2, 12, 8, requires_grad=True)

    def call(x: Tensor) -> Tensor:
        return block_causal_attention(x, x, x, LAYOUT, backend=backend)

    def results(function: Callable, x: Tensor) -> tuple[Tensor, Tensor]:
        out = function(x)
        return out.detach(), *torch.autograd.grad(out.square().sum(), x)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    eager = results(call, x)
    wide = x.detach().double().requires_grad_()
    exact = results(lambda x: block_causal_attention(x, x, x, LAYOUT), wide)
    for actual, low, expected in zip(results(compiled, x), eager, exact, strict=True):
        assert_within_budget(actual, low, expected)


def test_no_grad_and_inference_mode(backend: str) -> None:
    q, k, v = (x.requires_grad_() for x in operands(2))
    out = block_causal_attention(q, k, v, LAYOUT, backend=backend)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            again = block_causal_attention(q, k, v, LAYOUT, backend=backend)
        assert not again.requires_grad and torch.equal(again, out)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(backend: str, reentrant: bool) -> None:
    """Recomputed in backward, with the bits that it had."""
    tensors = [x.requires_grad_() for x in operands(2)]
    expected = torch.autograd.grad(loss_on(backend)(*tensors), tensors)
    checkpoint(loss_on(backend), *tensors, use_reentrant=reentrant).backward()
    for x, gradient in zip(tensors, expected, strict=True):
        assert torch.equal(x.grad, gradient)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype: torch.dtype, compiled: bool) -> None:
    """As PyTorch's own attention: operands are cast, mixed ones too; gradients come in the dtype of each."""
    torch._dynamo.reset()
    q, k, v = operands(1)
    mixed = [x.requires_grad_() for x in (q.to(dtype), k, v)]

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return block_causal_attention(q, k, v, LAYOUT)

    function = torch.compile(call, fullgraph=True, backend="aot_eager") if compiled else call
    with torch.autocast("cpu", dtype):
        out = function(*mixed)
    gradients = torch.autograd.grad(out.float().square().sum(), mixed)
    assert [g.dtype for g in gradients] == [x.dtype for x in mixed] and out.dtype == dtype

    def results(*tensors: Tensor) -> tuple[Tensor, ...]:
        tensors = [x.detach().requires_grad_() for x in tensors]
        out = block_causal_attention(*tensors, LAYOUT)
        return out.detach(), *torch.autograd.grad(
            out.to(torch.promote_types(out.dtype, torch.float32)).square().sum(), tensors
        )

    rounded = [x.to(dtype) for x in mixed]
    low, exact = results(*rounded), results(*(x.double() for x in rounded))
    for actual, expected, wide in zip((out.detach(), *gradients), low, exact, strict=True):
        assert_within_budget(actual.to(dtype), expected, wide)


def test_autocast_leaves_float64_alone() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert block_causal_attention(*(x.double() for x in operands(1)), LAYOUT).dtype == torch.float64


class Block(torch.nn.Module):
    """As models hold it: the layout is the module's own, and becomes part of an exported program."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.project, self.layout, self.backend = torch.nn.Linear(8, 3 * 2 * 8), LAYOUT, backend

    def forward(self, x: Tensor) -> Tensor:  # (B, N, 8)
        q, k, v = self.project(x).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return block_causal_attention(q, k, v, self.layout, backend=self.backend)


@pytest.mark.parametrize("strict", [True, False])
def test_export(backend: str, strict: bool) -> None:
    """One operator, for any batch; saved and loaded it still computes the same."""
    block = Block(backend).requires_grad_(False)
    batch = {"x": {0: torch.export.Dim("batch", max=64)}}
    program = torch.export.export(block, (torch.randn(2, 12, 8),), dynamic_shapes=batch, strict=strict)
    named = [str(node.target) for node in program.graph.nodes if "mirasol_" in str(node.target)]
    assert named == ([] if backend == "reference" else [f"mirasol_{backend}.block_causal_attention_fwd.default"])
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    x = torch.randn(5, 12, 8)
    for module in (program.module(), torch.export.load(file).module(), program.run_decompositions().module()):
        assert torch.equal(module(x), block(x))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ON_GPU)
def test_cuda_graph(backend: str) -> None:
    """A step, forward and backward, is captured once and replayed on new numbers."""
    on_gpu(backend)
    layout = LAYOUT.to("cuda")
    tensors = [x.cuda().requires_grad_() for x in operands(2)]

    def step() -> tuple[Tensor, ...]:
        out = block_causal_attention(*tensors, layout, backend=backend)
        return out.detach(), *torch.autograd.grad(out, tensors, torch.ones_like(out))

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # what the first call compiles and allocates, a capture must not
        step()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for x in tensors:
            x.copy_(torch.randn_like(x))
    graph.replay()
    for actual, expected in zip(captured, step(), strict=True):
        assert torch.equal(actual, expected)
