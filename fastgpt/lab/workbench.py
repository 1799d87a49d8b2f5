"""One run of the lab: what is asked about which kernels, put together into a Result."""

import platform
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import triton

from fastgpt import __version__
from fastgpt.lab import analyse, cases, revision, spec
from fastgpt.lab import launch as launches
from fastgpt.lab.chips import TARGETS, chip
from fastgpt.lab.compile import present
from fastgpt.lab.launch import Launch
from fastgpt.lab.result import SECTIONS, Checked, Result, Row, Traffic
from fastgpt.lab.spec import Spec

TIMEOUT = 300.0  # seconds for one launch that is run here
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Subject:
    """What one word of the command line, or one argument of `study`, stands for.

    Attributes:
        said: as it was said.
        op: an op of fastgpt with its sizes, or None.
        specs: of kernels that are somebody's own.
        kernels: the folder that holds fastgpt's kernels, if another revision's.
    """

    said: str
    op: str | None = None
    specs: tuple[Spec, ...] = ()
    kernels: str | None = None

    def launches(self, target: str, configs: str) -> list[Launch]:
        if self.op is None:
            with present(target):
                return [one for spec in self.specs for one in spec.launches(configs)]
        return [] if cases.refused(target) else cases.launches(self.op, target)

    def small_launches(self, target: str) -> list[Launch]:
        """At sizes that can be run here."""
        if self.op is None:
            with present(target):
                return [one for s in self.specs for at in s.sized() for one in at.launches()]
        return [] if cases.refused(target) else cases.small_launches(self.op, target)


def subject(said: str | Spec, by_hand: Spec | None = None) -> Subject:
    """What a name stands for: an op of fastgpt, a YAML file, file.py:kernel or file.py:spec.

    Args:
        said: the name; "@REVISION" behind it takes the kernel from that commit of its repository.
        by_hand: the arguments of a kernel that is named without a spec.

    Raises:
        ValueError: it stands for nothing; the message says what was looked for.
    """
    if isinstance(said, Spec):
        return Subject(said.kernel, specs=(said,))
    with present("sm_90"):
        return _subject(said, by_hand)


def _subject(said: str, by_hand: Spec | None) -> Subject:
    name, at, commit = said.rpartition("@")
    if not at:
        name, commit = said, ""
    own = re.fullmatch(r"(\w+)(\._\w+)?(:.*)?", name)
    if own and own[1] in cases.OPS:
        cases.parse(name)
        return Subject(said, op=name, kernels=revision.own_kernels(commit) if commit else None)
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise ValueError(f"lab: {name} is not a file")
        found = spec.read(name)
    elif name.endswith(".py"):
        kernels = launches.kernels_in(launches.load_module(name))
        there = f"its kernels are {', '.join(kernels)}" if kernels else "it has no kernel"
        raise ValueError(f"lab: a kernel is named {name}:FUNCTION; {there}")
    elif ":" in name:
        value = launches.load(name)
        if launches.is_kernel(value):
            if by_hand is None:
                names = ", ".join(p.name for p in launches.unwrap(value).params)
                raise ValueError(f"lab: {name} needs --args for its parameters {names}")
            found = [replace(by_hand, kernel=name)]
        else:
            found = list(value) if isinstance(value, (list, tuple)) else [value]
            if not found or not all(isinstance(one, Spec) for one in found):
                raise ValueError(f"lab: {name} is neither a kernel nor a Spec; got {value!r}"[:200])
    else:
        raise ValueError(
            f"lab: a kernel is one of {', '.join(cases.OPS)}, FILE.yaml, FILE.py:FUNCTION; "
            f"got {said!r}"
        )
    if commit:
        found = [replace(one, kernel=revision.kernel(one.kernel, commit)) for one in found]
    return Subject(said, specs=tuple(found))


