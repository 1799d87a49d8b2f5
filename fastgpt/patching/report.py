"""What patch did to each module, and back."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Line:
    """One module: its name in the model, its class, what it runs on now ("" if its own), and why
    that is so, or which module does its work."""

    name: str
    kind: str
    runs: str
    why: str = ""

    def __str__(self) -> str:
        return f"{self.name or 'the model'} ({self.kind}): {self.runs or 'left'}" + (
            f", {self.why}" if self.why else ""
        )


class Report:
    """What `fastgpt.patch` returns. Print it for a table; modules that fare alike share a line.

    Attributes:
        lines: a Line for every module, in the model's order.
        replaced: those that run on fastgpt.
        left: those that do not.
    """

    def __init__(self, lines: list[Line]) -> None:
        self.lines = lines
        self.restore: list[Callable[[], None]] = []
        self._swapped: list[tuple[nn.Module, type, type]] = []

    def swap(self, module: nn.Module, new: type[nn.Module]) -> None:
        """Give a module another class, until undo."""
        was = type(module)
        module.__class__ = new
        self._swapped.append((module, was, new))

    @property
    def replaced(self) -> list[Line]:
        """The lines of modules that run on fastgpt."""
        return [line for line in self.lines if line.runs]

    @property
    def left(self) -> list[Line]:
        """The lines of modules that run as they did."""
        return [line for line in self.lines if not line.runs]

    def undo(self) -> None:
        """Give every module its own forward back; the model computes the same bits as before.

        A second call does nothing. A module that has become something else since, for example by
        another patch, is not touched.
        """
        for module, was, now in self._swapped:
            if type(module) is now:
                module.__class__ = was
        for back in self.restore:
            back()
        self._swapped, self.restore = [], []

    def __str__(self) -> str:
        groups: dict[tuple[str, ...], list[str]] = {}
        for line in self.lines:
            key = (re.sub(r"(?<![^.])\d+(?![^.])", "*", line.name), line.kind, line.runs, line.why)
            groups.setdefault(key, []).append(line.name)
        head = f"{len(self.replaced)} of {len(self.lines)} modules replaced"
        rows: list[tuple[str, ...]] = [("module", "count", "class", "runs on")]
        for (name, kind, runs, why), names in groups.items():
            what = ", ".join(part for part in (runs or "left", why) if part)
            rows.append((name or "(the model)", str(len(names)), kind, what))
        return "\n".join([head, *_aligned(rows)])

    __repr__ = __str__


def _aligned(rows: list[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for name, count, kind, what in rows:
        yield f"{name:{widths[0]}}  {count:>{widths[1]}}  {kind:{widths[2]}}  {what}"
