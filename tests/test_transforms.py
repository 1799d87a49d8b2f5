"""Derivatives of every order and kind: they are right or refused, never silently absent.

The plain path is PyTorch's own operators; the kernels' path is an autograd Function for each op,
here on its registered op's plain implementation, in float64.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastgpt
from fastgpt import GPT, GPTConfig, ops
from fastgpt.ops import backend
from fastgpt.ops.backend import INTERPRET
from tests.conftest import HAS_CUDA, SANITIZED
from tests.op_cases import CASES, NAMES, Case, Inputs, registered

every_op = pytest.mark.parametrize("case", CASES, ids=NAMES)
Outputs = tuple[Tensor, ...]


@contextmanager
def plain() -> Iterator[None]:
    """PyTorch's operators, attention unfused: fused, it has these derivatives not on a CPU."""
    with ops.use("reference"), sdpa_kernel(SDPBackend.MATH):
        yield


def summed(outputs: Outputs) -> tuple[Outputs, Outputs | None]:
    """Each output's sum: the incoming gradient is one number, expanded."""
    return tuple(y.sum() for y in outputs), None


def constant(outputs: Outputs) -> tuple[Outputs, Outputs | None]:
    return outputs, tuple(torch.cos(y.detach()) for y in outputs)


def depending(outputs: Outputs) -> tuple[Outputs, Outputs | None]:
    """An incoming gradient that depends on the inputs itself."""
    return outputs, tuple(torch.cos(y) for y in outputs)


def last_alone(outputs: Outputs) -> tuple[Outputs, Outputs | None]:
    return (outputs[-1].square().sum(),), None


def penalty(case: Case, x: Inputs, ask: Callable[..., Any]) -> tuple[Any, ...]:
    """Gradients, and the gradients of the sum of their squares, as WGAN-GP's penalty takes them."""
    leaves = case.wanted(x)
    first = torch.autograd.grad(
        *_arguments(ask(case.outputs(**x)), leaves), create_graph=True, allow_unused=True
    )
    total = sum((g.square().sum() for g in first if g is not None), torch.zeros(()))
    if not total.requires_grad:
        return (*first, *[None] * len(leaves))
    return (*first, *torch.autograd.grad(total, leaves, allow_unused=True))


def _arguments(asked: tuple[Outputs, Outputs | None], leaves: list[Tensor]) -> tuple[Any, ...]:
    outputs, incoming = asked
    return outputs, leaves, incoming


@pytest.mark.parametrize("ask", [summed, constant, depending, last_alone])
@every_op
def test_second_derivatives_are_the_plain_paths(case: Case, ask: Callable[..., Any]) -> None:
    x = case.leaves(dtype=torch.float64)
    with plain():
        want = penalty(case, x, ask)
    with registered():
        got = penalty(case, x, ask)
    for name, g, w in zip([*x, *x], got, want, strict=False):
        zero = torch.zeros(())
        g, w = (zero if t is None else t for t in (g, w))
        scale = w.abs().max() + 1.0
        assert ((g - w).abs().max() / scale) < 1e-7, name


@every_op
def test_gradients_check_against_differences(case: Case) -> None:
    """And the gradients' own gradients, by finite differences alone."""
    x = case.leaves(dtype=torch.float64)
    names = [k for k, t in x.items() if t.requires_grad]

    def f(*leaves: Tensor) -> Outputs:
        return case.outputs(**(x | dict(zip(names, leaves, strict=True))))

    leaves = tuple(x[name] for name in names)
    with registered():
        torch.autograd.gradcheck(f, leaves, fast_mode=True)
        torch.autograd.gradgradcheck(f, leaves, fast_mode=True, atol=1e-4)


def assert_batched_gradients_are_a_loops(case: Case, x: Inputs) -> None:
    """As vectorized Jacobians take them: backward under vmap, forward as ever."""
    made, leaves = case.outputs(**x), case.wanted(x)
    dys = [torch.randn(3, *y.shape, dtype=y.dtype, device=y.device) for y in made]
    got = torch.autograd.grad(made, leaves, dys, is_grads_batched=True, retain_graph=True)
    for n in range(3):
        want = torch.autograd.grad(made, leaves, [dy[n] for dy in dys], retain_graph=True)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g[n], w)


@every_op
def test_batched_gradients_are_a_loops(case: Case) -> None:
    with registered():
        assert_batched_gradients_are_a_loops(case, case.leaves(dtype=torch.float64))


@pytest.mark.gpu
@pytest.mark.skipif(SANITIZED, reason="torch sees CPU tensors there, and batches them as such")
@pytest.mark.parametrize("name", ["attention", "layer_norm", "ffn"])
def test_batched_gradients_of_a_kernel_are_a_loops(name: str, device: str) -> None:
    case = next(c for c in CASES if c.name == name)
    with ops.use("triton"):
        assert_batched_gradients_are_a_loops(case, case.leaves(device=device))


