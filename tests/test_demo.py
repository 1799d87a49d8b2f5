"""The demo: it says what it should, learns, and keeps a checkpoint; on English and on Chinese."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastgpt import cli, demo
from fastgpt.lab import agreement, numbers
from fastgpt.train import load

POEM = ["白日依山尽", "黄河入海流", "欲穷千里目", "更上一层楼", "床前明月光", "疑是地上霜"]
CHINESE = "".join(f"{POEM[n % 6]}，{POEM[n * n % 6]}。{n}年。\n" for n in range(2000))


def bits(output: str, row: str) -> float:
    (found,) = re.findall(rf"^{re.escape(row)}.* (\d+\.\d+)$", output, re.M)
    return float(found)


def check(output: str, out: Path) -> None:
    for section in ("Text", "Tokenizer", "Model", "Training", "Held-out text", "Sample", "Ops"):
        assert f"\n{section}\n{'-' * len(section)}\n" in output
    assert bits(output, "this model") < bits(output, "frequencies of bytes")
    for op in ("attention", "layer_norm", "ffn"):
        assert re.search(rf"^trained with {op}: (reference|triton) \(", output, re.M)
        for direction in ("forward", "backward"):
            (row,) = re.findall(rf"^{op} +float32 +{direction} .*$", output, re.M)
            kernel, pytorch = map(float, row.split()[-2:])
            assert 0.0 < kernel < 1e-4
            assert kernel < 10 * pytorch
    load(out)


def test_learns_chinese(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "text.txt"
    path.write_text(CHINESE, encoding="utf-8")
    out = tmp_path / "out"
    args = ["demo", "--text", str(path), "--out", str(out), "--minutes", "0.08", "--prompt", "白日"]
    assert cli.main(args) == 0
    output = capsys.readouterr().out
    check(output, out)
    assert "\nSample\n------\n白日" in output
    assert cli.main(args) == 0  # an earlier demo's checkpoint is replaced
    assert len(list(out.glob("step-*"))) == 1


@pytest.mark.slow
def test_beats_frequencies_on_pythons_reference(tmp_path: Path) -> None:
    made = subprocess.run(
        [sys.executable, "-m", "fastgpt", "demo", "--out", str(tmp_path / "out"), "--minutes", "1"],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_WAIT_POLICY": "passive"},
    )
    assert made.returncode == 0, made.stderr
    check(made.stdout, tmp_path / "out")
    assert bits(made.stdout, "this model") < 0.9 * bits(made.stdout, "frequencies of tokens")


def test_threads_go_to_the_fastest_number(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    class Clock:
        seconds = 0.0

    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    now = [4]
    monkeypatch.setattr(torch, "set_num_threads", lambda n: now.__setitem__(0, n))
    clock = Clock()
    tune = demo._Threads(clock)  # type: ignore[arg-type]
    took = {4: 9.0, 2: 1.0, 1: 3.0}
    used = []
    for step in range(60):
        if step == 30:
            took = {4: 1.0, 2: 2.0, 1: 3.0}
        used.append(now[0])
        clock.seconds += took[now[0]]
        tune(None)  # type: ignore[arg-type]
    assert used[:6] == [4, 4, 2, 1, 2, 2]
    assert used[20:30].count(2) >= 7
    assert used[-1] == 4


def test_agreement_names_what_ran() -> None:
    table = agreement.measure(120.0)
    rows = table.splitlines()[1:]
    assert {row.split()[0] for row in rows} == set(numbers.OPS)
    assert all(row.split()[3] == "triton," for row in rows)


def test_agreement_says_why_it_could_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="no message"):
        agreement.measure()
