"""The figures of docs/: their scripts draw them, and the pages' numbers are the figures'."""

import shutil
from collections import Counter
from pathlib import Path

from tests.conftest import ROOT


def test_the_figures_are_drawn_and_shown(tmp_path: Path) -> None:
    from examples.figures import kernels, roofline

    shutil.copy(ROOT / "docs" / "gpu.md", tmp_path)
    kernels.main(tmp_path)
    roofline.main(tmp_path)
    made = {file.name for file in tmp_path.glob("*.svg")}
    assert made == {file.name for file in (ROOT / "docs").glob("*.svg")}
    pages = "".join(page.read_text() for page in (ROOT / "docs").glob("*.md"))
    assert all(f"]({name})" in pages for name in made)
    rows = roofline.ROW.findall((tmp_path / "gpu.md").read_text())
    assert {(op, who) for op, _, who, *_ in rows} >= {("attention", "cuDNN"), ("ffn", "fastgpt")}


def test_the_pages_numbers() -> None:
    from examples.figures.kernels import tiles, variance_error

    page = (ROOT / "docs" / "flash_attention.md").read_text()
    kinds = Counter(kind for row in tiles(1024, 128, 64, 1024, 0) for kind in row)
    said = f"{kinds['full']} blocks\nare full, {kinds['edge']} masked, {kinds['none']} skipped"
    assert said in page
    for T, m, n, more in ((1024, 128, 64, 1.12), (1024, 64, 64, 1.06), (4096, 128, 64, 1.03)):
        done = sum(kind != "none" for row in tiles(T, m, n, T, 0) for kind in row) * m * n
        assert round(done / (T * (T + 1) / 2), 2) == more and f"{more}" in page
    one, two = variance_error(1024.0)
    assert 0.3 < one < 0.45 and two < 4e-7  # the page: 37 %, below 4e-7
