"""python -m benchmarks.huggingface: what it measures is the model it says, on the attention it says."""

import json

import torch

from benchmarks import huggingface
from mirasol_kernels.integrations import transformers as integration


def test_it_runs_and_writes_what_it_prints(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(huggingface, "TIMING_SECONDS", 0.01)
    layouts = []
    run = integration.block_causal_attention
    monkeypatch.setattr(integration, "block_causal_attention", lambda *a, **k: (layouts.append(a[3]), run(*a, **k))[1])
    assert huggingface.main(["--tokens", "300", "--attention", "mirasol", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "huggingface.json").read_text())
    assert [(row["tokens"], row["train"], row["attention"]) for row in report["rows"]] == [
        (300, False, "mirasol"),
        (300, True, "mirasol"),
    ]
    assert all(row["seconds"] > 0 and row["step_bytes"] > 0 for row in report["rows"])
    assert capsys.readouterr().out.count("300 tokens") == 2
    mask = layouts[-1].dense_mask()[0]
    assert mask[256].sum() == 300 and torch.equal(mask[:256], torch.ones(300, 300).tril().bool()[:256])
