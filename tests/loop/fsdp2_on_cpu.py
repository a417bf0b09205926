"""accelerate has FSDP on GPUs only. Told that these processes are on some, it makes the same FSDP2
of them over gloo."""

import os

from accelerate.state import PartialState
from accelerate.utils import DistributedType


def fsdp2_on_cpu():
    """To be called before the Accelerator is made, where the environment has FSDP2_ON_CPU."""
    if os.environ.get("FSDP2_ON_CPU"):
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
