"""Which parameters of a model decay."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn


def decay_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    embeddings: bool = True,
    only: Iterable[Tensor] | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: matrices decay, what has one dimension, biases and norms,
    does not.

    Args:
        model: whose parameters; those that take no gradient are left out.
        weight_decay: of those that decay.
        embeddings: whether the tables of nn.Embedding decay, and an output layer tied to one.
        only: if given, of these parameters alone.

    Returns:
        At most two groups, none of them empty.
    """
    chosen = None if only is None else {id(p) for p in only}
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    params = [p for p in model.parameters() if p.requires_grad]
    if chosen is not None:
        params = [p for p in params if id(p) in chosen]
    decay = [p.ndim >= 2 and (embeddings or id(p) not in tables) for p in params]
    groups = [
        {"params": [p for p, d in zip(params, decay, strict=True) if d is on],
         "weight_decay": weight_decay if on else 0.0}
        for on in (True, False)
    ]  # fmt: skip
    return [group for group in groups if group["params"]]
