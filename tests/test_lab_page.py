"""The lab's page: what it says, and that a browser shows it, sorts it, filters it and is safe."""

import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fastgpt.lab import cells, charts, page
from fastgpt.lab.chips import chip
from fastgpt.lab.result import (
    KINDS,
    Checked,
    Cost,
    Counts,
    Finding,
    HostCost,
    Line,
    Number,
    Occupancy,
    Result,
    Row,
    Saved,
    Traffic,
)

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
).split()


def counts(scale: int, matrix: int) -> Counts:
    kinds = dict.fromkeys(KINDS, 0) | {
        "matrix": matrix,
        "mufu": scale // 4 if matrix else 1,
        "fp32": 3 * scale,
        "convert": scale // 2,
        "integer": 2 * scale,
        "uniform": scale // 3,
        "global_load": 8,
        "global_store": 4,
        "shared_load": 12 if matrix else 2,
        "barrier": 2,
        "control": 3,
    }
    widths = {"global_load": {16: 7, 4: 1}, "global_store": {16: 4}}
    return Counts(kinds, {"HMMA.16816.F32.BF16": matrix} if matrix else {}, widths)


def lines(whole: Counts, loop: Counts | None, count: int) -> tuple[Line, ...]:
    made = []
    for i in range(count):
        share = (1 + i * 7 % 13) / (7 * count)
        text = f"    acc_{i} = tl.dot(q, k{i})  # if i < {i} and m_i[:, None] > -inf:"
        inside = int(share * loop.instructions) if loop and i > count // 3 else 0
        at = 100 + i + (10 if i > 9 else 0)
        text = text if i != 5 else f'    x = "{HOSTILE}"'
        made.append(
            Line("repo/kernels/k.py", at, text, int(share * whole.instructions) + 1, inside)
        )
    made.append(Line("lib/triton/standard.py", 290, "return core.reduce(x, axis)", 9, 0))
    return tuple(made)


def row(kernel: str, target: str, matrix: int, variant: dict[str, Any], count: int = 24) -> Row:
    scale = 40 + 13 * TARGETS.index(target) + len(kernel)
    loop = counts(scale, matrix) if matrix or "bwd" in kernel else None
    whole = counts(3 * scale, matrix)
    pipes = {"mufu": 3.0 * scale, "fp32": 2.5 * scale, "integer": 2.0 * scale, "issue": 5.0 * scale}
    if matrix:
        useful = 2 * 2**20
        ideal = useful / 2 / chip(target).rate("16-bit")
        cycles = {"tensor": ideal} | pipes
    else:
        useful, ideal = 0, 9.0 * scale
        cycles = {"tensor": 0.0} | pipes | {"dram": ideal}
    binding = max(cycles, key=lambda pipe: cycles[pipe])
    others = max(c for pipe, c in cycles.items() if c != ideal)
    made = Cost(
        cycles, binding, useful, 1.0, ideal / cycles[binding], ideal / (ideal + others),
        "tensor" if matrix else "bandwidth",
    )  # fmt: skip
    return Row(
        kernel, target, variant,
        warps=4, stages=3, registers=64 + scale, spills=128 if kernel == "ffn.spills" else 0,
        shared=(300 if kernel == "ffn.too_large" else 48) * 1024,
        shared_limit=chip(target).shared_limit,
        occupancy=Occupancy(3, 12, 0.19, "registers"),
        whole=whole, loop=loop, loop_lines=(110, 130) if loop else None, cost=made,
        lines=lines(whole, loop, count),
    )  # fmt: skip


