"""Faults that tests on a GPU forgive: bounds, races, memory never written, other bits each run.

A launch is compiled to Triton's IR and that IR executed by ttsem (https://pypi.org/project/ttsem)
on the CPU, one program after the other, with every address seen. Five checks:

    bounds         an access outside every tensor. Each storage lies alone between guards, so
                   that an overrun of one does not land in the next.
    race           two programs touch one address and one of them writes something else there;
                   or two lanes of one store do.
    uninitialised  a read, before any write, of a tensor whose fill is "nan"; a result that
                   depends on lanes that a load masked off without other=.
    poison         the tensors that the kernel writes and does not read before are filled with
                   other bits, and it runs again: elements that differ were never written, or
                   depend on what was not. Tensors read before they are written are in place and
                   keep their input. An undefined operation, as a division by zero, counts too.
    twice          the programs run in the opposite order and give the same bits. It sees what
                   depends on the order of programs, as float atomics do; not what depends on
                   threads within one.

A kernel that leaves its tensors is stopped there, and the other checks do not run.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastgpt.lab import child, semantics
from fastgpt.lab.launch import Launch
from fastgpt.lab.result import Checked, Finding
from fastgpt.lab.semantics import Run
from fastgpt.lab.traffic import size

CHECKS = ("bounds", "race", "uninitialised", "poison", "twice")
TOO_LARGE = "not checked: too many accesses; use a smaller size"


def check(
    launches: Sequence[Launch], timeout: float | None = None
) -> tuple[list[Checked], list[Finding]]:
    """Look for faults in launches, in another process.

    Args:
        timeout: seconds that one launch may take.

    Returns:
        For each launch and check "clean", "found" or why it did not run; and what was found.
    """
    if not semantics.available():
        return [
            Checked(x.name, c, semantics.MISSING, size(x)) for x in launches for c in CHECKS
        ], []
    checked: list[Checked] = []
    findings: list[Finding] = []
    results = child.apply("fastgpt.lab.sanitize:examine", launches, timeout=timeout)
    for launch, result in zip(launches, results, strict=True):
        outcomes, found = dict.fromkeys(CHECKS, f"not run: {result}"), []
        if not isinstance(result, child.Failure):
            outcomes, found = result
        checked += [Checked(launch.name, c, outcomes[c], size(launch)) for c in CHECKS]
        findings += found
    return checked, findings


@dataclass
class _Examination:
    """What came of one launch."""

    launch: Launch
    outcomes: dict[str, str] = field(default_factory=lambda: dict.fromkeys(CHECKS, "clean"))
    findings: list[Finding] = field(default_factory=list)

    def found(self, check: str, where: str, what: str) -> None:
        what = " ".join(what.split())
        self.findings.append(Finding(self.launch.name, check, where, what))
        self.outcomes[check] = "found"

    def not_run(self, why: str, checks: Sequence[str] = CHECKS) -> None:
        for name in checks:
            if self.outcomes[name] == "clean":
                self.outcomes[name] = why


def examine(launch: Launch) -> tuple[dict[str, str], list[Finding]]:
    """The outcome of every check of a launch and what was found, in a process for this alone."""
    made = _Examination(launch)
    _examine(made, launch)
    return made.outcomes, made.findings


def _examine(made: _Examination, launch: Launch) -> None:
    first = semantics.run(launch)
    if first.stop is not None:
        kind, where, what = first.stop
        check = {"oob_read": "bounds", "oob_write": "bounds", "lanes": "race"}.get(kind, "poison")
        made.found(check, where, what)
        made.not_run(f"not run: stopped at the fault of {check}")
        return
    for where, what in first.races:
        made.found("race", where, what)
    if first.races_unchecked:
        made.not_run(TOO_LARGE, ["race"])
    if first.accesses is None:
        made.not_run(TOO_LARGE, ["uninitialised", "poison"])
    else:
        _uninitialised(made, first)
        _masked_off(made, first)
        _poison(made, first)
    again = semantics.run(launch, ir=first.ir, order="reverse")
    for name, differs in _differences(first, again).items():
        made.found(
            "twice", "", f"{_some(differs)} of {name} have other bits if programs run in reverse"
        )


def _uninitialised(made: _Examination, first: Run) -> None:
    """Reads before any write of what was declared to come uninitialised."""
    for name, arg in made.launch.tensors().items():
        touched = first.touched(name)
        if arg.fill == "nan" and touched.read_first.any():
            what = f"reads {_some(touched.read_first)} of {name} that nothing has written"
            made.found("uninitialised", first.first_read(name), what)


def _masked_off(made: _Examination, first: Run) -> None:
    """What depends on lanes that a load masked off and gave no value."""
    if not first.valueless:
        return
    again = semantics.run(made.launch, ir=first.ir, masked_garbage=True)
    where = first.valueless[0]
    loads = "the load" if len(first.valueless) == 1 else f"one of {len(first.valueless)} loads"
    if again.stop is not None:
        _, at, what = again.stop
        what = f"{what}, where lanes that {loads} masked off without other= are not 0"
        made.found("uninitialised", at, what)
        return
    for name, differs in _differences(first, again).items():
        made.found(
            "uninitialised", where,
            f"{_some(differs)} of {name} depend on lanes that {loads} masked off without other=",
        )  # fmt: skip


def _poison(made: _Examination, first: Run) -> None:
    """Run again with other bits in every tensor that is written and not read before."""
    touched = {name: first.touched(name) for name in made.launch.tensors()}
    written = {name: t.written for name, t in touched.items() if t.written.any()}
    outputs = {name: w for name, w in written.items() if not touched[name].read_first.any()}
    if not outputs:
        why = "taken as in place, being read before written" if written else "nothing is written"
        made.not_run(f"not run: {', '.join([*written, why])}", ["poison"])
        return
    again = semantics.run(made.launch, ir=first.ir, poisoned=tuple(outputs))
    if again.stop is not None:
        _, where, what = again.stop
        made.found("poison", where, f"{what}, with other bits in {', '.join(outputs)}")
        return
    for name, differs in _differences(first, again).items():
        never = differs & ~outputs.get(name, np.ones_like(differs))
        if never.any():
            made.found("poison", first.last_store(name), f"{_some(never)} of {name} never written")
        if (differs & ~never).any():
            what = f"{_some(differs & ~never)} of {name} depend on memory that nothing has written"
            made.found("poison", first.last_store(name), what)


def _differences(a: Run, b: Run) -> dict[str, npt.NDArray[np.bool_]]:
    """The elements whose bits differ, for every tensor that has any."""
    found = {}
    for name, tensor in a.tensors.items():
        differs = (_bits(tensor) != _bits(b.tensors[name])).any(1)
        if differs.any():
            found[name] = differs
    return found


def _bits(tensor: Tensor) -> npt.NDArray[np.uint8]:
    """(elements, bytes of one)"""
    flat = tensor.contiguous().reshape(-1, 1)
    bits: npt.NDArray[np.uint8] = flat.view(torch.uint8).numpy()
    return bits


def _some(which: npt.NDArray[np.bool_]) -> str:
    return f"{int(which.sum())} of {which.size} elements"
