"""Drop-ins for nn.LayerNorm and nn.RMSNorm, with the add to the residual stream before them."""

import torch
from torch import Tensor, nn

from fastgpt import ops


class LayerNorm(nn.LayerNorm):
    """y = (h - mean(h)) / sqrt(var(h) + eps) * weight + bias, with the residual add before it.

    Constructor and state_dict are nn.LayerNorm's; bias=False has no bias parameter.
    """

    def forward(  # type: ignore[override]
        self, x: Tensor, residual: Tensor | None = None, dropout_p: float = 0.0,
        x_bias: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        """Normalize x, or h = residual + dropout(x + x_bias).

        Args:
            x: (..., *normalized_shape).
            residual: x's shape; its dtype may be wider than x's.
            dropout_p: probability of dropping an element of x; needs residual. It is applied
                whether or not the module is in training mode.
            x_bias: of normalized_shape; needs residual.

        Returns:
            y of x's shape and dtype; with residual (y, h).

        Raises:
            ValueError: x does not end in normalized_shape.
        """
        shape, n = self.normalized_shape, len(self.normalized_shape)
        if tuple(x.shape[-n:]) != shape:
            raise ValueError(f"LayerNorm: x must end in {shape}; got x {tuple(x.shape)}")
        weight: Tensor | None = self.weight
        bias: Tensor | None = self.bias
        if weight is None:
            weight = torch.ones(shape, device=x.device)
        if n == 1:
            return ops.layer_norm(
                x, weight, bias, self.eps, residual=residual, x_bias=x_bias, dropout_p=dropout_p
            )
        flat = x.flatten(-n), weight.flatten(), None if bias is None else bias.flatten()
        if residual is None:
            return ops.layer_norm(
                *flat, self.eps, x_bias=x_bias, dropout_p=dropout_p
            ).view(x.shape)  # fmt: skip
        x_bias = None if x_bias is None else x_bias.flatten()
        y, h = ops.layer_norm(
            *flat, self.eps, residual=residual.flatten(-n), x_bias=x_bias, dropout_p=dropout_p
        )
        return y.view(x.shape), h.view(x.shape)


class RMSNorm(nn.RMSNorm):
    """y = h / sqrt(mean(h^2) + eps) * weight, with the residual add before it.

    Constructor and state_dict are nn.RMSNorm's; eps=None is the epsilon of float32, or of float64
    where x is of that dtype.
    """

    def forward(  # type: ignore[override]
        self, x: Tensor, residual: Tensor | None = None, dropout_p: float = 0.0,
        x_bias: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        """Normalize x, or h = residual + dropout(x + x_bias): arguments, result as in LayerNorm."""
        shape, n = self.normalized_shape, len(self.normalized_shape)
        if tuple(x.shape[-n:]) != shape:
            raise ValueError(f"RMSNorm: x must end in {shape}; got x {tuple(x.shape)}")
        weight: Tensor | None = self.weight
        if weight is None:
            weight = torch.ones(shape, device=x.device)
        eps = self.eps
        if eps is None:
            eps = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
        if n == 1:
            return ops.rms_norm(
                x, weight, eps, residual=residual, x_bias=x_bias, dropout_p=dropout_p
            )
        flat = x.flatten(-n), weight.flatten()
        if residual is None:
            return ops.rms_norm(*flat, eps, x_bias=x_bias, dropout_p=dropout_p).view(x.shape)
        x_bias = None if x_bias is None else x_bias.flatten()
        y, h = ops.rms_norm(
            *flat, eps, residual=residual.flatten(-n), x_bias=x_bias, dropout_p=dropout_p
        )
        return y.view(x.shape), h.view(x.shape)


def new_norm(n_embd: int, bias: bool, eps: float, rms: bool) -> LayerNorm | RMSNorm:
    """GPT-2's norm of the residual stream, or Llama's, which has no bias."""
    return RMSNorm(n_embd, eps) if rms else LayerNorm(n_embd, eps, bias=bias)
