"""The memory and the least time of a training step of one layout, from what was measured of it.

Precision: products in 16 bits; weights, gradients and both moments of AdamW in float32. So a
parameter takes 4 + 4 + 8 bytes, and 2 for the copy that products read. Gathers move 2 bytes,
sums of gradients 4.

Memory of a rank, its p being all of its 1 / (tp pp) of the weights, n the ranks that share them:
    fsdp, reshard      (4 + 4 + 8) p / n; gathered: 2 bytes of two blocks and of what is no block,
                       and 4 of the block whose gradient is on its way
    fsdp, kept         (4 + 4 + 8) p / n + 2 p, and 4 p of sums where there are micro-batches
    without fsdp       (4 + 4 + 8 + 2) p
    pipeline           the first of p stages keeps the activations of min(m, p (1 + (p - 1) / p v))
                       micro-batches, the last those of one, and the loss's
What fsdp shares it shares over cp too. Gradients are summed over ranks after each micro-batch,
unless weights are kept.

Time: every op takes the longer of its FLOPs at the matrix peak and its bytes at the memory's
bandwidth; every collective its ring volume at the link's bandwidth, and its hops. What overlaps:
    tp, cp     nothing: each waits for the one before it
    fsdp       a layer's gather with the layer before it, in forward and backward; a layer's
               reduce-scatter with the backward of the next. The first gather and the last
               reduce-scatter are exposed, and what outlasts its layer
    dp         a layer's all-reduce with the backward of the next, in the last micro-batch
    pp         nothing; each rank of tp sends its share; (p - 1) / v micro-batches' time of bubble
               on top (Narayanan et al., 2021, https://arxiv.org/abs/2104.04473), all stages as
               slow as the slowest
    optimizer  nothing: 4 + 4 + 8 bytes read, as many less the gradient and the copy's 2 written
So it is a bound from below, and MFU from above: no kernel reaches a peak, no network is alone.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fastgpt.config import GPTConfig
from fastgpt.plan.clusters import Cluster, sent
from fastgpt.plan.layout import Layout
from fastgpt.plan.measure import BACKWARD, FORWARD, Cost, Measured, measure

WEIGHT, COPY, GRADIENT, MOMENTS = 4, 2, 4, 8
STEP_BYTES = 2 * WEIGHT + GRADIENT + 2 * MOMENTS + COPY  # that AdamW moves a parameter


@dataclass(frozen=True)
class Flow:
    """What one kind of collective sends in a step.

    Attributes:
        kind: all-gather, reduce-scatter, all-reduce, send; axis: of the layout.
        link: "intra" or "inter"; bytes: that a device sends; seconds: on its link.
    """

    kind: str
    axis: str
    link: str
    bytes: float
    seconds: float


@dataclass(frozen=True)
class Estimate:
    """A layout's memory and least time.

    Attributes:
        sequences: of a step, all ranks'; accumulate: micro-batches of a rank.
        memory: part -> bytes of the fullest device.
        flows: what is sent.
        parts: part of a step -> seconds: products, memory, optimizer, bubble, and what each axis
            exposes.
        model_flops: of the step, all devices', as GPTConfig.flops counts them; hardware_flops: with
            what is made again.
    """

    config: GPTConfig
    cluster: Cluster
    layout: Layout
    T: int
    sequences: int
    accumulate: int
    memory: Mapping[str, float]
    flows: tuple[Flow, ...]
    parts: Mapping[str, float]
    model_flops: float
    hardware_flops: float

    @property
    def bytes(self) -> float:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.bytes <= self.cluster.usable

    @property
    def step(self) -> float:
        """Seconds."""
        return sum(self.parts.values())

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.sequences * self.T

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.step

    @property
    def mfu(self) -> float:
        """The ceiling of model FLOPs over what all devices' peaks allow."""
        return self.model_flops / (self.step * self.layout.world * self.cluster.peak_tflops * 1e12)

    @property
    def network(self) -> float:
        """Seconds of exposed communication."""
        return sum(self.parts[axis] for axis in ("tp", "cp", "fsdp", "dp", "pp"))

    @property
    def binds(self) -> str:
        """What takes most of the step: compute, memory bandwidth, network, bubble."""
        shares = {
            "compute": self.parts["products"],
            "memory bandwidth": self.parts["memory"] + self.parts["optimizer"],
            "network": self.network,
            "bubble": self.parts["bubble"],
        }
        return max(shares, key=lambda name: shares[name])

    def days(self, tokens: float) -> float:
        """That so many tokens take."""
        return tokens / self.tokens_per_second / 86400

    def to_json(self) -> dict[str, Any]:
        return {
            "layout": self.layout.to_json(),
            "world": self.layout.world,
            "sequence": self.T,
            "sequences_per_step": self.sequences,
            "micro_batches": self.accumulate,
            "memory_bytes": dict(self.memory) | {"total": self.bytes},
            "fits": self.fits,
            "communication": [asdict(flow) for flow in self.flows],
            "seconds": dict(self.parts) | {"step": self.step},
            "model_flops": self.model_flops,
            "hardware_flops": self.hardware_flops,
            "mfu_ceiling": self.mfu,
            "tokens_per_second": self.tokens_per_second,
            "binds": self.binds,
        }


