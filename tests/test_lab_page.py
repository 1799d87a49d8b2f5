"""The lab's page: what it says, without a browser."""

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fastgpt.lab import cells, charts, page
from fastgpt.lab.chips import chip
from fastgpt.lab.result import (
    KINDS,
    Result,
)
from tests.lab_result import TARGETS, counts, result, row

if TYPE_CHECKING:
    pass


def test_every_kind_of_instruction_is_in_one_group() -> None:
    assert sorted(kind for kinds in charts.GROUPS.values() for kind in kinds) == sorted(KINDS)
    some = counts(40, 64)
    assert sum(charts.mix(some)) == some.instructions


def test_points_of_the_roofline() -> None:
    h100 = chip("sm_90")
    rows = [r for r in result().rows if r.target == "sm_90"]
    by_kernel = {p.row.kernel: p for p in charts.points(rows, result().traffic, h100)}
    dense = by_kernel["attention._dkdv_kernel"]
    assert dense.row.cost and dense.speed == pytest.approx(
        dense.row.cost.ceiling * h100.peak("16-bit")
    )
    assert dense.serial == pytest.approx(dense.row.cost.serial * h100.peak("16-bit"))
    t = result().traffic[5]
    assert t.size == "T=1024", "the largest launch is the one that counts"
    assert dense.low == t.flops / t.moved and dense.high == t.flops / t.least
    streaming = by_kernel["layer_norm._fwd_kernel"]
    assert streaming.low is None and streaming.drawn
    assert streaming.row.cost and streaming.speed == pytest.approx(
        streaming.row.cost.ceiling * 3.35
    )
    assert not by_kernel["ffn.too_large"].drawn, "products without an intensity have no place"
    assert "attention._ws_kernel" not in by_kernel


@pytest.mark.parametrize("target", TARGETS)
def test_the_roofline_lies_in_its_frame(target: str) -> None:
    rows = [r for r in result().rows if r.target == target]
    found = charts.points(rows, result().traffic, chip(target))
    svg = charts.roofline(found, chip(target))
    assert all(0 <= float(x) <= charts.WIDTH for x in re.findall(r' c?x[12]?="([^"]+)"', svg))
    assert all(0 <= float(y) <= charts.HEIGHT for y in re.findall(r' c?y[12]?="([^"]+)"', svg))
    numbers = re.findall(r'class="middle number"[^>]*>(\d+)<', svg)
    assert numbers == [str(i) for i, p in enumerate(found, 1) if p.drawn]


def test_a_variant_is_what_tells_rows_of_a_kernel_apart() -> None:
    rows = result().rows
    said = dict(zip(map(id, rows), cells.variants(rows), strict=True))
    attention = [said[id(r)] for r in rows if r.kernel == "attention._fwd_kernel"]
    assert set(attention) == {"BLOCK_M=128", "BLOCK_M=64"}
    assert {said[id(r)] for r in rows if r.kernel == "layer_norm._fwd_kernel"} == {""}


@pytest.mark.parametrize(
    "bytes, text", [(0, "0 B"), (1023, "1,023 B"), (1024, "1.0 KiB"), (12_648_448, "12.1 MiB")]
)
def test_bytes_are_said_in_their_unit(bytes: int, text: str) -> None:
    assert cells.size(bytes).text == text


def test_growth_is_over_the_size_before() -> None:
    table = cells.traffic(result().traffic[:4])
    moved = [r[7].text for r in table.rows]
    # of another kernel, nothing is before
    assert moved[0] == "–" == moved[3] and moved[2] == "×3.94", moved


def test_an_empty_result_has_no_sections() -> None:
    text = page.render(Result({"triton": "3.7.1"}))
    assert "<h1>" in text and "triton 3.7.1" in text
    assert "<h2" not in text and "<table" not in text


def test_a_chip_that_is_not_known_has_no_roofline() -> None:
    unknown = replace(result().rows[1], target="sm_999")
    text = page.render(replace(result(), rows=(unknown,)))
    assert "sm_999" in text and "<svg" not in text


def test_a_large_result_stays_small() -> None:
    some = [row(f"op{i}._kernel", t, 64, {"B": i}, 60) for i in range(28) for t in TARGETS]
    text = page.render(replace(result(), rows=tuple(some)))
    assert len(some) == 112 and len(text.encode()) < 2e6


def test_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    path.write_text("before")
    monkeypatch.setattr(page, "render", lambda _: "\ud800")  # no UTF-8 has it
    with pytest.raises(UnicodeEncodeError):
        page.write(result(), path)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    page.write(result(), str(path))
    assert path.read_text() == page.render(result()) and list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError):
        page.write(result(), tmp_path / "none" / "report.html")
