"""Train a Mirasol with Hugging Face accelerate; DistributedDataParallel or FSDP2, as the configuration file says.

accelerate launch --config_file examples/accelerate/fsdp2.yaml examples/accelerate/train.py [--preset small]

Every process takes its own --rows of each batch. The clips are noise: put your own `DataLoader` in their place.
"""

from __future__ import annotations

import argparse
import gc

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch.utils.data import DataLoader, TensorDataset

from mirasol_model import Mirasol, MirasolConfig


def clips(config: MirasolConfig, rows: int, snippets: int = 2) -> TensorDataset:
    """video, audio and text of `rows` clips at 25 frames a second."""
    frames, size = snippets * config.video.frames, config.video.size
    video = torch.rand(rows, 3, frames, size, size)
    audio = 0.1 * torch.randn(rows, frames * config.audio.sample_rate // 25)
    return TensorDataset(video, audio, torch.randint(3, config.text.vocabulary, (rows, 16)))


def train(accelerator: Accelerator, options: argparse.Namespace) -> None:
    torch.manual_seed(0)
    config = MirasolConfig.preset(options.preset)
    model, data = Mirasol(config), clips(config, options.rows * accelerator.num_processes * options.steps)
    if options.float64:
        model, data = model.double(), TensorDataset(*(x.double() if x.is_floating_point() else x for x in data.tensors))
    model.eval()  # no tokens of x are masked, so that the number of processes changes nothing
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = DataLoader(data, batch_size=options.rows)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for step, (video, audio, text) in enumerate(loader):
        loss = model(video, audio, text, labels=text).loss
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        accelerator.print(f"step {step} loss {accelerator.reduce(loss.detach(), 'mean').item()!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rows", type=int, default=4, help="clips of a batch, of each process (default: 4)")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--float64", action="store_true", help="to compare with one process to rounding")
    options = parser.parse_args()

    ddp = DistributedDataParallelKwargs(find_unused_parameters=True)  # a batch may lack a modality
    accelerator = Accelerator(cpu=options.cpu, kwargs_handlers=[ddp])
    train(accelerator, options)
    accelerator.wait_for_everyone()
    # Before the group: DistributedDataParallel's reducer, where it is the last that holds the group, waits for gloo's
    # threads and keeps the interpreter's lock, for which they may be waiting (pytorch/pytorch#56297).
    accelerator.free_memory()
    gc.collect()
    accelerator.end_training()


if __name__ == "__main__":
    main()
