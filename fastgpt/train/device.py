"""The device of a run: which it is, what it computes in, how fast it could be at best."""

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

PRECISIONS = ("auto", "float32", "bfloat16", "float16")

# TFLOP/s of dense 16-bit products with float32 accumulation, by what torch calls the device, the
# longer name first. Data sheets: NVIDIA Turing (T4), A100, A30, A10, L4, L40S, Ada, H100, H200,
# Blackwell, RTX Blackwell; AMD CDNA 2 (one of MI250X's two dies is a device), CDNA 3, CDNA 4.
PEAKS = (
    ("H100 NVL", 835.0), ("H100 PCIe", 756.0), ("H100", 989.0), ("H200", 989.0), ("GH200", 989.0),
    ("B200", 2250.0), ("A100", 312.0), ("A30", 165.0), ("A10G", 70.0), ("A10", 125.0),
    ("L40S", 362.0), ("L40", 181.0), ("L4", 121.0), ("T4", 65.0), ("V100", 125.0),
    ("RTX 5090", 209.5), ("RTX 4090", 165.2), ("RTX 3090", 71.0),
    ("MI355X", 2516.0), ("MI325X", 1307.0), ("MI300X", 1307.0), ("MI250X", 191.5),
)  # fmt: skip


def pick_device(name: str) -> torch.device:
    """The device called name; "auto" is CUDA if there is one.

    Raises:
        ValueError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ValueError(f"train: the device must be one that is here; got {name!r}") from None
    return device


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products; "auto" is bfloat16 where the device computes in it."""
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has: dict[str, Any] = getattr(
            torch.cpu, "get_capabilities", dict
        )()  # not in older versions of torch
        fast = device.type == "cpu" and bool(has.get("avx512_bf16") or has.get("amx_bf16"))
    return torch.bfloat16 if fast else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Within, matrix products are in dtype."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s of dense products at the vendor's clock; None where this table does not know them."""
    if device.type != "cuda" or dtype.itemsize != 2:
        return None
    return named_peak(torch.cuda.get_device_name(device))


def named_peak(name: str) -> float | None:
    """FLOP/s of dense 16-bit products of a GPU, by the name that its driver gives it."""
    words = f" {name} ".replace("-", " ")
    return next((1e12 * peak for part, peak in PEAKS if f" {part} " in words), None)


def peak_memory(device: torch.device) -> int | None:
    """Bytes: the most that tensors have taken on a GPU, or this process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
