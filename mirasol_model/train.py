"""Train a model: python -m mirasol_model.train --config FILE (see `mirasol_model.train_config`).

The run goes on from its last checkpoint, if there is one in its folder, exactly as if it had never stopped: model and
optimiser come from there, the learning rate, the order of the data and all random numbers are functions of the step.
Under torchrun the processes share the work, as `shard` in the configuration says: each has the whole model (DDP), or a
share of it (FSDP2).
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from mirasol_model import Mirasol, MirasolConfig, checkpoints
from mirasol_model.data import Attempts, BadExample, Batch, Collate, Order, open_data
from mirasol_model.parallel import gathered, shard
from mirasol_model.run_log import RunLog, plot, read_rows
from mirasol_model.tokens import Text
from mirasol_model.train_config import OptimizerConfig, TrainConfig, differences

PARTS = ("latent", "video", "audio", "text")


def build_model(config: TrainConfig) -> Mirasol:
    seed_everything(config.seed)
    wanted = config.model.config(config.phase)
    if config.model.start is not None:
        return Mirasol.from_pretrained(config.model.start, config=wanted)
    return Mirasol(wanted)


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over all parameters, with its moments there from the beginning, so that every checkpoint has the same
    entries, also of parameters that the data so far had no use for."""
    wide, flat = ([p for p in model.parameters() if (p.ndim > 1) == matrix] for matrix in (True, False))
    groups = [{"params": wide, "weight_decay": config.weight_decay}, {"params": flat, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=config.betas)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # at rate 0 nothing changes
    optimizer.zero_grad()
    for state in optimizer.state.values():
        state["step"].zero_()
    return optimizer


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Of step 1 .. steps: a linear rise, then half a cosine."""
    if step <= config.warmup:
        return config.rate * step / config.warmup
    done = (step - config.warmup) / max(steps - config.warmup, 1)
    return config.rate * (config.final + (1 - config.final) * (1 + math.cos(math.pi * done)) / 2)


def seed_everything(*numbers: int) -> None:
    """Python, NumPy and torch begin anew from these numbers: what is random is a function of them."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class Trainer:
    """A run between two steps: `step`, `evaluate`, `save` and `load` are what there is to do; `run` does it all.

    `model` has the parameters, `parallel` is what is called in training: the model, or what wraps it.
    """

    def __init__(self, config: TrainConfig, device: torch.device):
        self.config, self.device = config, device
        self.rank, self.ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.folder = Path(config.out)
        model_config: MirasolConfig = config.model.config(config.phase)
        self.text = Text(model_config.text, config.model.tokenizer)
        data = config.data
        self.examples = Attempts(open_data(data.kind, data.train, model_config), replace=True)
        self.questions: Dataset | None = None
        if data.evaluate is not None:
            self.questions = Attempts(open_data(data.kind, data.evaluate, model_config, "evaluate"), replace=False)
        self.model = build_model(config).to(device).train()
        self.parallel = self.wrap(self.model)
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.bfloat16 = device.type != "cpu" if config.bfloat16 is None else config.bfloat16
        self.progress = {name: torch.zeros((), dtype=torch.int64) for name in ("step", "examples", "skipped")}
        self.warned: set[str] = set()
        self.skipped = 0  # by this process since its last step
        self.log: RunLog | None = None

    def wrap(self, model: Mirasol) -> nn.Module:
        if self.ranks == 1:
            return model
        return shard(model, init_device_mesh(self.device.type, (self.ranks,)), self.config.shard)

    # ------------------------------------------------------------------------------------------------------- data

    def loader(self, examples: Dataset, **order: Any) -> DataLoader:
        workers = self.config.data.workers
        return DataLoader(
            examples,
            num_workers=workers,
            timeout=self.config.data.timeout if workers else 0,
            collate_fn=Collate(self.text, predict_prompts=self.config.phase == "pretrain"),
            pin_memory=self.device.type == "cuda",
            **order,
        )

    def batches(self) -> Iterator[Batch]:
        """Of this process, from where the run stands."""
        ours = {"rank": self.rank, "ranks": self.ranks, "start": int(self.progress["examples"])}
        order = Order(len(self.examples), self.config.batch, self.config.seed, **ours)
        for batch, skipped in self.loader(self.examples, batch_sampler=order):
            self.skip(skipped)
            self.skipped += len(skipped)
            if batch is None or len(batch.frames) < self.config.batch:
                raise BadExample(f"data: no example that can be used among {len(skipped)}; the last: {skipped[-1]}")
            yield batch.to(self.device)

    def skip(self, reasons: Sequence[str]) -> None:
        """Warn of what was not used, of each once, or stop, as the configuration says."""
        if reasons and self.config.data.bad == "stop":
            raise BadExample(f"data: {reasons[0]}")
        for reason in reasons:
            if reason not in self.warned:
                self.warned.add(reason)
                self.say(f"warning: skipped, {len(self.warned)} so far: {reason}")

    def say(self, line: str) -> None:
        if self.log:
            self.log.say(line)
        else:
            print(line, file=sys.stderr, flush=True)

    # --------------------------------------------------------------------------------------------------- training

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16)

    def alone(self) -> AbstractContextManager:
        """Gradients stay with their process: more are to come before the step. With FSDP they do not: it is there to
        spare the memory of whole ones."""
        return self.parallel.no_sync() if isinstance(self.parallel, DistributedDataParallel) else nullcontext()

    def forward(self, batch: Batch) -> Any:
        with self.autocast():
            return self.parallel(
                batch.video,
                batch.audio,
                batch.text,
                labels=batch.labels,
                frames=batch.frames,
                has_audio=batch.has_audio,
            )

    def step(self, batches: Iterator[Batch]) -> dict[str, Any]:
        """One step of the optimiser -> its row of the log."""
        begin, config = time.perf_counter(), self.config
        step = int(self.progress["step"]) + 1
        rate = learning_rate(config.optimizer, step, config.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        parts = torch.zeros(2, 2 + len(PARTS), dtype=torch.float64, device=self.device)  # sums, and of how many
        for turn in range(config.accumulation):
            batch = next(batches)
            seed_everything(config.seed, step, turn, self.rank)
            last = turn == config.accumulation - 1
            with nullcontext() if last else self.alone():
                out = self.forward(batch)
                (out.loss / config.accumulation).backward()
            for i, loss in enumerate((out.loss, *(out.losses[name] for name in PARTS))):
                if loss is not None:
                    parts[:, i] += torch.stack([loss.detach().double(), parts.new_ones(())])
        norm = whole(nn.utils.clip_grad_norm_(self.model.parameters(), config.optimizer.clip))
        if not norm.isfinite():
            raise FloatingPointError(f"train: the gradients of step {step} are not finite")
        self.optimizer.step()
        self.optimizer.zero_grad()
        parts[0, -1], self.skipped = self.skipped, 0
        if self.ranks > 1:
            dist.all_reduce(parts)
        *sums, (skipped, _) = parts.T.tolist()
        self.progress["step"] += 1
        self.progress["examples"] += config.batch * config.accumulation * self.ranks
        self.progress["skipped"] += int(skipped)
        means = [total / n if n else None for total, n in sums]
        return {
            "step": step,
            **dict(zip(("loss", *PARTS), means, strict=True)),
            "norm": norm.item(),
            "rate": rate,
            "skipped": int(self.progress["skipped"]),
            "seconds": round(time.perf_counter() - begin, 4),
        }

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """Greedy answers to all questions -> {"exact": share that is right to the letter (as far as the tokenizer keeps
        letters), by kind and in all, "of": how many there were, "skipped": how many could not be asked}."""
        assert self.questions is not None
        right: Counter[str] = Counter()
        asked: Counter[str] = Counter()
        bad = 0
        mine = Subset(self.questions, range(self.rank, len(self.questions), self.ranks))  # type: ignore[arg-type]
        self.model.eval()
        with gathered(self.model):  # each process asks at its own pace
            loader = self.loader(mine, batch_size=self.config.batch)
            for batch, skipped in tqdm(loader, desc="evaluating", leave=False, disable=self.log is None):
                self.skip(skipped)
                bad += len(skipped)
                if batch is None:
                    continue
                for kind, given, answer in zip(batch.kinds, self.answers(batch), batch.answers, strict=True):
                    if not (expected := self.text.words(self.text.answer(answer))):
                        self.skip([f"answer: expected words that the tokenizer has, got {answer!r}"])
                        bad += 1
                        continue
                    for name in {kind or "all", "all"}:
                        asked[name] += 1
                        right[name] += given == expected
        self.model.train()
        if self.ranks > 1:
            every: list[Any] = [None] * self.ranks
            dist.all_gather_object(every, (right, asked, bad))
            right, asked = (sum((counts[i] for counts in every), Counter()) for i in (0, 1))
            bad = sum(counts[2] for counts in every)
        return {
            "step": int(self.progress["step"]),
            "exact": {kind: right[kind] / asked[kind] for kind in sorted(asked)},
            "of": {kind: asked[kind] for kind in sorted(asked)},
            "skipped": bad,
        }

    def answers(self, batch: Batch) -> list[str | None]:
        """None for one that does not end."""
        batch = batch.to(self.device)
        longest = max(len(self.text.answer(answer)) for answer in batch.answers)
        with self.autocast():
            tokens = self.model.generate(
                batch.video,
                batch.audio,
                batch.prompt,
                longest,
                frames=batch.frames,
                has_audio=batch.has_audio,
                prompt_lengths=batch.prompt_lengths,
            )
        # An answer that goes on where the right one ends is wrong, though its first words are right.
        eos = self.model.config.text.eos
        return [self.text.words(row) if eos in row else None for row in tokens.tolist()]

    # ------------------------------------------------------------------------------------------------ checkpoints

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def save(self) -> None:
        if self.log:
            self.log.sync()
        step = int(self.progress["step"])
        checkpoints.save(self.checkpoints, step, self.model, self.optimizer, self.progress, keep=self.config.keep)

    def load(self) -> None:
        """The last checkpoint, if there is one."""
        checkpoints.load(self.checkpoints, self.model, self.optimizer, self.progress)

    def agree(self) -> None:
        """The folder's run is of this configuration, which is written down the first time. Every process calls it."""
        file, now = self.folder / "config.json", json.dumps(self.config.to_dict(), indent=2)
        if checkpoints.steps(self.checkpoints):
            if changed := differences(json.loads(file.read_text()), json.loads(now)):
                raise ValueError(f"train: {self.folder} has a run of another configuration: {', '.join(changed)}")
            return
        if (self.folder / "model").exists() or self.once_saved():
            raise ValueError(
                f"train: out: expected a new folder, or a run's with its checkpoints, got {self.folder}, whose run has "
                "none left: to begin anew would erase its log and its model"
            )
        checkpoints.meet()  # all have looked before anything changes
        if checkpoints.first():
            self.folder.mkdir(parents=True, exist_ok=True)
            file.write_text(now + "\n")

    def once_saved(self) -> bool:
        """Whether the log goes past the step of a first checkpoint. A run that was killed before it may begin anew."""
        rows, file = read_rows(self.folder / "log.jsonl"), self.folder / "config.json"
        return bool(rows) and not (file.exists() and rows[-1]["step"] <= json.loads(file.read_text())["save_every"])

    def export(self) -> None:
        """<out>/model: what `Mirasol.from_pretrained` reads, and tokenizer.json. Every process calls it."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights: Any = get_model_state_dict(self.model, options=options)  # of all, in the first process
        if not checkpoints.first():
            return
        with torch.device("meta"):
            model = Mirasol(self.model.config)
        # What was gathered may be a view of more than itself, which safetensors refuses.
        model.load_state_dict({name: x.clone() for name, x in weights.items()}, assign=True)
        model.save_pretrained(self.folder / "model")
        self.text.tokenizer.save(str(self.folder / "model" / "tokenizer.json"))

    def run(self) -> None:
        config = self.config
        self.agree()
        self.load()
        batches = self.batches()
        if checkpoints.first():
            self.log = RunLog(self.folder, int(self.progress["step"]), config.steps)
        while int(self.progress["step"]) < config.steps:
            rows = [self.step(batches)]
            step = int(self.progress["step"])
            if self.questions is not None and (step % config.evaluate_every == 0 or step == config.steps):
                rows.append(self.evaluate())
            if self.log:
                self.log.write(rows)
            if step % config.save_every == 0 or step == config.steps:
                self.save()
        self.export()
        if self.log:
            self.log.close()
            plot(self.folder)


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


@contextmanager
def processes() -> Iterator[torch.device]:
    """-> the device of this process; under torchrun, in its group."""
    cuda, local = torch.cuda.is_available(), int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        yield device
        return
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield device
        dist.barrier()
    finally:
        # DistributedDataParallel's reducer goes first: where it is the last that holds the group, it waits for gloo's
        # threads and keeps the interpreter's lock, for which they may be waiting (pytorch/pytorch#56297).
        gc.collect()
        dist.destroy_process_group()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mirasol_model.train", description="Train a Mirasol model.")
    parser.add_argument("--config", type=Path, required=True, help="JSON or TOML: mirasol_model/train_config.py")
    config = TrainConfig.load(parser.parse_args(arguments).config)
    with processes() as device:
        Trainer(config, device).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
