"""The worked example: its pages hold what a model gave, and what it shows is right."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from examples.next_word.walk import table, width
from tests.conftest import ROOT

BLOCKS = ("tokens", "embedding", "weights", "sum", "ffn", "output", "text")
PAGES = ("next_word.md", "next_word.zh.md")


def block(page: str, name: str) -> list[str]:
    found = re.search(f"<!-- next_word: {name} -->\n```text\n(.*?)\n```\n<!-- end -->", page, re.S)
    assert found is not None, name
    return found.group(1).split("\n")


def test_both_pages_show_the_same_numbers() -> None:
    english, chinese = ((ROOT / "docs" / name).read_text() for name in PAGES)
    for name in BLOCKS:
        assert block(english, name) == block(chinese, name)


def test_what_the_page_shows_is_a_distribution() -> None:
    page = (ROOT / "docs" / PAGES[0]).read_text()
    softmax = block(page, "weights")
    rows = [line.split() for line in softmax[softmax.index("softmax") + 2 :]]
    assert len(rows) == len(block(page, "tokens")) - 1
    for n, row in enumerate(rows):
        weights = [float(x) for x in row[1 : n + 2]]
        assert sum(weights) == pytest.approx(1.0, abs=0.0005 * len(weights) + 1e-9)
        assert row[n + 2 : -1] == ["·"] * (len(rows) - n - 1) and row[-1] == "1.000"
    *parts, total = block(page, "sum")[1:]
    columns = [[float(x) for x in part.split()[-6:]] for part in parts]
    for shown, column in zip(total.split()[-6:], zip(*columns, strict=True), strict=True):
        assert float(shown) == pytest.approx(sum(column), abs=0.0005 * (len(columns) + 1))


def test_gelu_and_relu_of_the_page() -> None:
    z, gelu, relu = (
        torch.tensor([float(x) for x in line.split()[-6:]])
        for line in block((ROOT / "docs" / PAGES[0]).read_text(), "ffn")[1:]
    )
    torch.testing.assert_close(
        gelu, torch.nn.functional.gelu(z, approximate="tanh"), atol=1.1e-3, rtol=0.0
    )
    torch.testing.assert_close(relu, z.clamp(min=0.0), atol=1e-6, rtol=0.0)


def test_chinese_columns_stand_below_each_other() -> None:
    assert width("人工") == 4 and width("ab") == 2
    lines = table(["", "人"], [["智能", 1], ["a", 22]]).split("\n")
    assert [width(line) for line in lines] == [8, 8, 8]


def test_the_example_runs(tmp_path: Path) -> None:
    pytest.importorskip("chatterbot_corpus")
    for name in PAGES:
        shutil.copy(ROOT / "docs" / name, tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "examples.next_word", "--out", str(tmp_path / "run"), "--steps", "2",
         "--tune-steps", "2", "--pages", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name in PAGES:
        before, after = (ROOT / "docs" / name).read_text(), (tmp_path / name).read_text()
        assert before != after
        for part in BLOCKS:
            block(after, part)
        marks = r"(<!-- next_word: \w+ -->\n).*?(<!-- end -->)"
        assert re.sub(marks, r"\1\2", before, flags=re.S) == re.sub(
            marks, r"\1\2", after, flags=re.S
        )
