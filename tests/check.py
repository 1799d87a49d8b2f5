"""How far a kernel may stray: no further than PyTorch itself does at the same dtype."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Op = Callable[..., Tensor]


def run(
    f: Op, inputs: dict[str, Tensor], dy: Tensor, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """f's value and its gradients by every input, at the inputs' dtype or another."""
    leaves = {
        name: t.to(dtype or t.dtype).detach().clone(memory_format=torch.preserve_format)
        .requires_grad_() for name, t in inputs.items()
    }  # fmt: skip
    y = f(**leaves)
    grads = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
    return {"y": y.detach(), **{"d" + k: g for k, g in zip(leaves, grads, strict=True)}}


def assert_matches(
    op: Op, ref: Op, inputs: dict[str, Tensor], factor: float = 2.0, atol: float = 1e-5
) -> None:
    """Values and gradients of op err at most factor times ref at the same dtype, plus atol."""
    dy = torch.randn_like(ref(**inputs))
    got, same = run(op, inputs, dy), run(ref, inputs, dy)
    gold = run(ref, inputs, dy, torch.float64)
    for name, truth in gold.items():
        assert got[name].dtype == same[name].dtype, name
        assert got[name].shape == same[name].shape, name
        if truth.numel() == 0:
            continue
        err, theirs = ((t.double() - truth).abs().max().item() for t in (got[name], same[name]))
        allowed = factor * theirs + atol
        assert err <= allowed, (
            f"{name}: off by {err:.2e}, PyTorch in {same[name].dtype} allows {allowed:.2e}"
        )


def assert_one_graph(f: Callable[..., Any], calls: list[dict[str, Tensor]]) -> None:
    """Compiled with dynamic shapes, f needs one graph for all the calls and changes no bit."""
    graphs = 0

    def count(graph: Any, _: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=count)
    for inputs in calls:
        for got, want in zip(compiled(**inputs), f(**inputs), strict=True):
            assert torch.equal(got, want)
    assert graphs == 1


def assert_compiled_gradients_match(f: Op, inputs: dict[str, Tensor], atol: float = 1e-5) -> None:
    """The gradients of the scalar f, compiled whole, are the eager ones."""
    torch._dynamo.reset()
    leaves = [t.requires_grad_() for t in inputs.values()]
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(*leaves), leaves)
    for g, w in zip(got, torch.autograd.grad(f(*leaves), leaves), strict=True):
        assert torch.allclose(g, w, atol=atol)
