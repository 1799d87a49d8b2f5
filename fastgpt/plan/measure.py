"""What a rank computes, moves and keeps: measured on fake tensors, not worked out by formulas.

One training step of a rank's part of the model, as fastgpt.parallel shares it (`local.py`), forward
and backward, runs under FakeTensorMode: tensors have shapes and storages but no memory. Every op
that reaches the dispatcher is written down with its FLOPs (torch's and fastgpt's own formulas), the
bytes of its inputs and outputs, and the bytes alive after it; collectives with what they send. Two
depths, 2 and 3 layers, give what a layer adds and what
the rest takes; two batches, 1 and 2 sequences, give each op's line in the batch. Layers are alike
and shapes are linear in the batch, so both extrapolations are exact; a test holds them to that.
"""

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastgpt.config import GPTConfig
from fastgpt.ops import backend
from fastgpt.ops.linear_cross_entropy import GPU_BUDGET, chunk_rows
from fastgpt.plan.clusters import Cluster
from fastgpt.plan.layout import Layout

FORWARD, BACKWARD = 0, 1
DEPTHS = (2, 3)
Traffic = Mapping[tuple[str, str], tuple[float, float]]  # kind, axis: bytes, calls
_COLLECTIVES = {
    "_c10d_functional.all_gather_into_tensor": "all-gather",
    "_c10d_functional.reduce_scatter_tensor": "reduce-scatter",
    "_c10d_functional.all_reduce": "all-reduce",
}
_FREE = (
    "_c10d_functional.wait_tensor",
    "aten.promote_types",
    "aten.detach",
    "aten.new_empty",
    "aten.empty",
)


@dataclass(frozen=True)
class Cost:
    """Of one pass of a part of the model, on one device.

    Attributes:
        flops: of matrix products.
        products, memory: seconds of ops that the matrix peak, or the memory's bandwidth, bounds.
        traffic: kind of collective and axis -> bytes of the whole tensors, number of calls.
    """

    flops: float
    products: float
    memory: float
    traffic: Traffic

    @property
    def seconds(self) -> float:
        return self.products + self.memory


@dataclass(frozen=True)
class Measured:
    """Of a micro-batch on one rank; a part is "layer", one of n_layer, or "ends", all else.

    Attributes:
        forward, backward: part -> Cost.
        kept: part -> bytes alive from forward to backward, without weights.
        workspace: the most bytes alive above what is kept.
        weights: "layer", "embedding" or "head" -> elements that this rank holds; a tied head has
            its norm only.
    """

    forward: Mapping[str, Cost]
    backward: Mapping[str, Cost]
    kept: Mapping[str, float]
    workspace: float
    weights: Mapping[str, int]


