"""A live stream: a file is played in real time, snippet by snippet, and asked about on the way. Neither what is decoded
nor what the model keeps grows with time.

python examples/live.py [CLIP] [--ask "What is heard?"] [--every 4] [--speed 1] [--model FOLDER]

A clip without sound is seen alone; one that does not say its rate is played at 25 frames a second.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import torch

from mirasol_model import Mirasol, MirasolConfig
from mirasol_model.tokens import Text


def pictures(path: Path, size: int) -> Iterator[np.ndarray]:
    """Frames (3, size, size) uint8, one after the other; the centre of the picture."""
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            side = min(frame.width, frame.height)
            wide, high = frame.width * size // side, frame.height * size // side
            rgb = frame.reformat(wide, high, "rgb24").to_ndarray()  # (high, wide, 3)
            top, left = (high - size) // 2, (wide - size) // 2
            yield rgb[top : top + size, left : left + size].transpose(2, 0, 1)


def sounds(path: Path, rate: int) -> Iterator[np.ndarray]:
    """Pieces (samples,) of the sound, mono."""
    with av.open(str(path)) as container:
        if not container.streams.audio:
            return
        resampler = av.AudioResampler(format="fltp", rate=rate)
        for frame in container.decode(audio=0):
            yield from (piece.to_ndarray().mean(0) for piece in resampler.resample(frame))


def snippets(
    path: Path, frames: int, fps: float, size: int, rate: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """Video (1, 3, frames, size, size) and the sound of its time (1, samples), until the file ends; sound is None
    where the file has none."""
    heard, sound = 0, sounds(path, rate)
    first = next(sound, None)
    waiting = np.zeros(0, np.float32) if first is None else first
    held: list[np.ndarray] = []
    seen = 0
    for picture in pictures(path, size):
        held.append(picture)
        if len(held) < frames:
            continue
        seen += frames
        needed = round(seen / fps * rate) - heard
        while len(waiting) < needed and (piece := next(sound, None)) is not None:
            waiting = np.concatenate([waiting, piece])
        audio, waiting = waiting[:needed], waiting[needed:]
        heard += needed
        audio = np.pad(audio, (0, needed - len(audio)))  # sound that ends before the picture
        yield torch.from_numpy(np.stack(held, 1))[None], None if first is None else torch.from_numpy(audio)[None]
        held = []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("clip", nargs="?", type=Path, default=Path(__file__).with_name("sample.mp4"))
    parser.add_argument("--ask", default="What is heard?")
    parser.add_argument("--every", type=int, default=4, help="ask after so many snippets (default: 4)")
    parser.add_argument("--speed", type=float, default=1.0, help="of time (default: 1)")
    parser.add_argument("--window", type=int, default=32, help="snippets that the model looks back on (default: 32)")
    parser.add_argument("--model", type=Path, help="a folder of `save_pretrained` (default: random weights)")
    parser.add_argument("--preset", default="small", help="of the random model (default: small)")
    options = parser.parse_args()

    config = MirasolConfig.preset(options.preset)
    model = Mirasol.from_pretrained(options.model) if options.model else Mirasol(config).eval()
    config = model.config
    file = options.model / "tokenizer.json" if options.model else None
    text = Text(config.text, file if file and file.exists() else None)
    with av.open(str(options.clip)) as container:
        video = container.streams.video[0]
        fps = float(video.average_rate or video.guessed_rate or 25)
    stream, begin, late = model.stream(window=options.window), time.monotonic(), 0.0
    parts = snippets(options.clip, config.video.frames, fps, config.video.size, config.audio.sample_rate)
    for video, audio in parts:
        shown = (stream.seen + 1) * config.video.frames / fps  # seconds of the clip
        time.sleep(max(begin + shown / options.speed - time.monotonic(), 0))  # it has happened only now
        stream.push(video, audio)
        late = max(late, time.monotonic() - begin - shown / options.speed)
        if stream.seen % options.every == 0:
            prompt = torch.tensor([text.prompt(options.ask)])
            answer = text.words(stream.generate(prompt, 16)[0].tolist())
            kept = sum(x.nbytes for x in stream.state_dict().values())
            print(f"{shown:6.1f} s, {kept / 1e6:.2f} MB kept: {options.ask} {answer!r}", flush=True)
    print(f"{stream.seen} snippets, {stream.seen * config.video.frames} frames; at most {late:.2f} s late")


if __name__ == "__main__":
    main()
