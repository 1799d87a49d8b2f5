"""Where a sum goes into a norm: one pass for dropout, the sum and the norm of it.

After a layer, as in BERT:  norm(dropout(dense(x)) + residual).
In a pre-norm block, as in GPT-2 and Llama, whose second sum is the next block's affair:

    a = attention(norm1(h), ...);  h = h + dropout(a);  h = h + dropout(feed_forward(norm2(h)))
"""

import operator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx, nn

from fastgpt.patching.feed_forward import FeedForwardHow, drop, feed_forward, match, says
from fastgpt.patching.norms import NormHow, norm_of
from fastgpt.patching.swap import Patched, Swap, at, fusable, kind
from fastgpt.patching.trace import MORE, Steps, parameters_of, trace

Norms = dict[nn.Module, NormHow]  # those of the model that are replaced


@dataclass(frozen=True)
class AddNormHow:
    """Names of the layer before, of dropout ("" for none) and of the norm."""

    dense: str
    dropout: str
    norm: str
    how: NormHow
    types: tuple[type[nn.Module], ...]  # of norm and dropout


def probability(module: nn.Module, name: str) -> float:
    """Of the dropout in the submodule or the attribute of that name, in its mode at the time."""
    if not name:
        return 0.0
    found = at(module, name)
    if isinstance(found, nn.Dropout):
        return found.p if found.training else 0.0
    return float(found) if module.training else 0.0


def layers_of(module: nn.Module, norm: str, dropout: str) -> tuple[nn.Module, ...]:
    """The submodules that the fused norm does the work of."""
    found = [at(module, name) for name in (norm, dropout) if name]
    return tuple(m for m in found if isinstance(m, nn.Module))


class PatchedAddNorm(Patched):
    """norm(dropout(dense(x)) + residual)."""

    def run(self, x: Tensor, residual: Tensor) -> Any:
        how: AddNormHow = self._fastgpt_how
        p = probability(self, how.dropout)
        layers = layers_of(self, how.norm, how.dropout)
        if not fusable(layers, how.types) or p >= 1.0:
            return self.original(x, residual)
        x = at(self, how.dense)(x)
        return norm_of(layers[0], how.how, x, residual, p)[0]


def recognise_add_norm(module: nn.Module, norms: Norms) -> Swap | str | None:
    """A swap if module's forward(x, residual) is that; None if it has another shape."""
    if sum(m in norms for m in module.children()) != 1:
        return None
    takes = parameters_of(module)
    if len(takes) != 2 or any(p.kind is not p.POSITIONAL_OR_KEYWORD for p in takes):
        return None
    steps = trace(module, (takes[0].name, takes[1].name))
    if isinstance(steps, str):
        return steps
    layer = steps.called(steps.result)
    if layer is None or layer not in norms:
        return None
    terms = steps.added(steps.result.args[0])
    if terms is None or steps[1] not in terms:
        return None
    dropout, node = steps.dropped(terms[0] if terms[1] is steps[1] else terms[1])
    if steps.called(node) is None or node.args[0] is not steps[0]:
        return None
    if steps.between != 3 + bool(dropout):
        return None
    norm = str(steps.result.target)
    layers = layers_of(module, norm, dropout)
    how = AddNormHow(
        str(node.target), dropout, norm, norms[layer], tuple(kind(m) for m in layers)
    )  # fmt: skip
    op = "rms_norm" if how.how.rms else "layer_norm"
    parts = (norm, dropout) if len(layers) == 2 else (norm,)
    return Swap(PatchedAddNorm, how, f"{op} with the residual add", parts)


@dataclass(frozen=True)
class BlockHow:
    """What a block calls, by name, and what it hands to its attention."""

    takes: tuple[tuple[str, Any], ...]  # forward's arguments and their defaults
    absent: tuple[str, ...]  # those that must not be there
    norm1: str
    attention: str
    hands: tuple[tuple[int | str, str], ...]  # place or keyword -> forward's argument
    stream: int | str  # where the attention takes the normed stream
    more: bool  # whether it gets **kwargs too
    first: bool  # whether it is the first of what the attention returns
    dropout1: str
    norm2: str
    how: NormHow
    feed_forward: str | FeedForwardHow
    dropout2: str
    types: tuple[type[nn.Module], ...]  # of norm2, and of dropout1 if that is a submodule
    wrapped: bool  # whether a tuple of one is returned


class PatchedBlock(Patched):
    """A pre-norm block whose first sum is made in its second norm."""

    def run(self, *args: Any, **kwargs: Any) -> Any:
        how: BlockHow = self._fastgpt_how
        names = [name for name, _ in how.takes]
        given = {**dict(how.takes), **dict(zip(names, args, strict=False)), **kwargs}
        norm2 = layers_of(self, how.norm2, how.dropout1)
        inner: tuple[nn.Module, ...] = ()
        if isinstance(how.feed_forward, FeedForwardHow):
            inner = tuple(at(self, name) for name in how.feed_forward.parts)
        p = probability(self, how.dropout1)
        if (
            not fusable(norm2, how.types)
            or not (inner == () or fusable(inner, how.feed_forward.types))  # type: ignore[union-attr]
            or any(given[name] is not None for name in how.absent)
            or p >= 1.0
            or len(args) > len(names)
            or (not how.more and len(given) > len(names))
        ):
            return self.original(*args, **kwargs)
        h = given[names[0]]
        y = at(self, how.norm1)(h)
        handed = {to: given[name] for to, name in how.hands} | {how.stream: y}
        places = [handed[i] for i in range(len(handed)) if i in handed]
        keywords = {k: v for k, v in handed.items() if isinstance(k, str)}
        if how.more:
            keywords |= {k: v for k, v in given.items() if k not in names}
        a = at(self, how.attention)(*places, **keywords)
        a = a[0] if how.first else a
        y, h = norm_of(norm2[0], how.how, a, h, p)
        if isinstance(how.feed_forward, FeedForwardHow):
            y = feed_forward(how.feed_forward, inner, y)
        else:
            y = at(self, how.feed_forward)(y)
        h = h + drop(self, how.dropout2, y)
        return (h,) if how.wrapped else h


