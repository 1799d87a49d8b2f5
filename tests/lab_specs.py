"""What the lab's tests examine: small kernels in files of their own, and specs of them."""

from typing import Any

from fastgpt import lab
from fastgpt.lab.result import Result
from tests.conftest import ROOT

FOLDER = ROOT / "tests" / "lab_kernels"
RIGHT, COSTLY = FOLDER / "right.py", FOLDER / "costly.py"


def copy_spec(dtype: str = "bf16", **changes: Any) -> lab.Spec:
    said: dict[str, Any] = {
        "kernel": f"{RIGHT}:copy",
        "args": {"x_ptr": f"{dtype}[N]", "y_ptr": f"{dtype}[N]", "n": "N", "BLOCK": 1024},
        "grid": ["cdiv(N, BLOCK)"],
        "sizes": {"N": 65536},
        "options": {"num_warps": 4},
    }
    return lab.Spec(**(said | changes))


def run(*specs: lab.Spec, targets: tuple[str, ...] = ("sm_90",), **how: Any) -> Result:
    subjects = [lab.subject(spec) for spec in specs]
    found: Result = lab.study(subjects, targets, workers=0, **how)
    return found
