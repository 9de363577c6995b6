"""A process of test_accelerate.py: examples/accelerate/train.py with FSDP2, which accelerate leaves out on a CPU.

There it ignores the configuration's `fsdp_config` without a word and takes DistributedDataParallel.  The processes and
their gloo are what torch's FSDP2 needs, so tell accelerate's state afterwards that it shards.
"""

from __future__ import annotations

import runpy
import sys
from typing import Any
from unittest.mock import patch

from accelerate import Accelerator
from accelerate.state import AcceleratorState, DistributedType, PartialState
from torch.distributed.fsdp import FSDPModule

prepare, begin = Accelerator.prepare, AcceleratorState.__init__


def sharding(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
    begin(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def sharded(self: Accelerator, *args: Any, **kwargs: Any) -> Any:
    model, *others = prepare(self, *args, **kwargs)
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    print("in shards:", len(parts) - (model in parts), "modules", "and the whole" * (model in parts), flush=True)
    return model, *others


with patch.object(AcceleratorState, "__init__", sharding), patch.object(Accelerator, "prepare", sharded):
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
