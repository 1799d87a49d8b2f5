"""A step of AdamW with clipping over GPT-2's parameters: the optimizer, torch's fused and foreach.

Every call makes one more step on the same gradients. What is compared is the clipped gradient, as
the first moment of the last parameter has it.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastgpt.bench.case import Case
from fastgpt.optim import AdamW

LR, NORM, BETA = 1e-3, 1.0, 0.9


def shapes(width: int, layers: int, vocabulary: int) -> list[tuple[int, ...]]:
    """Of a GPT's parameters."""
    C = width
    block: list[tuple[int, ...]] = [
        (C,), (C,), (3 * C, C), (3 * C,), (C, C), (C,), (C,), (C,), (4 * C, C), (4 * C,),
        (C, 4 * C), (C,),
    ]  # fmt: skip
    return [(vocabulary, C), (1024, C), *block * layers, (C,), (C,)]


def provider(kind: str, sizes: list[tuple[int, ...]]) -> Callable[..., Tensor]:
    """A step from the gradients, one long vector, that returns the last clipped gradient."""
    made: list[tuple[list[nn.Parameter], torch.optim.Optimizer]] = []

    def step(grad: Tensor) -> Tensor:
        if not made:
            params = [nn.Parameter(torch.ones(s, dtype=grad.dtype).to(grad.device)) for s in sizes]
            for p, g in zip(params, grad.split([p.numel() for p in params]), strict=True):
                p.grad = g.detach().clone().view(p.shape)
            if kind == "fastgpt":
                made.append((params, AdamW(params, LR, max_grad_norm=NORM)))
            else:
                made.append((params, torch.optim.AdamW(params, LR, **{kind: True})))  # type: ignore[arg-type]
        params, optimizer = made[0]
        if kind != "fastgpt":
            nn.utils.clip_grad_norm_(params, NORM)
        optimizer.step()
        state = optimizer.state[params[-1]]
        return state["exp_avg"] / (1 - BETA ** state["step"])  # type: ignore[no-any-return]

    return step


def sizes(device: str) -> list[dict[str, int]]:
    """A tiny GPT and GPT-2 small: width, layers, vocabulary."""
    return [{"C": 256, "L": 4, "V": 2048}, {"C": 768, "L": 12, "V": 50257}]


def case(device: str, dtype: torch.dtype, *, C: int, L: int, V: int) -> Case:
    sizes = shapes(C, L, V)
    numel = sum(torch.Size(s).numel() for s in sizes)
    grad = torch.randn(1, device=device, dtype=dtype).expand(numel)
    kinds = {"fastgpt": "fastgpt", "torch fused": "fused", "torch foreach": "foreach"}
    providers = {n: provider(kind, sizes) for n, kind in kinds.items()}
    # Parameter and two moments are read and written, the gradient is read.
    return Case(
        "adamw", {"C": C, "L": L, "V": V}, providers, {"grad": grad}, "torch fused",
        traffic=(7 * numel * dtype.itemsize, 0), has_backward=False, note=f", {numel / 1e6:.1f} M",
    )  # fmt: skip