class Trace(TorchDispatchMode):
    """Writes down every op: its pass, FLOPs, bytes moved, bytes alive after it.

    Args:
        there: tensors that are alive before; axes: names of process groups -> axes.
    """

    def __init__(self, there: list[Tensor], axes: Mapping[str, str]) -> None:
        from torch.utils.flop_counter import flop_registry

        super().__init__()
        self.formulas = flop_registry
        self.which = FORWARD
        self.names: list[str] = []
        self.rows: list[tuple[int, float, float, float]] = []
        self.traffic: list[dict[tuple[str, str], tuple[float, float]]] = [{}, {}]
        self.live = 0
        self.axes = axes
        self.known = {t.untyped_storage()._cdata for t in _here(there)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = str(func._overloadpacket)
        if name == "prim.device":
            return out
        made = _here(tree_leaves(out))
        for t in made:
            self._born(t)
        if name in _COLLECTIVES:
            kind = _COLLECTIVES[name]
            whole = _bytes(made if kind == "all-gather" else _here(args[:1]))
            axis = self.axes[args[-1]]
            bytes, calls = self.traffic[self.which].get((kind, axis), (0.0, 0.0))
            self.traffic[self.which][kind, axis] = bytes + whole, calls + 1
            self.names.append(name)
            self.rows.append((self.which, 0.0, 0.0, self.live))
        elif not func.is_view and name not in _FREE and not _onto_itself(name, args):
            given = _here(tree_leaves((args, kwargs)))
            formula = self.formulas.get(func._overloadpacket)
            flops = formula(*args, **(kwargs or {}), out_val=out) if formula else 0
            if name == "fastgpt.embedding_fwd":
                given = made  # of the table only the rows that are asked for
            self.names.append(name)
            self.rows.append((self.which, flops, _bytes(given) + _bytes(made), self.live))
        return out

    def _born(self, t: Tensor) -> None:
        storage = t.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.live += size
            weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def _here(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among values; of a DTensor the part of this rank."""
    return [getattr(t, "_local_tensor", t) for t in values if isinstance(t, Tensor)]


def _onto_itself(name: str, args: tuple[Any, ...]) -> bool:
    """Whether a copy has nothing to do: what x[...] += y ends in."""
    if name != "aten.copy_":
        return False
    a, b = _here(args[:2])
    where = [(t.untyped_storage()._cdata, t.storage_offset(), t.stride()) for t in (a, b)]
    return where[0] == where[1] and a.shape == b.shape


def _bytes(tensors: list[Tensor]) -> int:
    """Of tensors, each once, an expanded dimension once."""
    seen = {}
    for t in tensors:
        n = t.element_size()
        for size, stride in zip(t.shape, t.stride(), strict=True):
            n *= size if stride else 1
        seen[t.untyped_storage()._cdata, t.storage_offset(), tuple(t.shape)] = n
    return sum(seen.values())


@contextmanager
def _fake() -> Iterator[None]:
    """Fake tensors, the kernels' path, and parameters of 16 bits, as products read them."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with backend.rehearsal(), backend.use("triton"), FakeTensorMode():
            yield
    finally:
        torch.set_default_dtype(before)


@dataclass(frozen=True)
class _Run:
    names: tuple[str, ...]
    which: NDArray[np.float64]
    flops: NDArray[np.float64]
    bytes: NDArray[np.float64]
    live: NDArray[np.float64]
    kept: float
    traffic: tuple[Traffic, Traffic]
    weights: Mapping[str, int]


@lru_cache(maxsize=512)
def _run(config: GPTConfig, layout: Layout, T: int, B: int, depth: int, level: int) -> _Run:
    """One step; level is config.recompute, which is no part of its equality."""
    from fastgpt.plan.local import axes, part, ranks

    shallow = replace(config, n_layer=depth, block_size=max(T, config.block_size), recompute=level)
    with ranks(layout) as mesh, _fake():
        model = part(shallow, layout, mesh)
        ids = torch.zeros(B, T, dtype=torch.int64)
        there = [ids]
        for p in model.parameters():
            p.grad = torch.empty_like(p)  # gradients are summed over micro-batches
            there += [p, p.grad]
        trace = Trace(there, axes(mesh))
        with trace:
            loss = model(ids, ids)
            kept = trace.live
            trace.which = BACKWARD
            loss.backward()
        named = dict(model.named_parameters())
    weights = dict.fromkeys(("layer", "embedding", "head"), 0)
    for name, p in named.items():
        where = "layer" if name.startswith("h.") else "embedding"
        where = "head" if name.startswith(("ln_f", "lm_head")) else where
        weights[where] += _here([p])[0].numel()
    table = np.array(trace.rows, dtype=np.float64)
    which, flops, moved, live = table.T
    traffic = (trace.traffic[0], trace.traffic[1])
    return _Run(tuple(trace.names), which, flops, moved, live, float(kept), traffic, weights)


def _at(config: GPTConfig, layout: Layout, T: int, B: int, depth: int) -> _Run:
    """A run at any batch, from those of 1 and 2 sequences, op by op."""
    level = 0 if layout.recompute == "block" else int(layout.recompute)
    key = replace(layout, micro_batch=1)
    if B <= 2 or (layout.tp > 1 and _chunk(config, layout, T, B) < B * T // layout.cp):
        return _run(config, key, T, B, depth, level)  # more chunks of logits, and so more ops
    one, two = (_run(config, key, T, n, depth, level) for n in (1, 2))
    if one.names != two.names:  # an op that is spared for one sequence
        return _run(config, key, T, B, depth, level)

    def line(a: Any, b: Any) -> Any:
        return a + (B - 1) * (b - a)

    traffic = tuple(
        {at: (line(a[at][0], b[at][0]), a[at][1]) for at in a}
        for a, b in zip(one.traffic, two.traffic, strict=True)
    )
    return _Run(
        one.names, one.which, line(one.flops, two.flops), line(one.bytes, two.bytes),
        line(one.live, two.live), line(one.kept, two.kept), traffic,  # type: ignore[arg-type]
        one.weights,
    )  # fmt: skip


def _chunk(config: GPTConfig, layout: Layout, T: int, B: int) -> int:
    """Rows of logits that exist at a time."""
    V = -(-config.vocab_size // layout.tp)
    return chunk_rows(B * T // layout.cp, V, 2, GPU_BUDGET)


def _cost(run: _Run, which: int, cluster: Cluster) -> Cost:
    """An op takes what the slower of its products and its memory traffic takes."""
    mine = run.which == which
    products = run.flops[mine] / (cluster.peak_tflops * 1e12)
    memory = run.bytes[mine] / (cluster.bandwidth_gbs * 1e9)
    bound = products >= memory
    return Cost(
        float(run.flops[mine].sum()), float(products[bound].sum()), float(memory[~bound].sum()),
        run.traffic[which],
    )  # fmt: skip


def _minus(a: Cost, b: Cost, times: int = 1) -> Cost:
    """a - times b."""
    traffic = {}
    for at, (bytes, calls) in a.traffic.items():
        less, fewer = b.traffic.get(at, (0.0, 0.0))
        if calls - times * fewer:
            traffic[at] = bytes - times * less, calls - times * fewer
    return Cost(
        a.flops - times * b.flops, a.products - times * b.products, a.memory - times * b.memory,
        traffic,
    )  # fmt: skip


def measure(config: GPTConfig, layout: Layout, T: int, cluster: Cluster) -> Measured:
    """Measure a micro-batch of a layout: tp, cp, sequence, recompute and micro_batch matter.

    Args:
        config: of the whole model; T: tokens of a sequence, all of cp's.
        cluster: whose matrix peak and memory bandwidth turn FLOPs and bytes into seconds.

    Raises:
        ValueError: triton is not installed.
    """
    key = Layout(
        tp=layout.tp, cp=layout.cp, recompute=layout.recompute, sequence=layout.sequence,
        micro_batch=layout.micro_batch,
    )  # fmt: skip
    return _measure(config, key, T, cluster)


@lru_cache(maxsize=4096)
def _measure(config: GPTConfig, layout: Layout, T: int, cluster: Cluster) -> Measured:
    shallow, deep = (_at(config, layout, T, layout.micro_batch, depth) for depth in DEPTHS)
    passes = []
    for which in (FORWARD, BACKWARD):
        low, high = (_cost(run, which, cluster) for run in (shallow, deep))
        layer = _minus(high, low)
        passes.append({"layer": layer, "ends": _minus(low, layer, DEPTHS[0])})
    kept = deep.kept - shallow.kept
    weights = dict(deep.weights)
    weights["layer"] = deep.weights["layer"] - shallow.weights["layer"]
    hidden = 0.0  # the logits that exist inside of one op; with tp they are seen
    if layout.tp == 1:
        hidden = _chunk(config, layout, T, layout.micro_batch) * config.vocab_size * 2.0
    return Measured(
        passes[FORWARD],
        passes[BACKWARD],
        {"layer": kept, "ends": shallow.kept - DEPTHS[0] * kept},
        max(float(deep.live.max()) - deep.kept, hidden),
        weights,
    )


@lru_cache(maxsize=64)
def parameters(config: GPTConfig) -> int:
    """Of the whole model, counted on fake tensors: those of 1 and 2 layers tell a layer's."""
    from fastgpt.model import GPT

    with FakeTensorMode():
        one, two = (GPT(replace(config, n_layer=n)).num_params() for n in (1, 2))
    return one + (config.n_layer - 1) * (two - one)
