"""What a run measured, and its files: one JSON and one CSV, each whole or not there."""

import csv
import io
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fastgpt.lab.files import write_whole

FORMAT = "fastgpt bench 2"
PACKAGES = (
    "triton", "transformers", "liger-kernel", "cut-cross-entropy", "flash-attn",
    "ctranslate2", "llama-cpp-python", "numpy",
)  # fmt: skip
TIMED, REFUSED, ABSENT, FAILED = "timed", "refused", "absent", "failed"


@dataclass(frozen=True)
class Row:
    """One provider at one size in one mode.

    Attributes:
        state: timed; refused (its values differ), absent (not installed, or not for this device)
            or failed (it raised, or would not fit), and then `why`.
        samples: seconds, one a round; `median`, `low` and `high` are their quartiles.
        ratio: the median over the rounds of its time to that of `base` in the same round, and
            where it lies, 95 % sure.
        first_call: seconds of the first call, compilation included.
        host: seconds of the host for a call, launches included; on a GPU, as kernels, how many it
            ran in a whole step, and busy, the seconds of them.
        peak_bytes: what a call adds at its highest; saved_bytes: what it keeps for backward.
        resident_bytes: of its process at its highest, if it had one of its own: the interpreter,
            libraries, weights, all; on a GPU weights, moments, and what a step adds.
        part: of a suite.
        flops, bytes, tokens: of one call; rates and shares of the machine's peaks follow from them.
    """

    what: str
    sizes: dict[str, int]
    dtype: str
    mode: str
    provider: str
    state: str
    why: str = ""
    samples: list[float] = field(default_factory=list)
    median: float | None = None
    low: float | None = None
    high: float | None = None
    base: str = ""
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    first_call: float | None = None
    host: float | None = None
    kernels: int | None = None
    busy: float | None = None
    peak_bytes: int | None = None
    resident_bytes: int | None = None
    saved_bytes: int | None = None
    flops: int | None = None
    bytes: int | None = None
    tokens: int | None = None
    tflops: float | None = None
    gbytes: float | None = None
    tokens_s: float | None = None
    of_gemm: float | None = None
    of_copy: float | None = None
    part: str = ""

    @property
    def case(self) -> str:
        return f"{self.what} {', '.join(f'{k}={v}' for k, v in self.sizes.items())}"

    @property
    def key(self) -> tuple[Any, ...]:
        """What it must share with a row of another run to be compared to it."""
        sizes = tuple(sorted(self.sizes.items()))
        return self.what, sizes, self.dtype, self.mode, self.provider


@dataclass(frozen=True)
class Run:
    """All rows of a run, and where they come from: facts, and the machine's peaks by dtype.

    Attributes:
        notes: what else a suite found, lines under headings.
    """

    facts: dict[str, str]
    peaks: dict[str, dict[str, float]]
    rows: list[Row]
    complete: bool = True
    notes: dict[str, list[str]] = field(default_factory=dict)


def facts(device: str) -> dict[str, str]:
    """Machine, versions, threads, and the commit of the fastgpt that is imported."""
    import torch

    import fastgpt

    found = {
        "device": device,
        "machine": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "system": platform.platform(),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastgpt": fastgpt.__version__,
        "commit": _commit(),
    }
    if device == "cuda":
        found["cuda"] = str(torch.version.cuda)
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        pass
    return f"{name}, {os.cpu_count()} CPUs"


def _commit() -> str:
    """Of the checkout that this file lies in; with + if it has changes; none if installed."""
    here = Path(__file__).parent
    git = ["git", "-C", str(here)]
    try:
        tracked = subprocess.run(
            [*git, "ls-files", "--error-unmatch", __file__], capture_output=True
        )
        if tracked.returncode:
            return "none"
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        dirty = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True)
    except OSError:
        return "none"
    return head.stdout.strip() + ("+" if dirty.returncode else "")