def result() -> Result:
    """Kernels of every sort on four chips, one that does not compile, and hostile text."""
    why = f"k.py:12: <b>no</b> such op & more {HOSTILE}"
    rows = [Row("attention._ws_kernel", TARGETS[0], error=why)]
    for target in TARGETS:
        rows += [
            row("layer_norm._fwd_kernel", target, 0, {"BLOCK": 1024, "ROWS": 1}),
            row("layer_norm._bwd_kernel", target, 0, {"BLOCK": 1024}),
            row("attention._fwd_kernel", target, 64, {"BLOCK_M": 128, "D": 64, "CAUSAL": True}),
            row("attention._fwd_kernel", target, 96, {"BLOCK_M": 64, "D": 64, "CAUSAL": True}),
            row("attention._dkdv_kernel", target, 128, {"D": 64}),
            row("ffn.spills", target, 32, {}),
            row("ffn.too_large", target, 48, {}),
            row(f"evil.{HOSTILE}", target, 16, {"NAME": HOSTILE}, 8),
        ]
    everywhere = " ".join(TARGETS)
    traffic = [
        Traffic(kernel, everywhere, f"T={t}", t * t * 8, t * 128, t * 384, t * 128, t * t * flops)
        for kernel, flops in (
            ("attention._fwd_kernel", 128),
            ("attention._dkdv_kernel", 320),
            ("ffn.spills", 700),
            ("layer_norm._fwd_kernel", 0),
        )
        for t in (256, 512, 1024)
    ]
    ops = ("attention", "layer_norm", "ffn")
    return Result(
        versions={"fastgpt": "0.1.0", "triton": "3.7.1", "torch": "2.13.0"},
        rows=tuple(rows),
        traffic=tuple(traffic),
        checked=tuple(
            Checked(f"{op}._fwd_kernel", check, "clean" if op != "ffn" else "found", "T=128")
            for op in ops
            for check in ("bounds", "race", "poison")
        ),
        findings=(Finding("ffn._fwd_kernel", "race", "kernels/ffn.py:88", f"two {HOSTILE}"),),
        numbers=(
            Number("ffn", "f32", "(7, 64)", "y", math.nan, 1e-6, 2e-6, "reference"),
            Number("attention", "bf16", "(1, 67, 2, 64)", "dq", 3.1e-3, 2.2e-3, 5.0e-3, "kernel"),
            Number("attention", "f32", "(1, 67, 2, 64)", "dk", 9.1e-3, 2.2e-6, 5.0e-6, "kernel"),
        ),
        saved=(
            Saved("layer_norm", "8192 x 768", "fastgpt", 12_648_448),
            Saved("layer_norm", "8192 x 768", "pytorch", 25_231_360),
        ),
        host=(HostCost("layer_norm forward", 26.4, 1), HostCost("GPT block", 410.0, 9)),
        notes=("sm_75: fastgpt's kernels need compute capability 8.0",),
        seconds=41.0,
    )


# What it says, without a browser.


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


# In a browser.


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip("no Chromium is installed")
    with api.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=program, args=FLAGS)
        yield started
        started.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "report.html"
    page.write(result(), path)
    return path.as_uri()


def opened(browser: "Browser", address: str, **how: Any) -> "Page":
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}} | how)
    shown = context.new_page()
    shown.set_default_timeout(5000)
    shown.goto(address)
    return shown


@pytest.fixture
def shown(browser: "Browser", address: str) -> "Iterator[Page]":
    made = opened(browser, address)
    yield made
    made.context.close()


def column(shown: "Page", table: str, index: int) -> list[str]:
    """The visible cells of a column, top down."""
    return shown.eval_on_selector_all(
        f"#{table} tbody tr:not([hidden])",
        f"rows => rows.map(r => r.cells[{index}]?.innerText.trim().replace(/\\s+/g, ' ') ?? null)",
    )


def test_quiet_and_alone(browser: "Browser", address: str) -> None:
    """No console message, no error, no request, and nothing hostile ran."""
    context = browser.new_context()
    shown = context.new_page()
    heard: list[str] = []
    shown.on("console", lambda message: heard.append(message.text))
    shown.on("pageerror", lambda error: heard.append(str(error)))
    shown.on("request", lambda request: heard.append(request.url))
    shown.goto(address)
    shown.wait_for_load_state("networkidle")
    assert heard == [address]
    assert shown.evaluate("performance.getEntriesByType('resource').length") == 0
    assert shown.evaluate("window.hacked") is None
    assert shown.locator("script").count() == 1 and shown.locator("img").count() == 0
    assert HOSTILE in column(shown, "summary-table", 0)[8]
    assert "<b>no</b> such op" in shown.locator("#summary-table .error").inner_text()
    assert HOSTILE in shown.locator(".code", has_text="x =").first.inner_text()
    context.close()


def test_rows_that_break_a_rule_say_so_in_words(shown: "Page") -> None:
    assert f"{2 * len(TARGETS) + 1} break a rule" in shown.locator(".facts").inner_text()
    spills = shown.locator("#summary-table tr", has_text="ffn.spills").first.locator(".bad")
    assert spills.inner_text().split() == ["breaks", "a", "rule:", "▲", "128"]
    assert "does not compile" in shown.locator("#summary-table .error").inner_text()


def numbers_of(texts: list[str]) -> list[float]:
    return [float(t.removeprefix("breaks a rule: ▲ ")) for t in texts]


