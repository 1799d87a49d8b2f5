"""BERT's feed-forward, which spans two modules: norm(dropout(down(act(up(x)))) + x).

Layers of its kind have it in a method of that name, `feed_forward_chunk`, that forward calls, for
all positions or for some of them at a time.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fastgpt.patching.feed_forward import FeedForwardHow, feed_forward, match, says
from fastgpt.patching.norms import NormHow, norm_of
from fastgpt.patching.residual import Norms, layers_of, probability
from fastgpt.patching.swap import Patched, Swap, at, fusable, kind
from fastgpt.patching.trace import trace

METHOD = "feed_forward_chunk"


@dataclass(frozen=True)
class ChunkHow:
    """The feed-forward, the names of dropout ("" for none) and norm, and of all that is fused."""

    ffn: FeedForwardHow
    dropout: str
    norm: str
    how: NormHow
    parts: tuple[str, ...]
    types: tuple[type[nn.Module], ...]


class PatchedChunk(Patched):
    """A layer whose feed_forward_chunk runs on ops.ffn and a norm with the add in it."""

    def run(self, *args: Any, **kwargs: Any) -> Any:
        return self.original(*args, **kwargs)

    def feed_forward_chunk(self, x: Tensor) -> Any:
        """x: (B, T, C) -> (B, T, C)."""
        how: ChunkHow = self._fastgpt_how
        p = probability(self, how.dropout)
        if p >= 1.0 or not fusable(tuple(at(self, name) for name in how.parts), how.types):
            return getattr(self._fastgpt_was, METHOD)(self, x)
        y = feed_forward(how.ffn, tuple(at(self, name) for name in how.ffn.parts), x)
        return norm_of(at(self, how.norm), how.how, y, x, p)[0]


def recognise_chunk(module: nn.Module, norms: Norms) -> Swap | str | None:
    """A swap if module has such a method; why not if it computes something else; else None."""
    method = getattr(kind(module), METHOD, None)
    if method is None:
        return None
    steps = trace(module, ("x",), method=lambda twin, x: method(twin, x))
    if isinstance(steps, str):
        return steps
    norm = steps.called(steps.result)
    terms = steps.added(steps.result.args[0]) if norm in norms else None
    if norm is None or terms is None or steps[0] not in terms:
        return f"its {METHOD} does not end in a norm of a sum with its input"
    dropout, node = steps.dropped(terms[0] if terms[1] is steps[0] else terms[1])
    found = match(steps, node)
    if isinstance(found, str):
        return found
    ffn, x = found
    count = len(ffn.types) + (not ffn.act) + bool(ffn.gate) + bool(dropout) + 2
    if x is not steps[0] or steps.between != count:
        return f"its {METHOD} does more than feed-forward, add and norm"
    name = str(steps.result.target)
    inner = [*ffn.parts, name, *([dropout] if len(layers_of(module, name, dropout)) == 2 else [])]
    outer = {part.rpartition(".")[0] for part in inner} - {""}
    parts = (*inner, *sorted(outer))
    how = ChunkHow(
        ffn, dropout, name, norms[norm], parts, tuple(kind(at(module, part)) for part in parts)
    )  # fmt: skip
    return Swap(PatchedChunk, how, f"{says(ffn)}, norm after it", parts)
