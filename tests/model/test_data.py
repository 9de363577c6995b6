"""Folders of clips, batches of clips that differ, the order of the data, and text as tokens."""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import Dataset

pytest.importorskip("av", reason="PyAV writes and reads the clips")

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from mirasol_model import MirasolConfig
from mirasol_model.data import (
    MOST_BAD,
    Attempts,
    BadExample,
    ClipFolder,
    Collate,
    Example,
    Order,
    open_data,
    stack_audio,
    stack_video,
)
from mirasol_model.media import MediaError, read_clip
from mirasol_model.tokens import Text, byte_tokenizer
from tests.model.clips import SAMPLES_PER_FRAME, clip, model
from tests.model.media_files import indices, write
from tests.numerics import assert_close_fp64

TINY = MirasolConfig.preset("tiny")
SOUND = {"codec": "aac", "rate": 16_000}
GOOD = {"clip": "long.mp4", "prompt": "what?", "answer": "a pattern", "kind": "picture"}


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """Two good clips, of 40 and of 20 frames, the second without sound; and files that are none."""
    folder = tmp_path_factory.mktemp("clips")
    write(folder / "long.mp4", sound=SOUND)
    write(folder / "short.mp4", frames=20)
    (folder / "corrupt.mp4").write_bytes((folder / "long.mp4").read_bytes()[:5000])
    (folder / "empty.mp4").touch()
    return folder


def folder_of(clips: Path, *lines, **options) -> ClipFolder:
    file = clips / "prompts.jsonl"
    file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return ClipFolder(file, **{"frames": 32, "size": 48, "sample_rate": 16_000, **options})


# ------------------------------------------------------------------------------------------------------------ folders


def test_a_folder_of_clips(clips):
    data = folder_of(clips, GOOD, "", {**GOOD, "clip": "short.mp4", "kind": "silent"}, least=16)
    assert len(data) == 2
    first, second = data[0], data[1]
    assert first[2:] == ("what?", "a pattern", "picture") and second.kind == "silent"
    assert first.video.shape == (3, 32, 48, 48) and first.video.dtype == torch.uint8 and second.video.shape[1] == 20
    assert first.audio.shape == (32 * SAMPLES_PER_FRAME,) and second.audio is None
    read = read_clip(clips / "long.mp4", frames=32, size=48, sample_rate=16_000)
    assert torch.equal(first.video.float() / 255, read.video) and torch.equal(first.audio, read.audio)
    assert indices(read) == list(range(32))
    slow = folder_of(clips, GOOD, fps=12.5, frames=16)[0]
    assert indices(read._replace(video=slow.video / 255)) == list(range(0, 32, 2))
    assert len(slow.audio) == 32 * SAMPLES_PER_FRAME


def test_a_line_ends_with_a_newline_alone(clips):
    """Other signs that Python takes for the end of a line may stand in text."""
    file = clips / "prompts.jsonl"
    line = json.dumps({**GOOD, "prompt": "wo\u2028rin, größer?\x85"}, ensure_ascii=False)
    file.write_bytes(f"{line}\r\n{line}".encode())
    data = ClipFolder(file, frames=32, size=48, sample_rate=16_000)
    assert len(data) == 2 and {data[i].prompt for i in (0, 1)} == {"wo\u2028rin, größer?\x85"}


def test_a_shorter_clip_is_what_the_file_has(clips):
    """With the sound of its own time, at any rate."""
    short = read_clip(clips / "long.mp4", frames=100, least=8, size=48, sample_rate=16_000)
    assert indices(short) == list(range(40)) and len(short.audio) == 40 * SAMPLES_PER_FRAME
    slow = read_clip(clips / "long.mp4", frames=100, least=8, fps=12.5, size=48, sample_rate=16_000)
    assert indices(slow) == list(range(0, 40, 2)) and len(slow.audio) == 40 * SAMPLES_PER_FRAME
    with pytest.raises(MediaError, match="only 40 frames, expected 41"):
        read_clip(clips / "long.mp4", frames=100, least=41, size=48, sample_rate=16_000)
    with pytest.raises(ValueError, match="read_clip: least: expected at most frames 8, got 9"):
        read_clip(clips / "long.mp4", frames=8, least=9, size=48, sample_rate=16_000)
    with pytest.raises(ValueError, match="read_clip: least: expected a positive int, got 0"):
        read_clip(clips / "long.mp4", frames=8, least=0, size=48, sample_rate=16_000)


