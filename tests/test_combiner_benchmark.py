"""The Combiner's benchmark, small: its tables, files and errors, and that it counts and compares the right things."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("av", reason="PyAV reads the clip")

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import combiner, harness
from mirasol_kernels import use_backend
from mirasol_model import MirasolConfig
from mirasol_model.combiner import build_combiner
from tests.numerics import assert_close_fp64


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(combiner, "TIMING_SECONDS", 0.0)
    monkeypatch.setattr(harness, "ceilings", lambda device: {"gemm float32": 1e9, "copy": 1e9})
    monkeypatch.setenv("MIRASOL_COMMIT", "a plain copy")


def report(folder, arguments):
    assert combiner.main([*arguments, "--out", str(folder / "new")]) == 0
    text = (folder / "new" / f"combiner-{arguments[0]}.json").read_text()
    assert os.uname().nodename not in text and str(Path.home()) not in text and str(harness.ROOT) not in text
    found = json.loads(text)
    assert found["machine"]["commit"] == "a plain copy"
    for row in found["rows"]:
        assert 0 < row["seconds_low"] <= row["seconds"] <= row["seconds_high"] and row["rounds"] >= harness.LEAST_ROUNDS
    return found


def test_pruning(quick, tmp_path, capsys):
    arguments = ["pruning", "--preset", "tiny", "--snippets", "2", "--layers", "1", "2", "--contexts", "current"]
    found = report(tmp_path, arguments)
    assert found["n"] == 326 and found["tokens"] == 32 and found["preset"] == "tiny"
    keys = [(row["layers"], row["train"], row["candidate"]) for row in found["rows"]]
    both = ["pruned", "unpruned"]
    assert keys == [(layers, train, name) for layers in (1, 2) for train in (False, True) for name in both]
    printed = capsys.readouterr().out
    assert printed.count("training step: saves") == printed.count("forward: saves") == 2
    assert printed.splitlines()[-1] == f"wrote {tmp_path / 'new' / 'combiner-pruning.json'}"


def test_kinds(quick, tmp_path, capsys):
    arguments = ["kinds", "--preset", "tiny", "--frames", "4", "--combiner", "ttm", "token_learner"]
    found = report(tmp_path, arguments)
    keys = [(row["frames"], row["train"], row["combiner"]) for row in found["rows"]]
    assert keys == [(4, train, kind) for train in (False, True) for kind in ("ttm", "token_learner")]
    assert len({(row["combiner"], row["parameters"]) for row in found["rows"]}) == 2
    assert all(0 <= row["step_bytes"] < row["peak_bytes"] for row in found["rows"])
    assert "a Token Turing Machine" in capsys.readouterr().out


@pytest.mark.parametrize("context", ["current", "all"])
def test_the_unpruned_one_is_the_same_function(context):
    config = replace(MirasolConfig.preset("tiny").combiner, context=context)
    pruned = build_combiner(8, replace(config, heads=2)).double()
    whole, sources = combiner.unpruned(pruned), [torch.randn(2, 3, n, 8).double() for n in (5, 2)]
    assert len(whole.blocks) == len(pruned.blocks) + 1
    assert_close_fp64(whole(*sources), pruned(*sources))
    assert list(whole.state_dict()) == list(pruned.state_dict())


@pytest.mark.parametrize("pruned", [True, False])
def test_flops_are_those_of_the_products(pruned):
    """The reference of one snippet by itself computes no pair that nobody sees."""
    dim, snippets, tokens = 8, 3, 11
    config = replace(MirasolConfig.preset("tiny").combiner, heads=2, layers=3)
    module = build_combiner(dim, config)
    module = module if pruned else combiner.unpruned(module)
    sources = [torch.randn(1, snippets, tokens - config.tokens, dim)]
    with FlopCounterMode(display=False) as counter, use_backend("reference"):
        module(*sources, None)
    assert counter.get_total_flops() == combiner.flops(config, dim, snippets, tokens, pruned=pruned, train=False)


def test_flops_of_every_snippet_so_far():
    """One snippet sees itself; the second costs its own linear layers, and attention over both."""
    config = replace(MirasolConfig.preset("tiny").combiner, heads=2, layers=1)
    every = replace(config, context="all")
    for train in (False, True):
        alone = combiner.flops(config, 8, 2, 11, pruned=True, train=train)
        pairs = 4 * config.tokens * 11 * 8
        both = combiner.flops(every, 8, 2, 11, pruned=True, train=train)
        assert both - alone == (7 * pairs // 2 if train else pairs)


@pytest.mark.parametrize("arguments", [[], ["kinds", "--frames", "0"], ["pruning", "--layers", "x"]])
def test_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        combiner.read(arguments)
    assert caught.value.code == 2 and "usage: python -m benchmarks.combiner" in capsys.readouterr().err
