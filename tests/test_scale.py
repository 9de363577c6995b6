"""What a training step costs on many GPUs, counted without one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import harness, layer_times, scale
from benchmarks.whole import configure
from mirasol_kernels import explain
from mirasol_model import layers

if explain("block_causal_attention")["native"] != "runs":
    pytest.skip("counts the operators of the compiled kernels", allow_module_level=True)

FRAMES, GPUS = 32, 2


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """`python -m benchmarks.scale` at its smallest -> its report."""
    folder = tmp_path_factory.mktemp("scale")
    options = ["--preset", "tiny", "--frames", str(FRAMES), "--gpus", "1", str(GPUS), "--out", str(folder)]
    assert scale.main([*options, "--tflops", "100", "--gbps", "10"]) == 0
    return json.loads((folder / "scale-tiny-current.json").read_text())


def test_memory_and_bytes(run: dict) -> None:
    config = configure("tiny", "current")
    one, two = run["rows"]
    parameters, size = one["parameters"], 4
    clip = FRAMES * (3 * config.video.size**2 + size * config.audio.sample_rate // scale.FPS)
    known = 3 * size * parameters + clip + 8 * scale.WORDS  # with Adam's two moments; without tables of positions
    assert known <= one["resting_bytes"] < 1.01 * known
    assert one["resting_bytes"] / two["resting_bytes"] == pytest.approx(GPUS, rel=0.1)
    assert one["peak_bytes"] - one["resting_bytes"] > size * parameters  # gradients, at least
    assert one["tokens_received"] == one["parameters_received"] == 0
    # Of each parameter half is elsewhere: it comes for forward, and again for backward but for those of the root, which
    # are kept; and half of its gradient comes.
    assert 2 * size * parameters / GPUS <= two["parameters_received"] <= 4 * size * parameters / GPUS
    snippets, m, dim = FRAMES // config.video.frames, config.combiner.tokens, config.encoder.dim
    of_one = snippets // GPUS * m * dim  # numbers in the compact tokens of a rank
    keys = 2 * of_one * 2, 2 * of_one * 4  # keys and values in bfloat16, and their gradients in float32
    ring = (GPUS - 1) * 3 * keys[0] + GPUS * keys[1]  # keys and values come for forward, again in it, and for backward
    latents, losses = 2 * (GPUS - 1) * of_one * size, 3 * size
    assert two["tokens_received"] == config.latent.layers * ring + latents + losses
    assert one["flops"] / GPUS < two["flops"] < one["flops"]  # the text decoder runs on both


def test_times_are_functions_of_rates_and_say_where_those_come_from(run: dict) -> None:
    for row in run["rows"]:
        assert row["times"] == "100 TFLOP/s ASSUMED; 10 GB/s ASSUMED"
        network = (row["tokens_received"] + row["parameters_received"]) / 10e9
        assert row["compute_seconds"] == row["flops"] / 100e12 and row["network_seconds"] == network
        assert row["least_seconds"] == max(network, row["compute_seconds"]) <= row["most_seconds"]


def test_rates_of_a_gpu_come_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "gpu.json"
    report = {"machine": {"gpu": "a GPU"}, "ceilings": {"gemm bfloat16": 5e14}}
    parser_options = ["--rates", str(file), "--frames", "32", "--gpus", "1"]
    for wrong in ({**report, "machine": {"cpu": "a CPU"}}, {**report, "ceilings": {}}):
        file.write_text(json.dumps(wrong))
        with pytest.raises(SystemExit):
            scale.main(parser_options)
        assert "expected a results file of a GPU" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        scale.main(["--frames", "16", "--gpus", "64"])
    assert "--gpus: expected a snippet of 8 frames for each, got 64" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        scale.main(["--combiner", "all", "--largest", "80"])
    assert "--largest: expected nothing with --combiner all" in capsys.readouterr().err
    rates = scale.Rates(5e14, None, "measured")
    row = {"gpus": 8, "flops": 1e15, "tokens_received": 1, "parameters_received": 1}
    assert rates.times(row) == {"compute_seconds": 2.0}  # of the network nothing is known


def test_the_longest_clip_is_where_the_first_line_meets_its_limit() -> None:
    def row(n: int) -> dict:
        return {
            "snippets": n,
            "frames": 4 * n,
            "peaks": {"a": int(1e9) + 4_000_000 * n, "b": int(1.1e9) + 1_000_000 * n},
        }

    fits = scale.largest([row(n) for n in scale.NEAR], [0.5, 2])
    assert fits["frames"] == {"0.5": 0, "2": 16 * 4 * (250 // 16)} and fits["bytes_per_snippet"] == 4e6


def test_a_long_clip_follows_from_short_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 16 snippets of 4 compact tokens a rank a layer is one piece, at 64 four, as 3b has them with its 32 tokens."""
    config = replace(configure("tiny", "current"), recompute="snippet")
    monkeypatch.setattr(layers, "AT_A_TIME", scale.APART * config.combiner.tokens)
    snippets = 64
    row = scale.far(scale.near(config, GPUS), snippets)
    direct = scale.step(config, snippets * GPUS * config.video.frames, GPUS)
    for key in ("frames", "snippets", "flops", "tokens_received", "parameters_received", "resting_bytes"):
        assert row[key] == direct[key], key
    # Of a layer it is the highest of several moments, each a line: one that overtakes later is missed. Never too high.
    assert 0.99 * direct["peak_bytes"] < row["peak_bytes"] <= direct["peak_bytes"]
    assert row["bend"] < 0.01


def test_layers_are_timed_by_what_more_of_them_add(monkeypatch: pytest.MonkeyPatch) -> None:
    flops = dict(zip(("base", *layer_times.PARTS), (100, 180, 140, 120, 110), strict=True))
    seconds = dict(zip(flops, (10.0, 14.0, 12.0, 11.0, 10.5), strict=True))
    rates = layer_times.rates(flops, seconds)
    assert rates == {**dict.fromkeys(layer_times.PARTS, 20.0), "rest": (100 - 150 / 4) / (10 - 7.5 / 4)}
    with pytest.raises(ValueError, match="--measure: expected text to take time"):
        layer_times.rates(flops, seconds | {"text": 9.0})
    config = configure("tiny", "current")
    deeper = layer_times.shallow(config)["latent"]
    assert (deeper.latent.layers, deeper.encoder.layers) == (1 + layer_times.MORE, 1)
    monkeypatch.setattr(harness, "interleave", lambda steps, **_: {name: _once(step) for name, step in steps.items()})
    assert layer_times.seconds(config, 2, 8, scale.FPS) == dict.fromkeys(flops, 1.0)


def _once(step: Callable[[], None]) -> harness.Timing:
    step()
    return harness.Timing(1.0, 1.0, 1.0, 1)


def test_a_table_without_rates_of_links_times_one_gpu_alone() -> None:
    row = {"snippets": 2, "flops": 1e12, "resting_bytes": 1e9, "peak_bytes": 2e9, "tokens_received": 0}
    rates = scale.Rates(1e12, None, "measured")
    rows = [row | {"gpus": gpus, "parameters_received": 0} for gpus in (1, 2)]
    alone, two = scale.table([row | rates.times(row) for row in rows]).splitlines()[1:]
    assert alone.split()[-4:] == ["1", "0", "1", "1"]
    assert two.split()[-1] == "1"