BAD = {
    "corrupt": ({"clip": "corrupt.mp4"}, MediaError, "corrupt.mp4"),
    "no bytes": ({"clip": "empty.mp4"}, MediaError, r"empty.mp4: the file is empty"),
    "missing": ({"clip": "nowhere.mp4"}, FileNotFoundError, "nowhere.mp4"),
    "a folder": ({"clip": "."}, OSError, "clips"),
    "too short": ({"clip": "short.mp4"}, MediaError, r"short.mp4: only 20 frames.*, expected 32"),
    "no answer": ({"answer": " "}, BadExample, r"prompts.jsonl:2: answer: expected some text, got none, for .*long"),
    "no text": ({"prompt": None}, BadExample, r"prompts.jsonl:2: prompt: expected text, got None"),
    "kind": ({"kind": 3}, BadExample, r"prompts.jsonl:2: kind: expected text, got 3"),
    "half a character": ({"prompt": "\ud83d"}, BadExample, r"jsonl:2: prompt: expected whole .*, got '\\ud83d'"),
    "half of an answer": ({"answer": "nice \ud83d"}, BadExample, r"prompts.jsonl:2: answer: expected whole characters"),
    "half a name": ({"clip": "\ud83d.mp4"}, BadExample, r"prompts.jsonl:2: clip: expected whole characters"),
    "half a kind": ({"kind": "\udc00"}, BadExample, r"prompts.jsonl:2: kind: expected whole characters"),
    "no clip": ({"clip": 1.5}, BadExample, r"prompts.jsonl:2: clip: expected text, got 1.5"),
    "no name": ({"clip": "a\0b"}, BadExample, r"prompts.jsonl:2: clip: expected the name of a file, got 'a\\x00b'"),
    "no JSON": ("{", BadExample, r"prompts.jsonl:2: expected JSON, got: "),
    "no mapping": ("[]", BadExample, r"prompts.jsonl:2: expected a mapping, got list"),
}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("bad", BAD)
def test_what_is_bad_names_its_file_and_gives_way(clips, bad, workers):
    change, error, message = BAD[bad]
    data = folder_of(
        clips, GOOD, change if isinstance(change, str) else {**GOOD, **change}, {**GOOD, "answer": "third"}
    )
    with pytest.raises(error, match=message):
        data[1]
    collate = Collate(Text(TINY.text), predict_prompts=False)
    attempts = Attempts(data, replace=True)
    loader = torch.utils.data.DataLoader(attempts, batch_size=3, num_workers=workers, collate_fn=collate)
    ((batch, skipped),) = loader
    assert batch.answers[::2] == ["a pattern", "third"] and batch.answers[1] in batch.answers[::2]
    assert len(skipped) == 1 and Path(clips.name).name in skipped[0]
    alone, why = collate([Attempts(data, replace=False)[1]])
    assert alone is None and why == skipped


def test_it_gives_up_after_many_bad_ones():
    class Nothing(Dataset[Example]):
        def __len__(self):
            return 1000

        def __getitem__(self, index):
            raise BadExample(str(index))

    attempt = Attempts(Nothing(), replace=True)[990]
    tried = [int(reason) for reason in attempt.skipped]
    assert attempt.example is None and tried[0] == 990 and len(set(tried)) == len(tried) == MOST_BAD
    assert all(0 <= index < 1000 for index in tried) and attempt == Attempts(Nothing(), replace=True)[990]


def test_a_damaged_clip_of_many_questions_gives_way(clips):
    """They stand together, and more of them than are tried; what stands in is the same when a run goes on."""
    lines = [{**GOOD, "clip": "empty.mp4" if i < 2 * MOST_BAD else "short.mp4"} for i in range(3 * MOST_BAD)]
    once, again = (Attempts(folder_of(clips, *lines, frames=1), replace=True) for _ in range(2))
    for index in range(2 * MOST_BAD):
        attempt = once[index]
        assert attempt.example is not None and set(attempt.skipped) == {f"{clips / 'empty.mp4'}: the file is empty"}
        assert attempt.skipped == again[index].skipped


@pytest.mark.parametrize("length", [1, 2, 5])
def test_every_example_is_tried_where_there_are_few(length):
    attempts = Attempts([None] * length, replace=True)
    assert all(sorted(attempts.candidates(index)) == list(range(length)) for index in range(length))


