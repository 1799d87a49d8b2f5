"""Which path an op takes, Triton kernel or plain PyTorch, and why: decided here and nowhere else.

    with fastgpt.use("triton"):      # a kernel, or an error that says why not
    with fastgpt.use("reference"):   # plain PyTorch
    with fastgpt.use("auto"):        # the default: the kernel wherever it can run

The environment variable FASTGPT_BACKEND sets the default, FASTGPT_CACHE the file of measured tiles
(XDG_CACHE_HOME/fastgpt/tiles.json). TRITON_INTERPRET=1, read by Triton when a kernel is decorated,
makes the kernels run on CPU tensors in Triton's interpreter.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

PATHS = ("auto", "triton", "reference")
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OLDEST = (8, 0)  # NVIDIA's compute capability: Ampere
HAS_TRITON = find_spec("triton") is not None
INTERPRET = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def _cache(environment: Mapping[str, str]) -> Path:
    folder = environment.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(environment.get("FASTGPT_CACHE") or f"{folder}/fastgpt/tiles.json")


TILES = _cache(os.environ)  # where `fastgpt tune` writes what it measured, and kernels look


def _check_path(path: str, source: str) -> str:
    if path not in PATHS:
        raise ValueError(f"{source}: the path must be one of {', '.join(PATHS)}; got {path!r}")
    return path


# Of the process, not of the thread: activation checkpointing runs forward again in a thread of the
# autograd engine's, and must take the path that the first forward took. Dynamo guards on it too.
_path = _check_path(os.environ.get("FASTGPT_BACKEND", "auto"), "FASTGPT_BACKEND")
_uses = [_path]  # the default, then what was entered and not yet left, by whatever thread


@dataclass(frozen=True)
class Choice:
    """The path one call of an op took, and why."""

    op: str
    path: str
    why: str

    def __str__(self) -> str:
        return f"{self.op}: {self.path} ({self.why})"


_choice = lru_cache(maxsize=256)(Choice)  # calls make few that differ
_last: dict[str, Choice] = {}
_listeners: list[list[Choice]] = []


def _leave(path: str) -> None:
    """Take away the last of that path: not the last of all, which may be another thread's."""
    global _path
    at = max(n for n, other in enumerate(_uses) if n and other == path)
    del _uses[at]
    _path = _uses[-1]


@contextmanager
def use(path: str) -> Iterator[None]:
    """Choose the path of every op called inside: "auto", "triton" or "reference".

    It holds for all threads of the process: of those that are inside at a time, whoever entered
    last decides, and once all have left it is as before.

    Raises:
        ValueError: path is none of these.
    """
    global _path
    _path = _check_path(path, "use")
    _uses.append(path)
    try:
        yield
    finally:
        _leave(path)


def explain(call: Callable[..., Any] | None = None, *args: Any, **kwargs: Any) -> list[Choice]:
    """Tell which path ops took, and why.

    Args:
        call: a function or model to run as call(*args, **kwargs). If None, nothing runs.

    Returns:
        The choices made while call ran, in order, other threads' too; without call, the last
        choice of every op.
        Calls inside a compiled graph are not seen: the choice was made when it was traced.

    Examples:
        >>> for choice in fastgpt.explain(fastgpt.ops.rms_norm, torch.ones(1, 2), torch.ones(2)):
        ...     print(choice)
        rms_norm: reference (tensors are on cpu; kernels need CUDA, or TRITON_INTERPRET=1)
    """
    if call is None:
        return list(_last.values())
    heard: list[Choice] = []
    _listeners.append(heard)
    try:
        call(*args, **kwargs)
    finally:
        _listeners.remove(heard)
    return heard


_rehearsing = False


@contextmanager
def rehearsal() -> Iterator[None]:
    """Inside, ops take the path that they take on a GPU, whatever device their tensors are on.

    For `fastgpt.lab`, which puts fake tensors or a driver that launches nothing underneath.
    """
    global _rehearsing
    before, _rehearsing = _rehearsing, True
    try:
        yield
    finally:
        _rehearsing = before


_looked = False  # for measured tiles: once, before the first kernel on a GPU that is there


def look_for_measured_tiles() -> None:
    """Read the user's cache, the first time that a GPU is in use."""
    global _looked
    if (
        not _looked
        and HAS_TRITON
        and not INTERPRET
        and not _rehearsing
        and torch.cuda.is_initialized()
    ):
        from fastgpt.ops import tuning

        _looked = True
        tuning.load(TILES.expanduser())


def runs_kernel(x: Tensor) -> bool:
    """Whether a registered op given x launches its kernel. The dispatcher cannot tell: under the
    sanitizer a tensor is CUDA to the program and CPU to the dispatcher."""
    if x.is_cuda and not torch.compiler.is_compiling() and not _looked:
        look_for_measured_tiles()
    return x.is_cuda or INTERPRET or _rehearsing


