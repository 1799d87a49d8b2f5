"""Layer norms and RMS norms: torch's, and any class that turns out to compute the same."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt import ops
from fastgpt.patching.swap import Patched, Swap, obstacle, own_forward, random, stand_in

EPS_NAMES = ("eps", "epsilon", "variance_epsilon", "layer_norm_eps", "norm_eps", "_eps")
EPS_VALUES = (1e-5, 1e-6, 1e-12, 1e-8)  # of norms that keep theirs to themselves


@dataclass(frozen=True)
class NormHow:
    """rms: which of the two norms. bias: whether there is one. eps: it, or the attribute's name."""

    rms: bool
    bias: bool
    eps: float | str


def norm_of(
    module: nn.Module, how: NormHow, x: Tensor, residual: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Any:  # fmt: skip
    """What ops.layer_norm or ops.rms_norm makes of x with a module's weights and epsilon.

    Dtypes are those that torch gives: on a GPU float32 under autocast; an RMS norm the wider of
    input's and weight's.
    """
    weight: Tensor | None = module.weight  # type: ignore[assignment]
    bias: Any = module.bias if how.bias else None
    eps: Any = getattr(module, how.eps) if isinstance(how.eps, str) else how.eps
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    if how.rms and weight is not None:
        dtype = torch.promote_types(dtype, weight.dtype)
    if x.is_cuda and torch.is_autocast_enabled("cuda"):
        dtype = torch.promote_types(dtype, torch.float32)
    shape = x.shape
    if weight is None:
        N = int(torch.Size(module.normalized_shape).numel())  # type: ignore[arg-type]
        weight = torch.ones(N, device=x.device)
    if weight.ndim > 1:
        x = x.flatten(-weight.ndim)
        weight, bias = weight.flatten(), None if bias is None else bias.flatten()
    x = x.to(dtype)
    if eps is None:
        eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    made: Any
    if residual is None:
        made = ops.rms_norm(x, weight, eps) if how.rms else ops.layer_norm(x, weight, bias, eps)
        return made.view(shape)
    if how.rms:
        made = ops.rms_norm(x, weight, eps, residual=residual, dropout_p=dropout_p)
    else:
        made = ops.layer_norm(x, weight, bias, eps, residual=residual, dropout_p=dropout_p)
    return made


class PatchedNorm(Patched):
    """A norm on ops.layer_norm or ops.rms_norm."""

    def run(self, x: Tensor) -> Any:
        return norm_of(self, self._fastgpt_how, x)


def how_of(norm: nn.Module) -> NormHow | None:
    """Of a norm that is patched, or of torch's; None of anything else."""
    if isinstance(norm, PatchedNorm):
        how: NormHow = norm._fastgpt_how
        return how
    if isinstance(norm, nn.LayerNorm) and own_forward(norm) is nn.LayerNorm.forward:
        return NormHow(False, True, "eps")
    if isinstance(norm, nn.RMSNorm) and own_forward(norm) is nn.RMSNorm.forward:
        return NormHow(True, False, "eps")
    return None


def recognise_norm(module: nn.Module, asked: str = "") -> Swap | str | None:
    """A swap if module is a norm; why not if it only looks like one; else None.

    Args:
        module: any.
        asked: the only norm that will do, "layer_norm" or "rms_norm", of a class of any name.
    """
    how = how_of(module)
    if how is None:
        if not asked and "norm" not in type(module).__name__.lower():
            return None
        found = _try(module)
        if isinstance(found, str):
            return found
        how = found
    op = "rms_norm" if how.rms else "layer_norm"
    if asked and op != asked:
        return f"it computes {op}"
    why = obstacle(*module.parameters(recurse=False))
    if why is not None:
        return why
    return Swap(PatchedNorm, how, op)


def _try(module: nn.Module) -> NormHow | str:
    """Compare with both norms on an input whose rows have variances 1 and 1e-6, in float64."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    names = {name for name, p in module._parameters.items() if p is not None}
    if not isinstance(weight, Tensor) or weight.ndim != 1 or not names <= {"weight", "bias"}:
        return "its parameters are not a weight (N,) and a bias (N,)"
    if bias is not None and (not isinstance(bias, Tensor) or bias.shape != weight.shape):
        return "its parameters are not a weight (N,) and a bias (N,)"
    if module._modules or module._buffers:
        return "it has submodules or buffers"
    (N,) = weight.shape
    twin = stand_in(module, lambda name, _: 1.0 + 0.3 * random(N, seed=len(name)))
    x = random(4, N) * torch.tensor([1.0, 1.0, 1e-3, 1e-3])[:, None]
    x[0] += 0.5
    try:
        with torch.no_grad():
            theirs = own_forward(module)(twin, x)
    except Exception as error:  # anybody's code
        return f"its forward does not take (rows, {N}) ({type(error).__name__})"
    if not isinstance(theirs, Tensor) or theirs.shape != x.shape:
        return "its forward does not give a tensor of its input's shape"
    own = [name for name in EPS_NAMES if isinstance(getattr(module, name, None), float)]
    epsilons: list[float | str] = [*own, *EPS_VALUES]
    for rms in (False,) if bias is not None else (False, True):
        for eps in epsilons:
            how = NormHow(rms, bias is not None, eps)
            ours = norm_of(twin, how, x)
            # What is cast to float32 inside differs by that; a wrong epsilon by far more.
            if torch.allclose(ours, theirs.double(), rtol=1e-5, atol=1e-5):
                return how
    return "it computes neither layer_norm nor rms_norm"
