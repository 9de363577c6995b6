"""Training runs: what one step is, that they learn, go on after being killed as if nothing had been, and are shared."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

pytest.importorskip("tensorboard", reason="runs are logged to TensorBoard")

from tokenizers import Tokenizer, models

from mirasol_model import Mirasol, checkpoints, train
from mirasol_model.data import BadExample
from mirasol_model.train_config import OptimizerConfig, TrainConfig
from tests.model.runs import rows_of, write_config
from tests.numerics import assert_close_fp64

CPU = torch.device("cpu")
MEASURED = ("loss", "latent", "video", "audio", "text", "norm")
UNMASKED = {"preset": "tiny", "change": {"latent": {"mask_ratio": 0.0}}}


def trainer(path: Path) -> train.Trainer:
    return train.Trainer(TrainConfig.load(path), CPU)


def run(folder: Path, **changes) -> list[dict]:
    assert train.main(["--config", str(write_config(folder, **changes))]) == 0
    return rows_of(folder)


def program(*arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# ------------------------------------------------------------------------------------------------- killed and resumed

MOMENTS = {
    "backward:2": "in the first steps, before there is a checkpoint",
    "fsync:2": "the first checkpoint's data are on the disk, its table is not",
    "step:5": "between two checkpoints",
    "write:2": "in the middle of a row of the log",
    "answers:1": "while it is evaluated",
    "rename:1": "a checkpoint's table is written, but under another name",
    "rename:2": "all of a checkpoint is written, under another name",
    "rmtree:3": "an old checkpoint is half removed",
    "export:1": "after the last checkpoint",
}


def test_a_run_that_is_killed_and_resumed_is_the_unbroken_one(tmp_path):
    """Bit by bit: every loss, what evaluation found, and the weights. With bad clips, and a process that decodes."""
    data = {"train": {"bad": 5}, "workers": 1}
    whole = run(tmp_path / "whole", data=data)
    assert [row["step"] for row in whole if "loss" in row] == list(range(1, 11))
    assert [row["step"] for row in whole if "exact" in row] == [5, 10] and whole[-1]["of"]["all"] == 5

    said = program("tests.model.runs", str(write_config(tmp_path / "killed", data=data)), *MOMENTS)
    ends = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    assert [end["code"] for end in ends] == [-9] * len(MOMENTS) + [0]
    assert ends[1]["checkpoints"] == ["growing"] and "leaving" in ends[7]["checkpoints"]
    assert ends[-1]["checkpoints"] == ["step-00000009", "step-00000010"]

    assert rows_of(tmp_path / "killed") == whole
    weights = [(tmp_path / name / "run" / "model" / "model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert weights[0] == weights[1]


def test_a_finished_run_has_nothing_to_do_and_another_configuration_is_refused(tmp_path):
    first = run(tmp_path, steps=2)
    assert run(tmp_path, steps=2, batch=3, keep=1) == first
    with pytest.raises(
        ValueError, match=r"run of another configuration: optimizer.rate 0.5 \(not 0.001\), seed 1 \(not"
    ):
        run(tmp_path, steps=2, seed=1, optimizer={"rate": 0.5})


def test_what_a_run_left_is_not_erased_where_its_checkpoints_are_gone(tmp_path):
    """Neither a finished run's, nor that of one that had saved; one that had not may begin anew."""
    rows, folder = run(tmp_path, steps=5), tmp_path / "run"
    shutil.rmtree(folder / "checkpoints")
    for gone in ("", "model"):
        if gone:
            shutil.rmtree(folder / gone)
        with pytest.raises(ValueError, match=r"train: out: expected a new folder, .*, got .*, whose run has none left"):
            run(tmp_path, steps=5, batch=1)
        assert rows_of(tmp_path) == rows and json.loads((folder / "config.json").read_text())["batch"] == 2
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    assert run(tmp_path, steps=5, save_every=1) == rows


def test_a_checkpoint_is_everything(tmp_path):
    """Also the moments of parameters that had no gradient yet, and what no later run may read: a half-written one."""
    made = trainer(write_config(tmp_path))
    made.step(made.batches())
    made.save()
    (made.checkpoints / "growing").mkdir()
    other = trainer(write_config(tmp_path))
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.add_(1)
    other.load()
    assert checkpoints.steps(made.checkpoints) == [1]
    assert {name: int(value) for name, value in other.progress.items()} == {"step": 1, "examples": 2, "skipped": 0}
    for a, b in zip(made.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)
        mine, its = made.optimizer.state[a], other.optimizer.state[b]
        assert mine.keys() == its.keys() and all(torch.equal(mine[name], its[name]) for name in mine)


