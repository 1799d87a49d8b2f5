"""How far a kernel may stray: no further than PyTorch itself does at the same dtype."""

from collections.abc import Callable

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
    """Values and gradients of op err at most factor times what ref errs at the same dtype, + atol.

    Nor is ref ever taken to err less than the rounding of the truth to that dtype: on a handful of
    elements it may, by luck.
    """
    dy = torch.randn_like(ref(**inputs))
    got, same = run(op, inputs, dy), run(ref, inputs, dy)
    gold = run(ref, inputs, dy, torch.float64)
    for name, truth in gold.items():
        assert got[name].dtype == same[name].dtype, name
        assert got[name].shape == same[name].shape, name
        if truth.numel() == 0:
            continue
        rounded = truth.to(same[name].dtype)
        err, theirs, least = (
            (t.double() - truth).abs().max().item() for t in (got[name], same[name], rounded)
        )
        allowed = factor * max(theirs, least) + atol
        assert err <= allowed, (
            f"{name}: off by {err:.2e}, PyTorch in {same[name].dtype} allows {allowed:.2e}"
        )
