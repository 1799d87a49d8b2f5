"""Ranks of one run: who they are, what each holds of the model, and sums over them.

The ranks form a mesh, dp x fsdp x cp x tp, tp innermost. Those that differ in dp or fsdp alone see
other rows of the batch; those that differ in cp or tp work on the same rows together. Everything
that travels does so through torch.distributed: DistributedDataParallel where only rows are shared,
fully_shard (FSDP2) where weights are, see tensor.py and context.py for the others.
"""

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp import register_fsdp_forward_method as through_fsdp
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from fastgpt.model import GPT, IGNORE
from fastgpt.parallel.config import ParallelConfig
from fastgpt.parallel.model import shared
from fastgpt.sharded import local, norm


class Rows(Protocol):
    """A batch, as far as the loss sees it."""

    @property
    def idx(self) -> Tensor: ...
    @property
    def targets(self) -> Tensor: ...


class Layout:
    """The ranks of a run, and this rank among them. Made by `Layout.start`.

    Attributes:
        config: with all sizes known.
        device: this rank's.
        rank, world: this rank's number, and how many there are.
        data_rank, data_world: this rank's place among those that hold different rows of a batch,
            and how many rows' parts there are: what a sampler is asked for.
        mesh: of the weights, with the dimensions dp, shard (fsdp and cp) and tp; None for one rank.
        rows: of the batch, with the dimensions data (dp and fsdp), cp and tp; None for one rank.
    """

    def __init__(self, config: ParallelConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.mesh: DeviceMesh | None = None
        self.rows: DeviceMesh | None = None
        self.rank, self.world = 0, 1
        self.data_rank, self.data_world = 0, 1
        self._ddp: DistributedDataParallel | None = None
        self._owns = False

    @classmethod
    def start(cls, config: ParallelConfig, device: torch.device) -> "Layout":
        """Meet the other ranks, if torchrun (or srun, with its variables) has started any.

        One rank needs no process group, and none is made. For others it is gloo on a CPU and nccl
        on CUDA, unless one is there already.

        Args:
            config: the same on all ranks.
            device: a kind of device; with "cuda", each rank takes the GPU of its LOCAL_RANK.

        Raises:
            ValueError: the sizes do not multiply to the number of ranks, or the ranks disagree; on
                all of them, with the same message.
        """
        world = dist.get_world_size() if dist.is_initialized() else _environment("WORLD_SIZE", 1)
        if world == 1:
            return cls(config.resolved(1), device)
        layout = cls(config, device)
        if device.type == "cuda":
            layout.device = torch.device("cuda", _environment("LOCAL_RANK", 0))
            torch.cuda.set_device(layout.device)
        if not dist.is_initialized():
            timeout = timedelta(seconds=config.timeout)
            store, rank, _ = next(rendezvous("env://", timeout=timeout))
            # torchrun keeps the store when it restarts the ranks, and with it their old addresses.
            attempt = _environment("TORCHELASTIC_RESTART_COUNT", 0)
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                store=dist.PrefixStore(f"attempt {attempt}", store),  # type: ignore[attr-defined]
                rank=rank,
                world_size=world,
                timeout=timeout,
                device_id=layout.device if device.type == "cuda" else None,
            )
            layout._owns = True
        layout.rank, layout.world = dist.get_rank(), world
        try:
            layout.agree("parallel", asdict(config))
            layout.config = config.resolved(world)
        except ValueError:
            layout.stop()
            raise
        layout._connect()
        return layout

    def _connect(self) -> None:
        c, kind = self.config, self.device.type
        assert c.dp * c.fsdp * c.cp * c.tp == self.world
        # With the order dp, fsdp, cp, tp both are plain meshes: no dimension needs flattening.
        self.mesh = init_device_mesh(
            kind, (c.dp, c.fsdp * c.cp, c.tp), mesh_dim_names=("dp", "shard", "tp")
        )
        self.rows = init_device_mesh(
            kind, (c.dp * c.fsdp, c.cp, c.tp), mesh_dim_names=("data", "cp", "tp")
        )
        self.data_rank, self.data_world = self.rows.get_local_rank("data"), c.dp * c.fsdp

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that speaks and writes."""
        return self.rank == 0

    def agree(self, what: str, value: Mapping[str, Any]) -> None:
        """See that all ranks have equal values.

        Args:
            what: the name of value in the error.
            value: names and plain values.

        Raises:
            ValueError: a rank's differs from the first's; on all ranks, with the same message.
        """
        if self.world == 1:
            return
        everyone: list[Any] = [None] * self.world
        dist.all_gather_object(everyone, dict(value))
        first = everyone[0]
        for rank, theirs in enumerate(everyone):
            for name in first.keys() | theirs.keys():
                if first.get(name) != theirs.get(name):
                    raise ValueError(
                        f"{what}: all ranks must have one {name}; got {first.get(name)} on rank 0,"
                        f" {theirs.get(name)} on rank {rank}"
                    )

    def parallelize(self, model: GPT, dtype: torch.dtype | None = None) -> GPT:
        """Give each rank its part of the model, in place.

        All ranks must start from the same weights. The model stays the module that it is: names and
        global shapes of its state_dict are unchanged, where weights are shared they are DTensors.
        Make the optimizer after this.

        Args:
            model: on this rank's device.
            dtype: with fsdp, that of the weights that are gathered, and of the products; gradients
                are still summed in float32.

        Returns:
            The model.

        Raises:
            ValueError: the ranks of tp do not divide the model's heads or feed-forward.
        """
        if self.mesh is None:
            return model
        c = self.config
        assert self.rows is not None
        if c.tp > 1 or c.cp > 1:
            tp = self.mesh["tp"] if c.tp > 1 else None
            shared(model, tp, self.rows["cp"] if c.cp > 1 else None, c.sequence)
        if c.fsdp > 1 or c.tp > 1:
            if c.tp < self.world:
                self._shard(model, dtype)
        else:
            ids = [self.device.index] if self.device.type == "cuda" else None
            self._ddp = DistributedDataParallel(model, ids, gradient_as_bucket_view=True)
        return model

    def _shard(self, model: GPT, dtype: torch.dtype | None) -> None:
        """FSDP2: each block a unit, what is left of the model, the tied table with it, another."""
        assert self.mesh is not None
        options: dict[str, Any] = {
            "mesh": self.mesh["dp", "shard"] if self.config.dp > 1 else self.mesh["shard"]
        }
        if dtype is not None:
            options["mp_policy"] = MixedPrecisionPolicy(dtype, torch.float32)
        # Nothing here writes into a block's output.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        for block in model.h:
            fully_shard(block, reshard_after_forward=self.config.reshard, **options)
        fully_shard(model, reshard_after_forward=False, **options)
        for method in ("hidden", "logits"):
            through_fsdp(model, method)

    def count(self, *batches: Rows) -> Tensor:
        """How many targets take part in the loss, in these batches of all ranks: an int64 scalar.

        Args:
            batches: those of a whole step, one for each forward pass.
        """
        counted = [(batch.targets != IGNORE).sum() for batch in batches]
        return self.all_reduce(torch.stack(counted).sum().to(self.device))

    def loss(self, model: GPT, batch: Rows, count: Tensor | None = None) -> Tensor:
        """This rank's part of the loss of a step, whose gradients the ranks average.

        With N ranks that hold different rows it is N times the sum over this rank's targets,
        divided by the number of all ranks' targets: right however many targets each rank has. Its
        mean over ranks, `all_reduce(loss, "mean")`, is the loss.

        Args:
            model: as parallelize gave it.
            batch: this rank's rows, on its device: idx, targets, and perhaps cu_seqlens and
                max_seqlen.
            count: targets that count in the whole step, see `count`; if None, those of this one
                batch on all ranks. Where a step has several batches, their losses then add up to
                the mean over all their targets.
        """
        here = (batch.targets != IGNORE).sum()
        mean = self._forward(model, batch)
        if self.world == 1 and count is None:
            return mean
        total = self.all_reduce(here) if count is None else count
        share = here.to(mean.dtype) * self.data_world / total
        return torch.where(here > 0, mean, 0.0) * share

    def _forward(self, model: GPT, batch: Rows) -> Tensor:
        runs = model if self._ddp is None or not torch.is_grad_enabled() else self._ddp
        cu_seqlens = getattr(batch, "cu_seqlens", None)
        documents = {}
        if cu_seqlens is not None:
            documents = {"cu_seqlens": cu_seqlens, "max_seqlen": getattr(batch, "max_seqlen", None)}
        loss: Tensor = runs(batch.idx, batch.targets, **documents)
        if isinstance(model, FSDPModule) and not torch.is_grad_enabled():
            model.reshard()  # as backward would
        return loss

    @contextmanager
    def no_sync(self, model: GPT, skip: bool = True) -> Iterator[None]:
        """Within, backward leaves gradients on each rank, for a later one outside to sum.

        Args:
            model: as parallelize gave it.
            skip: False does nothing: `no_sync(model, not last)`.
        """
        if not skip:
            yield
        elif self._ddp is not None:
            with self._ddp.no_sync():
                yield
        elif isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(False)
            try:
                yield
            finally:
                model.set_requires_gradient_sync(True)
        else:
            yield

    def all_reduce(self, value: Tensor, op: str = "sum") -> Tensor:
        """The "sum", "mean" or "max" of a value over the ranks that hold different rows."""
        if self.rows is None or self.data_world == 1:
            return value
        value = value.detach().clone()
        how = dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM
        dist.all_reduce(value, how, group=self.rows.get_group("data"))
        return value / self.data_world if op == "mean" else value

    @torch.no_grad()
    def clip_grad_norm(self, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
        """As torch.nn.utils.clip_grad_norm_, of plain tensors and DTensors of any placement.

        `fastgpt.optim.AdamW` with max_grad_norm does this itself.

        Returns:
            The norm of all gradients before, the same on all ranks.
        """
        grads = [p.grad for p in parameters if p.grad is not None]
        if not grads:
            return torch.zeros((), device=self.device)
        total = norm(grads)
        torch._foreach_mul_([local(g) for g in grads], (max_norm / (total + 1e-6)).clamp(max=1.0))
        return total

    def seed(self, seed: int) -> None:
        """Seed torch's generators for dropout: as torch.manual_seed on the first rank, and so that
        ranks which hold other elements of the activations drop out other ones."""
        c, at = self.config, self.rank
        if self.world > 1 and not c.sequence:
            at //= c.tp  # the ranks of tp hold the same activations
        torch.manual_seed(seed if at == 0 else _mixed(seed, at))

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            dist.barrier()

    def stop(self) -> None:
        """Part from the other ranks; the process group goes if `start` has made it."""
        if self._owns and dist.is_initialized():
            dist.destroy_process_group()
            self._owns = False


def rank() -> int:
    """This process's number, from 0, also where no process group is (yet, or any more)."""
    return dist.get_rank() if dist.is_initialized() else _environment("RANK", 0)


def _mixed(seed: int, rank: int) -> int:
    """Another seed for another rank, SplitMix64's step (Steele, Lea, Flood, 2014)."""
    z = (seed + rank * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return (z ^ (z >> 31)) >> 1


def _environment(name: str, default: int) -> int:
    """A number that torchrun sets."""
    return int(os.environ.get(name, default))
