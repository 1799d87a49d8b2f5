"""How DTensor shares fastgpt's registered ops: rules for torch.distributed's own parallel styles.

fastgpt's GPT needs none of them: its ops meet plain tensors. A model of one's own may: torch's
SequenceParallel hands DTensors to a norm. A rule says which placements of the inputs go with which
of the outputs, in one dimension of a mesh; DTensor chooses among them and moves what does not fit.
A weight that all ranks hold gets from rows that they share a gradient that is still to be summed.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch._ops import OpOverload
from torch.distributed.tensor import Partial, Placement, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from fastgpt.ops.attention import backward_op as attention_bwd
from fastgpt.ops.attention import forward_op as attention_fwd
from fastgpt.ops.cross_entropy import backward_op as cross_entropy_bwd
from fastgpt.ops.cross_entropy import forward_op as cross_entropy_fwd
from fastgpt.ops.layer_norm import backward_op as layer_norm_bwd
from fastgpt.ops.layer_norm import forward_op as layer_norm_fwd
from fastgpt.ops.rms_norm import backward_op as rms_norm_bwd
from fastgpt.ops.rms_norm import forward_op as rms_norm_fwd

Given = dict[str, Any]  # arguments by name; what stands for a tensor has a shape and an ndim
# Placements of the outputs in their order and of the inputs by name; those not named are whole.
Way = tuple[Sequence[Placement], dict[str, Placement]]

R, P = Replicate(), Partial()


def _norm_forward(given: Given) -> list[Way]:
    """x (..., N) by any dimension but the last. Statistics are of rows end to end, of each rank its
    own; only backward sees them, and their order is nothing to it."""
    if given["dropout_p"] > 0.0:
        return []  # the mask counts the rows of all
    ways: list[Way] = []
    for dim in range(given["x"].ndim - 1):
        s = Shard(dim)
        h = R if given["residual"] is None else s  # it is empty
        stats = [Shard(0)] * (2 if "bias" in given else 1)
        ways.append(((s, h, *stats), {"x": s, "residual": s}))
    return ways


def _norm_backward(given: Given) -> list[Way]:
    if given["dropout_p"] > 0.0:
        return []
    h, layer = given["h"], "mean" in given
    ways: list[Way] = []
    for dim in range(h.ndim - 1):
        s, rows = Shard(dim), Shard(0)
        dres = R if given["x_dtype"] == h.tensor_meta.dtype else s  # it is empty
        dbias = [P if given["has_bias"] else R] if layer else []
        dx_bias = R if given.get("x_bias_dtype") is None else P
        ins: dict[str, Placement] = {"dy": s, "dh": s, "h": s, "mean": rows, "rstd": rows}
        ways.append(((s, dres, P, *dbias, dx_bias), ins))
    return ways


def _attention_dims(given: Given) -> list[tuple[Placement, Placement]]:
    """By batch, or by heads where the ranks divide them: of q, k, v and o, and of lse."""
    extra = ("alibi_slopes", "bias", "key_mask", "document_ids", "cu_seqlens_q", "cu_seqlens_k")
    if given["dropout_p"] > 0.0 or any(given.get(name) is not None for name in extra):
        return []
    heads = given["k"].shape[2] % given["k"].mesh.size() == 0
    return [(Shard(0), Shard(0)), *([(Shard(2), Shard(1))] if heads else [])]


def _attention_forward(given: Given) -> list[Way]:
    return [((s, lse), {"q": s, "k": s, "v": s}) for s, lse in _attention_dims(given)]


def _attention_backward(given: Given) -> list[Way]:
    if given.get("packed"):
        return []  # heads of q, k and v lie in one dimension
    return [
        ((s, s, s, R), {"do": s, "dlse": lse, "q": s, "k": s, "v": s, "o": s, "lse": lse})
        for s, lse in _attention_dims(given)
    ]


def _cross_entropy_forward(given: Given) -> list[Way]:
    """By rows."""
    return [((Shard(0), Shard(1)), {"logits": Shard(0), "target": Shard(0)})]


def _cross_entropy_backward(given: Given) -> list[Way]:
    s = Shard(0)
    return [((s,), {"dloss": s, "logits": s, "target": s, "stats": Shard(1)})]


RULES: dict[OpOverload, Callable[[Given], list[Way]]] = {
    layer_norm_fwd: _norm_forward,
    layer_norm_bwd: _norm_backward,
    rms_norm_fwd: _norm_forward,
    rms_norm_bwd: _norm_backward,
    attention_fwd: _attention_forward,
    attention_bwd: _attention_backward,
    cross_entropy_fwd: _cross_entropy_forward,
    cross_entropy_bwd: _cross_entropy_backward,
}


def _learn(op: OpOverload, ways: Callable[[Given], list[Way]]) -> None:
    names = [argument.name for argument in op._schema.arguments]
    outputs = len(op._schema.returns)

    def rule(*args: Any, **kwargs: Any) -> list[tuple[list[Any], list[Any]]]:
        given = dict(zip(names, args, strict=False)) | kwargs
        every: list[Way] = [([R] * outputs, {}), *ways(given)]
        return [
            (
                list(outs),
                [ins.get(n, R) if hasattr(given[n], "placements") else None for n in given],
            )
            for outs, ins in every
        ]

    register_sharding(op)(rule)


def learn() -> None:
    """Teach DTensor the rules; to import fastgpt.parallel does so."""
    for op, ways in RULES.items():
        _learn(op, ways)
