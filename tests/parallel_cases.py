"""What each rank of tests/test_parallel.py runs: `torchrun tests/parallel_cases.py OUT NAME…`.

One process group runs many cases; rank 0 writes to OUT a line of JSON for each, ["name", null] or
["name", "what went wrong, and on which ranks"].
"""

import json
import math
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from fastgpt import GPT, GPTConfig
from fastgpt.ops.attention import AttentionFunction
from fastgpt.ops.cross_entropy import CrossEntropyFunction
from fastgpt.ops.layer_norm import LayerNormFunction
from fastgpt.ops.rms_norm import RMSNormFunction
from fastgpt.parallel import Layout, ParallelConfig
from fastgpt.parallel.order import gathered
from fastgpt.tokenizer import Tokenizer
from fastgpt.train import load
from fastgpt.train.checkpoint import CheckpointConfig, Checkpointer, tensors
from fastgpt.train.optimizer import OptimConfig

CPU = torch.device("cpu")
SMALL = GPTConfig(block_size=32, vocab_size=61, n_layer=2, n_head=4, n_embd=32)
LLAMA = GPTConfig(
    block_size=32, vocab_size=61, n_layer=2, n_head=4, n_embd=32, variant="llama", n_kv_head=2,
    qk_norm=True, tied=False,
)  # fmt: skip
STEPS, ROWS, T = 3, 8, 16


@dataclass(frozen=True)
class Batch:
    """What DATA's sampler gives."""

    idx: Tensor
    targets: Tensor
    cu_seqlens: Tensor | None = None
    max_seqlen: int = 0


def batch(
    step: int, rank: int = 0, world: int = 1, length: int = T, documents: bool = False
) -> Batch:
    """Rows of a step's batch, of which the first have few targets that count."""
    g = torch.Generator().manual_seed(step)
    idx = torch.randint(61, (ROWS, length + 1), generator=g)
    targets = idx[:, 1:].clone()
    targets[torch.rand(ROWS, length, generator=g) < torch.linspace(0.95, 0.0, ROWS)[:, None]] = -100
    ends = torch.rand(ROWS, length, generator=g) < 0.2  # of documents
    ends[:, -1] = True
    rows = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    made = Batch(idx[rows, :-1], targets[rows])
    if not documents:
        return made
    cu = F.pad(ends[rows].flatten().nonzero()[:, 0] + 1, (1, 0)).int()
    return replace(made, cu_seqlens=cu, max_seqlen=int(cu.diff().max()))