def recognise_block(module: nn.Module, norms: Norms) -> Swap | str | None:
    """A swap if module is a pre-norm block; why not if it only looks like one; else None."""
    if sum(m in norms for m in module.children()) < 2:
        return None
    takes = parameters_of(module)
    plain = [p for p in takes if p.kind is p.POSITIONAL_OR_KEYWORD]
    more = [p for p in takes if p.kind is p.VAR_KEYWORD]
    if len(plain) + len(more) != len(takes) or not plain:
        return "its forward takes arguments of a kind that is not handed on"
    absent = tuple(p.name for p in plain if p.name.startswith(("encoder_", "cross_")))
    names = tuple(p.name for p in plain if p.name not in absent)
    steps = trace(module, (*names, *[MORE for _ in more]), dict.fromkeys(absent))
    if isinstance(steps, str):
        return steps
    found = _match_block(steps, norms)
    if isinstance(found, str):
        return found
    default = [None if p.default is p.empty else p.default for p in plain]
    how = replace(
        found, takes=tuple(zip((p.name for p in plain), default, strict=True)), absent=absent
    )
    parts: tuple[str, ...] = (how.norm2,) + ((how.dropout1,) if len(how.types) == 2 else ())
    words = f"{'rms_norm' if how.how.rms else 'layer_norm'} with the residual add"
    if isinstance(how.feed_forward, FeedForwardHow):
        parts += how.feed_forward.parts
        words += f", {says(how.feed_forward)}"
    return Swap(PatchedBlock, how, words, parts)


NOT_PRE_NORM = "its forward is not norm, attention, add, norm, feed-forward, add"


def _match_block(steps: Steps, norms: Norms) -> BlockHow | str:
    """Walk from the result back to the input."""
    h, result = steps[0], steps.result
    wrapped = isinstance(result, tuple)
    if wrapped and len(result) == 1:
        result = result[0]
    for second, branch in _both(steps.added(result)):
        dropout2, node = steps.dropped(branch)
        found = _match_feed_forward(steps, node)
        if found is None:
            continue
        ffn, normed, count = found
        norm2 = steps.called(normed)
        if norm2 not in norms or normed.args[0] is not second:
            continue
        for stream, term in _both(steps.added(second)):
            if stream is not h:
                continue
            dropout1, a = steps.dropped(term)
            layers = layers_of(steps.module, str(normed.target), dropout1)
            how = BlockHow(
                (), (), *_match_attention(steps, a, norms), dropout1, str(normed.target),
                norms[norm2], ffn, dropout2, tuple(kind(m) for m in layers), wrapped,
            )  # fmt: skip
            # Two norms, the attention and two sums, and what of the rest there is: no step more.
            rest = how.first + bool(dropout1) + bool(dropout2)
            if how.attention and steps.between == 5 + count + rest:
                return how
    return NOT_PRE_NORM


def _match_feed_forward(steps: Steps, node: Any) -> tuple[str | FeedForwardHow, Any, int] | None:
    """A submodule, or a feed-forward in the block itself; what it is of; and its steps."""
    if steps.called(node) is None:
        return None
    inline = match(steps, node)
    if isinstance(inline, str):
        return str(node.target), node.args[0], 1
    ffn, normed = inline
    return ffn, normed, len(ffn.types) + (not ffn.act) + bool(ffn.gate)


Attention = tuple[str, str, tuple[tuple[int | str, str], ...], int | str, bool, bool]


def _match_attention(steps: Steps, node: Any, norms: Norms) -> Attention:
    """BlockHow's norm1, attention, hands, stream, more and first; "" if it is no call of a
    submodule with the normed input and with forward's own arguments."""
    none: Attention = ("", "", (), 0, False, False)
    first = isinstance(node, fx.Node) and node.target is operator.getitem and node.args[1] == 0
    call = node.args[0] if first else node
    if not isinstance(call, fx.Node) or call.op != "call_module":
        return none
    handed: dict[Any, Any] = {**dict(enumerate(call.args)), **call.kwargs}
    more = handed.pop(MORE, None) is not None
    places = [k for k, v in handed.items() if steps.called(v) in norms]
    if len(places) != 1 or handed[places[0]].args[0] is not steps[0]:
        return none
    norm1 = handed.pop(places[0])
    if any(not isinstance(v, fx.Node) or v.op != "placeholder" for v in handed.values()):
        return none
    hands = tuple((k, str(v.target)) for k, v in handed.items())
    return str(norm1.target), str(call.target), hands, places[0], more, bool(first)


def _both(terms: tuple[Any, Any] | None) -> tuple[tuple[Any, Any], ...]:
    return () if terms is None else (terms, terms[::-1])
