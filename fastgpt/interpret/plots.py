"""An explanation as four PNGs: attention.png, tokens.png, lens.png and heads.png."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastgpt.interpret.explanation import Explanation
from fastgpt.interpret.terminal import short

LABELLED = 40  # tokens that have room for their names
PANEL = 24  # in a panel beside others
COLUMNS = 64  # of the lens, the last ones
# Beside matplotlib's own, which has no Chinese, whichever of these is installed.
FONTS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC", "PingFang SC",
    "Hiragino Sans GB", "Microsoft YaHei", "SimHei", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei",
    "Droid Sans Fallback", "Arial Unicode MS", "IPAexGothic", "Noto Sans Symbols2",
)  # fmt: skip


def needs_matplotlib() -> None:
    """Raises ImportError, in a line, if it is not there."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ImportError(
            "explain: --png needs the package matplotlib; pip install 'fastgpt-triton[explain]'"
        ) from None


def draw(found: Explanation, folder: Path) -> list[Path]:
    """Write the four plots; the folder is made if it is not there.

    Returns:
        Their paths.

    Raises:
        OSError: the folder cannot be made or written.
    """
    import matplotlib

    folder.mkdir(parents=True, exist_ok=True)
    fonts = _fonts()
    named = _Names(found, fonts)
    written = []
    with matplotlib.rc_context({"font.family": fonts, "font.size": 8, "axes.titlesize": 8}):
        for name, plot in (
            ("attention", _attention), ("tokens", _tokens), ("lens", _lens), ("heads", _heads),
        ):  # fmt: skip
            path = folder / f"{name}.png"
            plot(found, named).savefig(path, dpi=150, bbox_inches="tight")
            written.append(path)
    return written


def _fonts() -> list[str]:
    from matplotlib import font_manager

    there = set(font_manager.get_font_names())
    return ["DejaVu Sans", *(name for name in FONTS if name in there)]


class _Names:
    """Tokens as these fonts can draw them: a character that none has is shown by its number."""

    def __init__(self, found: Explanation, fonts: Sequence[str]) -> None:
        from matplotlib import font_manager

        self._drawn: set[int] = set()
        for font in fonts:
            path = font_manager.findfont(font)
            self._drawn |= set(font_manager.get_font(path).get_charmap())
        self.tokens = [self(token) for token in found.tokens]

    def __call__(self, text: str, columns: int = 14) -> str:
        made = "".join(c if ord(c) in self._drawn else f"\\u{ord(c):04x}" for c in text)
        return short(made, columns).replace("$", r"\$")


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _ticks(axis: Any, names: Sequence[str], along: str) -> None:
    if len(names) <= LABELLED:
        rotation = {"rotation": 90} if along == "x" else {}
        getattr(axis, f"set_{along}ticks")(range(len(names)), names, fontsize=6, **rotation)


def _attention(found: Explanation, named: _Names) -> Any:
    """A panel a head: rows look, columns are looked at."""
    from matplotlib.colors import PowerNorm

    n, heads, T = len(found.layers), len(found.heads), len(found.tokens)
    whole = n * heads == 1
    side = 6.0 if whole else max(0.9, min(2.2, 16.0 / heads))
    figure = _figure(side * heads + 1.0, side * n * max(0.3, len(found.rows) / T) + 0.8)
    axes = figure.subplots(n, heads, squeeze=False)
    rows = [named.tokens[row] for row in found.rows]
    image = None
    for i, layer in enumerate(found.layers):
        for j, head in enumerate(found.heads):
            axis = axes[i][j]
            # Small weights are to be seen beside large ones.
            image = axis.imshow(found.weights[i, j], norm=PowerNorm(0.6, 0.0, 1.0), cmap="Blues")
            axis.set_title(f"{layer}.{head}", pad=2)
            axis.set_xticks([])
            axis.set_yticks([])
            if whole or (side > 1.8 and T <= PANEL):
                _ticks(axis, rows if j == 0 else [""] * len(rows), "y")
                _ticks(axis, named.tokens if i == n - 1 else [""] * T, "x")
    figure.suptitle("Attention weights by layer.head: rows look, columns are looked at")
    figure.colorbar(image, ax=axes, shrink=0.5)
    return figure


def _tokens(found: Explanation, named: _Names) -> Any:
    """What each token adds, and how much of it arrives."""
    T = len(found.tokens)
    figure = _figure(9.0, max(2.0, 0.22 * T + 1.0))
    left, right = figure.subplots(1, 2, sharey=True)
    at = np.arange(T)
    scores = found.attribution.scores.numpy()
    left.barh(at, scores, color=np.where(scores < 0.0, "#b0430f", "#0b6b62"))
    left.axvline(0.0, color="black", linewidth=0.6)
    left.set_title(f"nats added to log p({named(found.target.text)}), integrated gradients")
    right.barh(at, found.rollout[-1].numpy(), color="#8a4f00")
    right.set_title("attention rollout from the last position")
    _ticks(left, named.tokens, "y")
    left.invert_yaxis()
    return figure


def _lens(found: Explanation, named: _Names) -> Any:
    """The likeliest next token after each layer and position."""
    first = max(0, len(found.tokens) - COLUMNS)
    p = np.array([[c.p for c in lens.each[first:]] for lens in found.lens])
    layers, columns = p.shape
    figure = _figure(max(4.0, 0.75 * columns + 1.5), 0.3 * layers + 1.5)
    axis = figure.subplots()
    image = axis.imshow(p, aspect="auto", cmap="Blues", vmin=0.0, vmax=1.0, origin="lower")
    for n, lens in enumerate(found.lens):
        for t, c in enumerate(lens.each[first:]):
            shade = "white" if c.p > 0.55 else "black"
            axis.text(t, n, named(c.text, 10), ha="center", va="center", fontsize=6, color=shade)
    axis.set_yticks(range(layers), ["embedding", *(f"layer {n}" for n in range(layers - 1))])
    axis.set_xticks(range(columns), named.tokens[first:], rotation=45, ha="right")
    axis.set_title("The likeliest next token if the model stopped after a layer")
    figure.colorbar(image, label="probability")
    return figure


def _heads(found: Explanation, named: _Names) -> Any:
    """What is lost without each head, and what it adds to the logit by itself."""
    n_layer, n_head = found.lost.shape
    figure = _figure(max(6.0, 0.8 * n_head + 2.0), max(2.2, 0.3 * n_layer + 1.2))
    target = named(found.target.text)
    for axis, values, title in zip(
        figure.subplots(1, 2), (found.lost, found.direct.heads),
        (f"nats of log p({target}) lost without it", f"added to the logit of {target}"),
        strict=True,
    ):  # fmt: skip
        most = max(float(values.abs().max()), 1e-9)
        image = axis.imshow(
            values, cmap="BrBG", vmin=-most, vmax=most, origin="lower", aspect="auto"
        )
        axis.set(title=title, xlabel="head", ylabel="layer")
        axis.set_xticks(range(n_head))
        axis.set_yticks(range(n_layer))
        figure.colorbar(image)
    return figure