@lru_cache(maxsize=64)
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def transformed() -> bool:
    """Whether a transform of torch.func, or forward-mode differentiation, is at work."""
    return (
        torch._C._functorch.maybe_current_level() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


# As torch.compiler.assume_constant_result does, which would import dynamo: while dynamo traces a
# transform the answer is known, and cannot be asked for in the graph.
transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _obstacle(x: Tensor) -> str | None:
    """What keeps any kernel from running on x, or None."""
    if not runs_kernel(x):
        return f"tensors are on {x.device}; kernels need CUDA, or TRITON_INTERPRET=1"
    if not HAS_TRITON:
        return "triton is not installed"
    if x.dtype not in KERNEL_DTYPES:
        return f"kernels take float32, float16 and bfloat16; got {x.dtype}"
    if INTERPRET and x.dtype == torch.bfloat16:
        return "Triton's interpreter multiplies the raw bits of bfloat16"
    if transformed():
        return "kernels have no rule for torch.func's transforms and forward-mode derivatives"
    if torch.compiler.is_compiling():
        return None
    if x.is_cuda and torch.version.hip is None:
        capability = _capability(x.device)
        if capability < OLDEST:
            return f"kernels need compute capability 8.0; got {'.'.join(map(str, capability))}"
    return None


def kernels_run(x: Tensor) -> bool:
    """Whether ops given x take their kernels, unless one has a reason of its own."""
    return _path != "reference" and _obstacle(x) is None


def kernel_chosen(op: str, x: Tensor, obstacle: str | None = None) -> bool:
    """Decide for a call of op on x; obstacle is the op's own reason why its kernel cannot run.

    Raises:
        ValueError: the kernel is forced by use("triton") and cannot take the input.
    """
    path = _path
    why = _obstacle(x) or obstacle
    if path == "triton" and why is not None:
        raise ValueError(f"{op}: the triton path is forced, but {why}")
    chosen = path != "reference" and why is None
    if not torch.compiler.is_compiling():
        if path != "auto":
            why = f'use("{path}")'
        elif why is None:
            why = "Triton's interpreter" if INTERPRET and not x.is_cuda else "a CUDA tensor"
        _last[op] = choice = _choice(op, "triton" if chosen else "reference", why)
        for heard in _listeners:
            heard.append(choice)
    return chosen


Maybe = TypeVar("Maybe", Tensor, Tensor | None)


def autocast(*tensors: Maybe) -> tuple[Maybe, ...]:
    """The tensors in autocast's dtype where autocast is on, as torch casts those of a matmul."""
    device = "cpu"
    for t in tensors:
        if t is not None:
            device = t.device.type
            break
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or t.dtype not in KERNEL_DTYPES else t.to(dtype) for t in tensors)


def as_norms_under_autocast(x: Tensor) -> Tensor:
    """x in float32 where torch's own norms take it so: of 16 bits, on CUDA, under autocast."""
    if x.is_cuda and x.dtype.itemsize == 2 and torch.is_autocast_enabled("cuda"):
        return x.float()
    return x


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Inside, autocast is off on x's device, if that has it: "meta" has not."""
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


def traceable(*args: Any) -> tuple[Any, ...]:
    """The arguments of an autograd Function.

    Dynamo takes no tensor twice, as in attention(x, x, x): while it traces, the second is a view.
    """
    if not torch.compiler.is_compiling():
        return args
    made: list[Any] = []
    for arg in args:
        again = isinstance(arg, Tensor) and any(arg is before for before in made)
        made.append(arg.view_as(arg) if again else arg)
    return tuple(made)


def double_backward() -> bool:
    """Whether the running backward was called with create_graph=True."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def differentiable_grads(
    ref: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: tuple[Tensor | None, ...],
    needs: tuple[bool, ...],
    grads: tuple[Tensor | None, ...],
) -> tuple[Tensor | None, ...]:
    """The gradients of ref(*inputs) by plain PyTorch, themselves differentiable.

    A kernel's backward has no derivative of its own. One that is called with create_graph=True
    comes here, so that second derivatives are right and not silently absent. What requires no
    gradient gets None.
    """
    with torch.enable_grad():
        out = ref(*inputs)
    outs = out if isinstance(out, tuple) else (out,)
    live = [(o, g) for o, g in zip(outs, grads, strict=True) if g is not None and o.requires_grad]
    wanted = [
        t if need and t is not None and t.requires_grad else None
        for t, need in zip(inputs, needs, strict=True)
    ]
    if not live:
        return (None,) * len(inputs)
    got = iter(
        torch.autograd.grad(
            [o for o, _ in live],
            [t for t in wanted if t is not None],
            [g.to(o.dtype) for o, g in live],
            create_graph=True,
            allow_unused=True,
        )
    )
    return tuple(None if t is None else next(got) for t in wanted)
