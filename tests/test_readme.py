"""README's Python runs as it stands there, and its links lead to files."""

import re
from typing import Any

import pytest

from tests.conftest import ROOT

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


@pytest.mark.parametrize("block", BLOCKS, ids=["layers", "patch", "training"])
def test_readme(block: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(block.strip().splitlines()) <= 13
    names: dict[str, Any] = {}
    exec(compile(block, "README.md", "exec"), names)
    assert capsys.readouterr().out
    if "loss" in names:
        assert names["loss"].item() < 6.5  # the first is log(2048) = 7.6


def test_links() -> None:
    links = re.findall(r"\]\(([^)#:]+)[^)]*\)", (ROOT / "README.md").read_text())
    assert links and all((ROOT / link).is_file() for link in links), links