# ------------------------------------------------------------------------------------------------------------ a step


@pytest.fixture
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_accumulated_batches_are_one_batch(tmp_path, float64):
    """To rounding: the same clips, as much to predict in each half."""
    rows, weights = [], []
    for batch, accumulation in ((6, 1), (3, 2)):
        path = write_config(
            tmp_path, batch=batch, accumulation=accumulation, model=UNMASKED, data={"train": {"alike": True}}
        )
        made = trainer(path)
        rows.append(made.step(made.batches()))
        weights.append([parameter.detach() for parameter in made.model.parameters()])
    assert rows[0]["rate"] == rows[1]["rate"]
    for name in MEASURED:
        assert_close_fp64(*(torch.tensor(row[name]) for row in rows), what=name)
    for one, two in zip(*weights, strict=True):
        assert_close_fp64(one, two)


def test_the_rate_rises_and_falls():
    config = OptimizerConfig(rate=1.0, warmup=4, final=0.1)
    rates = [train.learning_rate(config, step, 20) for step in range(1, 21)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[-1] == pytest.approx(0.1)
    assert rates[11] == pytest.approx(0.55) and all(a > b for a, b in pairwise(rates[3:]))
    assert train.learning_rate(replace(config, warmup=0), 1, 1) == pytest.approx(0.1)


def test_vectors_do_not_decay_and_the_beginning_changes_nothing(tmp_path):
    model = train.build_model(TrainConfig.load(write_config(tmp_path)))
    before = [p.clone() for p in model.parameters()]
    optimizer = train.build_optimizer(model, OptimizerConfig(weight_decay=0.3))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    decay = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert all(decay[p] == (0.3 if p.ndim > 1 else 0.0) for p in model.parameters())
    assert all(state["step"] == 0 and not state["exp_avg"].any() for state in optimizer.state.values())


def test_random_numbers_are_a_function_of_the_step():
    drawn = []
    for numbers in ((0, 1), (0, 2), (0, 1)):
        train.seed_everything(*numbers)
        drawn.append(torch.rand(3).tolist())
    assert drawn[0] == drawn[2] != drawn[1]


def test_phases_differ_in_the_weight_of_text_and_in_what_is_predicted(tmp_path):
    for phase, weight, hidden in (("pretrain", 1.0, 0), ("finetune", 10.0, len("which colour?") + 1)):
        made = trainer(write_config(tmp_path, phase=phase))
        batch = next(made.batches())
        assert made.model.config.losses.text == weight
        assert all(int((row == -100).sum()) >= hidden for row in batch.labels)
        assert (batch.labels[:, :hidden] == -100).all() and (batch.labels[0, hidden] == batch.text[0, hidden])
    made = trainer(write_config(tmp_path, model={"preset": "tiny", "change": {"losses": {"text": 3.0}}}))
    assert made.model.config.losses.text == 3.0


def test_bfloat16(tmp_path):
    made = trainer(write_config(tmp_path, bfloat16=True))
    assert made.bfloat16 and not trainer(write_config(tmp_path)).bfloat16
    seen = []
    made.model.combiner.register_forward_hook(lambda module, inputs, out: seen.append(out))
    made.model.encoder.blocks[0].fc1.register_forward_hook(lambda module, inputs, out: seen.append(out.dtype))
    row = made.step(made.batches())
    assert seen[0] == torch.bfloat16 and math.isfinite(row["loss"])
    assert all(p.dtype == torch.float32 for p in made.model.parameters())


def test_gradients_that_are_not_finite_stop_the_run(tmp_path):
    made = trainer(write_config(tmp_path))
    with torch.no_grad():
        made.model.text.norm.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="train: the gradients of step 1 are not finite"):
        made.step(made.batches())


# ------------------------------------------------------------------------------------------------------- whole runs


def test_it_learns_and_a_second_phase_begins_where_the_first_ended(tmp_path):
    """Colours of clips that it never saw, each of both lengths; three answers of different lengths."""
    data = {"train": {"length": 48}, "evaluate": {"seed": 1, "length": 12}}
    rows = run(
        tmp_path / "first", data=data, steps=110, batch=4, evaluate_every=200, optimizer={"rate": 3e-3, "warmup": 10}
    )
    assert rows[-1]["exact"] == {"all": 1.0, "early": 1.0, "late": 1.0} and rows[-1]["of"]["all"] == 12
    assert rows[-2]["text"] < 0.3 < 4 < rows[0]["text"]
    folder = tmp_path / "first" / "run"
    assert {"config.json", "log.jsonl", "tensorboard", "checkpoints", "curves.png", "model"} == {
        path.name for path in folder.iterdir()
    }
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")

    start = {"start": str(folder / "model"), "preset": None}
    again = trainer(write_config(tmp_path / "second", phase="pretrain", model=start, data=data))
    saved = Mirasol.from_pretrained(folder / "model")
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), saved.parameters(), strict=True))
    assert again.model.training and again.model.config.losses.text == 1.0
    assert again.evaluate()["exact"]["all"] == 1.0
    with pytest.raises(ValueError, match=r"from_pretrained: config: .* combiner.kind 'ttm' \(not 'transformer'\)"):
        trainer(write_config(tmp_path / "third", model={**start, "change": {"combiner": {"kind": "ttm"}}}))


