"""TokenTuringParameters: what a Token Turing Machine owns, where it comes from, and how to walk through it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mirasol_kernels.latent_recurrence.initialise import POOL_HEADS, Draw
from mirasol_kernels.latent_recurrence.modules import (
    AddErase,
    LearnedMlp,
    LearnedQueries,
    MixerBlock,
    MlpBlock,
    Positions,
    Processor,
    TransformerBlock,
    learned_tokens,
    map_tensors,
    tensors_in,
)
from mirasol_kernels.latent_recurrence.scenic import Flax

_INIT = "TokenTuringParameters.init"


@dataclass(frozen=True)
class TokenTuringParameters:
    """The parameters of `token_turing_recurrence`, shared by all steps.

    Made by `init` (trainable, with the initialisers of the public reference) or `from_scenic` (its checkpoints), or put
    together from the dataclasses of `modules`.  What is there decides what runs: `memory_mode`, `processor` and `unit`
    follow from the types.  `add_erase` says how an AddErase write updates memory: "paper" as the Neural Turing Machine
    does, M prod_k (1 - w e) + sum_k w a with e in (0, 1), or "scenic" as the public code does, with
    mean_k (1 - w a) and an unbounded e, which adds about 1 to every element of memory at every step.
    """

    read: LearnedMlp | LearnedQueries
    process: Processor
    write: LearnedMlp | LearnedQueries | AddErase | None  # None: the simple unit, whose processor writes
    positions: Positions | None = None
    add_erase: str = "paper"

    def __post_init__(self) -> None:
        name = type(self).__name__
        if self.add_erase not in ("paper", "scenic"):
            raise ValueError(f"{name}: add_erase: expected 'paper' or 'scenic', got {self.add_erase!r}")
        if self.write is not None and isinstance(self.write, LearnedQueries) != isinstance(self.read, LearnedQueries):
            kinds = f"{type(self.read).__name__} and {type(self.write).__name__}"
            raise ValueError(f"{name}: read, write: expected both or neither to be LearnedQueries, got {kinds}")
        if self.positions is not None:
            if self.write is None:
                raise ValueError(f"{name}: positions: expected None with the simple unit, got tables")
            if (self.positions.write is None) != isinstance(self.write, AddErase):
                want = "no write table with AddErase" if isinstance(self.write, AddErase) else "a write table"
                raise ValueError(f"{name}: positions: expected {want}")

    @property
    def memory_mode(self) -> str:
        """TL, MHA or AddErase."""
        if isinstance(self.write, AddErase):
            return "AddErase"
        return "MHA" if isinstance(self.read, LearnedQueries) else "TL"

    @property
    def processor(self) -> str:
        """transformer, mixer or mlp."""
        kinds = {TransformerBlock: "transformer", MixerBlock: "mixer", MlpBlock: "mlp"}
        return kinds[type(self.process.blocks[0])]

    @property
    def unit(self) -> str:
        """standard, or simple: reads the input alone, and the processor's tokens are the next memory."""
        return "simple" if self.write is None else "standard"

    @property
    def width(self) -> int:
        """c."""
        return self.process.norm.weight.shape[0]

    @property
    def read_tokens(self) -> int:
        """r, the output tokens per step."""
        return learned_tokens(self.read)

    @property
    def memory_tokens(self) -> int | None:
        """The slots of memory that these parameters fix; None where any number will do."""
        if self.write is None or isinstance(self.write, AddErase):
            return None
        return learned_tokens(self.write)

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """("read.mlp.hidden.weight", tensor), ... in a fixed order."""
        return tensors_in(self)

    def replace(self, tensors: Mapping[str, Tensor]) -> TokenTuringParameters:
        """The same with other tensors, by the names of `named_tensors`; those that are not named stay."""
        unknown = set(tensors) - {name for name, _ in self.named_tensors()}
        if unknown:
            raise ValueError(f"TokenTuringParameters.replace: tensors: expected names of named_tensors, got {unknown}")
        return map_tensors(self, lambda name, tensor: tensors.get(name, tensor))

    def to(self, *args: Any, **kwargs: Any) -> TokenTuringParameters:
        """Every tensor `.to(...)`: a dtype, a device."""
        return map_tensors(self, lambda _, tensor: tensor.to(*args, **kwargs))

    @classmethod
    def init(
        cls,
        width: int,
        memory: int,
        read: int,
        *,
        memory_mode: str = "TL",
        processor: str = "transformer",
        unit: str = "standard",
        layers: int = 1,
        mlp: int = 512,
        heads: int = 12,
        hidden: int = 64,
        tokens: int | None = None,
        add_erase: str = "paper",
        query_std: float = 0.02,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> TokenTuringParameters:
        """New trainable tensors, with the defaults and initialisers of the public reference (scenic@4a38d475).

        width: c.  memory: slots.  read: r, output tokens per step.  layers, mlp, heads: of the processor.
        hidden: width inside the token learners and AddErase.
        tokens: input tokens per step, all sources together, to have learned positions; None is none.
        query_std: of the learned queries of MHA.  The reference's 0.02 makes their attention almost uniform at first,
        so that all tokens start nearly equal; about 1 does not.

        Kernels are xavier-uniform with biases N(0, 1e-6), in learned-query attention lecun-normal; attention biases 0,
        positions N(0, 0.02), norms 1 and 0.  Raises ValueError naming the argument.
        """
        for name, got, known in (
            ("memory_mode", memory_mode, ("TL", "MHA", "AddErase")),
            ("processor", processor, ("transformer", "mixer", "mlp")),
            ("unit", unit, ("standard", "simple")),
        ):
            if got not in known:
                raise ValueError(f"{_INIT}: {name}: expected one of {', '.join(known)}, got {got!r}")
        if unit == "simple" and (memory_mode != "TL" or tokens is not None):
            got = f"{memory_mode!r} and {tokens}"
            raise ValueError(f"{_INIT}: memory_mode, tokens: expected 'TL' and None with the simple unit, got {got}")
        sizes = {"width": width, "memory": memory, "read": read, "layers": layers}
        sizes |= {"mlp": mlp, "heads": heads, "hidden": hidden, "tokens": 0 if tokens is None else tokens}
        for name, number in sizes.items():
            least = 0 if name == "tokens" else 1
            if not isinstance(number, int) or number < least:
                raise ValueError(f"{_INIT}: {name}: expected an integer of at least {least}, got {number!r}")
        if processor == "transformer" and width % heads:
            raise ValueError(f"{_INIT}: width: expected a multiple of heads = {heads}, got {width}")
        if memory_mode == "MHA" and width % POOL_HEADS:
            raise ValueError(f"{_INIT}: width: expected a multiple of {POOL_HEADS}, the heads of MHA, got {width}")

        draw = Draw(generator, device, dtype)

        def pool(k: int) -> LearnedMlp | LearnedQueries:
            if memory_mode == "MHA":
                return draw.learned_queries(width, k, query_std)
            return draw.learned_mlp(width, hidden, k)

        write: LearnedMlp | LearnedQueries | AddErase | None = None
        if memory_mode == "AddErase":
            write = draw.add_erase(width, hidden, read)
        elif unit == "standard":
            write = pool(memory)
        positions = None
        if tokens is not None:
            seen = memory + tokens
            write_table = None if memory_mode == "AddErase" else draw.table(seen + read, width)
            positions = Positions(draw.table(seen, width), write_table)
        process = draw.processor(processor, read if unit == "standard" else memory + read, width, layers, mlp, heads)
        made = cls(pool(read), process, write, positions, add_erase)
        return made.replace({name: tensor.requires_grad_() for name, tensor in made.named_tensors()})

    @classmethod
    def from_scenic(cls, arrays: Mapping[str, Any]) -> TokenTuringParameters:
        """The parameters of scenic@4a38d475 `TokenTuringMachineUnit`, `...SimpleUnit` or `...Encoder` (flax).

        arrays: flax path ("Encoder_0.encoder_norm.scale") -> array, anything torch.as_tensor takes.  A prefix
        "unit_function." is dropped; where paths start with "param.", the others are no parameters and are left out.
        Memory mode, processor, layers, heads and positions follow from names and shapes; add_erase is "scenic".
        Tensors are copies.  Raises ValueError naming what is missing or left over.
        """
        flax = Flax(arrays)
        queries = flax.has("TokenLearnerMHA_0")
        name = "TokenLearnerMHA" if queries else "TokenLearnerModuleV11"
        pool = flax.learned_queries if queries else flax.learned_mlp
        write: LearnedMlp | LearnedQueries | AddErase | None = None
        if flax.has("TokenAddEraseWrite_0"):
            write = flax.add_erase("TokenAddEraseWrite_0")
        elif flax.has(f"{name}_1"):
            write = pool(f"{name}_1")
        positions = None
        if flax.has("read_pos_embed"):
            # The reference makes a write table in every mode, but its AddErase never reads it.
            table = flax.take("write_pos_embed.pos_embedding")[0]
            read_table = flax.take("read_pos_embed.pos_embedding")[0]
            positions = Positions(read_table, None if isinstance(write, AddErase) else table)
        made = cls(pool(f"{name}_0"), flax.processor(), write, positions, "scenic")
        if flax.left:
            raise ValueError(f"from_scenic: arrays: expected the parameters of one unit, got also {sorted(flax.left)}")
        return made
