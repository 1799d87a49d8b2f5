"""The kernel beside PyTorch's own ways: python -m examples.kernel_in_a_day.benchmark, on a GPU."""

import torch

from examples.kernel_in_a_day.tempered_softmax import tempered_softmax, tempered_softmax_ref
from fastgpt.bench.case import MODES, Case, compiled
from fastgpt.bench.measure import Rounds, Setting

T = 0.7


def case(M: int, N: int, device: str, dtype: torch.dtype) -> Case:
    providers = {  # the ratios are to the first
        "kernel": lambda x: tempered_softmax(x, T),
        "torch": lambda x: tempered_softmax_ref(x, T),
        "compiled": compiled(lambda x: tempered_softmax_ref(x, T)),
    }
    x = torch.randn(M, N, device=device, dtype=dtype)
    return Case("tempered_softmax", {"M": M, "N": N}, providers, {"x": x}, "torch")


def main(device: str, dtype: torch.dtype, sizes: list[tuple[int, int]], rounds: int = 20) -> None:
    for M, N in sizes:
        for mode in MODES:
            work = case(M, N, device, dtype)
            turns = Rounds(work, mode, work.offers, Setting(device, str(dtype)[6:], rounds, {}))
            for _step in turns.run():
                pass
            for row in turns.rows():
                said = row.why
                if row.median is not None and row.ratio is not None:
                    span = f"{row.ratio_low:.2f} to {row.ratio_high:.2f}"
                    said = f"{row.median * 1e6:.0f} us, ratio {row.ratio:.2f} ({span})"
                print(f"{work.name} {mode} {row.provider}: {said}")


if __name__ == "__main__":
    main("cuda", torch.bfloat16, [(8192, 1024), (8192, 50304)])
