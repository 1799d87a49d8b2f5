"""One computation at one size, and who offers it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor

from fastgpt.bench import timing
from fastgpt.lab.memory import saved_bytes

MODES = ("forward", "backward", "both")
# Of the largest value; a gradient, which is rounded more often, may be off by twice as much.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 2e-2}

Start = Callable[[], Any]


class Work(Protocol):
    """What `measure` times: one computation at one size, by several providers."""

    @property
    def what(self) -> str: ...

    @property
    def name(self) -> str:
        """With the sizes."""

    @property
    def sizes(self) -> dict[str, int]: ...

    @property
    def absent(self) -> dict[str, str]:
        """Providers that cannot be here, and why."""

    @property
    def offers(self) -> tuple[str, ...]:
        """The providers that can be tried."""

    @property
    def modes(self) -> tuple[str, ...]: ...

    def ready(self, provider: str) -> None:
        """Makes what the provider needs, which is not timed."""

    def first(self, provider: str, mode: str) -> Any:
        """A call that leaves everything as it was; the first one compiles."""

    def wrong(self, provider: str, mode: str) -> str | None:
        """Why the provider's values are not to be taken; None if they are right."""

    def start(self, provider: str, mode: str) -> Start:
        """Everything up to what is timed; the call that is."""

    def memory(self, provider: str, call: Start) -> tuple[int | None, int | None]:
        """Bytes that a call adds at its highest; those of its process, if it has one of its own."""

    def saved(self, provider: str) -> int | None:
        """Bytes kept for backward."""

    def counts(self, mode: str) -> dict[str, int]:
        """flops, bytes and tokens of a call, those that are known."""


@dataclass(frozen=True)
class Case:
    """An op at one size.

    Attributes:
        providers: functions of the same inputs.
        inputs: what has a gradient; the rest is in the functions.
        standard: whose values are right: PyTorch's own way, not this library's.
        flops: of the forward pass, a multiply-add is two; 0 if products are not what it is about.
        traffic: bytes that forward and backward must move if that is not inputs and outputs once.
        absent: providers that cannot be here, and why.
    """

    what: str
    sizes: dict[str, int]
    providers: dict[str, Callable[..., Tensor]]
    inputs: dict[str, Tensor]
    standard: str
    flops: int = 0
    tokens: int = 0
    traffic: tuple[int, int] | None = None
    absent: dict[str, str] = field(default_factory=dict)
    has_backward: bool = True
    note: str = ""

    @property
    def name(self) -> str:
        shape = ", ".join(f"{k}={v}" for k, v in self.sizes.items())
        return f"{self.what} {shape}{self.note}"

    @property
    def offers(self) -> tuple[str, ...]:
        return tuple(self.providers)

    @property
    def modes(self) -> tuple[str, ...]:
        return MODES if self.has_backward else MODES[:1]

    def _leaves(self) -> dict[str, Tensor]:
        return {n: t.detach().clone().requires_grad_() for n, t in self.inputs.items()}

    def start(self, provider: str, mode: str) -> Start:
        """The call to time: forward without gradients, both; or backward, once, after a forward."""
        f = self.providers[provider]
        if mode == "forward":
            return lambda: f(**self.inputs)
        leaves = self._leaves()
        wrt = list(leaves.values())
        y = f(**leaves)
        dy = torch.randn_like(y)
        if mode == "both":
            return lambda: torch.autograd.grad(f(**leaves), wrt, dy)
        return lambda: torch.autograd.grad(y, wrt, dy)

    def ready(self, provider: str) -> None:
        """Nothing: a provider is a function."""

    def values(self, provider: str, mode: str) -> dict[str, Tensor]:
        """The output and, but for forward, the gradients, for one incoming gradient."""
        f = self.providers[provider]
        if mode == "forward":
            with torch.no_grad():
                return {"values": f(**self.inputs)}
        leaves = self._leaves()
        y = f(**leaves)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y)
        grads = torch.autograd.grad(y, list(leaves.values()), dy)
        return {"values": y.detach()} | {f"d{n}": g for n, g in zip(leaves, grads, strict=True)}

    first = values

    def off(self, provider: str, mode: str = "forward") -> dict[str, float]:
        """Largest differences to the standard's, relative to its largest value."""
        want, got = self.values(self.standard, mode), self.values(provider, mode)
        return {n: relative(got[n], want[n]) for n in want}

    def wrong(self, provider: str, mode: str) -> str | None:
        if provider == self.standard:
            return None
        dtype = next(iter(self.inputs.values())).dtype
        for name, off in self.off(provider, mode).items():
            most = TOLERANCE[dtype] * (1 if name == "values" else 2)
            if not off <= most:  # nan is wrong too
                return f"{name} differ from {self.standard}'s by {off:.2g}, more than {most:.2g}"
        return None

    def memory(self, provider: str, call: Start) -> tuple[int | None, int | None]:
        device = next(iter(self.inputs.values())).device.type
        if device != "cuda" and provider.endswith("compiled"):
            return None, None  # compiled code allocates past the dispatcher
        return timing.peak_bytes(call, device), None

    def saved(self, provider: str) -> int | None:
        """Without the inputs, which are there anyway."""
        if not self.has_backward:
            return None
        leaves = self._leaves()
        return saved_bytes(lambda: self.providers[provider](**leaves), leaves.values())

    def counts(self, mode: str) -> dict[str, int]:
        if self.traffic:
            forward, backward = self.traffic
        else:
            with torch.no_grad():
                out = size_of(self.providers[self.standard](**self.inputs))
            given = self.input_bytes
            forward, backward = given + out, 2 * given + out
        times = {"forward": 1, "backward": 2, "both": 3}[mode]
        moved = {"forward": forward, "backward": backward, "both": forward + backward}[mode]
        found = {"flops": self.flops * times, "bytes": moved, "tokens": self.tokens}
        return {name: n for name, n in found.items() if n}

    @property
    def input_bytes(self) -> int:
        return sum(size_of(t) for t in self.inputs.values())


def relative(got: Tensor, want: Tensor) -> float:
    if got.shape != want.shape:
        return float("inf")
    got, want = got.float(), want.float()
    return float(((got - want).abs().max() / want.abs().max()).item())


def size_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def compiled(f: Callable[..., Any]) -> Callable[..., Any]:
    """f under torch.compile, for exactly the sizes it meets."""
    return torch.compile(f, dynamic=False)


def optional(
    ways: Mapping[str, tuple[str, Callable[..., Any]]], device: str
) -> tuple[dict[str, Callable[..., Any]], dict[str, str]]:
    """Of providers from packages that need a GPU, those that can be here, and why others cannot.

    Args:
        ways: the importable name of the package and the function of each provider.
    """
    here, absent = {}, {}
    for name, (package, f) in ways.items():
        if find_spec(package) is None:
            absent[name] = f"the package {package} is not installed"
        elif device != "cuda":
            absent[name] = "it needs a GPU"
        else:
            here[name] = f
    return here, absent
