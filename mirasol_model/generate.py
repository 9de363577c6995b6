"""Text, one token after another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mirasol_model.inputs import check_device, check_text
from mirasol_model.text import Memory, TextCache, TextDecoder


@torch.no_grad()
def generate(decoder: TextDecoder, memory: Memory, prompt: Tensor, max_new_tokens: int = 32, **sampling: Any) -> Tensor:
    """prompt (Q, L) int64 -> the tokens that follow (Q, <= max_new_tokens), `pad` after a row's last.

    Arguments and errors as `generate_tokens`.
    """
    every = generate_tokens(decoder, memory, prompt, max_new_tokens, **sampling)  # which checks the arguments
    rows = len(prompt)
    answer = prompt.new_full((rows, max_new_tokens), decoder.config.pad)
    row, length = torch.arange(rows, device=prompt.device), torch.zeros(rows, dtype=torch.int64, device=prompt.device)
    for tokens in every:
        said = tokens >= 0
        answer[row[said], length[said]] = tokens[said]
        length += said
    return answer[:, : int(length.max())]


def generate_tokens(
    decoder: TextDecoder,
    memory: Memory,
    prompt: Tensor,
    max_new_tokens: int = 32,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    *,
    prompt_lengths: Sequence[int] | Tensor | None = None,
    stop: Sequence[int] = (),
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """prompt (Q, L) int64 -> the tokens that follow as they come, (Q,) at a time; -1 for a row that says nothing then,
    because its prompt goes on or its answer has ended.

    The clip has Q rows, or one, and then all prompts are about it. prompt_lengths (Q,): where prompts differ in length,
    they are padded behind. temperature 0 takes the likeliest token; else tokens are drawn, from the top_k likeliest if
    given, and from the fewest likeliest whose probabilities reach top_p if given. An answer ends with `eos` or a token
    of `stop`, or after max_new_tokens. ValueError or TypeError names the argument that is not so, at once.
    """
    check_text("generate", "prompt", prompt, None, decoder.config.vocabulary)
    check_device("generate", decoder.embed.weight.device, prompt=prompt)
    rows, longest = prompt.shape
    clips = len(memory.layers[0][0])
    if rows != clips and (clips != 1 or rows < 1):
        expected = f"{clips} rows like the clips" if clips != 1 else "at least 1 row"
        raise ValueError(f"generate: prompt: expected {expected}, got {rows}")
    if max_new_tokens < 1:
        raise ValueError(f"generate: max_new_tokens: expected at least 1, got {max_new_tokens}")
    if not temperature >= 0:
        raise ValueError(f"generate: temperature: expected at least 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"generate: top_k: expected None or at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"generate: top_p: expected None or a share in (0, 1], got {top_p}")
    if not all(0 <= token < decoder.config.vocabulary for token in stop):
        raise ValueError(f"generate: stop: expected tokens 0 .. {decoder.config.vocabulary - 1}, got {list(stop)}")
    device = prompt.device
    lengths = torch.as_tensor([longest] * rows if prompt_lengths is None else prompt_lengths, device=device)
    if lengths.shape != (rows,) or not bool(((lengths >= 1) & (lengths <= longest)).all()):
        raise ValueError(f"generate: prompt_lengths: expected ({rows},) of 1 .. {longest}, got {lengths.tolist()}")
    ends = torch.tensor([decoder.config.eos, *stop], device=device)

    @torch.no_grad()
    def tokens() -> Iterator[Tensor]:
        start = int(lengths.min())
        cache = TextCache(decoder, rows, longest + max_new_tokens, decoder.embed.weight)
        logits = decoder(prompt[:, :start], memory.expand(rows), cache)[:, -1]  # (Q, vocabulary)
        done = torch.zeros(rows, dtype=torch.bool, device=device)
        for position in range(start, longest + max_new_tokens):
            drawn = pick(logits, temperature, top_k, top_p, generator)
            asking = position < lengths  # rows whose prompt goes on
            says = ~asking & ~done
            yield drawn.where(says, -1)
            done |= says & (torch.isin(drawn, ends) | (position - lengths == max_new_tokens - 1))
            if bool(done.all()):
                return
            token = torch.where(asking, prompt[:, min(position, longest - 1)], drawn)
            logits = decoder(token[:, None], memory.expand(rows), cache)[:, -1]

    return tokens()


def pick(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Tensor:
    """logits (Q, vocabulary) -> one token each (Q,)"""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p is not None:
        ordered, index = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # what the likelier ones have together
        logits = logits.scatter(1, index, ordered.masked_fill(before >= top_p, -torch.inf))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)
