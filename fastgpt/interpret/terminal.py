"""An explanation for a terminal: four short tables."""

import unicodedata
from collections.abc import Sequence

from fastgpt.interpret.explanation import Explanation

TOKENS = 32  # of a text that are shown, the last ones
HEADS = 8
LAYERS = 12  # columns
BAR = 24


def width(text: str) -> int:
    """Columns that a text takes: two for each wide character, as Chinese ones are."""
    return sum(
        0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF")
        for c in text
    )


def pad(text: str, columns: int, right: bool = False) -> str:
    room = " " * max(0, columns - width(text))
    return room + text if right else text + room


def short(text: str, columns: int) -> str:
    """At most so many columns, with … for what was left out."""
    if width(text) <= columns:
        return text
    while width(text) > columns - 1:
        text = text[:-1]
    return text + "…"


def table(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Columns as wide as their widest cell, the first `left` of them flush left."""
    wide = [max(map(width, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(
            pad(cell, w, n >= left) for n, (cell, w) in enumerate(zip(row, wide, strict=True))
        )
        for row in rows
    )
    return "\n".join(f"  {line}".rstrip() for line in lines)


def percent(p: float) -> str:
    return f"{100 * p:.1f}%" if p >= 0.0005 else "·"


def report(found: Explanation) -> str:
    """Next token, where the last position looks, what each layer would say, the heads."""
    parts = [
        f"{len(found.tokens)} tokens; {found.model}",
        _next(found),
        _tokens(found),
        _lens(found),
        _heads(found),
    ]
    return "\n\n".join(parts)


def _next(found: Explanation) -> str:
    best = max(found.follows[0].p, 1e-9)
    rows = [
        (short(c.text, 24), percent(c.p), "█" * max(1, round(BAR * c.p / best)))
        for c in found.follows
    ]
    lines = table([(a, b, pad(bar, BAR)) for a, b, bar in rows])
    return f"What comes next\n{lines}"


def _tokens(found: Explanation) -> str:
    n_layer = len(found.looks)
    step = -(-n_layer // LAYERS)
    layers = sorted({*range(n_layer - 1, -1, -step)})
    T = len(found.tokens)
    first = max(0, T - TOKENS)
    head = ["", "token", *(f"layer {n}" if n == layers[0] else str(n) for n in layers)]
    rows: list[Sequence[str]] = [[*head, "rollout", "nats"]]
    for t in range(first, T):
        looks = [percent(float(found.looks[n, t])) for n in layers]
        score = f"{float(found.attribution.scores[t]):+.2f}"
        token = short(found.tokens[t], 20)
        rows.append([str(t), token, *looks, percent(float(found.rollout[-1, t])), score])
    a, target = found.attribution, found.target
    assert a.baseline is not None and a.error is not None
    left_out = f" (the last {T - first} of {T} tokens)" if first else ""
    return (
        f"Where position {T - 1} looks, mean over heads, and what each token adds to"
        f" log p({target.text}){left_out}\n{table(rows, 2)}\n"
        f"  nats sum to {float(a.scores.sum()):+.3f}, from log p {a.baseline:.3f} without the"
        f" tokens to {a.value:.3f} with them; off by {abs(a.error):.1e}"
    )


def _lens(found: Explanation) -> str:
    rows: list[Sequence[str]] = [
        ["after", "the model would say", "", "", found.target.text, "rank"]
    ]
    for n, lens in enumerate(found.lens):
        said = [f"{short(c.text, 14)} {percent(c.p)}" for c in lens.top[:3]]
        said += [""] * (3 - len(said))
        name = "embedding" if n == 0 else f"layer {n - 1}"
        rows.append([name, *said, percent(lens.p), str(lens.rank)])
    return f"What it would say if it stopped after a layer\n{table(rows, 4)}"


def _heads(found: Explanation) -> str:
    rows: list[Sequence[str]] = [["head", "nats lost without it", "adds to the logit", "looks at"]]
    kept = {(layer, head) for layer in found.layers for head in found.heads}
    T = len(found.tokens)
    for layer, head in found.strongest(HEADS):
        looks = "-"
        if (layer, head) in kept and T - 1 in found.rows:
            at = found.layers.index(layer), found.heads.index(head), found.rows.index(T - 1)
            most = found.weights[at].topk(min(2, T))
            looks = ", ".join(
                f"{short(found.tokens[t], 14)} {percent(w)}"
                for w, t in zip(most.values.tolist(), most.indices.tolist(), strict=True)
            )
        lost, direct = float(found.lost[layer, head]), float(found.direct.heads[layer, head])
        rows.append([f"layer {layer} head {head}", f"{lost:+.3f}", f"{direct:+.3f}", looks])
    widest = max(width(row[-1]) for row in rows)
    rows = [[*row[:-1], pad(row[-1], widest)] for row in rows]  # words, flush left
    return f"Heads that matter most to {found.target.text}\n{table(rows, 1)}"
