"""Tubes, patches, positions, and the ViT: counts, order, what is real, and what nobody may see."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from mirasol_model.audio import SILENCE, LogMel
from mirasol_model.encoders import (
    TUBES_8,
    TUBES_32,
    AudioTokenizer,
    Tube,
    TubeTokenizer,
    ViT,
    default_tubes,
    sincos_positions,
)
from tests.numerics import assert_close_fp64, assert_golden, golden


def paper_order(tokenizer, height, width):
    """Index of each of our tokens among the tokens tube by tube, as the reference concatenates them."""
    grids = [tube.grid(tokenizer.frames, height, width) for tube in tokenizer.tubes]
    first = [sum(math.prod(grid) for grid in grids[:i]) for i in range(len(grids))]
    blocks = [
        torch.arange(h * w) + first[index] + t * h * w
        for _, index, t in tokenizer.planes()
        for _, h, w in [grids[index]]
    ]
    return torch.cat(blocks)


@pytest.mark.parametrize(
    ("tubes", "frames", "size", "tokens"),
    [
        (TUBES_32, 32, (224, 224), 539),
        (TUBES_8, 8, (224, 224), 343),
        (TUBES_32, 64, (224, 224), 1176),
        (TUBES_32, 16, (224, 224), 294),  # the long tube gives nothing
        (TUBES_32, 4, (224, 224), 245),
        (TUBES_32, 32, (256, 256), 704),
        (default_tubes(16), 16, (224, 224), 539),
    ],
)
def test_token_counts(tubes, frames, size, tokens):
    assert TubeTokenizer(6, tubes, frames=frames, size=size).valid_tokens(frames) == tokens


def test_tokens_of_the_reference():
    """daniel-code/TubeViT at half size; its kernels 1 to 3 are resampled from the first, ours are those."""
    data = golden("extra/tubevit_tokenizer_small")
    kernels = [data["param.conv_proj_weight"], *(data[f"mid.interp_kernel_{i}"] for i in (1, 2, 3))]
    halves = (((8, 16, 16), (0, 0, 0)), ((3, 16, 16), (2, 4, 4)), ((8, 16, 16), (0, 8, 8)), ((16, 8, 8), (0, 0, 0)))
    tubes = [Tube(kernel.shape[2:], *half) for kernel, half in zip(kernels, halves, strict=True)]
    tokenizer = TubeTokenizer(12, tubes, frames=16, size=(32, 32))
    with torch.no_grad():
        tokenizer.modality.zero_()
        for i, kernel in enumerate(kernels):
            tokenizer.weights[i].copy_(torch.from_numpy(kernel))
            tokenizer.biases[i].copy_(torch.from_numpy(data["param.conv_proj_bias"][i]))
        tokens = tokenizer(torch.from_numpy(data["in.video"])) - tokenizer.positions((32, 32), tokenizer.modality)
    assert_golden(tokens, data["out.tokens"][:, paper_order(tokenizer, 32, 32)])


def test_positions_of_the_reference():
    tokenizer = TubeTokenizer(96, TUBES_32, frames=32)
    expected = golden("extra/tubevit_posembed_full")["out.pos_embedding"][1:]  # without the class token
    assert_golden(tokenizer.positions((224, 224), tokenizer.modality), expected[paper_order(tokenizer, 224, 224)])


def slow_tokens(tokenizer, video):
    """One token at a time, from the words: a dot product of its pixels, and the sin/cos of its centre."""
    (rows, _, frames, height, width), dim = video.shape, tokenizer.dim
    tokens = []
    for index, tube in enumerate(tokenizer.tubes):
        kernel = tokenizer.weights[index]
        fold = kernel.shape[2] // tube.kernel[0]
        kernel = sum(kernel[:, :, i::fold] for i in range(fold))
        fits = [
            [at for at in range(0, size, stride) if at + offset + length <= size]
            for size, stride, offset, length in zip(
                (frames, height, width), tube.stride, tube.offset, tube.kernel, strict=True
            )
        ]
        for corner in product(*fits):
            begin = [at + offset for at, offset in zip(corner, tube.offset, strict=True)]
            t, h, w = (slice(b, b + length) for b, length in zip(begin, tube.kernel, strict=True))
            value = torch.stack([(kernel * video[row, :, t, h, w]).flatten(1).sum(1) for row in range(rows)])
            position = torch.zeros(dim, dtype=torch.float64)
            third = 2 * (dim // 6)
            for axis, (b, length) in enumerate(zip(begin, tube.kernel, strict=True)):
                for k in range(third // 2):
                    angle = (b + length // 2) * 10000 ** (-k / (third // 2))
                    position[axis * third + k] = math.sin(angle)
                    position[axis * third + third // 2 + k] = math.cos(angle)
            tokens.append((begin[0] + tube.kernel[0], value + tokenizer.biases[index] + position + tokenizer.modality))
    return torch.stack([token for _, token in sorted(tokens, key=lambda pair: pair[0])], dim=1)  # sorted is stable


@pytest.mark.parametrize(
    ("frames", "height", "width", "dim"), [(8, 48, 80, 14), (16, 80, 48, 12), (4, 40, 33, 18), (1, 32, 48, 8)]
)
def test_non_square_against_the_loop(frames, height, width, dim):
    """Widths that do not divide by 6 too; the declared size is another one."""
    tokenizer = TubeTokenizer(dim, default_tubes(frames), frames=frames).double()
    video = torch.rand(2, 3, frames, height, width, dtype=torch.float64)
    with torch.no_grad():
        tokens = tokenizer(video)
        assert_close_fp64(tokens, slow_tokens(tokenizer, video))
    assert tokens.shape[1] == tokenizer.valid_tokens(frames, (height, width))


@pytest.mark.parametrize(("frames", "size"), [(8, (224, 224)), (32, (224, 160)), (5, (96, 128)), (64, (112, 112))])
def test_position_rows_are_distinct(frames, size):
    tokenizer = TubeTokenizer(32, default_tubes(frames), frames=frames)
    table = tokenizer.positions(size, tokenizer.modality)
    assert len(table.unique(dim=0)) == len(table) == tokenizer.valid_tokens(frames, size)


@pytest.mark.parametrize("frames", [1, 4, 7, 8, 12, 16, 20, 32, 40])
def test_the_tokens_of_the_first_frames_are_a_prefix(frames):
    """Changing the frames from f on leaves exactly the first valid_tokens(f) tokens alone."""
    size = (64, 48)
    tokenizer = TubeTokenizer(12, default_tubes(frames), frames=frames, size=size)
    video = torch.rand(1, 3, frames, *size)
    with torch.no_grad():
        tokens = tokenizer(video)
        for f in range(frames):
            later = video.clone()
            later[:, :, f:] = torch.nan
            untouched = torch.isfinite(tokenizer(later)).all(2)[0]
            count = tokenizer.valid_tokens(f)
            assert untouched[:count].all() and not untouched[count:].any()
            assert torch.equal(tokenizer(later)[:, :count], tokens[:, :count])
    assert tokenizer.valid_tokens(frames) == tokens.shape[1]


def test_every_length_has_the_same_parameters_and_uses_them():
    shapes = [parameter.shape for parameter in TubeTokenizer(6, TUBES_32, frames=32).parameters()]
    for frames in range(1, 70):
        tokenizer = TubeTokenizer(6, default_tubes(frames), frames=frames, size=(32, 32))
        assert [parameter.shape for parameter in tokenizer.parameters()] == shapes
        assert all(0 not in tube.grid(frames, 32, 32) for tube in tokenizer.tubes)


@pytest.mark.parametrize("tube", TUBES_32)
def test_a_folded_kernel_is_the_whole_one_in_slow_motion(tube):
    taps, size = tube.kernel[0], (32, 48)
    fold = min(taps, 4)
    still = tube._replace(stride=(taps, *tube.stride[1:]), offset=(0, *tube.offset[1:]))
    whole = TubeTokenizer(12, [still], frames=taps).double()
    short = TubeTokenizer(12, [still.slower(fold)], frames=taps // fold).double()
    short.load_state_dict(whole.state_dict())
    video = torch.rand(1, 3, taps // fold, *size, dtype=torch.float64)
    quick = short(video) - short.positions(size, short.modality)
    slow = whole(video.repeat_interleave(fold, dim=2)) - whole.positions(size, whole.modality)
    assert_close_fp64(quick, slow)


def test_bytes_are_the_same_video():
    tokenizer = TubeTokenizer(12, TUBES_8, frames=8, size=(32, 32))
    video = torch.randint(0, 256, (2, 3, 8, 32, 32), dtype=torch.uint8)
    assert torch.equal(tokenizer(video), tokenizer(video.float() / 255))


def test_dimensions_of_positions():
    centres = torch.rand(5, 3, dtype=torch.float64)
    assert not sincos_positions(centres, 20)[:, 18:].any()
    assert_close_fp64(sincos_positions(centres, 20)[:, :18], sincos_positions(centres, 18))


@given(st.just(0) | st.integers(20, 9000))  # fewer lie where the window is almost zero: silent to the float
@settings(max_examples=50)
def test_audio_tokens_that_hear_something_are_a_prefix(samples):
    log_mel, tokenizer = LogMel(), AudioTokenizer(8)
    audio = torch.rand(1, 9000) - 0.5
    with torch.no_grad():
        tokens = tokenizer(log_mel(audio, [samples]))
        silent = tokenizer(log_mel(audio, [0]))
    heard = (tokens != silent).any(2)[0]
    assert tokens.shape == (1, 32, 8)  # 54 frames: 4 steps of 8 patches
    count = tokenizer.valid_tokens(samples)
    assert not heard[count:].any() and heard[:count].unflatten(0, (-1, 8)).any(1).all()


def test_audio_patches_against_the_loop():
    tokenizer = AudioTokenizer(10, mel_bins=12, patch=4).double()
    mel = torch.rand(2, 7, 12, dtype=torch.float64)
    padded = F.pad(mel, (0, 0, 0, 1), value=SILENCE)
    with torch.no_grad():
        tokens = tokenizer(mel).unflatten(1, (2, 3))
        for t, m in product(range(2), range(3)):
            patch = padded[:, None, 4 * t : 4 * t + 4, 4 * m : 4 * m + 4].transpose(2, 3)  # (2, 1, mel, time)
            expected = (tokenizer.weight * patch[:, None]).flatten(2).sum(2) + tokenizer.bias + tokenizer.modality
            centre = torch.tensor([[4 * t + 2, 4 * m + 2]], dtype=torch.float64)
            assert_close_fp64(tokens[:, t, m], expected + sincos_positions(centre, 10))
    table = tokenizer.positions((2, 3), tokenizer.bias)
    assert len(table.unique(dim=0)) == len(table) == 6


def naive_vit(vit, tokens):
    """Pre-norm, softmax attention and tanh GELU written out."""
    x = tokens
    for block in vit.blocks:
        y = F.layer_norm(x, x.shape[-1:], block.norm1.weight, block.norm1.bias, 1e-6)
        q, k, v = (part.unflatten(2, (block.heads, -1)) for part in block.qkv(y).chunk(3, dim=-1))
        weights = (torch.einsum("nqhd,nkhd->nhqk", q, k) / math.sqrt(q.shape[-1])).softmax(-1)
        x = x + block.proj(torch.einsum("nhqk,nkhd->nqhd", weights, v).flatten(2))
        y = block.fc1(F.layer_norm(x, x.shape[-1:], block.norm2.weight, block.norm2.bias, 1e-6))
        x = x + block.fc2(0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3))))
    return F.layer_norm(x, x.shape[-1:], vit.norm.weight, vit.norm.bias, 1e-6)


def test_vit_is_the_written_out_one():
    vit = ViT(24, 2, 3, 40).double()
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    tokens = torch.randn(2, 7, 24, dtype=torch.float64)
    assert_close_fp64(vit(tokens), naive_vit(vit, tokens))


def test_vit_does_not_see_what_is_not_there():
    vit, n = ViT(24, 3, 3, 48), 9
    valid = [9, 4, 1, 0]
    tokens = torch.randn(4, n, 24)
    absent = torch.arange(n) >= torch.tensor(valid)[:, None]
    out = vit(tokens, valid)
    for junk in (1e4, torch.inf, torch.nan):
        assert torch.equal(vit(tokens.masked_fill(absent[..., None], junk), valid), out)
    assert torch.equal(vit(tokens, torch.tensor(valid)), out)
    assert not out[absent].any() and torch.isfinite(out).all()

    double = ViT(24, 3, 3, 48).double()
    double.load_state_dict(vit.state_dict())
    wide = double(tokens.double(), valid)
    for row, count in enumerate(valid[:3]):
        assert_close_fp64(wide[row : row + 1, :count], double(tokens[row : row + 1, :count].double()))


def test_vit_gradients_of_padded_rows():
    vit = ViT(24, 2, 3, 48).double()
    tokens = torch.randn(3, 6, 24, dtype=torch.float64, requires_grad=True)
    valid, cotangent = [6, 2, 0], torch.randn(3, 6, 24, dtype=torch.float64)
    inputs = [tokens, *vit.parameters()]
    padded = torch.autograd.grad((vit(tokens, valid) * cotangent).sum(), inputs)
    rows = [(vit(tokens[i : i + 1, :count]) * cotangent[i : i + 1, :count]).sum() for i, count in ((0, 6), (1, 2))]
    for got, expected in zip(padded, torch.autograd.grad(sum(rows), inputs), strict=True):
        assert_close_fp64(got, expected)


def test_vit_takes_no_mask_where_all_is_real(monkeypatch):
    vit, seen = ViT(12, 1, 2, 24), []
    monkeypatch.setattr(vit, "_encode", lambda tokens, mask: seen.append(mask) or tokens)
    vit(torch.rand(2, 5, 12), [5, 5])
    vit(torch.rand(2, 5, 12))
    assert seen == [None, None]


def test_compiles_in_one_graph():
    """Sizes other than the declared one, uint8, and padded rows included."""
    vit, tubes, patches = ViT(12, 1, 2, 24), TubeTokenizer(12, TUBES_8, frames=8), AudioTokenizer(12)
    log_mel = LogMel()

    def encode(video, audio, valid):
        return vit(tubes(video), valid), vit(patches(log_mel(audio, valid)))

    inputs = torch.randint(0, 256, (2, 3, 8, 48, 32), dtype=torch.uint8), torch.rand(2, 900), torch.tensor([9, 3])
    for actual, expected in zip(
        torch.compile(encode, fullgraph=True, backend="eager")(*inputs), encode(*inputs), strict=True
    ):
        assert torch.equal(actual, expected)


def test_meta_device():
    with torch.device("meta"):
        vit, tubes, patches = ViT(12, 1, 2, 24), TubeTokenizer(12, TUBES_8, frames=8), AudioTokenizer(12)
        assert vit(tubes(torch.rand(2, 3, 8, 224, 224)), torch.tensor([9, 3])).shape == (2, 343, 12)
        assert vit(patches(LogMel()(torch.rand(2, 5120)))).shape == (2, 16, 12)


def test_position_tables_do_not_pile_up():
    tokenizer = TubeTokenizer(6, TUBES_8, frames=8, size=(32, 32))
    for height in range(32, 72):
        tokenizer.positions((height, 32), tokenizer.modality)
    assert len(tokenizer._tables) <= 16
    assert tokenizer.positions((71, 32), tokenizer.modality) is tokenizer.positions((71, 32), tokenizer.modality)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: default_tubes(0), "default_tubes: frames: expected at least 1, got 0"),
        (lambda: TubeTokenizer(6, [], frames=8), r"TubeTokenizer: tubes: expected one that fits 8 x \(224, 224\)"),
        (lambda: TubeTokenizer(6, TUBES_8, frames=8, size=(7, 7)), r"expected one that fits 8 x \(7, 7\), got"),
        (
            lambda: TubeTokenizer(6, [Tube((1, 2, 2), (0, 1, 1))], frames=8),
            "expected kernel, stride >= 1 and offset >=",
        ),
        (lambda: TubeTokenizer(6, [Tube((2, 2, 2), (1, 1, 1), taps=3)], frames=8), "taps that kernel"),
        (lambda: tube_tokens(1, 3, 7, 32, 32), r"video: expected \(N, 3, 8, H, W\), got \(1, 3, 7, 32, 32\)"),
        (lambda: tube_tokens(1, 3, 8, 32, 3), "video: expected a size that a tube fits, got 32 x 3"),
        (lambda: sincos_positions(torch.rand(4, 3), 5), "dim: expected at least 6 for 3 axes, got 5"),
        (lambda: AudioTokenizer(8, 128, 15), "AudioTokenizer: patch: expected a divisor of 128 mel bins, got 15"),
        (lambda: AudioTokenizer(8)(torch.rand(1, 9, 64)), r"mel: expected \(N, frames, 128\), got \(1, 9, 64\)"),
        (lambda: AudioTokenizer(8)(torch.rand(1, 0, 128)), r"got \(1, 0, 128\)"),
        (lambda: ViT(10, 1, 3, 20), "ViT: heads: expected a divisor of dim 10, got 3"),
        (lambda: ViT(12, 1, 3, 20)(torch.rand(1, 4, 10)), r"ViT: tokens: expected \(N, n, 12\), got \(1, 4, 10\)"),
        (lambda: ViT(12, 1, 3, 20)(torch.rand(1, 4, 12), [4, 4]), "valid: expected one number per row, 1, got 2"),
        (lambda: ViT(12, 1, 3, 20)(torch.rand(1, 4, 12), [5]), r"valid: expected 0\.\.4, got \[5\]"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def tube_tokens(*shape):
    return TubeTokenizer(6, TUBES_8, frames=8)(torch.rand(shape))