@dataclass(frozen=True)
class Run:
    """Three steps: losses, gradient norms, weights."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]


def made(config: GPTConfig) -> GPT:
    torch.manual_seed(1)
    model = GPT(config).double()  # the gradient of a key's bias is 0, and Adam divides by it
    with torch.no_grad():  # so that biases and norms are seen
        for p in model.parameters():
            p.add_(torch.randn(p.shape) * 0.05)
    return model


def trained(
    config: GPTConfig, layout: Layout, accumulate: int = 1, length: int = T,
    documents: bool = False, optimizer: str = "own",
) -> Run:  # fmt: skip
    model = layout.parallelize(made(config))
    own = optimizer != "torch"
    opt: torch.optim.Optimizer
    if optimizer == "muon":
        opt = OptimConfig("muon", 1e-2, clip=0.3).build(model)
    elif own:
        opt = model.configure_optimizer(1e-2, max_grad_norm=0.3)
    else:
        opt = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1, foreach=False)
    losses, norms = [], []
    for step in range(STEPS):
        at, many = layout.data_rank * accumulate, layout.data_world * accumulate
        parts = [batch(step, at + i, many, length, documents) for i in range(accumulate)]
        count = layout.count(*parts) if accumulate > 1 else None
        total = torch.zeros((), dtype=torch.float64)
        for i, part in enumerate(parts):
            with layout.no_sync(model, i + 1 < len(parts)):
                loss = layout.loss(model, part, count)
                loss.backward()
            total += loss.detach()
        losses.append(float(layout.all_reduce(total, "mean")))
        if own:
            opt.step()
            norms.append(float(opt.grad_norm))  # type: ignore[attr-defined]
        else:
            norms.append(float(layout.clip_grad_norm(model.parameters(), 0.3)))
            opt.step()
        opt.zero_grad()
    weights = {name: gathered(t) for name, t in model.state_dict().items()}
    return Run(losses, norms, weights)


def same(got: Run, want: Run, atol: float = 1e-7) -> None:
    for name in ("losses", "norms"):
        for a, b in zip(getattr(got, name), getattr(want, name), strict=True):
            assert math.isclose(a, b, rel_tol=1e-6), f"{name}: {got}, {want}"
    assert list(got.weights) == list(want.weights)
    for name, w in want.weights.items():
        assert got.weights[name].shape == w.shape, name
        off = (got.weights[name] - w).abs().max().item()
        assert off <= atol, f"{name} is off by {off:.1e}"


_alone: dict[object, Run] = {}


def matches(parallel: ParallelConfig, config: GPTConfig = SMALL, **options: object) -> None:
    """The layout's run is one process's."""
    kept = {name: options[name] for name in ("length", "optimizer", "documents") if name in options}
    key = (config, *kept.items())
    if key not in _alone:
        _alone[key] = trained(config, Layout(ParallelConfig(), CPU), **kept)  # type: ignore[arg-type]
    got = trained(config, Layout.start(parallel, CPU), **options)  # type: ignore[arg-type]
    if options.get("optimizer") != "muon":
        same(got, _alone[key])
        return
    want, start = _alone[key], made(config).state_dict()
    assert got.losses == pytest.approx(want.losses, rel=1e-3)
    for name, w in want.weights.items():  # its products are bfloat16's
        off, way = ((w - t).norm().item() for t in (got.weights[name], start[name]))
        assert off < 0.15 * way, f"{name} is off by {off:.1e} of {way:.1e}"


def half(**sizes: int) -> ParallelConfig:
    """The sizes with dp for the ranks that are left."""
    return ParallelConfig(dp=-1, **sizes)


def checkpoints() -> None:
    """A layout reads what another has written, moments too, and one process the weights."""
    shared: list[str] = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(shared)
    sizes: list[dict[str, int]] = [{"tp": 2, "fsdp": 2}, {"tp": 2, "dp": 2}, {"fsdp": 4}, {"dp": 4}]
    tokenizer = Tokenizer.train(["abc"], 257)
    config = replace(LLAMA, vocab_size=259)
    for n, size in enumerate(sizes):
        layout = Layout.start(ParallelConfig(**{"dp": 1, **size}), CPU)
        model, opt = optimized(config, layout)
        saver = Checkpointer(Path(shared[0]) / str(n), CheckpointConfig(asynchronous=False), layout)
        saver.save(1, model, tokenizer, opt)
        latest = saver.latest()
        want = {k: gathered(t) for k, t in tensors.optimizer_tensors(model, opt).items()}
        want |= {k: gathered(t) for k, t in model.state_dict().items()}
        alone, _ = load(Path(shared[0]) / str(n))
        for name, t in alone.state_dict().items():
            assert torch.equal(t, want[name]), f"{size}: {name}"
        for other in (sizes[n - 1], sizes[n]):
            there = Layout.start(ParallelConfig(**{"dp": 1, **other}), CPU)
            model, opt = optimized(config, there, seed=2)
            assert latest is not None
            Checkpointer(Path(shared[0]) / str(n), layout=there).load(latest, model, opt)
            got = {k: gathered(t) for k, t in tensors.optimizer_tensors(model, opt).items()}
            got |= {k: gathered(t) for k, t in model.state_dict().items()}
            assert got.keys() == want.keys()
            for name, t in want.items():
                assert torch.equal(got[name], t), f"{size} to {other}: {name}"
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(shared[0])


def optimized(
    config: GPTConfig, layout: Layout, seed: int = 1
) -> tuple[GPT, torch.optim.Optimizer]:
    """A model after a step that gives each element another moment."""
    torch.manual_seed(seed)
    model = layout.parallelize(GPT(config))
    opt = model.configure_optimizer(1e-2)
    part = batch(seed, layout.data_rank, layout.data_world)
    layout.loss(model, part).backward()
    opt.step()
    return model, opt


def generation() -> None:
    """Logits, with a cache and without, of sequences that no number of ranks divides."""
    sizes: list[dict[str, int]] = [{"dp": 2}, {"fsdp": 2}, {"tp": 2}, {"cp": 2}]
    for config in (SMALL, LLAMA):
        alone, idx = made(config).eval(), batch(0).idx[:2, :7]
        with torch.no_grad():
            want = alone(idx)
        for size in sizes:
            layout = Layout.start(ParallelConfig(**{"dp": 1, **size}), CPU)
            model = layout.parallelize(made(config)).eval()
            with torch.no_grad():
                close(model(idx), want, f"{size}")
                close(model(F.pad(idx, (0, 1)))[:, :7], want, f"{size}, an even length")
                cache = model.new_cache(2, 7)
                parts = [
                    model.hidden(part, cache) for part in (idx[:, :4], idx[:, 4:5], idx[:, 5:])
                ]
                close(model.logits(torch.cat(parts, 1)), want, f"{size}, cached")


def close(got: Tensor, want: Tensor, what: str) -> None:
    assert got.shape == want.shape, what
    off = (got - want).abs().max().item()
    assert off < 1e-9, f"{what}: off by {off:.1e}"


def rules_of_dtensor() -> None:
    """Ops of DTensors, forward and backward, keep the shards that they are given."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    def check(apply: Any, inputs: list[Any], places: list[Any], dim: int) -> None:
        """places: of the inputs that are tensors; the first output is shared by dim."""
        results = []
        for spread in (False, True):
            leaves = [
                (distribute_tensor(t, mesh, [place]) if spread else t.clone())
                if isinstance(t, Tensor) else t
                for t, place in zip(inputs, places, strict=True)
            ]  # fmt: skip
            wanted = [t.requires_grad_() for t in leaves if _floats(t)]
            out = apply(*leaves)
            outs = out if isinstance(out, tuple) else (out,)
            outs = tuple(o for o in outs if o.numel())
            if spread:
                assert outs[0].placements == (Shard(dim),), f"{apply}: {outs[0].placements}"
            total = torch.stack([o.sin().sum() for o in outs]).sum()
            grads = torch.autograd.grad(total, wanted)
            results.append([gathered(t) for t in (*outs, *grads)])
        for got, want in zip(*results, strict=True):
            assert torch.allclose(got, want, atol=1e-5), apply

    R = Replicate()
    x, h, w, b = draw(4, 6, 8), draw(4, 6, 8), draw(8), draw(8)
    for dim in (0, 1):
        s = Shard(dim)
        norm = [x, h, w, b, 1e-5, 0.0, None, b]
        check(LayerNormFunction.apply, norm, [s, s, R, R, None, None, None, R], dim)
        norm = [x, None, w, None, 1e-5, 0.0, None, None]
        check(LayerNormFunction.apply, norm, [s, None, R, *[None] * 5], dim)
        norm = [x, h, w, 1e-5, 0.0, None, None]
        check(RMSNormFunction.apply, norm, [s, s, R, *[None] * 4], dim)
    q, k, v = draw(4, 6, 4, 8), draw(4, 6, 2, 8), draw(4, 6, 2, 8)
    for dim in (0, 2):
        s = Shard(dim)
        check(AttentionFunction.apply, [q, k, v, 0.3, -1, 0, 0.0, None], [s] * 3 + [None] * 5, dim)
    target = torch.randint(9, (12,), generator=g)
    s = Shard(0)
    rows = [draw(12, 9), target, -100, 0.1, 0.0, 0.0]
    check(CrossEntropyFunction.apply, rows, [s, s, *[None] * 4], 0)


