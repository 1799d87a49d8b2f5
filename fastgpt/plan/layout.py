"""Layouts: how a model and a batch are spread over devices."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from fastgpt.config import GPTConfig

RECOMPUTE = ("0", "1", "2", "block")


@dataclass(frozen=True)
class Layout:
    """Ranks are numbered with tp innermost, then cp, pp, fsdp and dp outermost.

    Attributes:
        dp: replicas; their gradients are summed by an all-reduce.
        fsdp: ranks that share weights, gradients and optimizer state of a replica.
        tp: ranks that share every matrix, heads and feed-forward.
        cp: ranks that share a sequence; every rank gathers the keys and values of all, in forward
            and again in backward.
        pp: stages of a pipeline. A model on paper: fastgpt trains without one.
        interleave: runs of layers of a stage.
        micro_batch: sequences of one forward pass on a rank.
        recompute: as GPTConfig's 0, 1, 2; or "block": all of a block but what it is given, by
            torch.utils.checkpoint.
        sequence: whether the ranks of tp share the positions between those products too; what
            they gather for a product they let go, and gather again in backward.
        reshard: whether gathered weights are let go after each use (ZeRO-3). If not they are
            gathered once a step and kept (ZeRO-2); a pipeline needs that.
    """

    dp: int = 1
    fsdp: int = 1
    tp: int = 1
    cp: int = 1
    pp: int = 1
    interleave: int = 1
    micro_batch: int = 1
    recompute: str = "1"
    sequence: bool = True
    reshard: bool = True

    def __post_init__(self) -> None:
        for name in ("dp", "fsdp", "tp", "cp", "pp", "interleave", "micro_batch"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"Layout: {name} must be an int, at least 1; got {value!r}")
        if self.recompute not in RECOMPUTE:
            raise ValueError(
                f"Layout: recompute must be one of {', '.join(RECOMPUTE)}; got {self.recompute!r}"
            )

    @property
    def world(self) -> int:
        """Devices."""
        return self.dp * self.fsdp * self.tp * self.cp * self.pp

    @property
    def data(self) -> int:
        """Ranks that have sequences of their own."""
        return self.dp * self.fsdp

    @property
    def shared(self) -> tuple[int, int]:
        """Ranks that share weights, and ranks from one to the next: those of fsdp and cp."""
        if self.fsdp == 1 and (self.tp == 1 or self.pp > 1):
            return 1, 1
        if self.pp > 1:
            return self.fsdp, self.stride("fsdp")
        return self.fsdp * self.cp, self.stride("cp")

    @property
    def keeps_weights(self) -> bool:
        """Whether gathered weights stay for the whole step."""
        return self.shared[0] == 1 or not self.reshard or self.pp > 1

    def stride(self, axis: str) -> int:
        """Ranks from one member of an axis' group to the next."""
        order = ("tp", "cp", "pp", "fsdp", "dp")
        stride = 1
        for name in order[: order.index(axis)]:
            stride *= getattr(self, name)
        return stride

    def obstacle(self, config: GPTConfig, T: int) -> str | None:
        """Why this layout cannot hold such a model, or None."""
        for name, n in (("n_head", config.n_head), ("n_kv_head", config.kv_heads),
                        ("n_inner", config.inner)):  # fmt: skip
            if n % self.tp:
                return f"tp must divide {name}; got tp {self.tp}, {name} {n}"
        parts = 2 * self.cp if self.cp > 1 else 1
        if T % parts:
            return f"2 cp must divide the sequence; got cp {self.cp}, {T} tokens"
        if self.sequence and (T // self.cp) % self.tp:
            return f"tp must divide a rank's {T // self.cp} tokens; got tp {self.tp}"
        if self.pp > config.n_layer:
            return f"pp must be at most {config.n_layer} layers; got {self.pp}"
        if self.interleave > (most := -(-config.n_layer // self.pp)):
            return f"interleave must be at most a stage's {most} layers; got {self.interleave}"
        return None

    def __str__(self) -> str:
        """As `parse` takes it: what differs from one device."""
        said = []
        for name, value in asdict(self).items():
            if value != Layout.__dataclass_fields__[name].default:
                said.append(f"{name}={str(value).lower()}")
        return ",".join(said) or "dp=1"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def parse(words: str) -> Layout:
    """ "tp=8,fsdp=128,micro_batch=2" as a Layout.

    Raises:
        ValueError: unknown names, or values that are none.
    """
    values: dict[str, Any] = {}
    for word in words.split(","):
        name, equals, value = word.strip().partition("=")
        if not equals or name not in Layout.__dataclass_fields__:
            known = ", ".join(Layout.__dataclass_fields__)
            raise ValueError(f"plan: a layout is NAME=VALUE,... of {known}; got {word.strip()!r}")
        if name == "recompute":
            values[name] = value
        elif name in ("sequence", "reshard"):
            if value.lower() not in ("true", "false"):
                raise ValueError(f"plan: {name} must be true or false; got {value!r}")
            values[name] = value.lower() == "true"
        else:
            try:
                values[name] = int(value)
            except ValueError:
                raise ValueError(f"plan: {name} must be an int; got {value!r}") from None
    return Layout(**values)


def divisors(n: int) -> list[int]:
    """All divisors, ascending."""
    small = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    return small + [n // d for d in reversed(small) if d * d != n]


def candidates(
    config: GPTConfig, world: int, T: int, gpus_per_node: int, pipeline: bool = False
) -> Iterator[Layout]:
    """Layouts of so many devices that could hold the model, without micro-batch and recompute.

    tp stays in a node, at most 16; cp only where each rank keeps 4096 tokens.
    """
    most_tp = min(gpus_per_node, 16)
    for tp in (d for d in divisors(world) if d <= most_tp):
        for cp in (d for d in divisors(world // tp) if d == 1 or (d <= 64 and T // d >= 4096)):
            stages = [d for d in divisors(world // (tp * cp)) if d <= 64] if pipeline else [1]
            for pp in stages:
                data = world // (tp * cp * pp)
                for fsdp in divisors(data):
                    for reshard in (True, False) if fsdp > 1 and pp == 1 else (pp == 1,):
                        for v in sorted({1, 2, 4, -(-config.n_layer // pp)} if pp > 1 else {1}):
                            made = Layout(data // fsdp, fsdp, tp, cp, pp, v, reshard=reshard)
                            if made.obstacle(config, T) is None:
                                yield made