def test_reasons_can_be_printed(clips):
    name = os.fsdecode(b"caf\xe9.mp4")
    (clips / name).write_bytes(b"no video")
    (reason,) = Attempts(folder_of(clips, {**GOOD, "clip": name}), replace=False)[0].skipped
    assert "caf\\udce9.mp4: cannot be read as video" in reason and reason.encode()


def test_a_kind_may_be_null(clips):
    assert folder_of(clips, {**GOOD, "kind": None})[0].kind == ""


def test_frames_are_never_floats(clips):
    """Of a clip a worker holds no more than what it sends, and what it was read from."""

    class Largest(TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            out = operation(*args, **(kwargs or {}))
            self.bytes = max(self.bytes, out.nbytes if isinstance(out, torch.Tensor) else 0)
            return out

    with Largest() as largest:
        video = folder_of(clips, GOOD)[0].video
    assert largest.bytes == video.nbytes == 3 * 32 * 48 * 48


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "ClipFolder: prompts: expected the name of a JSONL file, got None"),
        ({"prompts": "nowhere.jsonl"}, "ClipFolder: prompts: expected a JSONL file, got 'nowhere.jsonl'"),
        ({"prompts": "x", "size": 3}, "expected only prompts, frames, least, fps for kind 'folder', got size"),
        ({"prompts": "x", "frames": 0}, "ClipFolder: frames: expected an integer of at least 1, got 0"),
        ({"prompts": "x", "frames": "32"}, "ClipFolder: frames: expected an integer of at least 1, got '32'"),
        ({"prompts": "x", "least": 40}, r"ClipFolder: least: expected None or 1 .. 32, got 40"),
        ({"prompts": "x", "fps": 0}, "ClipFolder: fps: expected a positive number, got 0"),
    ],
)
@pytest.mark.parametrize("part", ["train", "evaluate"])
def test_options_of_a_folder(options, message, part):
    with pytest.raises(ValueError, match=f"^config: data.{part}: {message}"):
        open_data("folder", options, TINY, part)


def test_sources(tmp_path):
    for content, message in ((b"\n", "at least one line"), (b"\n{\xe9}", "UTF-8 in .*none.jsonl, got: 'utf-8' codec")):
        (tmp_path / "none.jsonl").write_bytes(content)
        with pytest.raises(ValueError, match=f"config: data.train: ClipFolder: prompts: expected {message}"):
            open_data("folder", {"prompts": str(tmp_path / "none.jsonl")}, TINY)
    with pytest.raises(ValueError, match=r"data.kind: expected one of folder.*, got 'tape'"):
        open_data("tape", {}, TINY)


