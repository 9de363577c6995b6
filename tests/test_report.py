"""README.md and docs/results.md say what the results say: losses as wins, a check of a GPU stage by stage."""

from __future__ import annotations

import json
import re

import pytest

pytest.importorskip("matplotlib", reason="matplotlib draws the plots")
pytest.importorskip("tqdm", reason="the benchmarks draw a bar with it")

from benchmarks import report, results
from benchmarks.cases.block_causal_attention import CASES

MACHINE = {"cpu": "A chip", "isa": "AVX2", "threads": 2, "torch": "2.13.0", "triton": None, "commit": "a" * 40}
LIMITS = {"gemm float32": 1e11, "gemm bfloat16": 4e11, "copy": 1e10}


def row(candidate, seconds, *, case="latent", direction="forward", dtype="bfloat16", ours=False):
    return {
        "case": case, "kind": "snippets", "dtype": dtype, "direction": direction, "candidate": candidate, "ours": ours,
        "seconds": seconds, "seconds_low": seconds, "seconds_high": seconds, "of_floor": 0.5, "errors": {"out": 1e-3},
    }  # fmt: skip


def of_op(*rows, notes=(), machine=MACHINE):
    return {
        "op": "block_causal_attention", "machine": machine, "kernels": "avx2", "ceilings": LIMITS, "rows": list(rows),
        "notes": list(notes), "memory": [], "summary": [],
    }  # fmt: skip


def of_sweep(*rows):
    return {
        "machine": MACHINE, "ceilings": LIMITS, "preset": "base", "dtype": "bfloat16", "combiners": ["all"],
        "train": True, "clip": "noise", "fps": 25.0, "sound": True, "rows": list(rows), "notes": ["why not"],
    }  # fmt: skip


def of_model(backend, seconds, **more):
    return {
        "combiner": "all", "frames": 512, "snippet": 8, "backend": backend, "seconds": seconds, "seconds_low": seconds,
        "seconds_high": seconds, "frames_per_second": 512 / seconds, "peak_bytes": 2e9, "step_bytes": 1e9,
        "error": None, "parameters": 7,
    } | more  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    def put(**files):
        for name, content in files.items():
            (tmp_path / f"{name.replace('_', '-')}.json").write_text(json.dumps(content))
        return results.groups(tmp_path)

    return put


def test_readme_and_results_are_what_the_report_writes(capsys):
    """Of the text. Pictures depend on the machine that draws them, but they are all there."""
    assert report.main(["--check"]) == 0, capsys.readouterr().err
    for file, at in ((report.README, report.README.parent), (report.DOCS / "results.md", report.DOCS)):
        pictures = re.findall(r"\]\(([^)]+\.png)\)", file.read_text())
        assert pictures and all((at / picture).exists() for picture in pictures)
    assert {name for _, name, _ in report.MARKED.findall(report.README.read_text())} <= set(report.SECTIONS)


def test_a_loss_stands_where_wins_stand(folder):
    fast, slow = row("native", 1.0, ours=True), row("native", 1.0, case="wan_slice", ours=True)
    (group,) = folder(x_2026_01_01_a=of_op(fast, row("x", 2.0), row("y", 3.0), slow, row("x", 0.5, case="wan_slice")))
    table = report.op_table(group)
    assert "| 2.00 x |" in table[2] + table[3] and "| 0.50 x |" in table[2] + table[3] and "**1.00**" in table[4]
    assert any("| 0.50 |" in line for line in report.losses(group))
    each = report.op_table(group, each=True)
    assert "| x | y |" in each[0] and "| 2.00 | 3.00 |" in each[2] and "| 0.50 | |" in each[3]


def test_the_newest_counts_and_files_of_one_day_are_joined(folder):
    old = of_op(row("native", 9.0, ours=True))
    large = of_op(row("native", 1.0, ours=True), row("native", 9.0, case="wan_slice", ours=True))
    small = of_op(row("native", 2.0, case="wan_slice", ours=True))
    (group,) = folder(x_2026_01_01_a=old, x_2026_01_02_large=large, x_2026_01_02_small=small)
    assert [r["seconds"] for r in group.report["rows"]] == [1.0, 2.0]
    assert group.files == ("x-2026-01-02-large.json", "x-2026-01-02-small.json")
    one, two = folder(y_2026_01_01_a=of_op(row("native", 1.0, ours=True)))
    assert {one.machine, two.machine} == {"x", "y"} and one.slug != two.slug


