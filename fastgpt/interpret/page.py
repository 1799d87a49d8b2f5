"""An explanation as one HTML file that needs nothing else: no network, no fonts, no server."""

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fastgpt.interpret.explanation import Candidate, Explanation
from fastgpt.lab.files import write_whole

HERE = Path(__file__).parent
FULL = 65535  # a weight of 1


def packed(weights: Tensor, rows: tuple[int, ...]) -> str:
    """Weights (..., R, T) as base64 of 16 bits each; of row i only the keys up to i."""
    flat = weights.reshape(-1, *weights.shape[-2:]).clamp(0.0, 1.0).mul(FULL).round().numpy()
    parts = [head[n, : row + 1] for head in flat for n, row in enumerate(rows)]
    return base64.b64encode(np.concatenate(parts).astype("<u2").tobytes()).decode()


def _pairs(found: list[Candidate]) -> list[tuple[str, float]]:
    return [(c.text, round(c.p, 5)) for c in found]


def _rounded(t: Tensor) -> Any:
    return np.round(t.double().numpy(), 4).tolist()


def data(found: Explanation) -> dict[str, Any]:
    """What page.js draws."""
    a, d = found.attribution, found.direct
    T, rows = len(found.tokens), tuple(found.rows)
    return {
        "text": found.text,
        "tokens": list(found.tokens),
        "model": found.model,
        "target": [found.target.text, found.target.p],
        "next": _pairs(list(found.follows)),
        "layers": list(found.layers),
        "heads": list(found.heads),
        "rows": list(rows),
        "weights": packed(found.weights, rows),
        "rollout": packed(found.rollout, tuple(range(T))),
        "scores": _rounded(a.scores),
        "value": a.value,
        "baseline": a.baseline,
        "lens": [
            {"top": _pairs(list(lens.top[:3])), "p": lens.p, "rank": lens.rank,
             "each": _pairs(list(lens.each))}
            for lens in found.lens
        ],
        "lost": _rounded(found.lost),
        "direct": _rounded(d.heads),
        "sum": {
            "logit": d.logit, "embedding": d.token + d.position, "bias": d.norm_bias,
            "attention": _rounded(d.heads.sum(1) + d.attention_bias), "mlp": _rounded(d.mlp),
        },
    }  # fmt: skip


def render(found: Explanation) -> str:
    """The page's text. Whatever a token holds, it is text there and nothing else."""
    told = json.dumps(data(found), ensure_ascii=False, separators=(",", ":"))
    page = (HERE / "page.html").read_text(encoding="utf-8")
    for name, text in (
        ("page.css", (HERE / "page.css").read_text(encoding="utf-8")),
        ("page.js", (HERE / "page.js").read_text(encoding="utf-8")),
        ("data", told.replace("<", "\\u003c")),
    ):
        page = page.replace(f"/*{name}*/", text)
    return page


def write(found: Explanation, path: str | Path) -> None:
    """Write the page whole or not at all.

    Raises:
        OSError: the folder is not there, or cannot be written.
    """
    write_whole(path, render(found))
