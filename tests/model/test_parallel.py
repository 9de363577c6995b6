"""The model on several processes: rows shared out, snippets shared out, and checkpoints for another number of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from mirasol_kernels import Ranks
from mirasol_model import checkpoints
from mirasol_model.checkpoints import load, save
from mirasol_model.parallel import SnippetParallel, shard
from tests.model import distributed_training as training
from tests.model.clips import clip, model, words
from tests.numerics import assert_close_fp64
from tests.processes import run


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """A world of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.slow
def test_snippets_on_two_and_three_ranks(tmp_path: Path) -> None:
    """Losses, logits, latents and the gradient of every parameter are those of one process, for every Combiner."""
    assert all("all equal" in said for said in run("tests.model.distributed_snippets", 3, tmp_path))


@pytest.mark.slow
def test_training_on_several_ranks_and_going_on_with_another_number(tmp_path: Path) -> None:
    """DistributedDataParallel and `fully_shard`: losses of one process; saved by 2, resumed by 3 and by 1, and back."""
    checkpoints = str(tmp_path)
    for number, process_folder in ((2, tmp_path / "two"), (3, tmp_path / "three")):
        process_folder.mkdir()
        run("tests.model.distributed_training", number, process_folder, checkpoints)
    for number, saved in ((3, "fsdp2"), (2, "ddp3")):
        process_folder = tmp_path / f"from {saved}"
        process_folder.mkdir()
        run("tests.model.distributed_training", number, process_folder, checkpoints, saved)
    expected, single = training.alone()
    for saved in ("ddp2", "fsdp3"):
        made = training.made()
        optimizer = training.adam(made)
        load(tmp_path / saved, made, optimizer)
        steps = range(training.BEFORE, training.BEFORE + training.AFTER)
        for got, want in zip(training.train(made, optimizer, steps), expected[steps.start :], strict=True):
            assert_close_fp64(got, want)
        training.same_parameters(made, single)


def test_a_checkpoint_of_another_model_or_not_complete_is_refused(tmp_path: Path) -> None:
    made = training.made()
    optimizer = training.adam(made)
    assert load(tmp_path, made, optimizer) is None
    training.train(made, optimizer, range(1))
    save(tmp_path, 1, made, optimizer)
    assert made.latent.mask not in optimizer.state  # it had no gradient, and that is how it comes back
    assert load(tmp_path, made, optimizer) == 1
    assert made.latent.mask not in optimizer.state and made.latent.slots in optimizer.state
    other = model("perceiver")
    before = [parameter.clone() for parameter in other.parameters()]
    for unlike, what in (
        (other, r"combiner\.\S+: expected \(.*\), got no such parameter \(and \d+ others\)"),
        (model("all", combiner={"tokens": 3}), r"\S+: expected \(3, 64\), got \(4, 64\)"),
    ):
        with pytest.raises(ValueError, match=r"load: folder: .*step-00000001 is of another model: model\." + what):
            load(tmp_path, unlike, training.adam(unlike))
    assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))
    alike = model("current", recompute="snippet", latent={"mask_ratio": 0.0})  # of equal shapes, and not the same
    with pytest.raises(ValueError, match=r"another model: expected .* got combiner.context 'current' \(not 'all'\)"):
        load(tmp_path, alike, training.adam(alike))
    with pytest.raises(ValueError, match=r"load: progress: expected names that .* has, got 'step'"):
        load(tmp_path, made, optimizer, {"step": torch.zeros(())})

    (whole,) = tmp_path.iterdir()
    file = next(whole.glob("*.distcp"))
    content = file.read_bytes()
    file.write_bytes(content[:-1000])
    with pytest.raises(
        ValueError, match=rf"load: folder: expected \d+ bytes in .*{file.name}, got {len(content) - 1000}"
    ):
        load(tmp_path, made, optimizer)
    (whole / ".metadata").unlink()
    with pytest.raises(ValueError, match=r"load: folder: expected a complete checkpoint, got .* without .metadata"):
        load(tmp_path, made, optimizer)


def test_the_last_checkpoints_are_kept_and_none_is_written_over(tmp_path: Path) -> None:
    made = training.made()
    optimizer = training.adam(made)
    for step in (1, 2, 3):
        save(tmp_path, step, made, optimizer, {"step": torch.tensor(step)}, keep=2)
    assert checkpoints.steps(tmp_path) == [2, 3]
    progress = {"step": torch.tensor(0)}
    assert load(tmp_path, made, optimizer, progress) == progress["step"] == 3
    for step in (3, 1):
        with pytest.raises(ValueError, match=rf"save: step: expected one after 3, the last .*, got {step}"):
            save(tmp_path, step, made, optimizer)
    assert checkpoints.steps(tmp_path) == [2, 3]
    with pytest.raises(ValueError, match="save: keep: expected at least 1, got 0"):
        save(tmp_path, 4, made, optimizer, keep=0)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_one_rank(mesh: DeviceMesh, kind: str) -> None:
    """Of a wrapped model, too, whole and by snippets: `generate` asks the sharded parameters, and says the same."""
    video, audio = clip(12, 2)
    made, text = model(), words(2)
    expected, said = made(video, audio, text, labels=text), made.generate(video, audio, text, 4)
    outer = shard(SnippetParallel(made, Ranks(mesh)), mesh, kind)
    out = outer(video, audio, text, labels=text)
    for got, want in zip(
        (out.loss, out.logits, out.latents), (expected.loss, expected.logits, expected.latents), strict=True
    ):
        assert_close_fp64(got.detach(), want.detach())
    out.loss.backward()
    assert torch.equal(made.generate(video, audio, text, 4), said)


def test_errors(mesh: DeviceMesh) -> None:
    made = model()
    with pytest.raises(ValueError, match="mesh: expected one dimension, got 2"):
        shard(made, init_device_mesh("cpu", (1, 1)))
    with pytest.raises(ValueError, match="kind: expected 'ddp' or 'fsdp', got 'tp'"):
        shard(made, mesh, "tp")
    ranks = Ranks(mesh)
    ranks.size = 4
    with pytest.raises(ValueError, match="expected a snippet for each of 4 ranks, got 3"):
        SnippetParallel(made, ranks)(*clip(12))
    with pytest.raises(ValueError, match="labels: expected None without text"):
        SnippetParallel(made, Ranks(mesh))(*clip(12), labels=words(1))
