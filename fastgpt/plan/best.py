"""The layouts of a model on so many devices, the fastest that fits, and what binds it."""

from dataclasses import dataclass, replace
from typing import Any

from fastgpt.config import GPTConfig
from fastgpt.plan.clusters import Cluster
from fastgpt.plan.layout import RECOMPUTE, Layout, candidates
from fastgpt.plan.measure import parameters
from fastgpt.plan.roofline import COPY, GRADIENT, MOMENTS, WEIGHT, Estimate, estimate

SLACK = 1.25  # a step may have so many times the tokens asked for, where ranks do not divide it
MOST = 2**15  # devices that are tried
MATTERS = 1.02


@dataclass(frozen=True)
class Plan:
    """Layouts of one model on one cluster.

    Attributes:
        rows: the best micro-batch and recompute of every layout that fits, fastest first.
        wish: the fastest of all that were looked at and do not fit, if it is faster than the best.
    """

    config: GPTConfig
    cluster: Cluster
    gpus: int
    T: int
    rows: tuple[Estimate, ...]
    wish: Estimate | None

    @property
    def best(self) -> Estimate:
        return self.rows[0]

    @property
    def binds(self) -> str:
        """What takes most of the best layout's step; memory, if a faster one does not fit."""
        memory = self.wish is not None and self.wish.tokens_per_second > (
            MATTERS * self.best.tokens_per_second
        )
        return f"{self.best.binds}, memory" if memory else self.best.binds

    def to_json(self) -> dict[str, Any]:
        return {
            "cluster": self.cluster.to_json(),
            "gpus": self.gpus,
            "parameters": parameters(self.config),
            "binds": self.binds,
            "wish": None if self.wish is None else self.wish.to_json(),
            "layouts": [row.to_json() for row in self.rows],
        }


def batch_sequences(config: GPTConfig, T: int, tokens: int | None) -> int:
    """Sequences of a step: of the tokens asked for, else of about those of GPT-3's table 2.1."""
    if tokens is None:
        millions = parameters(config) / 1e9
        tokens = next(t for size, t in ((1, 2**19), (5, 2**20), (50, 2**21), (1e9, 2**22))
                      if millions < size)  # fmt: skip
    return max(1, tokens // T)


def search(
    config: GPTConfig, cluster: Cluster, gpus: int, T: int, sequences: int,
    *, pipeline: bool = False, recompute: tuple[str, ...] = RECOMPUTE,
) -> Plan:  # fmt: skip
    """Every layout that fits.

    Args:
        gpus: devices; T: tokens of a sequence; sequences: of a step.
        pipeline: whether to look at pipelines too, which fastgpt has a model of and no more.

    Raises:
        ValueError: none fits; the message says how many devices are enough.
    """
    fitting, wish = _fitting(config, cluster, gpus, T, sequences, pipeline, recompute)
    if not fitting:
        raise ValueError(_too_few(config, cluster, gpus, T, sequences, pipeline, recompute))
    rows = tuple(sorted(fitting, key=lambda row: -row.tokens_per_second))
    if wish is not None and wish.tokens_per_second <= rows[0].tokens_per_second:
        wish = None
    return Plan(config, cluster, gpus, T, rows, wish)


def _fitting(
    config: GPTConfig, cluster: Cluster, gpus: int, T: int, sequences: int, pipeline: bool,
    recompute: tuple[str, ...], enough: bool = False,
) -> tuple[list[Estimate], Estimate | None]:  # fmt: skip
    """The best of each layout; and the fastest that does not fit. With enough, the first fits."""
    found: list[Estimate] = []
    wish: Estimate | None = None
    for layout in candidates(config, gpus, T, cluster.gpus_per_node, pipeline):
        if layout.data > SLACK * sequences or _static(config, layout) > cluster.usable:
            continue
        best: Estimate | None = None
        for level in reversed(recompute) if enough else recompute:
            for size in _sizes(sequences, layout.data):
                m = _rounded(sequences, layout.data, size)
                if not m or (layout.interleave > 1 and m % layout.pp):
                    continue
                row = estimate(
                    config, replace(layout, micro_batch=size, recompute=level), T, sequences,
                    cluster,
                )  # fmt: skip
                if not row.fits:
                    if wish is None or row.tokens_per_second > wish.tokens_per_second:
                        wish = row
                    break
                if best is None or row.tokens_per_second > best.tokens_per_second:
                    best = row
                if enough:
                    return [row], wish
        if best is not None:
            found.append(best)
    return found, wish


def _sizes(sequences: int, data: int) -> list[int]:
    """Micro-batches: powers of two, and all that a rank has, ascending."""
    most = max(1, sequences // data)
    return sorted({2**k for k in range(most.bit_length())} | {most})


def _rounded(sequences: int, data: int, size: int) -> int:
    """Micro-batches of a rank, or 0 if they make the batch too large."""
    m = -(-sequences // (data * size))
    return m if data * size * m <= SLACK * sequences else 0


def _static(config: GPTConfig, layout: Layout) -> float:
    """Bytes that the weights of a rank take at least."""
    p = parameters(config) / (layout.tp * layout.pp) * 0.9  # stages differ, vocabularies are padded
    shared = layout.shared[0]
    kept = COPY if layout.keeps_weights else 0.0
    return p * ((WEIGHT + GRADIENT + MOMENTS) / shared + kept)


def _too_few(
    config: GPTConfig, cluster: Cluster, gpus: int, T: int, sequences: int, pipeline: bool,
    recompute: tuple[str, ...],
) -> str:  # fmt: skip
    """Say that nothing fits, and the smallest number of devices on which something does."""
    said = (
        f"plan: {parameters(config) / 1e9:.3g} B parameters do not fit on {gpus} x {cluster.name}"
        f" of {cluster.memory_gib:g} GiB in any layout"
    )
    node = cluster.gpus_per_node
    shares = [
        layout for layout in candidates(config, gpus, T, node, pipeline)
        if any(_rounded(sequences, layout.data, n) for n in _sizes(sequences, layout.data))
    ]  # fmt: skip
    if not shares:
        return (
            f"plan: {gpus} devices cannot share {sequences} sequences a step in any layout that"
            f" the model's heads and {T} tokens a sequence allow; give a larger batch"
        )

    def fits(n: int) -> bool:
        args = config, cluster, n, T, sequences, pipeline, recompute
        return bool(_fitting(*args, enough=True)[0])

    sizes = [n for n in (1, 2, 4) if n < node] + [node * 2**k for k in range(20)]
    sizes = [n for n in sizes if n <= MOST]
    most = next((n for n in sizes if n > gpus and fits(n)), None)
    if most is None:
        less = next((n for n in reversed(sizes) if n < gpus and fits(n)), None)
        if less is not None:
            return f"{said} with {sequences} sequences a step; on {less} one does"
        return f"{said}, nor on up to {MOST} with {sequences} sequences a step"
    if most > 2 * node:
        step = max(node, most // 32 // node * node)
        most = next(n for n in range(most // 2 + step, most + 1, step) if n == most or fits(n))
    return f"{said}; the smallest number on which one does is {most}"