def write(run: Run, path: Path) -> Path:
    """The JSON at path and the CSV beside it, whose path is returned.

    Raises:
        OSError: the folder is not there, or cannot be written.
    """
    write_whole(
        path, json.dumps({"format": FORMAT} | asdict(run), indent=1, allow_nan=False) + "\n"
    )
    text = io.StringIO()
    names = [f.name for f in fields(Row) if f.name not in ("sizes", "samples")]
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow([*names, "sizes", "rounds", *run.facts])
    for row in run.rows:
        cells = asdict(row)
        sizes = " ".join(f"{k}={v}" for k, v in row.sizes.items())
        values = ["" if cells[n] is None else cells[n] for n in names]
        rows.writerow([*values, sizes, len(row.samples), *run.facts.values()])
    table = path.with_suffix(".csv")
    write_whole(table, text.getvalue())
    return table


def read(path: Path) -> Run:
    """A run from its JSON.

    Raises:
        ValueError: the file is not one that `write` made, or of another format.
        OSError: it cannot be read.
    """
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"bench: {path} is not JSON") from None
    if not isinstance(said, dict) or said.get("format") != FORMAT:
        got = said.get("format") if isinstance(said, dict) else type(said).__name__
        raise ValueError(f"bench: {path} must have the format {FORMAT!r}; got {got!r}")
    try:
        rows = [Row(**row) for row in said["rows"]]
        return Run(said["facts"], said["peaks"], rows, said["complete"], said["notes"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"bench: {path} is not whole; {error}") from None


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Lines for people."""
    before = None
    for row in rows:
        mode = "" if row.mode == row.what else f", {row.mode}"
        head = f"{row.case}, {row.dtype}{mode}"
        if head != before:
            yield head
        before = head
        if row.state != TIMED or row.median is None or row.low is None or row.high is None:
            yield f"  {row.provider:22} {row.state}: {row.why}"
            continue
        spread = f"{_time(row.median)} ({_time(row.low).strip()} to {_time(row.high).strip()})"
        words = [f"  {row.provider:22} {spread:36}"]
        if row.ratio is not None and row.provider != row.base:
            sure = ""
            if row.ratio_low is not None and row.ratio_high is not None:
                sure = f" [{row.ratio_low:.2f}, {row.ratio_high:.2f}]"
            words.append(f"{row.ratio:.2f}{sure} x {row.base}")
        if row.tflops is not None:
            rate = row.tflops if row.tflops >= 1 else row.tflops * 1e3
            unit = "TFLOP/s" if row.tflops >= 1 else "GFLOP/s"
            words.append(f"{rate:.3g} {unit}{_share(row.of_gemm)}")
        if row.gbytes is not None and row.tflops is None:
            words.append(f"{row.gbytes:.3g} GB/s{_share(row.of_copy)}")
        if row.tokens_s is not None:
            words.append(f"{row.tokens_s:,.0f} tokens/s")
        if row.peak_bytes is not None:
            words.append(f"peak {_size(row.peak_bytes)}")
        if row.resident_bytes is not None:
            words.append(f"resident {_size(row.resident_bytes)}")
        if row.saved_bytes is not None:
            words.append(f"saved {_size(row.saved_bytes)}")
        if row.host is not None:
            words.append(f"host {_time(row.host).strip()}")
        if "compiled" in row.provider and row.first_call is not None:
            words.append(f"first call {row.first_call:.1f} s")
        yield "  ".join(words)


def _time(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:7.1f} us"
    return f"{seconds * 1e3:7.2f} ms" if seconds < 1 else f"{seconds:7.2f} s"


def _size(size: float) -> str:
    if size < 2**20:
        return f"{size / 2**10:.1f} KiB"
    return f"{size / 2**20:.1f} MiB" if size < 2**30 else f"{size / 2**30:.2f} GiB"


def _share(part: float | None) -> str:
    return "" if part is None else f" ({part:.0%})"