def _floats(t: object) -> bool:
    return isinstance(t, Tensor) and t.is_floating_point()


def seeds() -> None:
    """Ranks that hold other activations drop out others; the first draws as one process does."""
    for config, apart in (
        (ParallelConfig(), True), (ParallelConfig(tp=2), True),
        (ParallelConfig(tp=2, sequence=False), False),
    ):  # fmt: skip
        Layout.start(config, CPU).seed(7)
        drawn: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(drawn, torch.rand(()).item())
        torch.manual_seed(7)
        assert drawn[0] == torch.rand(()).item()
        assert (drawn[0] != drawn[1]) == apart, config


def refused() -> None:
    """What tp cannot share is said before anything is."""
    for config, size, message in (
        (SMALL, 2, ""),
        (replace(LLAMA, n_kv_head=1), 2, "parallel: tp must divide n_kv_head, 1; got tp 2"),
        (replace(SMALL, n_inner=33), 2, "parallel: tp must divide n_inner, 33; got tp 2"),
    ):
        try:
            Layout.start(ParallelConfig(tp=size), CPU).parallelize(GPT(config))
        except ValueError as error:
            assert str(error) == message, error
        else:
            assert not message
    model = GPT(replace(SMALL, dropout=0.1))
    layout = Layout.start(ParallelConfig(tp=2), CPU)
    layout.parallelize(model)
    model(torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="with dropout tp must divide the positions, 5; got tp 2"):
        model(torch.zeros(1, 5, dtype=torch.int64))


def ranks_that_disagree() -> None:
    config = ParallelConfig(dp=-1, fsdp=1 + dist.get_rank())
    try:
        Layout.start(config, CPU)
    except ValueError as error:
        expected = "parallel: all ranks must have one fsdp; got 1 on rank 0, 2 on rank 1"
        assert str(error) == expected, error
    else:
        raise AssertionError("they were let")


