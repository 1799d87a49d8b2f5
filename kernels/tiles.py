"""Tile sizes per op, width and chip: small tables, no autotuner, no query at import.

The basis of most rows is that they were compiled: the largest tile, of those tried, that compiles
for its chips without register spills and within their shared memory. Rows whose basis is MEASURED
were the fastest of some fifty, at GPT-2's sizes and contexts of 1024 and 4096. What `fastgpt tune`
measures on a GPU takes the place of these there; see tuned.py.
"""

import functools
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import triton
from torch import Tensor

from fastgpt.kernels import tuned

COMPILED = "compiled, Triton 3.7.1"
MEASURED = "measured on NVIDIA H100 80GB HBM3, Triton 3.6.0"


@dataclass(frozen=True)
class Tile:
    """Rows and columns of a program's tile, how it is compiled, and what speaks for it.

    descriptors: its main loop loads through tensor descriptors, which sm_90 and newer copy whole.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    descriptors: bool = field(default=False, kw_only=True)
    basis: str = field(default=COMPILED, kw_only=True, compare=False)

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
    """One tile for each kernel of attention."""

    fwd: Tile
    dkdv: Tile
    dq: Tile


def interpreting() -> bool:
    """Whether kernels were decorated for Triton's interpreter, TRITON_INTERPRET=1."""
    return not isinstance(_probe, triton.JITFunction)


@triton.jit
def _probe():
    pass


def chip() -> str:
    """The family of the current device, a key of the tables below."""
    if interpreting():
        return "interpreter"
    driver = triton.runtime.driver.active
    return _family(driver, driver.get_current_device())


@functools.lru_cache(maxsize=64)
def _family(driver: Any, device: Any) -> str:
    """Of a driver's current device, which is asked once: an answer takes microseconds."""
    target = driver.get_current_target()
    if target.backend != "cuda":
        name = str(target.arch)
        return "gfx950" if name == "gfx950" else "gfx9" if name.startswith("gfx9") else "gfx11"
    arch = int(target.arch)
    if arch in (80, 87):
        return "sm_80"
    if arch < 90:
        return "sm_86"
    if arch < 100:
        return "sm_90"
    return "sm_100" if arch < 120 else "sm_120"


tunable = functools.partial(tuned.tunable, where=lambda: chip())

