"""What a training step costs on many GPUs, counted without one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import layer_times, rank_step, scale
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
    clip = FRAMES * (3 * config.video.size**2 + size * config.audio.sample_rate // rank_step.FPS)
    known = 3 * size * parameters + clip + 8 * rank_step.WORDS  # with Adam's two moments; without tables of positions
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


def test_bad_options(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        scale.main(["--frames", "16", "--gpus", "64"])
    assert "--gpus: expected a snippet of 8 frames for each, got 64" in capsys.readouterr().err


def test_nothing_is_known_of_a_network_without_a_rate() -> None:
    row = {"gpus": 8, "flops": 1e15, "tokens_received": 1, "parameters_received": 1}
    assert scale.Rates(lambda row: 2.0, None, "measured").times(row) == {"compute_seconds": 2.0}


def test_the_longest_clip_is_where_the_first_line_meets_its_limit() -> None:
    def row(n: int) -> dict:
        return {
            "snippets": n,
            "frames": 4 * n,
            "peaks": {"a": int(1e9) + 4_000_000 * n, "b": int(1.1e9) + 1_000_000 * n},
        }

    fits = scale.largest([row(n) for n in rank_step.NEAR], [0.5, 2])
    assert fits["frames"] == {"0.5": 0, "2": 16 * 4 * (250 // 16)} and fits["bytes_per_snippet"] == 4e6


@pytest.mark.parametrize("combiner", layer_times.COMBINERS)
def test_a_long_clip_follows_from_short_ones(combiner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 16 snippets of 4 compact tokens a rank a layer is one piece, at 64 four, as 3b has them with its 32 tokens."""
    config = replace(configure("tiny", combiner), recompute="snippet")
    monkeypatch.setattr(layers, "AT_A_TIME", rank_step.APART * config.combiner.tokens)
    snippets = 64
    row = rank_step.far(rank_step.near(config, GPUS), snippets)
    direct = rank_step.step(config, snippets * GPUS * config.video.frames, GPUS)
    exact = ["frames", "snippets", "tokens_received", "parameters_received", "resting_bytes"]
    exact += ["flops"] if combiner == "current" else []  # the last piece of a layer over all tokens may be any
    for key in exact:
        assert row[key] == direct[key], key
    # Of a layer it is the highest of several moments, each a line: one that overtakes later is missed. Never too high.
    assert 0.99 * direct["peak_bytes"] < row["peak_bytes"] <= direct["peak_bytes"]
    assert row["bend"] < 0.01


