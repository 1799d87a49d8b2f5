"""RMS norm with the residual add and dropout before it, forward and backward.

Zhang, Sennrich, Root mean square layer normalization, 2019, https://arxiv.org/abs/1910.07467.
Per row of N:

    h = residual + dropout(x + x_bias)
    rstd = 1 / sqrt(sum(h^2) / N + eps)     y = h * rstd * weight

    g = dy * weight        xhat = h * rstd
    dresidual = rstd * (g - xhat * sum(g * xhat) / N) + dh        dx = its dropout
    dweight = sum over rows of dy * xhat        dx_bias = sum over rows of dx

It is layer norm without the mean: the kernels are layer_norm's, with CENTER off.
"""

import torch
from torch import Tensor

from fastgpt.kernels.layer_norm import layer_norm_bwd, layer_norm_fwd


def rms_norm_fwd(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, dropout_p: float,
    seed: Tensor | None, x_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """x, residual: (..., N), weight, x_bias: (N,) -> y of x's shape, h of the residual's or empty,
    rstd: (M,)."""
    y, h, _, rstd = layer_norm_fwd(
        x, residual, weight, None, eps, dropout_p, seed, x_bias, center=False
    )
    return y, h, rstd


def rms_norm_bwd(
    dy: Tensor | None, dh: Tensor | None, h: Tensor, weight: Tensor, rstd: Tensor,
    dropout_p: float, seed: Tensor | None, x_dtype: torch.dtype,
    x_bias_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of y and h, either None -> dx, dresidual or empty, dweight, dx_bias, or empty
    without x_bias_dtype."""
    dx, dres, dw, _, dxb = layer_norm_bwd(
        dy, dh, h, weight, False, rstd, rstd, dropout_p, seed, x_dtype, x_bias_dtype, center=False
    )
    return dx, dres, dw, dxb
