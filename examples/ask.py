"""Ask questions of a clip: it is read and encoded once, every question costs only its text.

python examples/ask.py [CLIP] --ask "Which ball rings the lowest?" "How many are there?" [--model FOLDER] [--frames 32]

--model is a folder as training leaves it in <out>/model: that of `save_pretrained`, and a tokenizer.json unless text is
bytes. It is shown --fps frames a second, which should be what `fps` was in training. Without --model the weights are
random, as none were ever published, and so is what is said.
"""

import argparse
from pathlib import Path

import torch

from mirasol_model import Mirasol, MirasolConfig
from mirasol_model.media import read_clip
from mirasol_model.tokens import Text

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("clip", nargs="?", type=Path, default=Path(__file__).with_name("sample.mp4"))
parser.add_argument("--ask", nargs="+", default=["What is heard?", "What is seen?"])
parser.add_argument("--model", type=Path)
parser.add_argument("--preset", default="small", help="of the random model (default: small)")
parser.add_argument("--frames", type=int, default=32)
parser.add_argument("--fps", type=float, default=25.0, help="frames a second (default: 25)")
parser.add_argument("--most", type=int, default=32, help="tokens in an answer (default: 32)")
parser.add_argument("--temperature", type=float, default=0.0)
options = parser.parse_args()

model = (
    Mirasol.from_pretrained(options.model) if options.model else Mirasol(MirasolConfig.preset(options.preset)).eval()
)
config = model.config
file = options.model / "tokenizer.json" if options.model else None
text = Text(config.text, file if file and file.exists() else None)
size, rate = config.video.size, config.audio.sample_rate
clip = read_clip(options.clip, frames=options.frames, fps=options.fps, size=size, sample_rate=rate)
with torch.no_grad():
    encoded = model.encode(clip.video[None], None if clip.audio is None else clip.audio[None])
print(f"{options.clip.name}: {options.frames} frames are {encoded.latents[0, ..., 0].numel()} tokens")
for question in options.ask:
    print(question, end=" ", flush=True)
    prompt = torch.tensor([text.prompt(question)])
    tokens = model.answer_tokens(encoded, prompt, options.most, temperature=options.temperature)
    for words in text.words_of(int(token) for token in tokens):
        print(words, end="", flush=True)
    print()