def test_needle_is_made_for_the_model():
    example = open_data("needle", {"clips": 2, "seed": 3, "frames": 32}, TINY)[5]
    assert example.video.shape == (3, 32, TINY.video.size, TINY.video.size) and example.kind == "sound"
    assert example.audio.shape == (32 * TINY.audio.sample_rate // 25,)
    for options, message in (
        ({}, "clips: expected how many to make, got None"),
        ({"clips": "2"}, "clips: expected an integer of at least 1, got '2'"),
        ({"clips": 2, "frames": "32"}, "frames: expected multiples of snippet 4, at least 32, got '32'"),
    ):
        with pytest.raises(ValueError, match=f"config: data.evaluate: Needle: {message}"):
            open_data("needle", options, TINY, "evaluate")
    with pytest.raises(ValueError, match="expected only clips, seed, frames, lures, shift for kind 'needle', got size"):
        open_data("needle", {"clips": 2, "size": 9}, TINY)


# ------------------------------------------------------------------------------------------------------------ batches


def examples() -> list[Example]:
    """Of 10, 6 and 7 frames, the second without sound."""
    made = []
    for frames, words in ((10, "one"), (6, "three"), (7, "seventeen")):
        video, audio = clip(frames)
        made.append(Example(video[0], audio[0] if frames != 6 else None, words, words[:2], "k"))
    return made


@pytest.mark.parametrize("predict_prompts", [False, True])
def test_a_batch_is_its_examples(predict_prompts):
    made, collate = model("current"), Collate(Text(TINY.text), predict_prompts)
    rows = examples()
    batch = collate.batch(rows)
    assert batch.frames == [10, 6, 7] and batch.has_audio == [True, False, True]
    assert batch.answers == ["on", "th", "se"] and batch.kinds == ["k"] * 3
    call = {"labels": batch.labels, "frames": batch.frames, "has_audio": batch.has_audio}
    out = made(batch.video, batch.audio, batch.text, **call)
    for i, row in enumerate(rows):
        one = collate.batch([row])
        length = one.text.shape[1]
        alone = made(one.video, one.audio, one.text, labels=one.labels)
        assert_close_fp64(out.logits[i, :length], alone.logits[0])
        assert torch.equal(batch.labels[i, :length], one.labels[0]) and (batch.labels[i, length:] == -100).all()
        assert (one.labels[0, : len(row.prompt) + 1] == -100).all() != predict_prompts
        assert batch.prompt_lengths[i] == one.prompt.shape[1] == len(row.prompt) + 1
        assert torch.equal(batch.prompt[i, : one.prompt.shape[1]], one.prompt[0])


def test_sound_of_rates_that_do_not_divide():
    """1,601.6 samples a frame; each clip's number is rounded on its own."""
    frames = [3, 5, 2]
    sounds = [torch.ones(round(n * 48_000 / Fraction(30_000, 1001))) for n in frames]
    stacked, heard = stack_audio(sounds, frames)
    assert stacked.shape == (3, len(sounds[1])) and heard == [True] * 3
    assert [int(row.sum()) for row in stacked] == [len(sound) for sound in sounds]
    longest_is_silent, heard = stack_audio([torch.ones(640), None], [1, 3])
    assert longest_is_silent.shape == (2, 1920) and heard == [True, False]
    assert stack_audio([None, None], [1, 2]) == (None, None)


@pytest.mark.parametrize("fps", [25, Fraction(30_000, 1001), Fraction(29.97)])
def test_sound_of_any_clips_whose_longest_is_silent(fps):
    sounds = {n: torch.ones(round(n * 16_000 / fps)) for n in range(1, 16)}
    for one, other in itertools.combinations(sounds, 2):
        stacked, heard = stack_audio([None, sounds[other], sounds[one]], [16, other, one])
        assert heard == [False, True, True] and abs(stacked.shape[1] - 16 * 16_000 / fps) < 10
        assert [int(row.sum()) for row in stacked] == [0, len(sounds[other]), len(sounds[one])]


def test_examples_that_make_no_batch():
    with pytest.raises(ValueError, match=r"collate: audio: expected 640.0 samples a frame in every .*, got 636.0"):
        stack_audio([None, torch.ones(1280), torch.ones(636)], [3, 2, 1])
    with pytest.raises(ValueError, match=r"collate: audio: expected 640.0 samples a frame in every .*, got 320.0"):
        stack_audio([torch.ones(1280), torch.ones(320)], [2, 1])
    for other in (None, torch.zeros(3, 2, 8, 9), torch.zeros(3, 2, 8, 8, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="collate: video: expected every example to have one of one dtype and"):
            stack_video([torch.zeros(3, 4, 8, 8), other])


# -------------------------------------------------------------------------------------------------------------- order


def take(order: Order, batches: int) -> list[int]:
    given = iter(order)
    return [index for _ in range(batches) for index in next(given)]


def test_order():
    """Every example once in each pass, differently in each; processes share; and it goes on where it stopped."""
    whole = take(Order(7, 3, seed=5), 14)
    assert sorted(whole[:7]) == sorted(whole[7:14]) == list(range(7)) and whole[:7] != whole[7:14]
    assert whole != take(Order(7, 3, seed=6), 14)
    assert take(Order(7, 3, seed=5, start=12), 10) == whole[12:]
    both = [take(Order(7, 2, seed=5, rank=rank, ranks=2), 6) for rank in (0, 1)]
    shared = [index for i in range(0, 12, 2) for ours in both for index in ours[i : i + 2]]
    assert shared == whole[:24]


# --------------------------------------------------------------------------------------------------------------- text


@pytest.mark.parametrize("words", ["", "red", "żółć 🎈", "</s><pad><0x41>", " a\nb\0", "x" * 3000])
def test_bytes(words):
    text = Text(TINY.text)
    tokens = text.answer(words)
    assert tokens == [3 + byte for byte in words.encode()] + [1]
    assert text.prompt(words) == [0, *tokens[:-1]]
    assert "".join(text.words_of([*tokens, 65])) == words
    assert text.words([*tokens, 0, 0]) == text.words(tokens[:-1]) == words


def test_bytes_that_are_no_character():
    text = Text(TINY.text)
    assert (
        list(text.words_of([3 + 0xC3, 3 + 0xC3]))
        == [text.words([3 + 0xC3, 3 + 0xC3])]
        == ["\N{REPLACEMENT CHARACTER}" * 2]
    )
    assert list(text.words_of([3 + 65, 3 + 0xC3])) == ["A"]


def test_words_after_bytes_that_are_no_character(tmp_path):
    """What was said stays said, and nothing of what follows is lost, neither words nor the spaces between them."""
    text = Text(TINY.text)
    assert "".join(text.words_of([225, 184, 167, 2])) == "\u07b5\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}<unk>"
    assert text.words([225, 184, 167, 2]) == 3 * "\N{REPLACEMENT CHARACTER}" + "<unk>"
    vocabulary = byte_tokenizer().get_vocab() | {"\u2581a": 259, "\u2581b": 260}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.add_special_tokens(["<pad>", "</s>"])
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = Text(TINY.text, tmp_path / "tokenizer.json")
    said = "".join(text.words_of([259, 225, 184, 167, 259, 260, 259, 225, 184, 260, 225]))
    assert said == "a\u07b5\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER} a b a\u07b5 b\N{REPLACEMENT CHARACTER}"


def test_special_tokens_are_no_words(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"the": 0, "<unk>": 1, "ball": 2}, unk_token="<unk>"))
    tokenizer.add_special_tokens(["<unk>", "<p>", "<e>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = Text(replace(TINY.text, pad=3, eos=4), tmp_path / "tokenizer.json")
    for tokens in ([0, 1, 2], [1], [1, 0, 1, 1]):
        assert "".join(text.words_of(tokens)) == text.words(tokens)


def test_any_tokenizer(tmp_path):
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<pad>", "</s>", "<unk>", "[CLS]"]
    tokenizer.train_from_iterator(["the red ball", "the green ball"], trainers.BpeTrainer(special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 3)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = Text(TINY.text, tmp_path / "tokenizer.json")
    whole = tokenizer.token_to_id("ball")
    assert text.answer("ball") == [whole, 1] and text.prompt("ball") == [0, whole]
    assert text.words(text.answer("the red ball")) == "the red ball"
    small = MirasolConfig.from_dict({**TINY.to_dict(), "text": {**TINY.to_dict()["text"], "vocabulary": 8}}).text
    with pytest.raises(ValueError, match=r"model.tokenizer: expected tokens below text.vocabulary 8, got \d\d"):
        Text(small, tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match=r"model.tokenizer: expected a tokenizer.json, got no file 'nowhere'"):
        Text(TINY.text, "nowhere")


def saved_words(tmp_path, special):
    tokenizer = Tokenizer(models.WordLevel({"the": 0, "ball": 1, "<unk>": 2, "red": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(special)
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=8, pad_id=3, pad_token="red")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_a_file_neither_cuts_nor_fills_up(tmp_path):
    config = replace(TINY.text, pad=4, eos=5)
    text = Text(config, saved_words(tmp_path, ["<p>", "<e>"]))
    assert text.answer("the red ball") == [0, 3, 1, 5] and text.prompt("red") == [4, 3]


def test_pad_and_eos_that_are_words_are_refused(tmp_path):
    file = saved_words(tmp_path, ["<p>", "<e>"])
    for change, message in (
        ({"eos": 5}, "pad: .*, got 0, which is 'the'"),
        ({"pad": 4}, "eos: .*, got 1, which is 'ball'"),
    ):
        with pytest.raises(ValueError, match=f"config: text.{message} in .*tokenizer.json"):
            Text(replace(TINY.text, **change), file)


def test_what_a_row_does_not_say_is_passed_over():
    """Pads, and the -1 of `generate_tokens`."""
    text = Text(TINY.text)
    tokens = [-1, 0, 3 + 65, -1, 3 + 66, 0, 1, 3 + 67]
    assert "".join(text.words_of(tokens)) == text.words(tokens) == "AB"


def test_the_byte_tokenizer_survives_its_file(tmp_path):
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    assert Text(TINY.text, tmp_path / "tokenizer.json").answer("é") == Text(TINY.text).answer("é")
