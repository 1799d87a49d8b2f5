"""Compile ahead, in parallel, the kernels that a model will need.

The model's step is traced on tensors that hold nothing. Wherever it calls one of fastgpt's ops, the
op's launchers run too, on tensors of the same shapes, and each launch is compiled by threads
beside the tracing instead of being run: what a real step launches is then found compiled.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from fastgpt.model import GPT, GPTConfig
from fastgpt.ops import backend, library
from fastgpt.optim import AdamW


def warmup(
    model: GPT | GPTConfig,
    batch_size: int,
    T: int | None = None,
    dtype: torch.dtype | None = None,
    *,
    autocast: torch.dtype | None = None,
    training: bool = True,
    generation: bool = False,
    target: str | None = None,
    workers: int | None = None,
) -> list[str]:
    """Compile all kernels of a training step, of generation, or of both, before the first.

    Args:
        model: a model, or the configuration of one.
        batch_size, T: rows and tokens of a step, or of a prompt; T is block_size without.
        dtype: of the weights: a model's own, or float32, without.
        autocast: dtype of matrix products, if the step runs under torch.autocast.
        training: forward, backward and the optimizer of `GPT.configure_optimizer`.
        generation: a prompt, and the tokens after it.
        target: compile for this chip, as "sm_90", which need not be there: a check.
        workers: threads; one a core without.

    Returns:
        What was compiled or found in Triton's cache, as file.kernel, sorted, each once.

    Raises:
        ValueError: there is no GPU and no target, or a number is out of range.
        triton.CompilationError: a kernel does not compile.
    """
    config = model if isinstance(model, GPTConfig) else model.config
    if dtype is None:
        dtype = model.wte.weight.dtype if isinstance(model, GPT) else torch.float32
    T = config.block_size if T is None else T
    if batch_size < 1 or not 1 <= T <= config.block_size:
        raise ValueError(
            "warmup: batch_size must be at least 1 and T from 1 to the model's block_size"
            f" {config.block_size}; got batch_size {batch_size}, T {T}"
        )
    if target is None and (backend.INTERPRET or not torch.cuda.is_available()):
        raise ValueError(
            "warmup: needs a GPU, or the target to compile for, as target='sm_90'; got neither"
        )
    device = "cpu" if target is not None else "cuda"
    traced = _steps(config, batch_size, T, dtype, autocast, training, generation, device)
    with _chip(target), _compiling(workers) as names:
        _trace(traced, device)
    return sorted(names)


@contextlib.contextmanager
def _chip(target: str | None) -> Iterator[None]:
    """The chip that is there, with the tiles that were measured on it, or the target."""
    if target is None:
        torch.cuda.init()
        backend.look_for_measured_tiles()
        yield
        return
    from fastgpt.lab.compile import present

    with present(target):
        yield


def _steps(
    config: GPTConfig, B: int, T: int, dtype: torch.dtype, autocast: torch.dtype | None,
    training: bool, generation: bool, device: str,
) -> Callable[[], None]:  # fmt: skip
    """What is traced: with nothing but shapes it takes no time and no memory."""

    def run() -> None:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)  # fake parameters cannot be moved to a dtype
        try:
            model = GPT(config)
        finally:
            torch.set_default_dtype(before)
        ids = torch.zeros(B, T, dtype=torch.int64)
        cast = torch.autocast(device, autocast, enabled=autocast is not None)
        if training:
            with cast:
                loss = model(ids, ids)
            loss.backward()
            optimizer = model.configure_optimizer(lr=1e-3)
            if isinstance(optimizer, AdamW):
                optimizer.step()
        if generation:
            model.eval()
            with cast, torch.no_grad():
                cache = model.new_cache(B)
                for tokens in (ids[:, : max(1, T - 1)], ids[:, :1]):
                    if cache.length + tokens.shape[1] <= config.block_size:
                        model.logits(model.hidden(tokens, cache)[:, -1])

    return run


def _trace(run: Callable[[], None], device: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    fake = (FakeTensorMode(), _Launching(), torch.device(device))
    with backend.rehearsal(), backend.use("triton"), fake[0], fake[1], fake[2]:
        run()


class _Launching(TorchDispatchMode):
    """Runs the launchers of fastgpt's ops beside their fake implementations."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        from torch._subclasses.fake_tensor import unset_fake_temporarily

        kwargs = kwargs or {}
        if func.namespace == "fastgpt":
            with unset_fake_temporarily(), torch.device("meta"), torch.no_grad():
                bare, named = tree_map_only(Tensor, _bare, (tuple(args), dict(kwargs)))
                library.implementations[func._schema.name.partition("::")[2]](*bare, **named)
        return func(*args, **kwargs)


def _bare(t: Tensor) -> Tensor:
    """A tensor of t's shape, strides and offset, on which addresses go, with nothing behind it."""
    elements = t.untyped_storage().nbytes() // t.itemsize
    storage = torch.empty(elements, dtype=t.dtype, device="meta")
    return storage.as_strided(t.shape, t.stride(), t.storage_offset())


@contextlib.contextmanager
def _compiling(workers: int | None) -> Iterator[set[str]]:
    """Inside, a launch is compiled by a thread, and its kernel's name added."""
    import triton
    from triton.runtime.jit import JITFunction

    launch = JITFunction.run
    names: set[str] = set()

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        names.add(f"{self.fn.__module__.rpartition('.')[2]}.{self.fn.__name__}")
        return launch(self, *args, grid=grid, warmup=True, **kwargs)

    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        JITFunction.run = run
        try:
            with triton.AsyncCompileMode(pool):
                yield names
        finally:
            JITFunction.run = launch
