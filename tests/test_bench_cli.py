"""The command fastgpt bench: its files, its exit codes, Ctrl-C, and bad input in one line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastgpt import cli
from fastgpt.bench import result
from tests.test_bench import run_of

SMALL = [
    "rms_norm",
    "--sweep",
    "M=4",
    "N=8,16",
    "--device",
    "cpu",
    "--providers",
    "fastgpt",
    "torch",
]


def test_a_run_writes_json_csv_and_png(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "run.json"
    argv = ["bench", *SMALL, "--rounds", "6", "--forward", "--both", "--out", str(out)]
    assert cli.main([*argv, "--png", str(tmp_path / "run.png")]) == 0
    said = capsys.readouterr().out
    assert "rms_norm M=4, N=16, float32, both" in said and "x fastgpt" in said
    run = result.read(out)
    assert run.complete and set(run.peaks) == {"float32"}
    assert {"machine", "threads", "torch", "fastgpt", "commit"} <= run.facts.keys()
    keys = {row.key for row in run.rows}
    assert len(keys) == len(run.rows) == 2 * 2 * 2
    for row in run.rows:
        assert row.state == "timed" and len(row.samples) == 6
        assert row.low is not None and row.median is not None and row.high is not None
        assert row.low <= row.median <= row.high
        assert row.base == "fastgpt" and row.ratio_low is not None
        assert row.tokens == 4 and row.bytes and row.peak_bytes is not None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.csv", "run.json", "run.png"]

    # A run compared to itself has not moved.
    assert cli.main(["bench", "compare", str(out), str(out)]) == 0
    assert "8 rows in both, 0 in one of them; 0 worse, 0 better" in capsys.readouterr().out


def test_compare_exits_with_1_if_anything_is_worse(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = []
    for name, scale in (("a", 1.0), ("slow", 1.3), ("fast", 0.7)):
        paths.append(str(tmp_path / f"{name}.json"))
        result.write(run_of(scale, seed=len(paths)), Path(paths[-1]))
    before, slow, fast = paths
    assert cli.main(["bench", "compare", before, slow]) == 1
    assert "ffn M=1, float32, forward, fastgpt: slower: " in capsys.readouterr().out
    assert cli.main(["bench", "compare", before, fast]) == 0
    assert "0 worse, 1 better" in capsys.readouterr().out
    assert cli.main(["bench", "compare", before, slow, "--least", "0.5"]) == 0


def test_ctrl_c_keeps_what_was_measured(tmp_path: Path) -> None:
    out = tmp_path / "run.json"
    sizes = ",".join(map(str, range(8, 8000, 8)))
    argv = ["rms_norm", "--sweep", "M=4", f"N={sizes}", "--device", "cpu", "--rounds", "50"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fastgpt", "bench", *argv, "--providers", "fastgpt", "torch",
         "--out", str(out)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        # A shell's background job ignores SIGINT, and so would this one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 100
        while not out.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        said, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, errors) == (130, "")
    assert "stopped; what was measured is in" in said
    run = result.read(out)
    assert not run.complete
    assert len(run.rows) >= 2 and len(run.rows[0].samples) == 50
    assert (tmp_path / "run.csv").is_file()


@pytest.mark.parametrize(
    "argv, said",
    [
        (["matmul"], "bench: OP must be one of attention, "),
        (["ffn", "--providers", "apex"], "must be of compiled, fastgpt, torch; got 'apex'"),
        (["ffn", "--sweep", "T=8"], "bench: --sweep takes the sizes C, M of ffn; got 'T'"),
        (["ffn", "--sweep", "M=8,x"], "must be NAME=NUMBER,NUMBER,...; got 'M=8,x'"),
        (["ffn", "--sweep", "M=-8"], "must be NAME=NUMBER,NUMBER,...; got 'M=-8'"),
        (["ffn", "--rounds", "0"], "bench: --rounds must be at least 1; got 0"),
        (["ffn", "--threads", "0"], "bench: --threads must be at least 1; got 0"),
        (["ffn", "--out", "a.txt"], "bench: --out must end in .json; got a.txt"),
        (["ffn", "--out", "nowhere/a.json"], "bench: --out must lie in a folder that is there"),
        (["ffn", "--dtype", "float8"], "invalid choice: 'float8'"),
        (["step", "--nanogpt", "nowhere"], "bench: --nanogpt must be nanoGPT's folder"),
        (["compare", "nowhere.json", "b.json"], "nowhere.json cannot be used; no such file"),
        (["compare", "a.json"], "the following arguments are required: B.json"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(
    argv: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", *argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1, captured
    assert said in captured.err
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_another_version_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    result.write(run_of(1.0), a)
    b.write_text(json.dumps(json.loads(a.read_text()) | {"format": "fastgpt bench 3"}))
    assert cli.main(["bench", "compare", str(a), str(b)]) == 2
    assert capsys.readouterr().err.endswith("got 'fastgpt bench 3'\n")


def test_the_files_of_benchmarks_are_the_command(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "benchmarks.rms_norm", *SMALL[1:], "--rounds", "1"]
    out = tmp_path / "run.json"
    made = subprocess.run([*argv, "--out", str(out)], capture_output=True, text=True, timeout=120)
    assert made.returncode == 0, made.stderr
    assert {row.what for row in result.read(out).rows} == {"rms_norm"}