def sizes_that_do_not_multiply() -> None:
    try:
        Layout.start(ParallelConfig(dp=3, fsdp=2), CPU)
    except ValueError as error:
        assert "must be the number of ranks" in str(error), error
    else:
        raise AssertionError("they were let")


# The numbers of ranks that run a case, and the case.
CASES: dict[str, tuple[tuple[int, ...], Callable[[], None]]] = {
    "dp": ((2,), lambda: matches(ParallelConfig())),
    "dp, accumulated": ((2,), lambda: matches(ParallelConfig(), accumulate=2)),
    "dp, llama": ((2,), lambda: matches(ParallelConfig(), LLAMA)),
    "fsdp": ((2, 4), lambda: matches(half(fsdp=2))),
    "fsdp, torch's AdamW": ((2, 4), lambda: matches(half(fsdp=2), optimizer="torch")),
    "fsdp, accumulated": ((2, 4), lambda: matches(half(fsdp=2), accumulate=2)),
    "fsdp, llama": ((2,), lambda: matches(half(fsdp=2), LLAMA)),
    "fsdp, not resharded": ((2,), lambda: matches(replace(half(fsdp=2), reshard=False))),
    "fsdp of all": ((4,), lambda: matches(ParallelConfig(dp=1, fsdp=-1))),
    "tp": ((2, 4), lambda: matches(ParallelConfig(tp=-1, dp=1))),
    "tp, llama": ((2,), lambda: matches(ParallelConfig(tp=2, dp=1), LLAMA)),
    "tp, whole sequences": ((2,), lambda: matches(ParallelConfig(tp=2, sequence=False))),
    "tp, llama, whole sequences": (
        (2,),
        lambda: matches(ParallelConfig(tp=2, sequence=False), LLAMA),
    ),
    "tp, odd length": ((2,), lambda: matches(ParallelConfig(tp=2), length=15)),
    "tp, accumulated": ((2,), lambda: matches(ParallelConfig(tp=2), accumulate=2)),
    "tp and dp": ((4,), lambda: matches(ParallelConfig(tp=2))),
    "tp and fsdp": ((4,), lambda: matches(ParallelConfig(tp=2, fsdp=2))),
    "tp and fsdp, llama": ((4,), lambda: matches(ParallelConfig(tp=2, fsdp=2), LLAMA)),
    "cp": ((2, 4), lambda: matches(ParallelConfig(cp=-1, dp=1))),
    "cp, llama": ((2,), lambda: matches(ParallelConfig(cp=2), LLAMA)),
    "cp, odd length": ((2,), lambda: matches(ParallelConfig(cp=2), length=15)),
    "cp, documents": ((2,), lambda: matches(ParallelConfig(cp=2), documents=True)),
    "cp, llama, documents": ((2,), lambda: matches(ParallelConfig(cp=2), LLAMA, documents=True)),
    "tp, documents": ((2,), lambda: matches(ParallelConfig(tp=2), documents=True)),
    "tp, llama, documents": ((2,), lambda: matches(ParallelConfig(tp=2), LLAMA, documents=True)),
    "fsdp, documents": ((2,), lambda: matches(half(fsdp=2), documents=True)),
    "fsdp, muon": ((2,), lambda: matches(half(fsdp=2), optimizer="muon")),
    "tp, muon": ((2,), lambda: matches(ParallelConfig(tp=2), optimizer="muon")),
    "tp and fsdp, muon": ((4,), lambda: matches(ParallelConfig(tp=2, fsdp=2), optimizer="muon")),
    "generation": ((2,), generation),
    "checkpoints": ((4,), checkpoints),
    "cp and dp": ((4,), lambda: matches(ParallelConfig(cp=2))),
    "cp and fsdp": ((4,), lambda: matches(ParallelConfig(cp=2, fsdp=2))),
    "cp and tp": ((4,), lambda: matches(ParallelConfig(cp=2, tp=2), LLAMA)),
    "rules of DTensor": ((2,), rules_of_dtensor),
    "seeds": ((2,), seeds),
    "what tp refuses": ((2,), refused),
    "ranks that disagree": ((2,), ranks_that_disagree),
    "sizes that do not multiply": ((2,), sizes_that_do_not_multiply),
}


def main(out: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, world = dist.get_rank(), dist.get_world_size()
    for name in names:
        problem = None
        try:
            CASES[name][1]()
        except Exception:
            problem = traceback.format_exc()
        everyone: list[str | None] = [None] * world
        dist.all_gather_object(everyone, problem)
        if rank == 0:
            said = [f"rank {r}: {p}" for r, p in enumerate(everyone) if p is not None]
            with out.open("a") as file:
                file.write(json.dumps([name, "\n".join(said) or None]) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
