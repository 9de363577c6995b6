"""The configuration of a run: read from JSON and TOML, and errors that name the field."""

from __future__ import annotations

import json

import pytest

from mirasol_model import MirasolConfig
from mirasol_model.fields import build
from mirasol_model.train_config import FREE, TrainConfig, differences

LEAST = {"out": "run", "model": {"preset": "tiny"}, "data": {"kind": "folder", "train": {"prompts": "a.jsonl"}}}


def test_json_and_toml_are_the_same(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({**LEAST, "steps": 3, "optimizer": {"betas": [0.8, 0.9]}}))
    (tmp_path / "a.toml").write_text(
        'out = "run"\nsteps = 3\nmodel.preset = "tiny"\n[optimizer]\nbetas = [0.8, 0.9]\n'
        '[data]\nkind = "folder"\ntrain = {prompts = "a.jsonl"}\n'
    )
    config = TrainConfig.load(tmp_path / "a.json")
    assert config == TrainConfig.load(tmp_path / "a.toml") == build(TrainConfig, config.to_dict(), "")
    assert config.steps == 3 and config.optimizer.betas == (0.8, 0.9) and config.phase == "pretrain"
    for name in ("a.json", "a.toml"):
        (tmp_path / name).write_text("{]")
        with pytest.raises(ValueError, match=rf"config: .*{name}: expected (JSON|TOML)"):
            TrainConfig.load(tmp_path / name)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"speed": 1}, ValueError, "config: the whole: expected only out, model, .*, got speed"),
        ({"out": 3}, TypeError, "config: out: expected str, got 3"),
        ({"phase": "play"}, TypeError, r"config: phase: expected one of \('pretrain', 'finetune'\), got 'play'"),
        ({"steps": 0}, ValueError, "config: train.steps: expected an integer of at least 1, got 0"),
        ({"steps": 1.5}, TypeError, "config: steps: expected int, got 1.5"),
        ({"seed": -1}, ValueError, "config: seed: expected 0 or more, got -1"),
        ({"bfloat16": 1}, TypeError, "config: bfloat16: expected bool, got 1"),
        ({"model": {}}, ValueError, "config: model.preset: expected either it or model.start, got None"),
        ({"model": {"preset": "huge"}}, ValueError, "config: model.preset: expected one of tiny, small, base, 3b"),
        ({"model": {"preset": "tiny", "change": 1}}, TypeError, "config: model.change: expected dict"),
        ({"model": 3}, TypeError, "config: model: expected a mapping, got int"),
        ({"data": {"kind": "folder"}}, ValueError, "config: data.train: expected a value, got None"),
        ({"data": {**LEAST["data"], "workers": -1}}, ValueError, "config: data.workers: expected 0 or more, got -1"),
        ({"data": {**LEAST["data"], "timeout": 0}}, ValueError, "config: data.timeout: expected seconds, more than 0"),
        ({"data": {**LEAST["data"], "bad": "eat"}}, TypeError, r"data.bad: expected one of \('skip', 'stop'\)"),
        ({"optimizer": {"rate": 0}}, ValueError, "config: optimizer.rate: expected more than 0, got 0"),
        ({"optimizer": {"clip": -1.0}}, ValueError, "config: optimizer.clip: expected more than 0, got -1.0"),
        ({"optimizer": {"warmup": -1}}, ValueError, "config: optimizer.warmup: expected 0 or more, got -1"),
        ({"optimizer": {"weight_decay": -1}}, ValueError, "optimizer.weight_decay: expected 0 or more, got -1"),
        ({"optimizer": {"final": 2}}, ValueError, r"optimizer.final: expected a share in \[0, 1\], got 2"),
        ({"optimizer": {"betas": [0.9, 1.0]}}, ValueError, r"optimizer.betas: expected two shares in \[0, 1\)"),
    ],
)
def test_what_does_not_fit_is_an_error(change, error, message):
    with pytest.raises(error, match=message):
        build(TrainConfig, {**LEAST, **change}, "")


def test_the_model_of_a_run(tmp_path):
    change = {"combiner": {"kind": "ttm"}, "recompute": "snippet"}
    config = build(TrainConfig, {**LEAST, "model": {"preset": "tiny", "change": change}}, "")
    made, tiny = config.model.config("finetune"), MirasolConfig.preset("tiny")
    assert tiny.differences(made) == "combiner.kind 'ttm' (not 'transformer')"
    assert made.recompute == "snippet" and made.losses.text == 10.0
    for name, value in (("combiner", {"kin": "ttm"}), ("combine", {})):
        with pytest.raises(ValueError, match=rf"config: .*expected only .*, got {'kin' if value else 'combine'}"):
            build(TrainConfig, {**LEAST, "model": {"preset": "tiny", "change": {name: value}}}, "").model.config(
                "pretrain"
            )
    with pytest.raises(ValueError, match=r"model.start: expected a folder with a config.json, got 'nowhere'"):
        build(TrainConfig, {**LEAST, "model": {"start": "nowhere"}}, "").model.config("pretrain")


def test_a_second_phase_has_the_words_of_the_first(tmp_path):
    """It says so where a run writes it down, so that one that goes on without them is another."""
    file, start = tmp_path / "tokenizer.json", {"model": {"start": str(tmp_path)}}
    bytes_ = build(TrainConfig, {**LEAST, **start}, "")
    file.touch()
    words = build(TrainConfig, {**LEAST, **start}, "")
    assert bytes_.model.tokenizer is None and words.to_dict()["model"]["tokenizer"] == str(file)
    assert differences(words.to_dict(), bytes_.to_dict()) == [f"model.tokenizer None (not {str(file)!r})"]
    own = {**LEAST, "model": {"start": str(tmp_path), "tokenizer": "own.json"}}
    assert build(TrainConfig, own, "").model.tokenizer == "own.json"
    assert build(TrainConfig, LEAST, "").model.tokenizer is None


def test_a_start_may_leave_out_what_is_default(tmp_path):
    (tmp_path / "config.json").write_text('{"combiner": {"kind": "ttm"}}')
    made = build(TrainConfig, {**LEAST, "model": {"start": str(tmp_path)}}, "").model.config("finetune")
    assert made.combiner.kind == "ttm" and made.losses.text == 10.0


def test_what_may_change_when_a_run_is_resumed():
    begun = json.loads(json.dumps(build(TrainConfig, LEAST, "").to_dict()))
    for name in FREE:
        *part, field = name.split(".")
        now = json.loads(json.dumps(begun))
        assert field in (now[part[0]] if part else now)
        (now[part[0]] if part else now)[field] = "another"
        assert differences(begun, now) == []
    assert differences(begun, {**begun, "steps": 5}) == ["steps 5 (not 1000)"]
    assert differences(begun, {**begun, "model": {**begun["model"], "change": {"recompute": "snippet"}}}) == [
        "model.change.recompute 'snippet' (not None)"
    ]
