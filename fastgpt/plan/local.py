"""A rank's part of a GPT, for measuring: the model as fastgpt.parallel shares it, with no peers.

torch's "fake" process group answers every collective at once with a tensor of the right shape.
Under fake tensors, where no value is looked at, that is all there is to know. What fsdp and dp add
is not here: it does not change what a rank computes and keeps, and `fastgpt.plan.roofline` has it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils.checkpoint import checkpoint

from fastgpt.config import GPTConfig
from fastgpt.model import GPT
from fastgpt.parallel.model import shared
from fastgpt.plan.layout import Layout


@contextmanager
def ranks(layout: Layout) -> Iterator[DeviceMesh | None]:
    """Within, this process is the first rank of a mesh cp x tp whose others do not exist.

    Raises:
        ValueError: this process has peers already.
    """
    if layout.tp * layout.cp == 1:
        yield None
        return
    if dist.is_initialized():
        raise ValueError("plan: this process belongs to a process group; plan in one of its own")
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=layout.tp * layout.cp, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (layout.cp, layout.tp), mesh_dim_names=("cp", "tp"))
    finally:
        dist.destroy_process_group()


class _Checkpointed(nn.Module):
    """A block of which only what it is given is kept."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: Any) -> Any:
        return checkpoint(self.block, *args, use_reentrant=False, preserve_rng_state=False)


def part(config: GPTConfig, layout: Layout, mesh: DeviceMesh | None) -> GPT:
    """What one rank of a layout holds of a GPT: tp, cp, sequence and recompute matter here.

    Args:
        mesh: as `ranks` gives it.
    """
    model = GPT(config)
    if mesh is not None:
        tp = mesh["tp"] if layout.tp > 1 else None
        shared(model, tp, mesh["cp"] if layout.cp > 1 else None, layout.sequence)
    if layout.recompute == "block":
        model.h = nn.ModuleList(_Checkpointed(block) for block in model.h)
    return model


def axes(mesh: DeviceMesh | None) -> dict[str, str]:
    """The names of process groups -> the axis of the layout that each is."""
    if mesh is None:
        return {}
    return {mesh[name].get_group().group_name: name for name in ("tp", "cp")}