def test_an_answer_must_be_right_to_its_end(tmp_path, monkeypatch):
    made = trainer(write_config(tmp_path, data={"evaluate": {"seed": 1, "length": 6}}))
    words = {"red": "red", "green": "greens", "blue": ""}

    def generate(video, audio, prompt, longest, **more):
        answers = [("red", "green", "blue")[int(clip.float().mean((1, 2, 3)).argmax())] for clip in video]
        rows = [made.text.answer(words[answer])[:longest] for answer in answers]
        return torch.tensor([row + [0] * (longest - len(row)) for row in rows])

    monkeypatch.setattr(made.model, "generate", generate)
    assert made.evaluate()["exact"]["all"] == pytest.approx(1 / 3)
    assert made.model.training


def test_an_answer_that_says_nothing_is_never_right(tmp_path, monkeypatch, capsys):
    """What the tokenizer has no words for is not asked; and who does not end has said nothing, not the right thing."""
    known = {"<pad>": 0, "</s>": 1, "<unk>": 2, "red": 3, "green": 4}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    choice = {"preset": "tiny", "tokenizer": str(tmp_path / "tokenizer.json")}
    made = trainer(write_config(tmp_path, model=choice, data={"evaluate": {"seed": 1, "length": 6}}))
    monkeypatch.setattr(made.model, "generate", lambda video, *_, **__: torch.full((len(video), 2), 2))
    assert made.evaluate() == {
        "step": 0,
        "exact": {"all": 0, "early": 0, "late": 0},
        "of": {"all": 4, "early": 2, "late": 2},
        "skipped": 2,
    }
    assert "answer: expected words that the tokenizer has, got 'blue'" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------- bad data


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_examples_are_skipped_with_a_counted_warning(tmp_path, capsys, workers):
    made = trainer(write_config(tmp_path, data={"train": {"bad": 3, "length": 6}, "workers": workers}))
    batches = made.batches()
    seen = [next(batches) for _ in range(6)]  # two passes
    assert all(len(batch.frames) == 2 for batch in seen)
    warnings = capsys.readouterr().err.splitlines()
    assert sorted(line.split(": ", 2)[2] for line in warnings) == ["clip-2: no good", "clip-5: no good"]
    assert warnings[-1].startswith("warning: skipped, 2 so far: clip-")
    assert made.skipped == 2 * sum(len(made.examples[i].skipped) for i in range(6)) >= 4
    assert made.step(batches)["skipped"] == int(made.progress["skipped"]) >= 4 and made.skipped == 0


@pytest.mark.parametrize("workers", [0, 1])
def test_or_they_stop_the_run(tmp_path, workers):
    bad = {"train": {"bad": 3, "length": 6}, "workers": workers, "bad": "stop"}
    with pytest.raises(BadExample, match=r"^data: clip-[25]: no good$"):
        run(tmp_path, data=bad)


@pytest.mark.parametrize("workers", [0, 1])
def test_data_without_a_good_example_end_with_an_error(tmp_path, workers):
    with pytest.raises(BadExample, match=r"data: no example that can be used among \d+; the last: clip-\d: no good"):
        run(tmp_path, data={"train": {"bad": 1, "length": 6}, "workers": workers})


def test_bad_questions_are_not_asked(tmp_path, capsys):
    made = trainer(write_config(tmp_path, data={"evaluate": {"bad": 2, "length": 6}}))
    found = made.evaluate()
    assert found["of"] == {"all": 3, "late": 3} and found["skipped"] == 3
    assert capsys.readouterr().err.count("no good") == 3


def test_data_that_never_come_are_an_error(tmp_path, monkeypatch):
    path = write_config(tmp_path, data={"kind": "waiting", "workers": 1, "timeout": 1.0, "evaluate": None})
    monkeypatch.setitem(train.open_data.__globals__["SOURCES"], "waiting", lambda options, model: Waiting())
    with pytest.raises(RuntimeError, match="DataLoader timed out after 1"):
        train.main(["--config", str(path)])


class Waiting(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index):
        __import__("time").sleep(30)
