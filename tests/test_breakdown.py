"""The profile, small: its table, its file, and what it takes an operation for."""

import json
from types import SimpleNamespace

import pytest

pytest.importorskip("av", reason="PyAV reads the clip")

from benchmarks import breakdown, harness


def event(*names):
    """The first is the operation, the others are what called it."""
    made = None
    for name in reversed(names):
        made = SimpleNamespace(name=name, cpu_parent=made)
    return made


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (("aten::addmm", "aten::linear"), "GEMM"),
        (("aten::mm",), "GEMM"),
        (("aten::copy_", "aten::addmm"), "bias"),
        (("aten::copy_", "aten::contiguous"), "copy"),
        (("aten::sum", "AddmmBackward0"), "bias"),
        (("aten::sum",), "other"),
        (("aten::_scaled_dot_product_flash_attention_for_cpu_backward",), "attention"),
        (("mirasol_native::block_causal_attention_bwd",), "attention"),
        (("mirasol_native::token_learner_fwd",), "fused op"),
        (("aten::native_layer_norm_backward",), "LayerNorm"),
        (("aten::gelu",), "GELU"),
        (("aten::add_",), "add"),
        (("aten::addcmul",), "other"),
        (("aten::cat",), "copy"),
    ],
)
def test_kinds(names, kind):
    assert breakdown.kind_of(event(*names)) == kind


def test_saved_at_most():
    seconds = dict.fromkeys(breakdown.KINDS, 0.0) | {"GEMM": 6.0, "LayerNorm": 1, "add": 1, "GELU": 1.5, "bias": 0.5}
    row = {"seconds": seconds, "bytes_fused": {"LayerNorm": 10.0, "GELU": 15.0}}
    assert breakdown.at_most(row, 10.0) == {"LayerNorm": 0.1, "GELU": 0.05}


def test_table_and_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(harness, "ceilings", lambda device: {"gemm float32": 1e9, "copy": 1e9})
    out = tmp_path / "new"
    assert breakdown.main(["--preset", "tiny", "--frames", "8", "--combiner", "current", "--out", str(out)]) == 0
    report = json.loads((out / "breakdown.json").read_text())
    parts = ["encoder", "Combiner current", "model, current"]
    assert [(row["part"], row["train"]) for row in report["rows"]] == [(p, t) for t in (False, True) for p in parts]
    for row in report["rows"]:
        assert all(row["seconds"][kind] > 0 for kind in ("GEMM", "attention", "LayerNorm", "GELU", "add", "bias"))
        assert set(row["saved_at_most"]) == set(row["bytes_fused"]) == {"LayerNorm", "GELU"}
    forward, step = report["rows"][0], report["rows"][3]
    # 2 snippets; per token 2 blocks of 2 norms and a last one, and 2 GELUs.
    tokens = 2 * sum(breakdown.tokens_of(breakdown.MirasolConfig.preset("tiny")))
    assert forward["bytes_fused"] == {"LayerNorm": 4 * tokens * 5 * 64 * 4, "GELU": 2 * tokens * 2 * 128 * 4}
    assert step["bytes_fused"]["LayerNorm"] == 2 * forward["bytes_fused"]["LayerNorm"]
    assert step["bytes_fused"]["GELU"] == 5 / 2 * forward["bytes_fused"]["GELU"]
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == f"wrote {out / 'breakdown.json'}" and len(printed) == 2 + len(report["rows"]) + 1
