"""Fine-tune on a folder of clips: one is made first, of clips in which a ball goes left or right and a tone rises or
falls, with a question about each.

python examples/finetune.py [FOLDER] [--clips 64] [--steps 300]

What it leaves is what your own folder would need: train.jsonl, test.jsonl, and a configuration for
python -m mirasol_model.train --config FOLDER/config.json
"""

import argparse
import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from mirasol_model import train

FPS, SIZE, RATE, FRAMES = 25, 32, 16_000, 8


def write_clip(path: Path, right: bool, rising: bool, rng: np.random.Generator) -> None:
    """FRAMES frames of a ball on a dark ground, and the tone of their time."""
    y, x = np.mgrid[:SIZE, :SIZE]
    height, colour = rng.uniform(8, SIZE - 8), rng.integers(128, 256, 3)
    across = np.linspace(5, SIZE - 5, FRAMES) if right else np.linspace(SIZE - 5, 5, FRAMES)
    pitch = np.geomspace(300, 1200, FRAMES * RATE // FPS) if rising else np.geomspace(1200, 300, FRAMES * RATE // FPS)
    sound = (0.3 * np.sin(2 * np.pi * np.cumsum(pitch) / RATE)).astype(np.float32)
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=FPS, options={"crf": "18", "threads": "1"})
        video.width, video.height, video.pix_fmt = SIZE, SIZE, "yuv420p"
        audio = container.add_stream("aac", rate=RATE, layout="mono")
        for centre in across:
            ball = (x - centre) ** 2 + (y - height) ** 2 < 16
            picture = np.where(ball[..., None], colour, 30).astype(np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode(None))
        for first in range(0, len(sound), 1024):
            piece = av.AudioFrame.from_ndarray(sound[None, first : first + 1024], "fltp", "mono")
            piece.sample_rate, piece.pts, piece.time_base = RATE, first, Fraction(1, RATE)
            container.mux(audio.encode(piece))
        container.mux(audio.encode(None))


def write_folder(folder: Path, name: str, clips: int, seed: int) -> None:
    """Clips, and two questions about each."""
    rng, lines = np.random.default_rng(seed), []
    for i in range(clips):
        right, rising = (bool(choice) for choice in rng.integers(0, 2, 2))
        clip = f"{name}-{i}.mp4"
        write_clip(folder / clip, right, rising, rng)
        lines += [
            {"clip": clip, "prompt": "where?", "answer": "right" if right else "left", "kind": "seen"},
            {"clip": clip, "prompt": "pitch?", "answer": "up" if rising else "down", "kind": "heard"},
        ]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("out/finetune"))
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--preset", default="tiny")
    options = parser.parse_args()
    folder = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    write_folder(folder, "train", options.clips, seed=0)
    write_folder(folder, "test", options.clips // 4, seed=1)
    config = {
        "out": str(folder / "run"),
        "phase": "finetune",
        "model": {"preset": options.preset},
        "data": {
            "kind": "folder",
            "train": {"prompts": str(folder / "train.jsonl"), "frames": FRAMES, "fps": FPS},
            "evaluate": {"prompts": str(folder / "test.jsonl"), "frames": FRAMES, "fps": FPS},
            "workers": 1,
        },
        "optimizer": {"rate": 2e-3, "warmup": 20},
        "steps": options.steps,
        "batch": 8,
        "evaluate_every": 100,
        "save_every": 100,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    train.main(["--config", str(folder / "config.json")])
    last = json.loads((folder / "run" / "log.jsonl").read_text().splitlines()[-1])
    print("exact match on clips it never saw:", last["exact"])


if __name__ == "__main__":
    main()
