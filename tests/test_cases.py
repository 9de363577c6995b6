"""What is measured: every user's shape, and none on a CPU that takes minutes there."""

import pytest

from benchmarks.cases.block_causal_attention import CASES
from mirasol_kernels import SnippetLayout

MOST = {"cpu": 2e11, "cuda": 2e14}  # flops of a forward pass: seconds of two slow cores, a second of a large GPU


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_case_fits_its_devices(case) -> None:
    assert case.layout.q_len and case.layout.k_len
    for device in case.devices:
        assert case.flops("forward") <= MOST[device], f"{case.name} is too large for {device}"


def test_user_groups() -> None:
    """Shapes people have on GPUs, each beside one of its kind that a CPU can run."""
    large = {
        "wan_1b": ("uniform", 12, 128, 32_760, 32_760, "wan_slice"),
        "wan_14b": ("uniform", 40, 128, 32_760, 32_760, "wan_slice"),
        "wan_teacher": ("slices", 12, 128, 65_520, 65_520, "forcing_slice"),
        "wan_decode": ("cross", 12, 128, 4_680, 32_760, "video_decode_slice"),
        "wan_first_frame": ("slices", 12, 128, 32_760, 32_760, "first_frame_slice"),
        "longlive": ("slices", 12, 128, 37_440, 37_440, "window_slice"),
        "longlive2": ("slices", 24, 128, 168_960, 168_960, "window_slice"),
        "longlive2_text": ("cross", 24, 128, 84_480, 6_144, "text_slice"),
        "vjepa2_ac_8": ("uniform", 16, 64, 2_064, 2_064, "vjepa2_ac"),
        "vjepa2_plan": ("uniform", 16, 64, 774, 774, "vjepa2_plan_32"),
        "text_images": ("block ids", 8, 256, 2_048, 2_048, "text_images"),
        "magi": ("uniform", 48, 128, 108_000, 108_000, "wan_slice"),
        "decode_256": ("cross", 40, 64, 256, 4_352, "decode_256"),
        "combiner_64": ("uniform", 16, 80, 20_864, 20_864, "combiner_16"),
        "combiner_64_last": ("uniform", 16, 80, 2_048, 20_864, "combiner_64_last"),
    }
    for name, (kind, heads, dim, rows, keys, slice_) in large.items():
        case = CASES[name]
        assert kind in repr(case.layout)
        found = case.heads * case.group, case.dim, case.layout.q_len, case.layout.k_len
        assert found == (heads, dim, rows, keys), name
        assert "cuda" in case.devices and "cpu" in CASES[slice_].devices and kind in repr(CASES[slice_].layout)
    assert CASES["wan_teacher"].layout == SnippetLayout.teacher_forcing([4680] * 7)
    assert CASES["longlive2"].layout == SnippetLayout.teacher_forcing([7040] * 12, window=4, sink=1)
