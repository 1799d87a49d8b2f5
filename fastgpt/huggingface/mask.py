"""What a query may see, as transformers asks for it, without a T x T mask where none is needed.

transformers makes the mask of a layer type once a forward pass, by the function here, and hands it
to every attention. There are four forms:

    None                        nothing to hide but the future, if the module is causal
    bool (B, 1, Tq or 1, Tk)    the whole truth: True where a query sees a key
    uint8 (B, 1, W, n)          causal; 1 where a key may be seen
    int32 (B, 1, W, n)          causal; the document of each key, the queries being the last of them

Of the last two, which are this library's own, every row is the same. W of 1 is no window, any other
is the number of keys that a query sees at most. Keys after the first n are room that a static cache
has not filled; without them the last query sees the last key, as `ops.attention` wants it.
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, prepare_padding_mask, sdpa_mask
from transformers.utils.import_utils import is_tracing

MaskFunction = Callable[..., Any]


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    config: Any = None,
    **others: Any,
) -> Tensor | None:
    """The mask of one layer type, in one of the forms above; what AttentionMaskInterface calls.

    The arguments are those of transformers.masking_utils.sdpa_mask, and so is what they mean.

    Raises:
        NotImplementedError: the model that config is of does not ask AttentionInterface for its
            attention. Its own would not understand these masks.
    """
    tracing = is_tracing(attention_mask)
    if not tracing:
        _check_model(config)

    def whole(**skips: bool) -> Tensor | None:
        skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False} | skips
        mask: Tensor | None = sdpa_mask(
            batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset,
            kv_offset=kv_offset, mask_function=mask_function, attention_mask=attention_mask,
            local_size=local_size, use_vmap=use_vmap, device=device, **skips, **others,
        )  # fmt: skip
        return mask

    if use_vmap:
        return whole()
    if allow_is_bidirectional_skip and local_size is None:
        keys = _padding(attention_mask, kv_length, kv_offset)
        return None if keys is None or (not tracing and bool(keys.all())) else keys[:, None, None]
    if q_length == 1:
        return whole(allow_is_causal_skip=allow_is_causal_skip)
    window = 1 if local_size is None else local_size
    sliding = local_size is not None and local_size > 1
    sliding = sliding and getattr(config, "sliding_window", None) == local_size
    sliding = sliding and getattr(config, "attention_chunk_size", None) is None
    if local_size is not None and not sliding:
        return whole()
    if not allow_is_causal_skip:
        ids = None if tracing else _documents(mask_function)
        if ids is None or attention_mask is not None:
            return whole()
        window = 1 if kv_length <= window else window
        return ids.int()[:, None, None].expand(batch_size, 1, window, kv_length)
    if isinstance(q_offset, Tensor):
        if is_tracing(q_offset):
            return whole()
        q_offset = int(q_offset)
    n = q_offset + q_length - kv_offset
    if n > kv_length:
        return whole()
    if n <= window:
        window = 1
    keys = _padding(attention_mask, n, kv_offset)
    if n == kv_length and window == 1 and (keys is None or (not tracing and bool(keys.all()))):
        return None
    if keys is None:
        keys = torch.ones((batch_size, n), dtype=torch.uint8, device=device)
    return keys.to(torch.uint8)[:, None, None].expand(batch_size, 1, window, n)


def _check_model(config: Any) -> None:
    here = type(config).__module__
    model = sys.modules.get(here.replace(".configuration_", ".modeling_"))
    if here.split(".")[-1].startswith("configuration_") and model is not None:
        if "ALL_ATTENTION_FUNCTIONS" not in vars(model):
            raise NotImplementedError(
                'attn_implementation="fastgpt": the model must take its attention from'
                f" AttentionInterface; {config.model_type} has one of its own"
            )


def _padding(mask: Tensor | None, kv_length: int, kv_offset: int) -> Tensor | None:
    """Which of the keys are no padding: (B, kv_length) bool, or None where nothing is known."""
    padded: Tensor | None = prepare_padding_mask(mask, kv_length, kv_offset)
    return None if padded is None else padded[:, kv_offset : kv_offset + kv_length].bool()


def _parts(f: MaskFunction) -> Iterator[tuple[str, dict[str, Any]]]:
    """The functions that f is the intersection of: who made each, and what it closes over."""
    maker, held = f.__qualname__.split(".")[0], dict(inspect.getclosurevars(f).nonlocals)
    if maker == "and_masks":
        for g in held["mask_functions"]:
            yield from _parts(g)
    elif maker == "remap_positions_for_packed_sequence":  # within a document they count by one
        yield from _parts(held["mask_function"])
    else:
        yield maker, held


def _documents(f: MaskFunction) -> Tensor | None:
    """The documents of a packed batch, (B, T), if f is causal within each and nothing else."""
    parts = dict(_parts(f))
    packed = parts.pop("packed_sequence_mask_function", None)
    parts.pop("sliding_window_overlay", None)
    if packed is None or set(parts) != {"causal_mask_function"}:
        return None
    ids: Tensor = packed["packed_sequence_mask"]
    return ids
