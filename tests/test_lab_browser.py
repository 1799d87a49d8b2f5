"""The lab's page in a browser, which shows it, sorts it, filters it, and is safe from it."""

import shutil
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest

from fastgpt.lab import page
from tests.lab_result import FLAGS, HOSTILE, TARGETS, result

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip("needs Chromium: apt-get install chromium")
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