def test_sort_by_click(shown: "Page") -> None:
    head = shown.locator("#summary-table thead th", has_text="Registers")
    index = head.evaluate("th => th.cellIndex")
    before = column(shown, "summary-table", index)
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    after = column(shown, "summary-table", index)
    assert after != before and after[-1].startswith("breaks a rule: ▲ does not compile")
    assert numbers_of(after[:-1]) == sorted(numbers_of(after[:-1]))
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "descending"
    after = column(shown, "summary-table", index)
    # what is missing is last either way
    assert after[-1].startswith("breaks a rule: ▲ does not compile")
    assert numbers_of(after[:-1]) == sorted(numbers_of(after[:-1]), reverse=True)


def test_sort_by_keyboard(shown: "Page") -> None:
    """Words sort with their numbers: sm_80 before sm_100."""
    shown.locator("#filter").focus()
    for _ in range(3):  # past the table's scroller and the column of kernels
        shown.keyboard.press("Tab")
    assert shown.evaluate("document.activeElement.innerText") == "Target"
    shown.keyboard.press("Enter")
    head = shown.locator("#summary-table thead th", has_text="Target")
    assert head.get_attribute("aria-sort") == "ascending"
    assert list(dict.fromkeys(column(shown, "summary-table", 1))) == [
        "gfx942", "sm_80", "sm_90", "sm_100"
    ]  # fmt: skip
    shown.keyboard.press("Shift+Tab")
    shown.keyboard.press("Space")
    assert head.get_attribute("aria-sort") is None, "one column sorts at a time"
    assert column(shown, "summary-table", 0)[0] == "attention._dkdv_kernel"


def test_numbers_that_are_none_come_last(shown: "Page") -> None:
    head = shown.locator("#numbers-table thead th", has_text="kernel")
    for _ in range(2):
        head.locator("button").click()
        assert column(shown, "numbers-table", 5)[-1] == "nan"
    assert column(shown, "numbers-table", 9)[-1].endswith("does not agree")


def test_filter(shown: "Page") -> None:
    every = len(column(shown, "summary-table", 0))
    shown.locator("#filter").fill("ATTENTION sm_80")
    assert set(column(shown, "summary-table", 1)) == {"sm_80"}
    assert all("attention" in kernel for kernel in column(shown, "summary-table", 0))
    assert shown.locator("#matches").inner_text() == f"4 of {every} rows"
    shown.locator("#filter").fill("nothing of the kind")
    assert column(shown, "summary-table", 0) == []
    shown.locator("#filter").fill("")
    assert len(column(shown, "summary-table", 0)) == every


def test_one_target_at_a_time(shown: "Page") -> None:
    visible = "e => e.filter(x => x.checkVisibility()).map(x => x.innerText)"
    heads = ("#main div.t h3", "table.source thead tr:first-child .t")
    assert set(shown.eval_on_selector_all(heads[0], visible)) == {"sm_80 · A100 SXM 80GB"}
    shown.locator("select.target").last.select_option(label="gfx942 · MI300X")
    assert set(shown.eval_on_selector_all(heads[0], visible)) == {"gfx942 · MI300X"}
    assert all("gfx942" in t for t in shown.eval_on_selector_all(heads[1], visible))
    assert {s.input_value() for s in shown.locator("select.target").all()} == {"3"}
    shown.locator("select.target").first.select_option(label="all targets")
    assert len(set(shown.eval_on_selector_all(heads[0], visible))) == len(TARGETS)


def test_the_hottest_line_of_the_chosen_target_is_the_darkest(shown: "Page") -> None:
    kernel = shown.locator("details", has=shown.locator("summary", has_text="_dkdv_kernel"))
    kernel.locator("summary").click()
    strengths = kernel.locator(".code").evaluate_all(
        "lines => lines.map(line => +getComputedStyle(line).getPropertyValue('--a'))"
    )
    loops = [line.loop for line in result().rows[5].lines]
    assert max(strengths) == 1 and strengths.index(1) == loops.index(max(loops))
    assert strengths[-1] == 0


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_the_page_does_not_scroll_sideways(browser: "Browser", address: str, width: int) -> None:
    shown = opened(browser, address, viewport={"width": width, "height": 800})
    shown.eval_on_selector_all("details", "e => e.forEach(d => d.open = true)")
    for choice in ("0", ""):
        shown.locator("select.target").first.select_option(choice)
        assert shown.evaluate("document.documentElement.scrollWidth") <= width
    if width == 360:  # the tables do, each in its frame
        assert shown.eval_on_selector("#summary-table", "t => t.parentNode.scrollWidth") > width
    shown.context.close()


