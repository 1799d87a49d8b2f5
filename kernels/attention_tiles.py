"""Tiles of the attention kernels per chip, head dim and options, and how they suit the chip."""

from dataclasses import replace

import torch

from fastgpt.kernels.tiles import MEASURED, AttentionTiles, Tile, chip, tunable


def padded_head_dim(D: int) -> int:
    """The power of two, at least 16, that a head dim is padded to inside the kernels."""
    return max(16, 1 << (D - 1).bit_length())


def _tma(block_m: int, block_n: int, num_warps: int, num_stages: int) -> Tile:
    return Tile(block_m, block_n, num_warps, num_stages, descriptors=True)


def _measured(tile: Tile) -> Tile:
    return replace(tile, basis=MEASURED)


# Per chip and padded head dim up to that key: queries x keys of forward, dk/dv and dq, in 16-bit
# dtypes. Dropout keeps a tile of random bits as well; where that spills, its own row follows.
_ATTENTION: dict[str, dict[int, tuple[Tile, Tile, Tile]]] = {
    "sm_80": {
        64: (Tile(128, 64, 4, 2), Tile(64, 128, 8, 2), Tile(128, 64, 8, 2)),
        128: (Tile(128, 64, 8, 2), Tile(32, 64, 4, 3), Tile(128, 64, 8, 3)),
    },
    "sm_86": {
        64: (Tile(128, 64, 4, 2), Tile(64, 128, 8, 2), Tile(128, 64, 8, 2)),
        128: (Tile(128, 64, 8, 2), Tile(32, 64, 4, 3), Tile(128, 64, 8, 2)),
    },
    "sm_90": {
        64: (
            _measured(_tma(64, 64, 4, 2)),
            _measured(_tma(64, 64, 4, 2)),
            _measured(_tma(64, 64, 4, 3)),
        ),
        128: (
            _measured(_tma(64, 64, 4, 3)),
            _measured(_tma(64, 64, 4, 2)),
            _measured(_tma(128, 64, 8, 3)),
        ),
    },
    "sm_100": {
        64: (Tile(128, 128, 8, 3), Tile(64, 128, 8, 3), Tile(128, 64, 8, 3)),
        128: (_tma(128, 128, 8, 3), _tma(64, 128, 8, 3), Tile(128, 64, 8, 3)),
    },
    "sm_120": {
        64: (_tma(128, 64, 4, 3), Tile(64, 128, 8, 3), Tile(128, 64, 8, 3)),
        128: (_tma(128, 64, 8, 3), _tma(32, 64, 4, 3), Tile(128, 32, 8, 3)),
    },
    # A warp's product is 32 rows: more than one warp for each 32 would repeat its work.
    "gfx9": {
        64: (Tile(128, 64, 4, 1), Tile(64, 128, 4, 1), Tile(128, 32, 4, 1)),
        128: (Tile(128, 64, 4, 1), Tile(32, 128, 4, 1), Tile(128, 32, 4, 1)),
    },
    "gfx950": {
        64: (Tile(128, 64, 4, 1), Tile(64, 128, 4, 1), Tile(128, 32, 4, 1)),
        128: (Tile(128, 64, 4, 1), Tile(64, 128, 4, 1), Tile(128, 32, 4, 1)),
    },
    # The least that spills, at a head dim of 128: a thread has 256 registers and two accumulators.
    "gfx11": {
        64: (Tile(128, 64, 8, 1), Tile(16, 128, 8, 1), Tile(64, 16, 4, 1)),
        128: (Tile(128, 32, 8, 1), Tile(16, 32, 4, 1), Tile(64, 16, 4, 1)),
    },
}
_ATTENTION_DROPOUT: dict[str, dict[int, tuple[Tile, Tile, Tile]]] = {
    "sm_80": {
        64: (Tile(128, 64, 8, 3), Tile(64, 128, 8, 3), Tile(128, 64, 8, 3)),
        128: (Tile(128, 64, 8, 3), Tile(16, 64, 4, 3), Tile(128, 64, 8, 3)),
    },
    "sm_86": {
        64: (Tile(128, 64, 8, 3), Tile(64, 128, 8, 3), Tile(128, 64, 8, 3)),
        128: (Tile(128, 64, 8, 3), Tile(16, 64, 4, 3), Tile(128, 64, 8, 2)),
    },
    "sm_90": {
        64: (
            _measured(Tile(64, 64, 4, 3)),
            _measured(Tile(32, 64, 4, 3)),
            _measured(Tile(64, 32, 4, 3)),
        ),
        128: (
            _measured(Tile(64, 64, 4, 3)),
            _measured(Tile(32, 128, 8, 3)),
            _measured(_tma(64, 32, 4, 3)),
        ),
    },
    "sm_100": {
        64: (Tile(128, 32, 8, 3), Tile(64, 128, 8, 3), Tile(128, 64, 8, 3)),
        128: (Tile(128, 32, 8, 3), Tile(32, 128, 8, 3), Tile(128, 64, 8, 3)),
    },
    "sm_120": {
        64: (Tile(128, 64, 8, 3), Tile(32, 128, 8, 3), Tile(128, 64, 8, 3)),
        128: (Tile(128, 64, 8, 3), Tile(16, 32, 2, 3), Tile(128, 32, 8, 3)),
    },
    "gfx9": {
        64: (Tile(128, 64, 4, 1), Tile(32, 128, 4, 1), Tile(128, 32, 4, 1)),
        128: (Tile(128, 32, 4, 1), Tile(32, 128, 4, 1), Tile(128, 32, 4, 1)),
    },
    "gfx950": {
        64: (Tile(128, 64, 4, 1), Tile(32, 128, 4, 1), Tile(128, 32, 4, 1)),
        128: (Tile(128, 32, 4, 1), Tile(32, 128, 4, 1), Tile(128, 32, 4, 1)),
    },
    "gfx11": {},
}
# Head dims of 136 to 256, any chip. Backward spills: two accumulators of 256 columns a key.
_ATTENTION_WIDE = (Tile(64, 32, 4, 2), Tile(16, 64, 4, 2), Tile(64, 16, 4, 2))
# With extras: a bias takes a tile of addresses as well, of 64 bits each.
_EXTRAS_AMD = (Tile(64, 32, 4, 1), Tile(16, 64, 4, 1), Tile(64, 16, 4, 1))
_EXTRAS_NVIDIA = (Tile(64, 32, 8, 2), Tile(32, 32, 4, 2), Tile(64, 32, 8, 2))
_EXTRAS_HOPPER = {
    64: (
        _measured(_tma(64, 64, 4, 2)),
        _measured(_tma(32, 64, 4, 2)),
        _measured(_tma(64, 64, 4, 3)),
    ),
    128: (
        _measured(_tma(64, 64, 4, 2)),
        _measured(Tile(32, 128, 8, 3)),
        _measured(_tma(64, 64, 4, 2)),
    ),
}
_ATTENTION_EXTRAS = {
    "gfx9": _EXTRAS_AMD,
    "gfx950": _EXTRAS_AMD,
    "gfx11": _EXTRAS_AMD,
    "sm_100": (Tile(64, 32, 8, 2), Tile(32, 32, 4, 1), Tile(128, 32, 8, 2)),
}
# float32, any chip: products on the plain FMA units, since TF32 would round the inputs.
_ATTENTION_FLOAT32 = {
    64: (Tile(64, 32, 8, 1), Tile(16, 32, 4, 1), Tile(64, 16, 8, 1)),
    128: (Tile(32, 16, 4, 1), Tile(16, 32, 4, 1), Tile(16, 16, 4, 2)),
    256: (Tile(32, 16, 8, 1), Tile(16, 16, 4, 1), Tile(32, 16, 4, 1)),
}


