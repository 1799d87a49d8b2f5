"""The page of fastgpt explain in a browser."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from fastgpt.interpret import page
from tests.explained import explanation
from tests.test_lab_browser import browser, opened  # noqa: F401

pytest.importorskip("captum")

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "explained.html"
    page.write(explanation(), path)
    return path.as_uri()


@pytest.fixture
def shown(browser: "Browser", address: str) -> "Iterator[Page]":  # noqa: F811
    made = opened(browser, address)
    yield made
    made.context.close()


def said(shown: "Page") -> str:
    return shown.locator("#said").inner_text()


def shares(shown: "Page") -> list[float]:
    """What the tokens say below them, in per cent."""
    texts = shown.locator(".tok:not(.goal) i").all_inner_texts()
    return [float(text.removesuffix(" %")) if text else 0.0 for text in texts]


def weights(layer: int, head: int | None, row: int) -> list[float]:
    w = explanation().weights
    chosen = w[layer].mean(0) if head is None else w[layer, head]
    return [100.0 * float(x) for x in chosen[row]]


def close(got: list[float], want: list[float]) -> bool:
    """To what is printed: a tenth below ten per cent, else a whole; nothing below a half."""
    return all(
        abs(g - w) <= (0.051 if w < 9.9 else 0.51) or (g == 0.0 and w < 0.5)
        for g, w in zip(got, want, strict=True)
    )


def test_quiet_alone_and_true_to_the_text(browser: "Browser", address: str) -> None:  # noqa: F811
    context = browser.new_context()
    shown = context.new_page()
    heard: list[str] = []
    shown.on("console", lambda message: heard.append(message.text))
    shown.on("pageerror", lambda error: heard.append(str(error)))
    shown.on("request", lambda request: heard.append(request.url))
    shown.goto(address)
    shown.wait_for_load_state("networkidle")
    assert heard == [address]
    assert shown.locator(".tok:not(.goal) b").all_text_contents() == list(explanation().tokens)
    assert shown.locator("#strip").get_attribute("lang") == "zh"
    assert shown.locator("#strip b b, #strip script").count() == 0
    context.close()


def test_a_token_shows_where_it_looks(shown: "Page") -> None:
    T = len(explanation().tokens)
    layer, head = explanation().strongest(1)[0]
    assert close(shares(shown), weights(layer, head, T - 1)), "at first the head that matters most"
    assert said(shown).startswith(f"Layer {layer}, head {head}: ")
    shown.locator("#grid [role=gridcell]").nth(3).click()
    assert close(shares(shown), weights(1, None, T - 1))
    assert said(shown).startswith("Layer 1, mean of 2 heads: ")
    shown.locator(".tok").nth(3).hover()
    assert close(shares(shown), weights(1, None, 3))
    assert "(position 3)" in said(shown)
    shown.mouse.move(0, 0)
    assert f"(position {T - 1})" in said(shown), "leaving goes back to what was chosen"
    shown.locator(".tok").nth(5).click()
    shown.mouse.move(0, 0)
    assert close(shares(shown), weights(1, None, 5))
    assert shown.locator(".tok.on").count() == 1
    shown.keyboard.press("ArrowRight")
    assert close(shares(shown), weights(1, None, 6))
    shown.keyboard.press("Home")
    assert shares(shown)[0] == 100.0
    assert shown.evaluate("document.activeElement.matches('.tok.on')")


def test_a_head_by_click_and_by_keyboard(shown: "Page") -> None:
    T = len(explanation().tokens)
    cells = shown.locator("#grid [role=gridcell]")
    assert cells.count() == 2 * 3
    cells.nth(1).click()  # layer 0, head 0
    assert close(shares(shown), weights(0, 0, T - 1))
    assert shown.locator("#map-title").inner_text() == "Layer 0, head 0"
    shown.keyboard.press("ArrowRight")
    shown.keyboard.press("ArrowDown")
    assert close(shares(shown), weights(1, 1, T - 1))
    chosen = shown.locator("#grid [aria-selected=true]")
    assert chosen.count() == 1 and chosen.evaluate("e => e === document.activeElement")
    lost = float(explanation().lost[1, 1])
    assert f"{abs(lost):.3f} nats lost without it" in (chosen.get_attribute("aria-label") or "")
    assert shown.locator("#grid [tabindex='0']").count() == 1
    shown.locator("#best button").first.click()
    layer, head = explanation().strongest(1)[0]
    assert shown.locator("#map-title").inner_text() == f"Layer {layer}, head {head}"


def test_the_map_is_the_weights(shown: "Page") -> None:
    """Its pixels get darker with the weight, and a click chooses the row."""
    shown.locator("#grid [role=gridcell]").nth(2).click()
    row = shown.evaluate(
        """() => { const small = document.createElement('canvas'); pixels(small, 0, 1);
        const d = small.getContext('2d').getImageData(0, 6, 7, 1).data;
        return Array.from({length: 7}, (_, i) => d[4 * i]); }"""
    )
    want = weights(0, 1, 6)[:7]
    order = sorted(range(7), key=lambda key: want[key])
    assert sorted(row, reverse=True) == [row[key] for key in order], "red falls from white to blue"
    box = shown.locator("#map").bounding_box()
    assert box is not None
    at = shown.evaluate("[shapes.left + 1.5 * shapes.cell, shapes.top + 4.5 * shapes.cell]")
    shown.locator("#map").click(position={"x": at[0], "y": at[1]})
    assert "(position 4)" in said(shown)
    assert (
        shown.locator("#under")
        .inner_text()
        .startswith(f"{explanation().tokens[4]} → {explanation().tokens[1]}: ")
    )


def test_rollout_and_attribution(shown: "Page") -> None:
    shown.get_by_role("radio", name="Rollout").check()
    found = explanation()
    assert close(shares(shown), [100.0 * float(x) for x in found.rollout[-1]])
    shown.get_by_role("radio", name="Attribution").check()
    texts = shown.locator(".tok:not(.goal) i").all_inner_texts()
    got = [float(text.replace("−", "-")) for text in texts]
    assert got == pytest.approx(found.attribution.scores.tolist(), abs=0.0051)
    assert f"{found.attribution.value:.3f}" in said(shown)


def test_tables(shown: "Page") -> None:
    found = explanation()
    rows = shown.locator("#lens tbody tr")
    assert rows.count() == 3
    cells = rows.nth(1).locator("td").all_text_contents()
    assert cells[:-2] == [c.text for c in found.lens[1].each]
    assert cells[-1] == str(found.lens[1].rank)
    names = shown.locator("#next .name").all_text_contents()
    assert names == [c.text for c in found.follows]
    assert (
        f"{found.direct.logit:.2f}" in shown.locator("p", has_text="sum to the logit").inner_text()
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_fits_and_can_be_read(browser: "Browser", address: str, scheme: Any, width: int) -> None:  # noqa: F811
    shown = opened(browser, address, viewport={"width": width, "height": 800}, color_scheme=scheme)
    assert shown.evaluate("document.documentElement.scrollWidth") <= width
    for mode in ("Attribution", "Rollout", "Attention"):
        shown.get_by_role("radio", name=mode).check()
        for least in shown.evaluate(CONTRAST):
            assert least >= 4.5, (mode, least)
    shown.context.close()


# Of each token's text with its background, as WCAG counts it; the canvas resolves color-mix.
CONTRAST = """() => {
  const canvas = Object.assign(document.createElement('canvas'), {width: 1, height: 1});
  const pen = canvas.getContext('2d', {willReadFrequently: true});
  const light = (...layers) => {
    for (const colour of layers) { pen.fillStyle = colour; pen.fillRect(0, 0, 1, 1); }
    const linear = Array.from(pen.getImageData(0, 0, 1, 1).data, (c) => c / 255)
      .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  };
  const card = getComputedStyle(document.getElementById('reading')).backgroundColor;
  const shown = '.tok:not(.late) b, .tok:not(.late) i, #lens td';
  return [...document.querySelectorAll(shown)].filter((e) => e.textContent).map((e) => {
    const behind = [card, getComputedStyle(e.closest('.tok') ?? e).backgroundColor];
    const pair = [light(...behind), light(...behind, getComputedStyle(e).color)];
    return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
  });
}"""


def test_a_page_of_some_layers_heads_and_rows(
    browser: "Browser",  # noqa: F811
    tmp_path: Any,
) -> None:
    from fastgpt.interpret import explain_text
    from tests.explained import tiny

    found = explain_text(*tiny(), "looks at words", layers=[1], heads=[1], rows=[1, -1])
    page.write(found, tmp_path / "few.html")
    shown = opened(browser, (tmp_path / "few.html").as_uri())
    assert shown.locator("#grid [role=gridcell]").count() == 2
    assert said(shown).startswith("Layer 1, head 1: ")
    shown.locator(".tok").nth(0).click(force=True)
    assert f"(position {len(found.ids) - 1})" in said(shown), "that row was not kept"
    shown.locator(".tok").nth(1).click()
    got = shares(shown)
    assert close(got, [100.0 * float(x) for x in found.weights[0, 0, 0]])
    shown.context.close()
