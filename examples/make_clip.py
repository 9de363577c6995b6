"""Make examples/sample.mp4: balls in a room whose bounces and collisions can be heard. `python examples/make_clip.py`

What is seen explains what is heard, and only together they tell all: every ball has its own note, struck when it hits a
wall or another ball, louder for a harder hit, from the left or the right where it happens.
"""

from __future__ import annotations

import argparse
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

FPS, WIDTH, HEIGHT, RATE = 25, 160, 120, 32_000
ROOM = np.array([[20, 0], [140, 120]])  # its corners, x and y: the square that a centre crop leaves
SUBSTEPS = 40  # of the motion, per frame: 1 ms
RADIUS = np.array([9.0, 11.0, 13.0, 15.0])  # pixels
NOTE = np.array([784.0, 587.3, 440.0, 293.7])  # Hz; the bigger the lower
COLOUR = np.array([[240, 200, 60], [230, 90, 70], [80, 190, 110], [90, 140, 240]])


def simulate(frames: int, seed: int = 3) -> tuple[np.ndarray, list[tuple[float, int, float, float]]]:
    """-> positions (frames, balls, 2) in pixels; hits (seconds, ball, strength in 0..1, pan in 0..1)."""
    rng = np.random.default_rng(seed)
    at = np.array([[45.0, 30.0], [115.0, 35.0], [50.0, 90.0], [110.0, 85.0]])
    speed = rng.uniform(45, 85, (4, 1)) * np.stack([np.cos(a := rng.uniform(0, 2 * np.pi, 4)), np.sin(a)], 1)  # pixel/s
    path, hits = np.empty((frames, 4, 2)), []
    for step in range(frames * SUBSTEPS):
        if step % SUBSTEPS == 0:
            path[step // SUBSTEPS] = at
        now = step / (FPS * SUBSTEPS)
        at = at + speed / (FPS * SUBSTEPS)
        for i in range(4):
            for axis in range(2):
                gaps = np.abs(at[i, axis] - ROOM[:, axis])
                outward = 0 if gaps.min() > RADIUS[i] else (-1, 1)[gaps.argmin()]
                if outward * speed[i, axis] > 0:
                    hits.append((now, i, abs(speed[i, axis]) / 150, at[i, 0] / WIDTH))
                    speed[i, axis] *= -1
            for j in range(i):
                apart = at[i] - at[j]
                axis_of_hit = apart / np.linalg.norm(apart)
                closing = (speed[j] - speed[i]) @ axis_of_hit
                if np.linalg.norm(apart) < RADIUS[i] + RADIUS[j] and closing > 0:
                    mass = RADIUS**2
                    push = 2 * closing / (mass[i] + mass[j]) * axis_of_hit  # elastic: the balls never come to rest
                    speed[i], speed[j] = speed[i] + mass[j] * push, speed[j] - mass[i] * push
                    hits += [(now, ball, closing / 150, at[ball, 0] / WIDTH) for ball in (i, j)]
    return path, hits


def draw(at: np.ndarray, index: int) -> np.ndarray:
    """Ball positions (balls, 2) -> picture (HEIGHT, WIDTH, 3) uint8, with smooth edges."""
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    shade = 40 + 12 * np.sin(2 * np.pi * (x / WIDTH + index / 311)) + 10 * y / HEIGHT
    picture = np.stack([0.7 * shade, 0.8 * shade, shade], 2)
    picture[:, : ROOM[0, 0]] = picture[:, ROOM[1, 0] :] = (96, 84, 72)
    for centre, radius, colour in zip(at, RADIUS, COLOUR, strict=True):
        distance = np.hypot(x - centre[0], y - centre[1])
        inside = np.clip(radius - distance + 0.5, 0, 1)[..., None]
        light = 1.15 - 0.5 * np.clip((x - centre[0] + y - centre[1]) / (2 * radius) + 0.5, 0, 1)[..., None]
        picture += inside * (colour * light - picture)
    return picture.clip(0, 255).round().astype(np.uint8)


def ring(hits: list[tuple[float, int, float, float]], frames: int) -> np.ndarray:
    """Hits -> stereo sound (2, samples) float32: a struck bar per hit, on a floor of faint noise."""
    samples = frames * RATE // FPS
    sound = 1e-3 * np.random.default_rng(1).standard_normal((2, samples))
    time = np.arange(int(0.35 * RATE)) / RATE
    for second, ball, strength, pan in hits:
        bar = sum(
            a * np.sin(2 * np.pi * NOTE[ball] * m * time) * np.exp(-d * time)
            for m, a, d in ((1, 1, 14), (2.76, 0.4, 30), (5.4, 0.2, 60))
        )
        first = round(second * RATE)
        piece = (0.35 * min(strength, 1) * bar)[: samples - first]
        sound[:, first : first + len(piece)] += np.sqrt([[1 - pan], [pan]]) * piece
    return np.tanh(sound).astype(np.float32)


def write(path: Path, frames: int) -> None:
    positions, hits = simulate(frames)
    sound = ring(hits, frames)
    with av.open(str(path), "w", options={"movflags": "+faststart", "fflags": "+bitexact"}) as container:
        video = container.add_stream("libx264", rate=FPS, options={"crf": "24", "preset": "slow", "threads": "1"})
        video.width, video.height, video.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        audio = container.add_stream("aac", rate=RATE, layout="stereo", options={"flags": "+bitexact"})
        audio.bit_rate = 64_000
        for index in range(frames):
            picture = av.VideoFrame.from_ndarray(draw(positions[index], index), format="rgb24")
            container.mux(video.encode(picture))
        container.mux(video.encode(None))
        for first in range(0, sound.shape[1], 1024):
            piece = av.AudioFrame.from_ndarray(np.ascontiguousarray(sound[:, first : first + 1024]), "fltp", "stereo")
            piece.sample_rate, piece.pts, piece.time_base = RATE, first, Fraction(1, RATE)
            container.mux(audio.encode(piece))
        container.mux(audio.encode(None))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", nargs="?", type=Path, default=Path(__file__).with_name("sample.mp4"))
    parser.add_argument("--frames", type=int, default=640, help="how many, at 25 per second (default: 640)")
    arguments = parser.parse_args()
    write(arguments.path, arguments.frames)
    print(f"{arguments.path}: {arguments.frames} frames, {arguments.path.stat().st_size:,} bytes")