@tunable
def attention_tiles(
    dtype: torch.dtype, block_d: int, dropout: bool, extras: bool = False
) -> AttentionTiles:
    """Tiles of the attention kernels for a head dim padded to block_d; extras: with softcap,
    ALiBi, a bias, key_mask or document_ids.
    """
    where = chip()
    if where == "interpreter":
        fwd, dkdv, dq = Tile(32, 16, 4, 1), Tile(16, 32, 4, 1), Tile(32, 16, 4, 1)
    elif dtype == torch.float32:
        fwd, dkdv, dq = _ATTENTION_FLOAT32[max(64, block_d)]
    elif block_d > 128:
        fwd, dkdv, dq = _ATTENTION_WIDE
    elif extras and where == "sm_90" and not dropout:
        fwd, dkdv, dq = _EXTRAS_HOPPER[max(64, block_d)]
    elif extras:
        fwd, dkdv, dq = _ATTENTION_EXTRAS.get(where, _EXTRAS_NVIDIA)
    else:
        at = max(64, block_d)
        rows = _ATTENTION[where]
        fwd, dkdv, dq = (_ATTENTION_DROPOUT[where] if dropout else rows).get(at, rows[at])
    return AttentionTiles(fwd, dkdv, dq)


def by_pointers(tile: Tile, block_d: int, accumulators: int = 1, bias: bool = False) -> Tile:
    """A tile that was to be loaded by descriptors, and cannot be: addresses take registers too,
    those of a bias as many again.

    A warp group's products have 64 rows: twice the warps would make each of them twice.
    """
    if not tile.descriptors:
        return tile
    if tile.block_m > 64:
        return replace(tile, num_warps=8, descriptors=False)
    wide = block_d > 64
    rows = 32 if accumulators > 1 and wide else tile.block_m
    columns = 32 if bias and wide else tile.block_n
    return replace(tile, block_m=rows, block_n=columns, num_stages=3, descriptors=False)


