"""Kernel development with no GPU: what a kernel became on each chip, what it moves, where it fails.

    from fastgpt import lab

    result = lab.study([lab.subject("attention"), lab.subject(lab.Spec("add.py:add", ...))])
    for row in result.rows:
        print(row.kernel, row.target, row.registers, row.spills)

The command line is `fastgpt lab`; docs/lab.md teaches both.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastgpt.lab.chips import TARGETS, chip
    from fastgpt.lab.compile import capture, offline
    from fastgpt.lab.launch import Launch, TensorArg
    from fastgpt.lab.result import Result, Row
    from fastgpt.lab.spec import Spec
    from fastgpt.lab.table import compare, gate, report
    from fastgpt.lab.workbench import study, subject

_HOME = {
    "chips": ("TARGETS", "chip"),
    "compile": ("capture", "offline"),
    "launch": ("Launch", "TensorArg"),
    "result": ("Result", "Row"),
    "spec": ("Spec",),
    "table": ("compare", "gate", "report"),
    "workbench": ("study", "subject"),
}
__all__ = [
    "TARGETS", "Launch", "Result", "Row", "Spec", "TensorArg", "capture", "chip", "compare",
    "gate", "offline", "report", "study", "subject",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Triton is imported with the first name that needs it, not with this package."""
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(f"fastgpt.lab.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
