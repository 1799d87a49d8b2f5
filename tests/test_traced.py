"""What a GPU would be given, without one: the ops on tensors without data, and their launchers with
launches that are only counted. Neither may wait for the device: a CUDA graph could not."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastgpt
from fastgpt import GPT, GPTConfig, ops
from fastgpt.ops import backend
from fastgpt.ops.backend import INTERPRET
from tests.conftest import HAS_CUDA, ROOT
from tests.op_cases import CASES, NAMES, Case, Inputs, registered

pytestmark = pytest.mark.skipif(HAS_CUDA or INTERPRET, reason="about kernels that cannot run here")
every_op = pytest.mark.parametrize("case", CASES, ids=NAMES)
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2")
READS = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__")


def backward(case: Case, made: tuple[Tensor, ...], x: Inputs) -> tuple[Tensor, ...]:
    return torch.autograd.grad(made, case.wanted(x), [torch.ones_like(y) for y in made])


@every_op
def test_forward_and_backward_trace_to_the_registered_ops(case: Case) -> None:
    """What AOTAutograd compiles; its fake tensors raise where data would be read."""

    def both(x: Inputs) -> tuple[Tensor, ...]:
        made = case.outputs(**x)
        return made + backward(case, made, x)

    with registered():
        graph = make_fx(both, tracing_mode="fake")(case.leaves())
    called = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    once = case.name == "linear_cross_entropy"  # its gradients are made in forward
    assert len([name for name in called if name.startswith("fastgpt.")]) == (1 if once else 2)
    assert not [name for name in called if name.removeprefix("aten.").split(".")[0] in WAITS]


@every_op
def test_on_cuda_shapes_and_dtypes_are_the_cpus(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fake CUDA tensors without gradient: with it autograd, built for CPUs, ends the process."""
    monkeypatch.setattr(backend, "_capability", lambda device: (9, 0))
    x = {name: t.detach() for name, t in case.leaves().items()}
    want = case.outputs(**x)
    got: list[Tensor] = []
    with FakeTensorMode():
        on_gpu = {name: torch.empty(t.shape, dtype=t.dtype, device="cuda") for name, t in x.items()}
        heard = fastgpt.explain(lambda: got.extend(case.outputs(**on_gpu)))
    assert [(c.op, c.path) for c in heard] == [(case.op, "triton")]
    for g, w in zip(got, want, strict=True):
        assert (g.device.type, g.shape, g.dtype) == ("cuda", w.shape, w.dtype)


# The launchers


class Waited(AssertionError):
    pass


class NoWaiting(TorchDispatchMode):
    """Raises where a tensor on a GPU would have to be waited for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").partition(".")[0]
        masked = name == "index" and any(
            t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1]
        )
        if name in WAITS or masked:
            raise Waited(func.name())
        return func(*args, **kwargs or {})


class NoReading(TorchFunctionMode):
    """Raises where Python reads a tensor, or makes one from numbers on the device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        made_there = func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], Tensor)
        if (name in READS and types) or (made_there and (kwargs or {}).get("device") != "cpu"):
            raise Waited(name)
        return func(*args, **kwargs or {})


@contextmanager
def launching(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Inside, ops launch on sm_90 and nothing runs; each launch must be under its device guard."""
    from triton.runtime.jit import JITFunction

    from fastgpt.lab.compile import capture

    guarded: list[Tensor] = []
    launched: list[str] = []

    @contextmanager
    def guard(x: Tensor) -> Iterator[None]:
        guarded.append(x)
        yield
        guarded.pop()

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        assert guarded, f"{self.fn.__name__} is launched on whatever device is current"
        launched.append(self.fn.__name__)

    for file in (ROOT / "kernels").glob("*.py"):
        module = importlib.import_module(f"fastgpt.kernels.{file.stem}")
        if hasattr(module, "on_device"):
            monkeypatch.setattr(module, "on_device", guard)
    for name in ("cross_entropy", "linear_cross_entropy"):  # on a CPU alone targets are looked at
        module = importlib.import_module(f"fastgpt.ops.{name}")
        monkeypatch.setattr(module, "check_range", lambda *args: None)
    with capture("sm_90"), backend.rehearsal(), ops.use("triton"), monkeypatch.context() as patch:
        patch.setattr(JITFunction, "run", run)
        with NoWaiting(), NoReading():
            yield launched


@every_op
def test_a_launcher_waits_for_nothing_and_guards_its_device(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No reading back, no shape from data: forward and backward could be captured in a graph."""
    x = case.leaves()
    with launching(monkeypatch) as launched:
        made = case.outputs(**x)
        forward = len(launched)
        backward(case, made, x)
    assert forward > 0
    assert len(launched) > forward or case.name == "linear_cross_entropy"


@pytest.mark.parametrize("tensors", [False, True], ids=["numbers", "a tensor among them"])
def test_adamws_launcher_waits_for_nothing(tensors: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def group(lr: float | Tensor) -> ops.AdamWGroup:
        p, g, m, v = (torch.ones(9) for _ in range(4))
        return ops.AdamWGroup([p], [g], [m], [v], [torch.zeros(())], lr=lr)

    groups = [group(1e-3), group(torch.tensor(1e-3) if tensors else 1e-4)]
    control, scale = torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.ones(1)
    with launching(monkeypatch) as launched:
        ops.adamw(groups, control, max_grad_norm=1.0, skip_nonfinite=True, grad_scale=scale)
    assert launched == ["_norm_kernel", "_prepare_kernel", "_step_kernel"]


def test_a_training_step_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """With dropout, whose seeds are drawn on the device, clipping and AdamW."""
    model = GPT(GPTConfig(8, 31, n_layer=1, n_head=2, n_embd=16, dropout=0.1))
    optimizer = model.configure_optimizer(1e-3, max_grad_norm=1.0)
    _ = optimizer.grad_norm  # makes what the optimizer keeps on the device
    x, y = torch.randint(31, (2, 2, 8))
    with launching(monkeypatch) as launched:
        model(x, y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(launched) > 20


def _asks(x: Tensor) -> Any:
    return x.sum().item()


def _decides(x: Tensor) -> Any:
    return 1 if x.sum() > 0 else 2


def _selects(x: Tensor) -> Any:
    return x[x > 0]


def _makes(x: Tensor) -> Any:
    return torch.tensor([1.0], device=x.device)


@pytest.mark.parametrize("waits", [_asks, _decides, _selects, _makes])
def test_what_would_wait_is_seen(waits: Callable[[Tensor], Any]) -> None:
    with pytest.raises(Waited), NoWaiting(), NoReading():
        waits(torch.ones(3))
