"""fastgpt bench --suite cpu: what it plans and writes; pages made of a run; models in processes."""

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastgpt import GPT, GPTConfig, cli
from fastgpt.bench import models, report, result, suite
from fastgpt.bench.players import Role
from fastgpt.bench.result import Row, Run
from fastgpt.bench.run import Wanted, bench, plan
from fastgpt.bench.show import Shown
from fastgpt.bench.worker import Child, Said, resident

PAGE = f"before\n{report.MARKS[0]}\nold\n{report.MARKS[1]}\nafter\n"
SIZES = {"B": 1, "T": 8, "L": 1, "H": 2, "C": 16, "V": 32}


def row(provider: str, seconds: float, **more: Any) -> Row:
    made = Row("step", SIZES, "float32", "step", provider, "timed", samples=[seconds])
    return dataclasses.replace(
        made, median=seconds, low=seconds, high=seconds, base="fastgpt", ratio=seconds,
        tokens_s=8 / seconds, **more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    """The suite at tiny sizes, without what compiles, in one process."""
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("suite")
    (folder / "page.md").write_text(PAGE)
    who = ("fastgpt", "hugging-face", "torch", "sdpa", "math", "torch-fused")
    planned = [p for p in suite.cpu(small=True) if p.part != suite.AT_START]
    shown = Shown(folder / "page.md", folder / "page.html", folder / "page.png")
    assert bench(Wanted((), "cpu", (), providers=who), folder / "run.json", shown, planned, say=len)
    return result.read(folder / "run.json"), folder


def test_the_suite_times_all_that_is_planned(small: tuple[Run, Path]) -> None:
    run, _ = small
    bad = [
        (r.case, r.dtype, r.provider, r.why) for r in run.rows if r.state not in ("timed", "absent")
    ]
    assert bad == []
    timed = {(r.part, r.what, r.dtype, r.provider) for r in run.rows if r.state == "timed"}
    for precision in ("float32", "autocast"):
        for who in ("fastgpt", "Hugging Face"):
            assert ("training step", "step", precision, who) in timed
    assert ("decode", "decode", "bfloat16", "fastgpt") in timed
    assert {what for part, what, *_ in timed if part == "ops"} == set(cli_ops())
    assert {part for part, *_ in timed if part.startswith("scaling")} == {
        "scaling T", "scaling C", "scaling L",
    }  # fmt: skip


def cli_ops() -> tuple[str, ...]:
    from fastgpt.bench.cli import OPS

    return OPS


def test_the_page_has_the_tables_between_its_lines(small: tuple[Run, Path]) -> None:
    text = (small[1] / "page.md").read_text()
    head, tail = report.parts(small[1] / "page.md")
    assert (head, tail) == ("before\n", "\nafter\n") and "old" not in text
    for title in ("Training step", "Decode", "Ops", "Scaling"):
        assert f"\n### {title}\n" in text
    assert re.search(r"\| attention \| T \| fastgpt \| 8 \| 32 \| T\^\S+ \| T\^\S+ \|", text)
    assert "times the tokens/s of Hugging Face" in text
    for block in text.split("\n\n"):
        if block.startswith("|"):
            assert len({line.count("|") for line in block.splitlines()}) == 1, block


def test_the_other_pages_are_whole(small: tuple[Run, Path]) -> None:
    html = (small[1] / "page.html").read_text()
    assert "http" not in html.replace("http://www.w3.org", "") and "<polyline" in html
    assert html.count("<svg") >= 6  # time and memory of attention along T, a step along T, C, L
    assert (small[1] / "page.png").read_bytes().startswith(b"\x89PNG")


def test_a_page_is_made_of_a_file(
    small: tuple[Run, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    file = str(small[1] / "run.json")
    assert cli.main(["bench", "show", file, "--markdown", str(page)]) == 0
    assert page.read_text() == (small[1] / "page.md").read_text()
    assert cli.main(["bench", "show", file]) == 0
    assert "attention B=1, T=32" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--suite", "cpu", "ffn"], "--suite says itself what is timed"),
        (["--suite", "gpu"], "needs a GPU that torch sees"),
        (["ffn", "--dtype", "int8"], "--dtype int8 is for decode; got ffn"),
        (["decode", "--dtype", "autocast"], "--dtype autocast is for step; got decode"),
        (["ffn", "--markdown", "page.md"], "page.md must have the lines <!-- begin: fastgpt bench"),
        (["show", "nowhere.json"], "nowhere.json cannot be used; no such file"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(
    argv: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "page.md").write_text("no lines")
    assert cli.main(["bench", *argv]) == 2
    captured = capsys.readouterr()
    assert said in captured.err and len(captured.err.splitlines()) == 1


def test_an_unknown_provider_does_not_stop_the_others(tmp_path: Path) -> None:
    said: list[str] = []
    wanted = Wanted(
        ("rms_norm",), "cpu", ("float32",), sweep=(("M", (4,)), ("N", (8,))), rounds=1,
        providers=("fastgpt", "apex"),
    )  # fmt: skip
    assert bench(wanted, tmp_path / "a.json", Shown(), say=said.append)
    assert said[0] == "bench: --providers must be of compiled, fastgpt, torch; got 'apex'"
    assert [r.state for r in result.read(tmp_path / "a.json").rows] == ["timed"]


def test_a_precision_is_left_out_where_nothing_takes_it() -> None:
    found = plan(Wanted(("ffn", "step", "decode"), "cpu", ("float32", "autocast", "int8")))
    assert [(p.what, p.dtype) for p in found if p.dtype != "float32"] == [
        ("step", "autocast"), ("decode", "int8"),
    ]  # fmt: skip


# --- memory ---------------------------------------------------------------------------------------


def test_a_step_that_does_not_fit_is_said_before_it_is_made() -> None:
    long = models.sizes("step", "cpu") | {"B": 1, "T": 10**7}
    model = models.Model("step", "cpu", "float32", long)
    # 12 layers keep each at least 8 widths of 768 floats a token.
    assert model.bytes_needed() > 12 * 8 * 768 * 4 * 10**7
    assert model._players == {}
    wide = models.Model("decode", "cpu", "int8", models.sizes("decode", "cpu"))
    assert 124e6 < wide.bytes_needed() < 130e6


class Largest(TorchDispatchMode):
    """The most elements that a tensor has which an operator makes."""

    most = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [t.numel() for t in tree_leaves(out) if isinstance(t, Tensor)]
        self.most = max([self.most, *made])
        return out


def test_no_tensor_has_a_number_for_each_pair_of_tokens() -> None:
    """In a training step; the math backend of attention shows that one would be seen."""
    T = 4096
    model = GPT(GPTConfig(T, 64, 1, 1, 16))
    idx = torch.randint(64, (1, T))
    with Largest() as seen:
        model(idx, idx).backward()
    assert 16 * T <= seen.most < T * T / 4
    q = torch.randn(1, 1, T, 16)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), Largest() as all_of_it:
        torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
    assert all_of_it.most >= T * T


# --- processes ------------------------------------------------------------------------------------


def test_a_process_that_ends_is_said_and_another_can_start() -> None:
    child = Child(Role("step", "fastgpt", "cpu", "float32", SIZES))
    try:
        child.ready()
        child._process.kill()
        with pytest.raises(Said, match="ended by SIGKILL, as one is that takes more memory"):
            child.values()
        assert set(child.values()) == {"loss", "the gradient's norm"}
        call = child.start()
        call()
        added, most = child.memory()
        assert added is not None and most is not None and most > 50 << 20
    finally:
        child.close()
    assert child._process is None


def test_what_a_child_cannot_do_is_said() -> None:
    child = Child(Role("step", "nanoGPT", "cpu", "float32", SIZES))
    try:
        with pytest.raises(Said, match="ValueError: bench: --nanogpt must say"):
            child.ready()
    finally:
        child.close()


def test_resident_memory_is_what_is_touched() -> None:
    before = resident(os.getpid())
    held = torch.ones(50 << 20, dtype=torch.uint8)
    after = resident(os.getpid())
    assert before is not None and after is not None
    assert after - before > 0.9 * held.nbytes
    assert resident(2**30) is None


# --- tables ---------------------------------------------------------------------------------------


def test_the_best_of_each_is_held_against_ours() -> None:
    rows = [
        row("fastgpt", 1.0, resident_bytes=100), row("nanoGPT", 2.0, resident_bytes=400),
        dataclasses.replace(row("fastgpt", 0.5, resident_bytes=200), dtype="autocast"),
    ]  # fmt: skip
    text = "\n".join(report.whole(rows))
    assert "fastgpt (autocast) has 4.00 times the tokens/s of nanoGPT (float32) in 0.50 of" in text