def test_what_was_not_interleaved_is_not_compared(folder):
    """Two stages of one check time the same call: each has its own table."""
    first = of_op(row("triton", 1.0, ours=True), row("x", 2.0))
    second = of_op(row("triton", 4.0, ours=True), row("flex", 6.0))
    stages = [("tests", {"counts": {}}), ("attention", first), ("attention-flex", second), ("sanitizer", None)]
    check = {"machine": MACHINE, "stages": [{"name": name, "result": result} for name, result in stages]}
    check["stages"].append(
        {"name": "training", "result": of_sweep(of_model("triton", 1.0), of_model("reference", 2.5))}
    )
    found = folder(gpu_2026_01_01_gpu_check=check)
    assert [group.kind for group in found] == ["op", "op", "sweep"]
    assert "2.00 x" in report.op_table(found[0])[2] and "1.50 flex" in report.op_table(found[1])[2]
    text = report.document(found)
    assert "| 512 | all | triton |" in text and "| 2.50 |" in text and "- why not" in text


def test_a_sweep_shows_what_it_knows(folder):
    rows = of_model("native", 1.0, limit=3.25, joules=12.0), of_model("reference", 2.0, joules=20.0)
    (group,) = folder(x_2026_01_01_s=of_sweep(*rows, of_model("native", 1.0, frames=16)))
    head, _, shorter, mine, _ = report.sweep_table(group)  # which was measured last
    assert shorter.startswith("| 16 |") and mine.startswith("| 512 |")
    assert "limit of our ops" in head and "joule" in head and "error" not in head
    assert "| 2.00 | 3.25 |" in mine and "| 12.0 |" in mine


def test_who_has_no_time_has_a_reason(folder):
    notes = [row("n", 1.0) | {"name": "flex", "reason": "no compiler"}] * 2
    (group,) = folder(x_2026_01_01_a=of_op(row("native", 1.0, ours=True), notes=notes))
    assert report.absent(group) == ["- flex: no compiler (2 calls)"]


def test_other_files_are_tables_as_well(folder):
    other = {"machine": MACHINE, "rows": [{"part": "encoder", "seconds": {"GEMM": 0.25}, "steps": 2000, "of": None}]}
    (group,) = folder(x_2026_01_01_breakdown=other)
    assert report.other_table(group) == [
        "| part | seconds GEMM | steps | of |", "| --- | ---: | ---: | ---: |", "| encoder | 0.25 | 2,000 | |"
    ]  # fmt: skip


def test_files_of_any_form_are_shown(folder):
    (group,) = folder(x_2026_01_01_odd={"loss": [1.0, 0.5], "steps": 7})
    assert report.other_table(group)[2] == "| 2 values | 7 |"
    assert "a machine that its file does not name" in report.document([group])


def test_pictures(folder, tmp_path):
    from matplotlib import image

    rows = [row("native", 0.1 * (i + 1), case=case, ours=True) for i, case in enumerate(("latent", "wan_slice"))]
    rows += [
        row("native", 0.3, direction="backward", ours=True),
        row("x", 0.4),
        row("native", 0.2, case="gone", ours=True),
    ]
    found = folder(
        x_2026_01_01_a=of_op(*rows), x_2026_01_01_s=of_sweep(of_model("native", 1.0), of_model("reference", 2.0))
    )
    report.draw(found, tmp_path)
    for slug in (*(group.slug for group in found), "x-roofline"):
        picture = image.imread(tmp_path / f"{slug}.png")
        assert picture.shape[1] > 600 and picture[0, 0, 3] == 0 and picture[..., 3].max() == 1, slug


def test_labels_say_who_and_what():
    said = report.label("block_causal_attention", "latent")
    assert said == "latent model of Mirasol, B1 H16 D80 (uniform 64 x 32)" and str(CASES["latent"]) not in said
    assert report.label("block_causal_attention", "gone") == "gone"
    assert [report.number(x) for x in (0, 0.0123, 0.123, 1.23, 12.3, 123.4, 12345.6)] == [
        "0", "0.012", "0.12", "1.23", "12.3", "123", "12,346"
    ]  # fmt: skip