@pytest.mark.parametrize("combiner", layer_times.COMBINERS)
@pytest.mark.parametrize("gpus", [1, GPUS])
def test_the_parts_have_the_flops_of_the_step(combiner: str, gpus: int) -> None:
    """All of them and nothing twice: 12 snippets, in pieces of 4, the last call of the Combiner by itself."""
    config = replace(configure("tiny", combiner), recompute="snippet")
    snippets = 12
    made = layer_times.parts(config, snippets, gpus)
    step = rank_step.step(config, snippets * config.video.frames, gpus)
    assert layer_times.flops_of(config, made) == step["flops"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every layer of `tiny` timed once, Combiner "all", in calls of at most 4 snippets -> the file."""
    folder = tmp_path_factory.mktemp("layers")
    options = ["--preset", "tiny", "--combiner", "all", "--frames", str(FRAMES), "--gpus", "1", str(GPUS)]
    assert layer_times.main([*options, "--most", "4", "--whole", "--seconds", "0", "--out", str(folder)]) == 0
    return folder / "layers-tiny.json"


def test_layers_are_timed_by_themselves(measured: Path) -> None:
    report = json.loads(measured.read_text())
    config = replace(configure("tiny", "all"), recompute="snippet")
    rows = {(row["part"], row["snippets"]): row for row in report["rows"]}
    wanted = [part for gpus in (1, GPUS) for part in layer_times.parts(config, FRAMES // 4, gpus)]
    assert {name for name, _ in rows} == {part.name for part in wanted} | {layer_times.WHOLE}
    assert max(n for name, n in rows if name not in ("text", layer_times.WHOLE)) == 4
    assert min(row["seconds"] for row in rows.values()) > 0
    assert report["machine"]["cpu"] and report["layers_of"] == "tiny" and report["frames"] == FRAMES


def test_a_step_is_the_sum_of_its_layers(measured: Path) -> None:
    config = replace(configure("tiny", "all"), recompute="snippet")
    rows = json.loads(measured.read_text())["rows"]
    snippets = FRAMES // config.video.frames
    made = layer_times.parts(config, snippets, 1)
    flops = dict(zip(made, layer_times.counted(config, [(x.name, x.snippets) for x in made]), strict=True))
    # Calls that take as long as their flops at 1 Tflop/s, or what has none a second for each snippet: so do the others.
    even = [row | {"seconds": row["flops"] / 1e12 if row["flops"] else row["snippets"]} for row in rows]
    expected = sum(x.calls * (flops[x] / 1e12 if flops[x] else x.snippets) for x in made)
    assert layer_times.composed(config, snippets, 1, even) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match="--layers: expected a time of 'encoder' of 8 snippets, got those of"):
        layer_times.composed(config, snippets, 1, [row for row in rows if row["part"] != "encoder"])
    with pytest.raises(ValueError, match="of 'tokens' of 8 snippets, or flops to scale by, got none"):
        layer_times.composed(config, snippets, 1, [row | {"flops": None} for row in rows])
    with pytest.raises(ValueError, match="--layers: expected a time of 'text' of 16 snippets"):
        layer_times.composed(config, 2 * snippets, 1, rows)  # it is not linear in them


def test_times_come_from_measured_layers(measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    options = ["--preset", "tiny", "--combiner", "all", "--frames", str(FRAMES), "--gpus", "1", "--out", str(tmp_path)]
    check = tmp_path / "check.json"  # as a stage of a gpu_check
    check.write_text(json.dumps({"stages": [{"name": "layers", "result": json.loads(measured.read_text())}]}))
    assert scale.main([*options, "--layers", str(check)]) == 0
    (row,) = json.loads((tmp_path / "scale-tiny-all.json").read_text())["rows"]
    config = replace(configure("tiny", "all"), recompute="snippet")
    rows = json.loads(measured.read_text())["rows"]
    assert row["compute_seconds"] == layer_times.composed(config, row["snippets"], 1, rows)
    assert "layers MEASURED on" in row["times"] and "ASSUMED" not in row["times"]
    said = capsys.readouterr().out
    assert "80 GB" in said and "the text decoder, on every rank alike: 0.000" in said
    for wrong in (["--preset", "small"], ["--combiner", "current"], ["--layers", str(tmp_path / "none.json")]):
        with pytest.raises(SystemExit):
            scale.main([*options, "--layers", str(check), *wrong])
    errors = capsys.readouterr().err
    assert "--layers: expected layer times of 'small'" in errors
    assert "--layers: expected a time of 'tokens'" in errors and "none.json" in errors
    with pytest.raises(SystemExit):
        layer_times.main(["--preset", "tiny", "--frames", "16", "--gpus", "8"])
    assert "--gpus: expected at most 4, a snippet for each, got 8" in capsys.readouterr().err


def test_what_fits() -> None:
    assert [scale.fits(int(peak * 1e9)) for peak in (80, 81, 142)] == ["80 GB", "141 GB", "none"]


def test_a_table_without_rates_of_links_times_one_gpu_alone() -> None:
    row = {"snippets": 2, "flops": 1e12, "resting_bytes": 1e9, "peak_bytes": 2e9, "tokens_received": 0}
    rates = scale.Rates(lambda row: row["flops"] / 1e12, None, "measured")
    rows = [row | {"gpus": gpus, "parameters_received": 0} for gpus in (1, 2)]
    alone, two = scale.table([row | rates.times(row) for row in rows]).splitlines()[1:]
    assert alone.split()[-4:] == ["1", "0", "1", "1"]
    assert two.split()[-1] == "1"
