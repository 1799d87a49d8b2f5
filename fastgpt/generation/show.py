"""The distribution of the next token, shown: as a table and as a plot."""

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt.decoder import Decoder
from fastgpt.generation.sampling import Sampling
from fastgpt.model import GPT
from fastgpt.tokenizer import Tokenizer

BAR = 30  # characters of the likeliest token's
EIGHTHS = " ▏▎▍▌▋▊▉█"
# Fonts that have Chinese, of Linux, Windows and macOS.
FONTS = (
    "Noto Sans CJK SC", "Noto Sans SC", "Noto Sans CJK JP", "Source Han Sans SC",
    "Source Han Sans CN", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Droid Sans Fallback",
    "Microsoft YaHei", "SimHei", "PingFang SC", "Hiragino Sans GB", "Arial Unicode MS",
)  # fmt: skip


@dataclass(frozen=True)
class Likely:
    """An id that may come next.

    Attributes:
        rank: from 1 on.
        id: the token.
        token: as it can be shown, see `label`.
        p: its probability.
    """

    rank: int
    id: int
    token: str
    p: float


@dataclass(frozen=True)
class Next:
    """What may come after a prompt.

    Attributes:
        likeliest: the first of them, the likeliest first.
        entropy: sum -p log p over all ids, in nats.
        possible: how many ids have a probability above 0.
    """

    likeliest: Sequence[Likely]
    entropy: float
    possible: int


def next_token(
    model: GPT,
    ids: Sequence[int],
    top: int,
    tokenizer: Tokenizer | None = None,
    sampling: Sampling | None = None,
) -> Next:
    """The distribution of the token after ids.

    Args:
        ids: a prompt of at most block_size tokens.
        top: how many tokens to tell.
        tokenizer: to show them by.
        sampling: as what the distribution is drawn from; the model's own if None.

    Raises:
        ValueError: the prompt is too long for the context.
    """
    if len(ids) > model.config.block_size:
        raise ValueError(
            f"next: the prompt must fit the context, block_size {model.config.block_size};"
            f" got {len(ids)} tokens"
        )
    sampling = Sampling() if sampling is None else sampling
    row = torch.tensor([list(ids)], device=model.wte.weight.device)
    logits = Decoder(model, 1, len(ids)).prefill(row)
    seen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, row, True)
    p = sampling.probabilities(logits, seen)[0].double()
    values, order = p.topk(min(top, len(p)))
    likeliest = [
        Likely(rank, id, label(id, tokenizer), value)
        for rank, (id, value) in enumerate(zip(order.tolist(), values.tolist(), strict=True), 1)
        if value > 0.0
    ]
    return Next(likeliest, entropy(p), int((p > 0).sum()))


def entropy(p: Tensor) -> float:
    """sum -p log p, in nats."""
    return float(torch.special.entr(p).sum())


def label(id: int, tokenizer: Tokenizer | None) -> str:
    """A token as it can be read: in quotes, with bytes that are no whole character in brackets."""
    if tokenizer is None:
        return str(id)
    table = tokenizer.token_bytes
    raw = table[id] if 0 <= id < len(table) else b""
    if not raw:
        return tokenizer.name(id) or "no token"
    parts, bad = [], b""
    for c in raw.decode(errors="surrogateescape"):
        if "\udc80" <= c <= "\udcff":
            bad += bytes([ord(c) - 0xDC00])
            continue
        parts += [f"<{bad.hex(' ')}>"] if bad else []
        parts.append('\\"' if c == '"' else c if c == "'" else repr(c)[1:-1])
        bad = b""
    parts += [f"<{bad.hex(' ')}>"] if bad else []
    return '"' + "".join(parts) + '"'


def width(text: str) -> int:
    """Columns of a terminal: two for a wide character, none for one that joins another."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def table(found: Next) -> str:
    """The tokens below each other, and the entropy."""
    rest = found.possible - len(found.likeliest)
    others = f"{rest:,} others"
    wide = max(len("token"), len(others), *(width(one.token) for one in found.likeliest))
    lines = [f"rank  {'token':<{wide}}  {'id':>7}  probability"]
    most = found.likeliest[0].p
    for one in found.likeliest:
        eighths = round(8 * BAR * one.p / most)
        bar = "█" * (eighths // 8) + EIGHTHS[eighths % 8].strip()
        pad = " " * (wide - width(one.token))
        line = f"{one.rank:>4}  {one.token}{pad}  {one.id:>7}  {_percent(one.p):>11}  {bar}"
        lines.append(line.rstrip())
    if rest > 0:
        left = max(0.0, 1.0 - sum(one.p for one in found.likeliest))
        lines.append(f"      {others:<{wide}}  {'':>7}  {_percent(left):>11}")
    bits, like = found.entropy / math.log(2.0), math.exp(found.entropy)
    lines.append(
        f"entropy {bits:.2f} bits: as uncertain as {like:,.1f} equally likely tokens"
        f" of {found.possible:,}"
    )
    return "\n".join(lines)


def plot(found: Next, title: str, path: Path) -> str | None:
    """Write the tokens' probabilities as a PNG.

    Returns:
        What is to be said of it: that no font here has some character.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: path cannot be written.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.font_manager import FontProperties
    except ImportError:
        raise ImportError("next: --png needs the package matplotlib") from None
    fonts, known = _fonts()
    names = [one.token if known(one.token) else f"id {one.id}" for one in found.likeliest]
    lost = [one.token for one in found.likeliest if not known(one.token)]
    if not known(title):
        lost.append(title)
        title = "the next token"
    font = FontProperties(family=fonts)
    p = [100.0 * one.p for one in found.likeliest]
    figure = Figure((7.0, 1.2 + 0.28 * len(p)), layout="constrained")
    axis = figure.subplots()
    bars = axis.barh(range(len(p)), p, color="tab:blue")
    axis.bar_label(bars, [_percent(one.p) for one in found.likeliest], padding=3, fontsize=8)
    axis.set_yticks(range(len(p)), names, fontproperties=font, fontsize=10, parse_math=False)
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.set_xlabel(f"probability, %; entropy {found.entropy / math.log(2.0):.2f} bits")
    axis.set_title(title, fontproperties=font, fontsize=11, parse_math=False)
    figure.savefig(path, format="png", dpi=150)
    if lost:
        return f"no font here has all characters of {', '.join(lost)}: shown otherwise"
    return None


def _fonts() -> tuple[list[str], Any]:
    """The fonts to draw text in, and whether they have all characters of a text."""
    from matplotlib import font_manager
    from matplotlib.ft2font import FT2Font

    here = {font.name: font.fname for font in font_manager.fontManager.ttflist}
    names = ["DejaVu Sans", *(name for name in FONTS if name in here)]
    characters: set[int] = set()
    for name in names:
        characters |= FT2Font(here[name]).get_charmap().keys()
    return names, lambda text: all(ord(c) in characters for c in text)


def _percent(p: float) -> str:
    return f"{100.0 * p:.2f} %" if p >= 1e-4 else f"{100.0 * p:.0e} %"
