"""Tile sizes per op, width and chip: small tables, no autotuner, no query at import.

No row was timed. A row is the largest tile found that compiles for its chips without register
spills, within their shared memory, with the fewest instructions per element in the main loop.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor


@dataclass(frozen=True)
class Tile:
    """Rows and columns of a program's tile, and how it is compiled."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, Any]:
        """Launch options. FP fusion is Triton's default up to 3.9 and not after."""
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }


@dataclass(frozen=True)
class AttentionTiles:
    fwd: Tile
    delta: Tile
    dkdv: Tile
    dq: Tile


WIDEST_ROW = 8192  # columns of a row that stays in registers


def interpreting() -> bool:
    return not isinstance(_probe, triton.JITFunction)


@triton.jit
def _probe():
    pass


def chip() -> str:
    """The family of the current device, a key of the tables below."""
    if interpreting():
        return "interpreter"
    target = triton.runtime.driver.active.get_current_target()
    if target.backend != "cuda":
        return "gfx950" if target.arch == "gfx950" else "gfx942"
    arch = int(target.arch)
    if arch in (80, 87):
        return "sm_80"
    if arch < 90:
        return "sm_86"
    if arch < 100:
        return "sm_90"
    return "sm_100" if arch < 120 else "sm_120"


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Launch on the tensor's own device, whatever the current one is."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def dot_precision(dtype: torch.dtype) -> str:
    """How float32 matrices are multiplied: as torch.set_float32_matmul_precision says."""
    if dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest":
        return "ieee"
    return "ieee" if chip().startswith("gfx") else "tf32"


def padded_head_dim(D: int) -> int:
    return max(16, triton.next_power_of_2(D))


def attention_tiles(dtype: torch.dtype, block_d: int, dropout: bool) -> AttentionTiles:
    if chip() == "interpreter":
        t = Tile(32, 16, 4, 1)
        return AttentionTiles(t, t, Tile(16, 32, 4, 1), t)
    t = Tile(64, 64, 4, 2)
    return AttentionTiles(t, t, t, t)


def programs(x: Tensor, num_warps: int) -> int:
    """How many programs walk over rows side by side: enough for 16 warps on each multiprocessor."""
    if not x.is_cuda:
        return 4
    return torch.cuda.get_device_properties(x.device).multi_processor_count * max(1, 16 // num_warps)


def layer_norm_tile(N: int, backward: bool = False) -> Tile:
    """Rows x columns of a program. A warp holds 1024 elements of a row (512 in backward, which has
    sums to keep as well), so a row of up to that width is reduced without shared memory."""
    if chip() == "interpreter":
        return Tile(4, min(128, triton.next_power_of_2(N)), 1, 1)
    per_warp = 512 if backward else 1024
    block_n = min(WIDEST_ROW, triton.next_power_of_2(N))
    return Tile(max(1, per_warp // block_n), block_n, min(16, max(1, block_n // per_warp)), 1)


@dataclass(frozen=True)
class ProductTile(Tile):
    block_k: int = 32


def ffn_tile() -> ProductTile:
    """Of the feed-forward's products, in 16-bit dtypes."""
    if chip() == "interpreter":
        return ProductTile(32, 32, 4, 1, 16)
    return ProductTile(128, 128, 8, 3, 32)


def act_tile() -> Tile:
    """Of the pointwise passes over (M, F)."""
    return Tile(8, 32, 1, 1) if chip() == "interpreter" else Tile(4, 512, 4, 1)
