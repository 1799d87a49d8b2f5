"""Dropout masks from a counter-based generator: a mask belongs to an element, not to a tile.

Philox4x32-7 (Salmon, Moraes, Dror, Shaw, Parallel random numbers: as easy as 1, 2, 3, SC 2011,
https://doi.org/10.1145/2063384.2063405; 7 rounds pass BigCrush) turns a seed and an element's
position into 32 random bits. Forward and backward draw the same bits without storing a mask.
"""

import torch
from torch import Tensor

ROUNDS = 7
_MASK = 0xFFFFFFFF


def _mulhilo(a: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * x, both below 2**32, without leaving int64."""
    low = a * (x & 0xFFFF)  # below 2**48
    high = a * (x >> 16) + (low >> 16)  # below 2**49
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor) -> Tensor:
    """The first 32-bit word of Philox4x32-7 with key seed and counter (c0, c1, c2, 0), as int64."""
    k0, k1 = seed.long() & _MASK, (seed.long() >> 32) & _MASK
    c3 = torch.zeros_like(c0)
    for _ in range(ROUNDS):
        hi0, lo0 = _mulhilo(0xD2511F53, c0)
        hi1, lo1 = _mulhilo(0xCD9E8D57, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0


def threshold(p: float) -> int:
    """An element is dropped if the upper 31 of its 32 random bits, as a number, are below this."""
    return round(p * 2**31)


def dropout_mask(seed: Tensor, shape: tuple[int, ...], p: float) -> Tensor:
    """The elements that dropout with this seed keeps, as kernels and references draw them.

    The counter of an element is (last index, second last index, the leading ones flattened).

    Args:
        seed: one int64, on the device of the mask.
        shape: of the mask: (B, H, Tq, Tk) for attention, (rows, columns) for layer_norm.
        p: probability of dropping an element, 0 <= p < 1.

    Returns:
        bool tensor of that shape, True where the element is kept.
    """
    *lead, rows, columns = shape
    n = 1
    for size in lead:
        n *= size
    at = [torch.arange(size, device=seed.device) for size in (n, rows, columns)]
    c2, c1, c0 = torch.broadcast_tensors(at[0][:, None, None], at[1][:, None], at[2])
    bits = philox(seed.reshape(()), c0, c1, c2)
    return ((bits >> 1) >= threshold(p)).reshape(shape)


def check_dropout(op: str, p: float, seed: Tensor | None) -> None:
    """Raise unless p is a probability below 1 and seed, if given, is one int64."""
    if not 0.0 <= p < 1.0:
        raise ValueError(f"{op}: dropout_p must lie in [0, 1); got {p}")
    if seed is not None and (seed.dtype != torch.int64 or seed.numel() != 1):
        raise ValueError(
            f"{op}: seed must be one int64; got {seed.dtype} of shape {tuple(seed.shape)}"
        )


def draw_seed(device: torch.device) -> Tensor:
    """A seed from the device's default generator, on the device: no host sync, graph-safe."""
    return torch.randint(0, 2**62, (1,), dtype=torch.int64, device=device)