def attention_flags(dtype: torch.dtype) -> dict[str, bool]:
    """How the attention kernels suit the chip.

    TRUNCATE: no instruction rounds float32 to bfloat16, which takes six; dropping bits takes half
    of one. PARTS: a row is spread over threads, so that sums over it are kept in parts and a
    product may start at a value. On sm_100 a thread has whole rows, and accumulators lie in tensor
    memory; on gfx11 Triton cannot split the layout.
    """
    where = chip()
    rounds = where.startswith("sm_") or where in ("interpreter", "gfx950")
    whole = where in ("sm_100", "gfx11")
    return {"TRUNCATE": dtype == torch.bfloat16 and not rounds, "PARTS": not whole}


@tunable
def dbias_tile(dtype: torch.dtype, block_d: int) -> Tile:
    """Queries x keys of a tile of the gradient of attention's bias."""
    if chip() == "interpreter":
        return Tile(32, 16, 4, 1)
    if dtype == torch.float32 or block_d > 128:
        return Tile(32, 32, 4, 1)
    return Tile(32, 32, 8 if block_d > 64 else 4, 1 if chip().startswith("gfx") else 2)


@tunable
def decode_tile(dtype: torch.dtype, block_d: int, rows: int) -> Tile:
    """Queries x keys of a tile of decoding, where a kv head has so many rows of queries; one row is
    one query, the products being sums over the head dim.

    Some 16 KB of keys and values are a block, and two of them on their way while one is used.
    """
    wide = dtype == torch.float32
    block_m = 1 if rows == 1 else min(16 if wide else 64, max(16, 1 << (rows - 1).bit_length()))
    if chip() == "interpreter":
        return Tile(block_m, 16, 4, 1)
    if block_d > 128:
        block_m = min(32, block_m)
    block_n = 64 if block_d <= 64 else 32
    if wide:
        block_n = 32 if block_d <= 64 and rows == 1 else 16
    warps = 8 if block_d > 128 or block_m == 64 or (wide and block_d > 64 and rows > 1) else 4
    stages = 2 if block_d > 128 or (wide and rows > 1) else 3
    return Tile(block_m, block_n, warps, 1 if chip().startswith("gfx") else stages)
