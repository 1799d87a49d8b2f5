"""Checkpoints by several ranks: any number of them reads what any number wrote."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)  # fmt: skip
from torch.nn.parallel import DistributedDataParallel

from fastgpt.model import GPT, GPTConfig
from fastgpt.tokenizer import Tokenizer
from fastgpt.train import checkpoint, load
from fastgpt.train.checkpoint import CheckpointConfig, Checkpointer
from tests import ranks

# Four ranks get uneven slices of 259 rows, and of 3 rows one gets none.
SHAPE = GPTConfig(block_size=3, vocab_size=259, n_layer=2, n_head=2, n_embd=16)
TOKENIZER = Tokenizer.train(["abc"], 257)


def here() -> Any:
    """The ranks, as a layout tells them."""
    if not dist.is_initialized():
        return None
    return SimpleNamespace(rank=dist.get_rank(), world=dist.get_world_size())


def spread(model: GPT, how: str) -> nn.Module:
    """A model over all ranks, in one of the ways that there are."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world == 1 or how == "plain":
        return model
    if how == "ddp":
        return DistributedDataParallel(model)
    if how == "fsdp":
        for block in model.h:
            fully_shard(block)
        fully_shard(model)
        return model
    tp = 2
    mesh = init_device_mesh("cpu", (world // tp, tp), mesh_dim_names=("fsdp", "tp"))
    for block in model.h:
        assert isinstance(block, nn.Module)
        plan = {"mlp.c_fc": ColwiseParallel(), "mlp.c_proj": RowwiseParallel()}
        parallelize_module(block, mesh["tp"], plan)
        fully_shard(block, mesh=mesh["fsdp"])
    fully_shard(model, mesh=mesh["fsdp"])
    return model


def trained(how: str, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model and an optimizer with moments, the same numbers whatever the ranks."""
    torch.manual_seed(seed)
    model = spread(GPT(SHAPE), how)
    optimizer = torch.optim.AdamW(model.parameters(), fused=how != "fsdp x tp")
    generator = torch.Generator().manual_seed(seed + 1)
    for p in model.parameters():
        full = torch.randn(p.shape, generator=generator)
        p.grad = _as(full, p)
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def _as(full: Tensor, like: Tensor) -> Tensor:
    if not isinstance(like, DTensor):
        return full
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full, like.device_mesh, like.placements)


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in tensors.items()}


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    from fastgpt.train.checkpoint import tensors

    return whole(tensors.model_tensors(model) | tensors.optimizer_tensors(model, optimizer))


def write(rank: int, out: Path, how: str) -> None:
    model, optimizer = trained(how, 0)
    saver = Checkpointer(out, CheckpointConfig(), here())
    saver.save(3, model, TOKENIZER, optimizer, {"note": 1})
    saver.wait()
    full = everything(model, optimizer)
    if rank == 0:
        save_file({k: v.contiguous() for k, v in full.items()}, out / "expected.safetensors")


def read_back(rank: int, out: Path, how: str) -> None:
    model, optimizer = trained(how, 5)
    saver = Checkpointer(out, CheckpointConfig(), here())
    at = saver.latest()
    assert at is not None
    assert saver.load(at, model, optimizer)["note"] == 1
    got, want = everything(model, optimizer), load_file(out / "expected.safetensors")
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize(
    "before, after",
    [
        ((1, "plain"), (2, "fsdp")),
        ((2, "fsdp"), (1, "plain")),
        ((2, "fsdp"), (4, "fsdp")),
        ((4, "fsdp"), (2, "ddp")),
        ((2, "ddp"), (4, "fsdp x tp")),
        ((4, "fsdp x tp"), (2, "fsdp")),
    ],
    ids=str,
)
def test_any_ranks_read_what_any_ranks_wrote(
    tmp_path: Path, before: tuple[int, str], after: tuple[int, str]
) -> None:
    out = tmp_path / "run"
    ranks.run(before[0], tmp_path, write, out, before[1])
    ranks.run(after[0], tmp_path, read_back, out, after[1])
    want = load_file(out / "expected.safetensors")
    model, _ = load(out)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, want[name]), name
    # Every rank has written a share, none of it twice.
    at = checkpoint.find(out)
    files = sorted(at.glob("model/*"))
    assert len(files) == before[0]
    assert sum(len(f.read_bytes()) for f in files) < 1.6 * sum(
        t.numel() * t.element_size() for t in model.state_dict().values()
    )
    assert json.loads((at / "train.json").read_text())["step"] == 3
