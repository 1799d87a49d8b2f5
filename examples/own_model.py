"""The fused ops in a model of one's own: a block whose residual adds happen inside its norms.

python examples/own_model.py
"""

import torch
from torch import Tensor, nn

import fastgpt
from fastgpt import ops
from fastgpt.layers import LayerNorm


class Block(nn.Module):
    """Pre-norm attention and feed-forward with grouped queries: 8 query heads, 2 key heads."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = LayerNorm(width), LayerNorm(width, bias=False)
        self.qkv = nn.Linear(width, width + 2 * width // 4)
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, branch: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        B, T, C = h.shape
        x, h = self.norm_1(branch, residual=h)  # h + branch, and its norm, in one pass
        q, k, v = self.qkv(x).view(B, T, 12, C // 8).split([8, 2, 2], dim=2)
        o = ops.attention(q, k, v, window=128)
        x, h = self.norm_2(self.out(o.reshape(B, T, C)), residual=h)
        up, down = self.up, self.down
        return ops.ffn(x, up.weight, up.bias, down.weight, down.bias), h


block = Block()
x = torch.randn(2, 200, 256)
branch, h = block(torch.zeros_like(x), x)
(branch + h).square().mean().backward()
print("\n".join(map(str, fastgpt.explain())))