class _Sum:
    """Adds up flows."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.flows: dict[tuple[str, str, str], tuple[float, float]] = {}

    def add(
        self, kind: str, axis: str, size: int, stride: int, bytes: float, times: float,
        calls: float = 1.0,
    ) -> float:  # fmt: skip
        """Seconds of one of so many times that bytes are sent in so many calls."""
        seconds = self.cluster.seconds(kind, size, stride, bytes, calls)
        if seconds and times:
            key = kind, axis, self.cluster.link(size, stride)[0]
            was = self.flows.get(key, (0.0, 0.0))
            self.flows[key] = was[0] + times * sent(kind, size, bytes), was[1] + times * seconds
        return seconds

    def all(self) -> tuple[Flow, ...]:
        return tuple(Flow(*key, *value) for key, value in self.flows.items())


def estimate(
    config: GPTConfig, layout: Layout, T: int, sequences: int, cluster: Cluster
) -> Estimate:
    """Memory and least time of a step.

    Args:
        T: tokens of a sequence.
        sequences: of a step; more where its ranks and micro-batches do not divide it.

    Raises:
        ValueError: the layout cannot hold the model.
    """
    obstacle = layout.obstacle(config, T)
    if obstacle is not None:
        raise ValueError(f"plan: {obstacle}")
    m = -(-sequences // (layout.data * layout.micro_batch))
    if layout.interleave > 1 and m % layout.pp:
        raise ValueError(
            f"plan: an interleaved pipeline's micro-batches must be a multiple of pp;"
            f" got {m}, pp {layout.pp}"
        )
    measured = measure(config, layout, T, cluster)
    flows = _Sum(cluster)
    parts, flops = _times(config, layout, T, m, measured, cluster, flows)
    made = layout.data * layout.micro_batch * m
    return Estimate(
        config, cluster, layout, T, made, m, _memory(config, layout, m, measured), flows.all(),
        parts, config.flops(T, training=True) * float(made), flops * layout.data * m,
    )  # fmt: skip


def stages(n_layer: int, pp: int) -> tuple[int, int]:
    """Layers of every stage but the last, and of the last, which has the loss to do too."""
    most = -(-n_layer // pp)
    return most, max(1, n_layer - (pp - 1) * most)


def _memory(config: GPTConfig, layout: Layout, m: int, measured: Measured) -> dict[str, float]:
    """Bytes of the fullest stage."""
    most, last = stages(config.n_layer, layout.pp)
    w, kept, pp = measured.weights, measured.kept, layout.pp
    outer = w["embedding"] + w["head"]
    if pp == 1:
        return _stage(layout, m, most, outer, w["layer"], most * kept["layer"] + kept["ends"],
                      measured.workspace)  # fmt: skip
    flight = min(float(m), pp * (1 + (pp - 1) / (pp * layout.interleave)))
    first = _stage(layout, m, most, w["embedding"], w["layer"], flight * most * kept["layer"],
                   measured.workspace)  # fmt: skip
    head = w["head"] + (w["embedding"] if config.tied else 0)
    end = _stage(layout, m, last, head, w["layer"], last * kept["layer"] + kept["ends"],
                 measured.workspace)  # fmt: skip
    return max(first, end, key=lambda memory: sum(memory.values()))


def _stage(
    layout: Layout, m: int, layers: int, outer: int, layer: int, kept: float, workspace: float
) -> dict[str, float]:
    p = layers * layer + outer
    n = layout.shared[0]
    memory = {
        "weights": WEIGHT * p / n, "gradients": GRADIENT * p / n, "optimizer": MOMENTS * p / n,
        "gathered": 0.0, "activations": kept, "workspace": workspace,
    }  # fmt: skip
    if layout.keeps_weights:
        memory["gathered"] = float(COPY * p)
        if n > 1 and m > 1:
            memory["gathered"] += GRADIENT * p
    else:
        memory["gathered"] = float(COPY * (min(2, layers) * layer + outer) + GRADIENT * layer)
    return memory


def _times(
    config: GPTConfig, layout: Layout, T: int, m: int, measured: Measured, cluster: Cluster,
    flows: _Sum,
) -> tuple[dict[str, float], float]:  # fmt: skip
    """Seconds of each part of a step, and the FLOPs of one replica's micro-batch."""
    L, pp, v = config.n_layer, layout.pp, layout.interleave
    most, last = stages(L, pp)
    costs = (measured.forward, measured.backward)
    parts = dict.fromkeys(
        ("products", "memory", "optimizer", "tp", "cp", "fsdp", "dp", "pp", "bubble"), 0.0
    )

    # A micro-batch on the slowest stage.
    total = {part: costs[FORWARD][part].seconds + costs[BACKWARD][part].seconds
             for part in ("layer", "ends")}  # fmt: skip
    ends_too = pp == 1 or last * total["layer"] + total["ends"] > most * total["layer"]
    layers = last if ends_too and pp > 1 else most
    layer_time = []
    for cost in costs:
        on_stage = [(cost["layer"], layers)] + ([(cost["ends"], 1)] if ends_too else [])
        for part, times in on_stage:
            parts["products"] += m * times * part.products
            parts["memory"] += m * times * part.memory
        waited = 0.0
        for part, times in on_stage:
            for axis, seconds in _waits(part, layout, m * times, flows).items():
                parts[axis] += m * times * seconds
                waited += seconds if part is cost["layer"] else 0.0
        layer_time.append(cost["layer"].seconds + waited)
    if pp > 1:
        width = 2 * layout.micro_batch * (T // layout.cp) * config.n_embd / layout.tp
        one = flows.add("send", "pp", pp, layout.stride("pp"), width, 2 * v * m)
        parts["pp"] = 2 * v * m * one
        micro = sum(parts.values()) / m
        parts["bubble"] = (pp - 1) / v * micro

    _gradients(layout, m, layers, measured, layer_time, flows, parts)
    p = most * measured.weights["layer"] + measured.weights["embedding"] + measured.weights["head"]
    held = p / layout.shared[0]
    parts["optimizer"] = STEP_BYTES * held / (cluster.bandwidth_gbs * 1e9)
    flops = sum(L * c["layer"].flops + c["ends"].flops for c in costs) * layout.tp * layout.cp
    return parts, flops


def _waits(cost: Cost, layout: Layout, times: float, flows: _Sum) -> dict[str, float]:
    """Axis -> seconds of the collectives in one pass of a part, for which it waits."""
    waits = {"tp": 0.0, "cp": 0.0}
    for (kind, axis), (bytes, calls) in cost.traffic.items():
        size, stride = getattr(layout, axis), layout.stride(axis)
        waits[axis] += flows.add(kind, axis, size, stride, bytes, times, calls)
    return waits


def _gradients(
    layout: Layout, m: int, layers: int, measured: Measured, layer_time: list[float], flows: _Sum,
    parts: dict[str, float],
) -> None:  # fmt: skip
    """What gathers of weights and sums of gradients expose."""
    forward, backward = layer_time
    layer = measured.weights["layer"]
    outer = measured.weights["embedding"] + measured.weights["head"]
    n, stride = layout.shared
    replicas = layout.dp if n > 1 else layout.dp * layout.cp
    apart = layout.stride("dp") if n > 1 or layout.pp > 1 else layout.stride("cp")

    reduce = flows.add("all-reduce", "dp", replicas, apart, GRADIENT * layer / n, layers)
    end = flows.add("all-reduce", "dp", replicas, apart, GRADIENT * outer / n, 1)
    gather = scatter = 0.0
    if n > 1:
        times = 1 if layout.keeps_weights else m
        gathers = layers * (times if layout.keeps_weights else 2 * times)
        gather = flows.add("all-gather", "fsdp", n, stride, COPY * layer, gathers)
        scatter = flows.add("reduce-scatter", "fsdp", n, stride, GRADIENT * layer, layers * times)
        outside = flows.add("all-gather", "fsdp", n, stride, COPY * outer, 1)
        outside += times * flows.add("reduce-scatter", "fsdp", n, stride, GRADIENT * outer, times)
        again = 0.0 if layout.keeps_weights else gather
        late = (layers - 1) * max(0.0, gather - forward)
        late += (layers - 1) * max(0.0, again + scatter - backward)
        parts["fsdp"] = times * (gather + late + scatter) + outside
    # The last micro-batch's backward hides what is left of its time.
    room = max(0.0, backward - scatter - (0.0 if layout.keeps_weights else gather))
    parts["dp"] = (layers - 1) * max(0.0, reduce - room) + reduce + end
