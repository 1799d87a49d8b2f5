"""Clusters: a chip, its memory, how many stand in a node, and the links within and between nodes.

    cluster("h100").gpus_per_node            # 8
    read("ours.yaml").link(group)            # GB/s that a collective of that group gets

All bandwidths are those of one device and one direction, as the vendor quotes them: what a step
takes at least follows from them, not what it takes.
"""

from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fastgpt.lab.chips import CHIPS


@dataclass(frozen=True)
class Cluster:
    """Devices and what connects them.

    Attributes:
        name: what it is called in tables.
        peak_tflops: dense products of 16 bits with float32 accumulation, TFLOP/s of one device.
        bandwidth_gbs: of a device's memory, GB/s.
        memory_gib: of a device.
        gpus_per_node: devices that the fast link connects.
        intra_gbs: a device's fast link within the node, GB/s in one direction.
        inter_gbs: a device's share of its node's network, GB/s in one direction.
        intra_us, inter_us: what a message between two neighbours takes beside its bytes.
        reserve_gib: memory that no tensor gets: context, communicators, fragments.
    """

    name: str
    peak_tflops: float
    bandwidth_gbs: float
    memory_gib: float
    gpus_per_node: int
    intra_gbs: float
    inter_gbs: float
    intra_us: float = 2.0
    inter_us: float = 5.0
    reserve_gib: float = 4.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "name":
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"Cluster: {field.name} must be a number; got {value!r}")
            may_be_zero = field.name in ("intra_us", "inter_us", "reserve_gib")
            if not (value > 0 or (may_be_zero and value == 0)):
                raise ValueError(f"Cluster: {field.name} must be positive; got {value}")
        if not isinstance(self.gpus_per_node, int):
            raise TypeError(f"Cluster: gpus_per_node must be an int; got {self.gpus_per_node!r}")

    @property
    def usable(self) -> float:
        """Bytes of a device that tensors may take."""
        return (self.memory_gib - self.reserve_gib) * 2**30

    def inside(self, size: int, stride: int) -> int:
        """How many of a group's members share a node.

        Args:
            size: of the group; stride: ranks from one member to the next.
        """
        return max(1, min(size, self.gpus_per_node // stride))

    def link(self, size: int, stride: int) -> tuple[str, float]:
        """The link that bounds a group's collective, and its bandwidth for one device, GB/s.

        Within a node the fast link. Across nodes a ring enters and leaves each node once for all
        its k members there, over the network shares of these k: min(intra, k inter).
        """
        k = self.inside(size, stride)
        if size <= k:
            return "intra", self.intra_gbs
        return "inter", min(self.intra_gbs, k * self.inter_gbs)

    def seconds(self, kind: str, size: int, stride: int, bytes: float, calls: float = 1.0) -> float:
        """The least time of a collective, by the ring algorithm's volume.

        n ranks send (n - 1) / n of the whole for a gather or a reduce-scatter, twice that for an
        all-reduce; a message between two neighbours ("send") all of it. Latency: n - 1 hops of a
        ring, 2 log2 n of the trees that an all-reduce takes.

        Args:
            kind: "all-gather", "reduce-scatter", "all-reduce" or "send".
            size, stride: of the group.
            bytes: of the whole tensor, of all calls together.
            calls: how many collectives that is.
        """
        if size == 1 or not bytes:
            return 0.0
        where, gbs = self.link(size, stride)
        hop = (self.intra_us if where == "intra" else self.inter_us) * 1e-6
        hops = {"send": 1, "all-reduce": 2 * (size - 1).bit_length()}.get(kind, size - 1)
        return sent(kind, size, bytes) / (gbs * 1e9) + calls * hops * hop

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def sent(kind: str, size: int, bytes: float) -> float:
    """Bytes that one rank sends in a collective over a tensor of so many bytes."""
    if size == 1:
        return 0.0
    return bytes * {"send": 1.0, "all-reduce": 2 * (size - 1) / size}.get(kind, (size - 1) / size)


def _of(
    target: str, name: str, memory: float, intra: float, inter: float, node: int = 8
) -> Cluster:
    chip = CHIPS[target]
    peak = round(chip.peak("16-bit"), 1)
    return Cluster(name, peak, chip.bandwidth, memory, node, intra, inter)


# Peaks and memory bandwidths of chips that the lab knows are its own (fastgpt/lab/chips.py), others
# those of data sheets. NVLink 2, 3, 4, 5: 300, 600, 900, 1800 GB/s both ways. One network adapter
# a GPU: 200 Gb/s (DGX A100), 400 Gb/s (DGX H100 and later); V100: 400 Gb/s a server of 8, as
# Microsoft said of the machine that it built for OpenAI (2020). TPU v4: Jouppi et al., 2023,
# https://arxiv.org/abs/2304.01433: six links of 50 GB/s in a 3D torus, of which a collective along
# one axis uses two; a pod is the node here, and its network is the 81 Tb/s between two pods of 3072
# that Chowdhery et al., 2022, https://arxiv.org/abs/2204.02311, report.
_ALL = (
    Cluster("v100", 125.0, 900.0, 32.0, 8, 150.0, 6.25, reserve_gib=2.0),
    Cluster("a100-40gb", 312.0, 1555.0, 40.0, 8, 300.0, 25.0),
    _of("sm_80", "a100", 80.0, 300.0, 25.0),
    _of("sm_90", "h100", 80.0, 450.0, 50.0),
    Cluster("h200", round(CHIPS["sm_90"].peak("16-bit"), 1), 4800.0, 141.0, 8, 450.0, 50.0),
    _of("sm_100", "b200", 180.0, 900.0, 50.0),
    _of("gfx942", "mi300x", 192.0, 448.0, 50.0),
    _of("sm_89", "rtx4090", 24.0, 25.0, 3.125),
    Cluster("tpu-v4", 275.0, 1228.0, 32.0, 3072, 100.0, 3.3, reserve_gib=1.0),
)
CLUSTERS = {c.name: c for c in _ALL}
"""By name."""


def cluster(name: str) -> Cluster:
    """A named cluster, or one that a YAML file describes.

    Args:
        name: of CLUSTERS, or the path of a .yaml file, see `read`.

    Raises:
        ValueError: it is neither.
    """
    if name in CLUSTERS:
        return CLUSTERS[name]
    if name.endswith((".yaml", ".yml")):
        return read(name)
    raise ValueError(
        f"plan: the cluster must be one of {', '.join(CLUSTERS)}, or a .yaml file; got {name!r}"
    )


def read(path: str | Path) -> Cluster:
    """A cluster from YAML: Cluster's attributes; `base` names one to start from.

        base: h100
        name: ours
        inter_gbs: 25

    Raises:
        ValueError: it is no such file; OSError: it cannot be read.
        ImportError: pyyaml is not installed.
    """
    try:
        import yaml
    except ImportError:
        raise ImportError("plan: needs the package pyyaml; pip install pyyaml") from None
    try:
        said = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"plan: {path} is no YAML; {error}") from None
    if not isinstance(said, dict):
        raise ValueError(f"plan: {path} must map names to numbers; got {type(said).__name__}")
    base = said.pop("base", None)
    made: dict[str, Any] = {"name": Path(path).stem}
    if base is not None:
        if base not in CLUSTERS:
            raise ValueError(
                f"plan: {path}: base must be one of {', '.join(CLUSTERS)}; got {base!r}"
            )
        made = asdict(CLUSTERS[base]) | made
    known = [field.name for field in fields(Cluster)]
    for key in said:
        if key not in known:
            raise ValueError(f"plan: {path}: known are base, {', '.join(known)}; got {key!r}")
    made |= said
    lacking = [f.name for f in fields(Cluster) if f.name not in made and f.default is MISSING]
    if lacking:
        raise ValueError(f"plan: {path} lacks {', '.join(lacking)}; a base would give them")
    return Cluster(**made)