def test_errors(folder, monkeypatch, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"odd.json: expected a name like <machine>-<year>"):
        folder(odd=of_op())
    with pytest.raises(ValueError, match=r"report:nothing: expected one of sweep, attention"):
        report.readme("<!-- report:nothing -->\n<!-- /report -->", [])
    monkeypatch.setattr(report, "FOLDER", tmp_path / "empty")
    assert report.main([]) == 2
    assert (
        "benchmarks/results has nothing of 'small, forward pass, snippets of 8, all' in float32 on a CPU"
        in capsys.readouterr().err
    )


def test_a_stale_text_fails_the_check(monkeypatch, tmp_path, capsys):
    stale = tmp_path / "README.md"
    stale.write_text(report.README.read_text().replace("| 512 |", "| 513 |"))
    monkeypatch.setattr(report, "README", stale)
    assert report.main(["--check"]) == 1
    assert capsys.readouterr().err == "README.md is not what python -m benchmarks.report writes\n"


def test_pieces_of_a_sweep_are_joined(folder):
    """Of a size that two files of one day have, the later file counts."""
    first = of_sweep(of_model("triton", 1.0), of_model("triton", 1.0, frames=16))
    (group,) = folder(x_2026_01_01_a=first, x_2026_01_01_b=of_sweep(of_model("triton", 2.0)))
    assert [(row["frames"], row["seconds"]) for row in group.report["rows"]] == [(16, 1.0), (512, 2.0)]
    assert group.report["combiners"] == ["all"] and group.report["notes"] == ["why not"]


def test_long_clips_are_a_sweep_of_their_own(folder):
    """Newer, and of another machine: neither README's table nor what the sweep has to show changes for it."""
    usual = of_sweep(of_model("native", 1.0)) | {"preset": "small", "dtype": "float32", "train": False}
    long = usual | {"rows": [of_model("native", 9.0, frames=2048)]}
    wide = usual | {"rows": [of_model("native", 9.0, snippet=32)]}
    found = folder(x_2026_01_01_a=usual, y_2026_01_02_b=long, y_2026_01_02_c=wide)
    assert {group.what for group in found if group.machine == "y"} == {
        "small, long clips, forward pass, snippets of 8, all", "small, forward pass, snippets of 32, all",
    }  # fmt: skip
    for made in (report.sweep_section(found), report.headline_section(found)):
        assert any("x-2026-01-01-a.json" in line for line in made) and not any("y-2026" in line for line in made)


def test_what_the_sweep_has_to_show(folder):
    ours = of_model("native", 1.0, limit=3.0, step_bytes=1e9, frames=512)
    small = of_sweep(ours, of_model("reference", 2.5, step_bytes=2e9)) | {"preset": "small", "dtype": "float32"}
    found = folder(x_2026_01_01_a=small, x_2026_01_02_b=of_op(row("native", 1.0, ours=True)))
    lines = report.headline_section(found)
    assert lines[0].startswith("0 of 21 lines met") and "`x-2026-01-01-a.json`" in lines[0]
    wanted = (
        "| 512 frames, training step, `all` | no: memory; not measured: compiled | 2.50 | 2 | 3.00 | | 1.5 | 0.50 |"
    )
    assert any(line.startswith(wanted) for line in lines)
    assert "What the sweep has to show, x" in report.document(found)
    assert not report.headline_table([folder(x_2026_01_01_a=of_sweep(ours))[0]])  # base, on a CPU: nothing is asked


def test_a_step_part_by_part(folder):
    def part(name, direction, seconds, floor):
        return {"part": name, "direction": direction, "seconds": seconds, "floor": floor, "flops": 1e9, "bytes": 1e6}

    rows = [part("encoder", "forward", 0.001, 0.001), part("encoder", "backward", 0.003, 0.001)]
    step = {"combiner": "all", "frames": 64, "seconds": 0.004, "without_stamps": 0.0041, "rows": rows}
    of_parts = {"machine": MACHINE, "ceilings": LIMITS, "preset": "small", "dtype": "float32", "steps": [step]}
    found = folder(x_2026_01_01_p=of_parts)
    said, _, *table = report.parts_section(found)[2:]
    assert said.endswith("4.10 without stamps; next: encoder; at its floor the step would be 2.00 times as fast.")
    assert table[2] == "| encoder | 1.0 | 3.0 | 100.0% | 2.0 | 2 | 2.0 | 50% | 2.00 |"
    assert table[2] in report.document(found)
