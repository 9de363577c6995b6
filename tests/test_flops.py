"""Flops of our ops, counted where they are called, against what their own cases and the plain form say."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cases import latent_recurrence, token_learner
from benchmarks.flops import counted_ops
from mirasol_kernels import SnippetLayout, block_causal_attention, explain, use_backend
from mirasol_kernels import token_learner as learner

if explain("block_causal_attention")["native"] != "runs":
    pytest.skip("counts the operators of the compiled kernels", allow_module_level=True)


def counted(work) -> int:
    with counted_ops() as formulas, FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        work()
    return counter.get_total_flops()


def test_attention_is_counted_by_pairs_that_see_each_other() -> None:
    layout = SnippetLayout.uniform(5, 3, window=2, sink=1)
    pairs = int(layout.dense_mask().sum())
    q, k, v = (torch.randn(2, heads, 15, width, requires_grad=True) for heads, width in ((4, 8), (2, 8), (2, 6)))
    forward = 2 * 2 * 4 * pairs * (8 + 6)
    assert counted(lambda: block_causal_attention(q, k, v, layout)) == forward
    assert counted(lambda: block_causal_attention(q, k, v, layout).sum().backward()) == 7 * forward // 2


def test_a_token_learner_is_counted_as_its_case_says() -> None:
    case = token_learner.CASES["quick"]
    leaves = [x.requires_grad_() for x in case.inputs(torch.float32, "cpu", 0)]
    leaves.pop(6)
    sources, *rest = case.split(leaves)

    def call(**options):
        return learner(sources, *rest[:6], positions=rest[6:], **options)

    assert counted(call) == case.flops("forward") == counted(lambda: call(backend="reference"))
    assert counted(lambda: call().sum().backward()) == case.flops("backward")
    few = torch.tensor([[3, 9], [20, 0], [0, 0]])
    assert counted(lambda: call(valid=few)) == case.flops("forward") * 32 / (3 * 29)


@pytest.mark.parametrize("layers", [1, 2])
def test_a_token_turing_machine_is_counted_as_the_loop(layers) -> None:
    case = latent_recurrence.Case("x", "a test", 5, 7, 32, 6, 3, 2, layers=layers, mlp=16)
    *weights, state, x, _, _ = (v.requires_grad_() for v in case.inputs(torch.float32, "cpu", 0))

    def call():
        return case.ours(weights, state, x)

    with use_backend("native"):
        forward = counted(call)
        assert forward == case.flops("forward")
        both = counted(lambda: sum(y.sum() for y in call()).backward())
    # Backward of what pools the inputs makes their logits again, which the loop keeps.
    again = 2 * case.batch * case.steps * case.n * latent_recurrence.HIDDEN * (2 * case.c + case.slots + case.read)
    assert both == 3 * forward + again