# torch.func, on the plain path: on a GPU too, as backend says


def loss_of(case: Case, x: Inputs) -> tuple[Callable[[Inputs], Tensor], Inputs]:
    """A scalar of the inputs that take gradient, and those."""
    rest = {name: t for name, t in x.items() if not t.requires_grad}

    def loss(leaves: Inputs) -> Tensor:
        return torch.stack([y.sin().sum() for y in case.outputs(**leaves, **rest)]).sum()

    return loss, {name: t.detach() for name, t in x.items() if t.requires_grad}


@every_op
def test_grad_and_per_sample_gradients_are_autograds(case: Case) -> None:
    x = case.leaves(dtype=torch.float64)
    loss, leaves = loss_of(case, x)
    samples = {name: t + torch.randn(3, *t.shape, dtype=t.dtype) for name, t in leaves.items()}
    got = vmap(grad(loss), randomness="different")(samples)
    for n in range(3):
        one = {name: t[n].clone().requires_grad_() for name, t in samples.items()}
        want = torch.autograd.grad(loss(one), list(one.values()))
        alone = grad(loss)({name: t[n] for name, t in samples.items()})
        for name, w in zip(one, want, strict=True):
            torch.testing.assert_close(got[name][n], w)
            torch.testing.assert_close(alone[name], w)


@every_op
def test_directional_derivatives_are_those_of_the_gradient(case: Case) -> None:
    """Forward mode, by torch.func and without it."""
    loss, leaves = loss_of(case, case.leaves(dtype=torch.float64))
    direction = {name: torch.randn_like(t) for name, t in leaves.items()}
    with plain():
        slopes = grad(loss)(leaves)
        want = torch.stack([(slopes[name] * direction[name]).sum() for name in leaves]).sum()
        got: Tensor = jvp(loss, (leaves,), (direction,))[1]
        torch.testing.assert_close(got, want)
    with plain(), forward_ad.dual_level():
        dual = {name: forward_ad.make_dual(t, direction[name]) for name, t in leaves.items()}
        torch.testing.assert_close(forward_ad.unpack_dual(loss(dual)).tangent, want)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["grad", "vmap", "forward mode"])
def test_kernels_stand_aside(kind: str, device: str) -> None:
    """A kernel would lose the derivative in silence: ffn saves nothing where none is asked for."""
    x, w1, w2 = (torch.randn(s, device=device) for s in ((3, 16), (32, 16), (16, 32)))

    def f(x: Tensor) -> Tensor:
        return ops.ffn(x, w1, None, w2, None).sum()

    f(x)
    with forward_ad.dual_level():
        transformed: dict[str, Callable[[], Any]] = {
            "grad": lambda: grad(f)(x),
            "vmap": lambda: vmap(f)(x),
            "forward mode": lambda: f(forward_ad.make_dual(x, torch.ones_like(x))),
        }
        (choice,) = fastgpt.explain(transformed[kind])
    assert choice.path == "reference" and "torch.func" in choice.why


@pytest.mark.skipif(HAS_CUDA or INTERPRET, reason="a kernel chosen by mistake fails elsewhere")
@pytest.mark.parametrize("kind", ["grad", "per sample"])
@pytest.mark.parametrize("name", ["layer_norm", "rotary norm", "ffn", "linear_cross_entropy"])
def test_kernels_stand_aside_in_a_compiled_transform(name: str, kind: str) -> None:
    """Where ops would take their kernels, dynamo traces a transform: on a kernel's way it would
    give a wrong gradient, or none."""
    case = next(c for c in CASES if c.name == name)
    loss, leaves = loss_of(case, case.leaves())
    transform: Any = grad(loss)
    if kind == "per sample":
        transform = vmap(grad(loss))
        leaves = {n: t + torch.randn(3, *t.shape) for n, t in leaves.items()}
    with plain():
        want = transform(leaves)
    torch._dynamo.reset()
    with backend.rehearsal():
        got = torch.compile(transform, fullgraph=True, backend="aot_eager")(leaves)
    for n, w in want.items():
        torch.testing.assert_close(got[n], w, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", ["gpt2", "llama"])
def test_per_sample_gradients_of_a_model(variant: Any) -> None:
    """As differential privacy takes them: one backward for all samples, against a loop."""
    model = GPT(GPTConfig(8, 31, 1, 2, 16, variant=variant)).double()
    parameters = dict(model.named_parameters())
    x, y = torch.randint(31, (2, 3, 8))

    def loss(p: Inputs, x: Tensor, y: Tensor) -> Tensor:
        return functional_call(model, p, (x[None], y[None]))

    got = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, y)
    for n in range(3):
        want = torch.autograd.grad(model(x[n : n + 1], y[n : n + 1]), list(parameters.values()))
        for name, w in zip(parameters, want, strict=True):
            torch.testing.assert_close(got[name][n], w)
