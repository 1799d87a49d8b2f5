"""Tensors to and from safetensors files, each rank its own slices: torch.distributed.checkpoint."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.nn.parallel import DistributedDataParallel

from fastgpt.config import GPTConfig
from fastgpt.parallel import order
from fastgpt.parallel.model import SharedGPT
from fastgpt.train.checkpoint.folder import one_line

SHARD_BYTES = 2**30  # of a file; writing one takes as much memory again
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")
# A process alone is no mistake.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable", UserWarning)


def bare(model: nn.Module) -> nn.Module:
    """The model within DistributedDataParallel and torch.compile."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def _plain(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _config(model: nn.Module) -> GPTConfig:
    config = bare(model).config
    assert isinstance(config, GPTConfig)
    return config


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's state_dict under the names that it has when nothing is wrapped around it."""
    return {_plain(name): t.detach() for name, t in bare(model).state_dict().items()}


def set_model(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a model what was read, where the tensors of its state_dict are not its own."""
    if isinstance(inner := bare(model), SharedGPT):
        inner.load_state_dict(tensors)


def _parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
    """Names of the optimizer's parameters, in the order in which its state_dict counts them."""
    names = {p: _plain(name) for name, p in bare(model).named_parameters()}
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if any(p not in names for p in params):
        raise ValueError("checkpoint: the optimizer's parameters must be the model's")
    return [(names[p], p) for p in params]


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What the optimizer remembers of each parameter: {"exp_avg.<parameter>": ...}."""
    state = optimizer.state_dict()["state"]
    made = {
        f"{key}.{name}": torch.as_tensor(value).detach()
        for n, (name, _) in enumerate(_parameters(model, optimizer))
        for key, value in state.get(n, {}).items()
        if value is not None
    }
    return order.saved(made, _config(model))


def optimizer_places(
    model: nn.Module, optimizer: torch.optim.Optimizer, saved: Metadata
) -> dict[str, Tensor]:
    """Tensors to `read` an optimizer's into: one of its parameter's shape is sharded as that is.

    Raises:
        ValueError: they are of other parameters.
    """
    params = dict(_parameters(model, optimizer))
    places = {}
    for full, (shape, dtype) in _shapes(saved).items():
        _, _, name = full.partition(".")
        if name not in params:
            raise ValueError(f"the optimizer must have the parameter {name}; it has not")
        p = params[name]
        if shape == p.shape:
            places[full] = torch.zeros_like(p.detach(), dtype=dtype)
        elif shape.numel() == 1:
            places[full] = torch.zeros(shape, dtype=dtype)
        else:
            raise ValueError(f"{full} must be {tuple(p.shape)}, as the model; got {tuple(shape)}")
    return order.saved(places, _config(model))


def set_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Give an optimizer what it is to remember; its options stay as they are."""
    numbers = {name: (n, p) for n, (name, p) in enumerate(_parameters(model, optimizer))}
    state: dict[int, dict[str, Tensor]] = {}
    for full, value in tensors.items():
        key, _, name = full.partition(".")
        n, p = numbers[name]
        if value.shape == p.shape:
            value = order.placed(value, p, full, _config(model))
        state.setdefault(n, {})[key] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def write(tensors: Mapping[str, Tensor], folder: Path, group: Any, world: int) -> None:
    """Write tensors into a folder, each rank of the group what is its own.

    Raises:
        OSError: some rank could not; which and why.
    """
    files, size = {}, 0
    for name, t in tensors.items():
        size += t.numel() * t.element_size()
        files[name] = 1 + size // (SHARD_BYTES * world)
    seen = {n: i for i, n in enumerate(sorted(set(files.values())), 1)}
    writer = HuggingFaceStorageWriter(
        str(folder), {name: seen[n] for name, n in files.items()}, save_distributed=True
    )
    contiguous = {name: t.contiguous() for name, t in tensors.items()}
    try:
        save(contiguous, storage_writer=writer, process_group=group)
    except CheckpointException as error:
        raise OSError(_reason(error)) from None


class _Reader(HuggingFaceStorageReader):
    """Told what there is: not every rank need open every file to find out."""

    def __init__(self, folder: Path, saved: Metadata) -> None:
        super().__init__(str(folder))
        self._saved = saved

    def read_metadata(self) -> Metadata:
        return self._saved


def index(folder: Path) -> Metadata:
    """Which tensors there are in a folder, and where their slices are.

    Raises:
        OSError, SafetensorError: it cannot be read.
    """
    return HuggingFaceStorageReader(str(folder)).read_metadata()


def read(tensors: dict[str, Tensor], folder: Path, saved: Metadata, group: Any = None) -> None:
    """Fill tensors from a folder; with a group, all of its ranks together.

    Raises:
        OSError: some rank could not; which and why.
    """
    if not tensors:
        return
    reader = _Reader(folder, saved)
    try:
        load(tensors, storage_reader=reader, process_group=group, no_dist=group is None)
    except CheckpointException as error:
        raise OSError(_reason(error)) from None


def _shapes(saved: Metadata) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {
        name: (m.size, m.properties.dtype)
        for name, m in saved.state_dict_metadata.items()
        if isinstance(m, TensorStorageMetadata)
    }


def same(want: Mapping[str, Tensor], saved: Metadata) -> dict[str, torch.dtype]:
    """Check that the weights of a model were saved; their dtypes.

    Raises:
        ValueError: they were not.
    """
    got = _shapes(saved)
    missing, extra = sorted(want.keys() - got.keys()), sorted(got.keys() - want.keys())
    if missing or extra:
        what = f"lacks {missing[0]}" if missing else f"has the unknown {extra[0]}"
        raise ValueError(f"it must hold the model's weights; it {what}")
    for name, tensor in want.items():
        shape, dtype = got[name]
        if tensor.shape != shape or dtype.is_floating_point != tensor.dtype.is_floating_point:
            raise ValueError(
                f"it must hold {name} as {tuple(tensor.shape)}; got {dtype} {tuple(shape)}"
            )
    return {name: dtype for name, (_, dtype) in got.items()}


def _reason(error: CheckpointException) -> str:
    rank, (cause, _) = min(error.failures.items())
    where = f"rank {rank}: " if len(error.failures) > 1 or rank else ""
    return where + one_line(cause)