CONTRAST = """selector => {
  // a colour as the screen has it; color-mix and gradients are resolved by painting them
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const paint = (colours) => {
    canvas.clearRect(0, 0, 1, 1);
    for (const c of colours) { canvas.fillStyle = c; canvas.fillRect(0, 0, 1, 1); }
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ratio = (element) => {
    const layers = [];
    for (let e = element; e; e = e.parentElement) {
      const s = getComputedStyle(e);
      const tint = s.backgroundImage.match(/linear-gradient\\((color\\(.*?\\)|rgba?\\(.*?\\)) /);
      if (tint) layers.unshift(tint[1]);
      layers.unshift(s.backgroundColor);
    }
    const a = light(paint(["white", ...layers]));
    const b = light(paint([getComputedStyle(element).color]));
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  };
  return [...document.querySelectorAll(selector)].filter((e) => e.checkVisibility()).map(ratio);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(browser: "Browser", address: str, scheme: str) -> None:
    """WCAG AA: 4.5 for text, wherever it stands."""
    shown = opened(browser, address, color_scheme=scheme)
    back = shown.evaluate("getComputedStyle(document.body).backgroundColor")
    assert back == {"light": "rgb(255, 255, 255)", "dark": "rgb(18, 22, 27)"}[scheme]
    for selector in ("body", "p", "a", "small", ".bad", ".good", "td", "th", ".bar i", ".line"):
        found = shown.evaluate(CONTRAST, selector)
        assert found and min(found) >= 4.5, (selector, min(found))
    heated = shown.evaluate(CONTRAST, ".heat")
    assert max(heated) - min(heated) > 3, "tints are seen by the measurement"
    shown.context.close()


def test_every_control_is_reached_by_tab_and_shows_it(shown: "Page") -> None:
    wanted = shown.evaluate(
        """() => [...document.querySelectorAll("a, button, input, select, summary, .scroll")]
          .filter((e) => e.checkVisibility()).map((e, i) => (e.dataset.seen = i, i))"""
    )
    reached: dict[int, float] = {}
    for _ in range(len(wanted) + 3):
        shown.keyboard.press("Tab")
        seen, outline = shown.evaluate(
            "(e => [e.dataset.seen, parseFloat(getComputedStyle(e).outlineWidth)])"
            "(document.activeElement)"
        )
        if seen is not None:
            reached[int(seen)] = outline
    assert sorted(reached) == wanted
    assert min(reached.values()) >= 1, "where the focus is can be seen"


def test_the_skip_link_skips(shown: "Page") -> None:
    shown.keyboard.press("Tab")
    assert shown.evaluate("document.activeElement.className") == "skip"
    shown.keyboard.press("Enter")
    assert shown.evaluate("document.activeElement.id") == "main"


def test_headings_in_order_and_tables_named(shown: "Page") -> None:
    levels = shown.eval_on_selector_all("h1, h2, h3", "e => e.map(h => +h.tagName[1])")
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b <= a + 1 for a, b in pairwise(levels))
    assert shown.evaluate("document.documentElement.lang") == "en"
    assert shown.locator("table:not(:has(caption))").count() == 0
    ids = shown.eval_on_selector_all("[id]", "e => e.map(x => x.id)")
    assert len(ids) == len(set(ids))
    assert shown.locator("nav a").all_inner_texts() == shown.locator("h2").all_inner_texts()


def test_without_javascript_everything_is_there(browser: "Browser", address: str) -> None:
    shown = opened(browser, address, java_script_enabled=False)
    rows = shown.locator("#summary-table tbody tr").all_inner_texts()
    assert len(rows) == len(result().rows) and "ffn.spills" in rows[6]
    assert [s.is_visible() for s in shown.locator("svg.roofline").all()] == [True] * len(TARGETS)
    assert not any(e.is_visible() for e in shown.locator("select, input, button").all())
    targets = shown.locator("table.source").first.locator("thead tr").first.inner_text()
    assert all(target in targets for target in TARGETS)
    shown.context.close()


def test_print_shows_what_is_folded(shown: "Page") -> None:
    folded = shown.locator("table.source").nth(1)
    assert not folded.is_visible()
    shown.emulate_media(media="print", color_scheme="dark")
    assert folded.bounding_box() is not None
    assert not shown.locator("#filter").is_visible()
    assert shown.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