_HERE = nullcontext()


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Launch on the tensor's own device, whatever the current one is."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(x.device)


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. On the host Triton's takes as long as an allocation."""
    return -(-a // b)


def multiprocessors(x: Tensor) -> int:
    """Of the tensor's device; where that is none, as few as make a test."""
    if not x.is_cuda:
        return 4
    count: int = torch.cuda.get_device_properties(x.device).multi_processor_count
    return count


def programs(x: Tensor, num_warps: int) -> int:
    """How many programs walk over rows side by side: enough for 16 warps on each multiprocessor."""
    return multiprocessors(x) * (max(1, 16 // num_warps) if x.is_cuda else 1)


def all_registers() -> dict[str, int]:
    """A launch option for kernels near the limit: ptxas spills some to fit one more program."""
    return {} if chip() == "interpreter" or chip().startswith("gfx") else {"maxnreg": 255}


def norm_pieces(N: int, block_n: int) -> int:
    """In how many pieces of block_n columns a program holds a row of N; 0 if it cannot."""
    pieces = cdiv(N, block_n)
    return pieces if pieces <= (3 if chip() == "interpreter" else 8) else 0


@tunable
def layer_norm_tile(N: int, backward: bool = False, dropout: bool = False) -> Tile:
    """Rows x columns of a program, of which it holds a few beside each other: see norm_pieces.

    A piece is 16 bytes a lane of a 16-bit row. As few warps hold a row as can without spills, of up
    to 8192 columns; to draw dropout's bits takes registers as well.
    """
    if chip() == "interpreter":
        return Tile(1 if N > 64 else 4, min(64, triton.next_power_of_2(N)), 1, 1)
    if N <= 256:
        block_n = triton.next_power_of_2(N)
        return Tile(min(32, max(1, (256 if backward else 512) // block_n)), block_n, 1, 1)
    if chip() == "sm_90" and not dropout and N <= 8192:
        # More of its programs fit a multiprocessor, and leave fewer partial sums backward.
        block_n = triton.next_power_of_2(cdiv(N, 4 if backward else 2))
        warps = max(1, block_n // (128 if backward else 512))
        if warps <= 8:
            return Tile(1, block_n, warps, 1, basis=MEASURED)
    per_warp, most, warps = 256, (2 if backward else 3) if dropout else (4 if backward else 8), 8
    if chip() == "sm_90" and not backward:
        most = 4
    if chip().startswith("gfx9"):  # 64 lanes, and of 4 warps or fewer each has 512 registers
        per_warp, most, warps = 512, (4 if backward or dropout else 8), (4 if dropout else 8)
        if N <= 1024 and N % 512:
            return Tile(2, 256, 1, 1)
    if N > 4096:
        most = min(most, 4)
    needed = triton.next_power_of_2(cdiv(N, per_warp * most))
    if needed > warps:
        return Tile(1, min(1024, triton.next_power_of_2(N // 8) // 2), 4, 1)  # too narrow to hold
    return Tile(1, per_warp * needed, needed, 1)


def shared_by_more(tile: Tile, pieces: int, backward: bool, dropout: bool) -> Tile:
    """A norm's tile where a bias of the branch is held in registers as well: by twice the warps,
    if a thread has so many elements that it would spill."""
    most = 32
    if chip().startswith("sm_") and (backward or dropout):
        most = 8 if backward and dropout and chip() in ("sm_100", "sm_120") else 24
    warp = 64 if chip().startswith("gfx9") else 32
    if pieces * tile.block_m * tile.block_n <= most * warp * tile.num_warps:
        return tile
    return replace(tile, block_n=2 * tile.block_n, num_warps=2 * tile.num_warps)


@tunable
def embedding_tile(C: int, backward: bool = False) -> Tile:
    """Rows x columns of a program: a warp moves 16 bytes a lane of 16-bit rows."""
    if chip() == "interpreter":
        return Tile(4, min(32, triton.next_power_of_2(C)), 1, 1)
    block_n = min(256, triton.next_power_of_2(C))
    return Tile(4 if backward else 2, block_n, 1, 1)


def has_tma() -> bool:
    """Whether tiles can be loaded through tensor descriptors in hardware: NVIDIA since Hopper."""
    return chip() in ("sm_90", "sm_100", "sm_120")


def interleaves() -> bool:
    """Whether two products are made as one of interleaved rows; AMD's compiler takes no choice
    between pointers."""
    return not chip().startswith("gfx")


def has_ptx() -> bool:
    """Whether a kernel may hold instructions of NVIDIA's."""
    return chip().startswith("sm_")


@dataclass(frozen=True)
class ProductTile(Tile):
    block_k: int = 32


# Per chip: of x w1^T, of x w_gate^T and x w1^T side by side, of dy w2 and of that with a gate, in
# 16-bit dtypes. The columns are those of one product.
_FFN_AMPERE = (
    ProductTile(128, 256, 8, 4, 32),
    ProductTile(128, 128, 8, 4, 32),
    ProductTile(128, 256, 8, 3, 64),
    ProductTile(128, 256, 8, 3, 64),
)
_FFN_GFX9 = (
    ProductTile(256, 128, 8, 2, 64),
    ProductTile(128, 128, 8, 2, 64),
    ProductTile(256, 128, 8, 2, 64),
    ProductTile(256, 128, 8, 2, 64),
)
_FFN: dict[str, tuple[ProductTile, ProductTile, ProductTile, ProductTile]] = {
    "interpreter": 4 * (ProductTile(32, 32, 4, 1, 16),),
    "sm_80": _FFN_AMPERE,
    "sm_86": _FFN_AMPERE,
    "sm_90": (
        ProductTile(128, 128, 8, 3, 64, basis=MEASURED),
        ProductTile(128, 128, 8, 3, 64, basis=MEASURED),
        ProductTile(128, 128, 8, 3, 64, basis=MEASURED),
        ProductTile(64, 128, 8, 3, 64, basis=MEASURED),
    ),
    "sm_100": (
        ProductTile(128, 256, 8, 2, 128),
        ProductTile(128, 128, 8, 2, 128),
        ProductTile(128, 256, 8, 2, 128),
        ProductTile(128, 256, 8, 2, 128),
    ),
    "sm_120": (
        ProductTile(128, 256, 8, 2, 64),
        ProductTile(128, 128, 8, 2, 64),
        ProductTile(128, 256, 8, 2, 64),
        ProductTile(128, 256, 8, 3, 32),
    ),
    "gfx9": _FFN_GFX9,
    "gfx950": _FFN_GFX9,
    "gfx11": (
        ProductTile(128, 128, 8, 2, 32),
        ProductTile(128, 64, 8, 2, 32),
        ProductTile(128, 128, 8, 2, 32),
        ProductTile(128, 128, 8, 2, 32),
    ),
}


@tunable
def ffn_tile(kernel: str, gated: bool, how: str) -> ProductTile:
    """Of a product of the feed-forward, "up" or "dh", whose operands are loaded as how says."""
    where = chip()
    if how != "descriptors" and has_tma():
        where = "sm_86"  # addresses take registers too
    rows = _FFN[where]
    return rows[2 * (kernel == "dh") + gated]


def ffn_parts(tile: ProductTile, gated: bool) -> int:
    """In how many parts an epilogue takes a tile's columns: a thread has 32 elements of a part, 16
    with a gate. For all of them at once there are not the registers."""
    if chip() == "interpreter":
        return 8 if gated else 4
    warp = 64 if chip().startswith("gfx9") else 32
    each = tile.block_m * tile.block_n // (warp * tile.num_warps)
    return min(8, max(2, each // (16 if gated else 32)))


@tunable
def act_tile(gate_grads: bool = False) -> Tile:
    """Of the pointwise passes over (M, F); the gradients of a gated one need more registers."""
    if chip() == "interpreter":
        return Tile(8, 32, 1, 1)
    return Tile(2 if gate_grads else 4, 512, 4, 1)


@tunable
def quantized_row_tile(N: int, row_bytes: int) -> Tile:
    """Rows of a quantised weight x bytes of a row, of a program's step; a lane reads 16 bytes of
    each row. The lanes reach over a row of up to 4 KB. Four rows share what is read of x, where
    there are programs enough all the same to keep every multiprocessor busy."""
    if chip() == "interpreter":
        return Tile(4, 128, 1, 1)
    warp = 64 if chip().startswith("gfx9") else 32
    lanes = min(256, max(warp, triton.next_power_of_2(cdiv(row_bytes, 16))))
    return Tile(4 if N >= 2048 else 2 if N >= 512 else 1, 16 * lanes, lanes // warp, 1)


@tunable
def quantized_tile(rows: int, bits: int, group: int) -> ProductTile:
    """Of a product with up to that many rows of x: block_m of them, block_n of the weight."""
    if chip() == "interpreter":
        return ProductTile(min(16, rows), 16, 4, 1, 32)
    nvidia = chip().startswith("sm_")
    if rows <= 32:
        block_k = 64 if chip() == "gfx11" else 128
        return ProductTile(max(8 if nvidia else 16, rows), 64, 4, 4 if nvidia else 2, block_k)
    if rows <= 64 or not nvidia:
        return ProductTile(64, 128, 8, 3 if nvidia else 2, 64)
    return ProductTile(128, 128, 4, 3, 64 if chip() in ("sm_90", "sm_100") else 32)


def quantized_splits(tiles: int, blocks: int, most: int) -> tuple[int, int]:
    """Blocks of K that a program takes of a tile's, and how many programs, at most so many, share
    the tile: such that there are 256 programs, of 4 blocks or more each, for to add up their sums
    takes one more launch."""
    each = cdiv(blocks, max(1, min(blocks // 4, most, 256 // tiles)))
    return each, cdiv(blocks, each)


@tunable
def unpack_tile() -> Tile:
    """Of the pass that makes numbers of a quantised weight, and of that over sums."""
    return Tile(8, 64, 1, 1) if chip() == "interpreter" else Tile(4, 512, 4, 1)


@tunable
def adamw_tile(prepare: bool = False) -> Tile:
    """Of the optimizer's pass: blocks of a chunk x elements of a block; or of its preparation."""
    if prepare:
        return Tile(1, 8 if chip() == "interpreter" else 256, 4, 1)
    return Tile(2, 32, 1, 1) if chip() == "interpreter" else Tile(4, 2048, 4, 1)


@tunable
def rotary_tile(D: int) -> Tile:
    """Heads x pairs of a head, of a program's step over the heads of a token.

    A thread has 8 pairs, two accesses of 16 bytes in 16-bit dtypes. There are more threads than
    pairs of a head: Triton then loads cosines where they are used, 16 bytes at a time as well,
    and not spread over the threads, to be exchanged through shared memory.
    """
    block_d = triton.next_power_of_2(D // 2)
    if chip() == "interpreter":
        return Tile(4, block_d, 1, 1)
    a_warp = 32 if chip().startswith("gfx9") else 16
    return Tile(16, block_d, min(8, max(1, block_d // a_warp)), 1)


@dataclass(frozen=True)
class LossTile(Tile):
    """Columns of a block; those of 16 bytes, which a lane holds side by side; the lanes."""

    lanes: int = 32
    vec: int = 8


@tunable
def cross_entropy_tile(
    V: int, itemsize: int, twice: bool = False, options: bool = False
) -> LossTile:
    """Of one row of V logits, 32 bytes to a lane and block; a wider row than that is walked over.

    The fewer lanes share a row, the less of their work is beginning and end. But a row that is
    read twice, 100 KB of GPT-2's, should still be in L2 the second time, and so should those of
    all programs beside it: on A100 and H100 (40 and 50 MB) no more than about three on each
    multiprocessor, so that 16 warps share one; B200 has 126 MB, and the fewest cycles to spare.
    With smoothing, z-loss or a softcap a lane needs more than the 64 registers that 16 warps leave.
    """
    vec = 16 // itemsize
    if chip() == "interpreter":
        return LossTile(1, 8 * vec, 1, 1, 4, vec)
    warp = 64 if chip().startswith("gfx9") else 32
    most = (256 if options or chip() == "sm_100" else 512) if twice else 128
    lanes = min(most, max(warp, triton.next_power_of_2(V) // (2 * vec)))
    return LossTile(1, 2 * vec * lanes, lanes // warp, 1, lanes, vec)