def study(
    subjects: Sequence[Subject],
    targets: Sequence[str] = TARGETS,
    sections: Sequence[str] = (),
    configs: str = "first",
    workers: int | None = None,
    progress: Progress | None = None,
) -> Result:
    """Compile kernels for targets and read what came out; with sections, run them here as well.

    Args:
        subjects: from `subject`.
        targets: of `fastgpt.lab.chips.TARGETS`.
        sections: of SECTIONS.
        configs: "first" or "all" configurations of a kernel under @triton.autotune.
        workers: processes, by default one a core; 0 works in this one.
        progress: called with what is under way, how much of it is done, and of how much.

    Raises:
        ValueError: a target or a section is not known, or a kernel cannot be loaded.
    """
    start = time.perf_counter()
    for target in targets:
        chip(target)
    if unknown := set(sections) - set(SECTIONS):
        raise ValueError(f"lab: sections are {', '.join(SECTIONS)}; got {', '.join(unknown)}")
    notes = [
        f"{target}: {why}"
        for target in targets
        if any(s.op for s in subjects) and (why := cases.refused(target))
    ]
    rows: list[Row] = []
    for kernels in dict.fromkeys(s.kernels for s in subjects):
        with revision.taken(kernels):
            asked = [s for s in subjects if s.kernels == kernels]
            jobs = [(one, t) for t in targets for one in _launches(asked, t, configs)]
            order = {job[0].name: at for at, job in reversed(list(enumerate(jobs)))}
            jobs.sort(key=lambda job: order[job[0].name])  # each kernel's targets side by side

            def report(done: int, of: int, row: Row) -> None:
                if progress:
                    progress(f"{row.kernel} {row.target}", done, of)

            rows += analyse.rows(jobs, workers, report, kernels)
    result = Result(versions(), tuple(rows), notes=tuple(notes))
    if sections:
        result = _run_sections(result, subjects, targets, sections, progress)
    return replace(result, seconds=time.perf_counter() - start)


def _launches(subjects: Sequence[Subject], target: str, configs: str) -> list[Launch]:
    """All of them; a kernel that several ops launch in one variant is there once."""
    found: list[Launch] = []
    seen: set[tuple[str, str]] = set()
    for one_of in subjects:
        for launch in one_of.launches(target, configs):
            key = launch.name, repr(launch.variant)
            if one_of.op is None or key not in seen:
                found.append(launch)
            if one_of.op is not None:
                seen.add(key)
    return found


def versions() -> dict[str, str]:
    """Of what made a result."""
    return {
        "fastgpt": __version__,
        "triton": triton.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _run_sections(
    result: Result,
    subjects: Sequence[Subject],
    targets: Sequence[str],
    sections: Sequence[str],
    progress: Progress | None,
) -> Result:
    """The sections that run kernels on this machine."""
    from fastgpt.lab import host, memory, numbers, sanitize

    subjects = [s for s in subjects if s.kernels is None]  # another revision's are compiled only
    ops = [cases.parse(s.op) for s in subjects if s.op]
    names = list(dict.fromkeys(name for name, _ in ops))
    usable = [t for t in targets if not cases.refused(t)] or list(targets)

    small = [one for s in subjects for one in s.small_launches(usable[0])]
    smallest = list({one.name: one for one in reversed(small)}.values())[::-1]

    for done, section in enumerate(SECTIONS):
        if section not in sections:
            continue
        if progress:
            progress(section, done, len(SECTIONS))
        if section == "host":
            rows = [row for name in names for row in host.of_op(name)]
            rows += [
                host.of_launch(one, usable[0])
                for s in subjects
                if s.op is None
                for one in s.launches(usable[0], "first")
            ]
            result = replace(result, host=tuple(rows))
        elif section == "memory":
            saved = [row for name, sizes in ops for row in memory.of_op(name, sizes)]
            result = replace(result, saved=(*saved, *(memory.gpt2() if ops else ())))
        elif section == "traffic":
            moved, uncounted = _traffic(subjects, usable)
            result = replace(result, traffic=moved, checked=(*result.checked, *uncounted))
        elif section == "sanitize":
            checked, findings = sanitize.check(smallest, TIMEOUT)
            result = replace(result, checked=(*result.checked, *checked), findings=tuple(findings))
        elif section == "numbers":
            given = [one for one in small if one.reference]
            for errors, outcomes in (
                numbers.ops(names, timeout=TIMEOUT),
                numbers.launches(given, TIMEOUT),
            ):
                failed = [o for o in outcomes if o.outcome not in ("clean", "found")]
                result = replace(
                    result,
                    numbers=(*result.numbers, *errors),
                    checked=(*result.checked, *failed),
                )
    return result


def _traffic(
    subjects: Sequence[Subject], targets: Sequence[str]
) -> tuple[tuple[Traffic, ...], tuple[Checked, ...]]:
    """Traffic at growing sizes. Chips with the same tiles are counted once, together."""
    from fastgpt.lab.traffic import measure

    found: dict[str, tuple[Launch, list[str]]] = {}
    for target in targets:
        for one in [small for s in subjects for small in s.small_launches(target)]:
            key = repr((one.name, one.args, one.grid))
            chips = found.setdefault(key, (one, []))[1]
            if target not in chips:
                chips.append(target)
    together: dict[str, list[Launch]] = {}
    for one, chips in found.values():
        together.setdefault(" ".join(chips), []).append(one)
    rows: list[Traffic] = []
    failed: list[Checked] = []
    for same, group in together.items():
        made, outcomes = measure(group, same, TIMEOUT)
        rows += made
        failed += [o for o in outcomes if o.outcome != "counted"]
    return tuple(rows), tuple(failed)
