"""One more token on a CPU, with little between the products: what `generate` runs where it can.

A token of a small model on a CPU is a hundred products of a matrix and a few rows, each of tens of
microseconds. Modules, checks and the choice of a path cost as much again. Here they are done once,
before the first token; a step then is torch's own operators, each in the form that reads its
weights the fastest:

    one row of bfloat16         matrix times vector, not the product of two matrices
    a few rows                  W x^T rather than x W^T: what is put in order first is x, not W
    int8, int4                  see `fastgpt.quantized`

The numbers are those of the modules but for the order of sums.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt.cache import KVCache
from fastgpt.layers import MLP, Block, CausalSelfAttention, GatedMLP, lends
from fastgpt.model import GPT
from fastgpt.norms import LayerNorm, RMSNorm
from fastgpt.ops import backend
from fastgpt.ops.ffn import activate
from fastgpt.ops.rotary import rotary_ref
from fastgpt.quantized import (
    Int4Linear,
    Int8Embedding,
    Int8Linear,
    bytes_multiply_exactly,
    rows_product,
)

Rows = Callable[[Tensor], Tensor]  # (B, K) -> (B, N)
KNOWN = (
    Block, CausalSelfAttention, MLP, GatedMLP, LayerNorm, RMSNorm, nn.Linear, nn.Embedding,
    nn.ModuleList, Int8Linear, Int8Embedding, Int4Linear,
)  # fmt: skip


class _Layer(NamedTuple):
    """What a step does in a block."""

    ln_1: Rows
    c_attn: Rows
    rotary: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    c_proj: Rows
    ln_2: Rows
    mlp: Rows
    room: Tensor  # (2, B, slots, Hkv, D)
    keys: Tensor  # (B, Hkv, slots, D)
    values: Tensor


def one_token(model: GPT, cache: KVCache, B: int) -> Callable[[Tensor], Tensor] | None:
    """A function from the next ids, (B,) int64, to the logits after them, (B, V).

    It adds to the cache, in the rooms that this has now, and holds no copies of the weights but
    those that int8 and int4 layers keep for themselves; run it in inference mode.

    Returns:
        None where the model must run by its modules: not on a CPU, where kernels run, under
        autocast, in more than one dtype, with hooks, or with parts other than GPT's own.
    """
    if not _plain(model):
        return None
    c, dtype = model.config, model.dtype
    H, kv, D = c.n_head, c.kv_heads, c.head_dim
    layers = [_layer(block, cache, n, B) for n, block in enumerate(model.h)]
    last = _norm(model.ln_f)
    head = _head(model, B)
    wte, turns = model.wte, model._turns
    wpe = None if model.wpe is None else model.wpe.weight
    embed = wte if isinstance(wte, Int8Embedding) else partial(_looked_up, wte.weight)
    grouped, slots = H != kv, cache.slots
    first_slots = torch.arange(B) * slots

    def step(token: Tensor) -> Tensor:
        start, places = cache.begin(1)
        if places is None:
            at, end = start, start + 1
            first = 0 if cache.window is None else max(0, end - cache.window)
            turn = None if turns is None else (turns[0][at:end], turns[1][at:end])
            taken = seen = None
        else:  # rows of different lengths, or a room that has gone round
            places = places[:, 0]
            first, end, seen = 0, min(cache.length + 1, slots), cache.seen
            taken = first_slots + places % slots
            turn = None if turns is None else (turns[0][places, None], turns[1][places, None])
        try:
            h = embed(token).to(dtype)  # (B, C)
        except IndexError:
            raise model.outside(token) from None
        if wpe is not None:
            h = h + wpe[start if places is None else places]
        for layer in layers:
            qkv = layer.c_attn(layer.ln_1(h)).view(B, H + 2 * kv, D)
            q = qkv.narrow(1, 0, H)
            new = qkv.narrow(1, H, 2 * kv).view(B, 2, kv, D).transpose(0, 1)
            if turn is not None:
                q, k = layer.rotary(q[:, None], qkv[:, None, H : H + kv], *turn)
                q, new = q[:, 0], torch.stack((k[:, 0], qkv.narrow(1, H + kv, kv)))
            if taken is None:
                layer.room.select(2, start).copy_(new)
            else:
                layer.room.view(2, B * slots, kv, D).index_copy_(1, taken, new)
            o = F.scaled_dot_product_attention(
                q.unsqueeze(2), layer.keys.narrow(2, first, end - first),
                layer.values.narrow(2, first, end - first), attn_mask=seen, enable_gqa=grouped,
            )  # fmt: skip
            h = h + layer.c_proj(o.reshape(B, H * D))
            h = h + layer.mlp(layer.ln_2(h))
        cache.advance(1)
        return head(last(h))

    return step


def _plain(model: GPT) -> bool:
    """Whether a step does all that the modules do."""
    weight = model.ln_f.weight
    if (
        type(model) is not GPT
        or weight.device.type != "cpu"
        or weight.dtype not in (torch.float32, torch.bfloat16)
        or backend.kernels_run(weight)
        or backend.transformed()
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
    ):
        return False
    for module in model.modules():
        if module is not model and not (type(module) in KNOWN and lends(module, type(module))):
            return False
    return all(
        type(p) is nn.Parameter and p.dtype == weight.dtype and p.device == weight.device
        for p in model.parameters()
    )


def _layer(block: nn.Module, cache: KVCache, n: int, B: int) -> _Layer:
    assert isinstance(block, Block)
    room = cache.room(n)
    keys, values = room.transpose(2, 3).unbind(0)
    attn, rotary = block.attn, partial(rotary_ref)
    if (q_norm := attn.q_norm) is not None and (k_norm := attn.k_norm) is not None:
        rotary = partial(
            rotary_ref, q_weight=q_norm.weight, k_weight=k_norm.weight, eps=q_norm.eps or 0.0
        )
    return _Layer(
        _norm(block.ln_1), _product(attn.c_attn, B), rotary, _product(attn.c_proj, B),
        _norm(block.ln_2), _feed_forward(block.mlp, B), room, keys, values,
    )  # fmt: skip


def _norm(norm: LayerNorm | RMSNorm) -> Rows:
    shape, weight, eps = list(norm.normalized_shape), norm.weight, norm.eps
    if isinstance(norm, LayerNorm):
        bias: Tensor | None = norm.bias
        return lambda h: torch.layer_norm(h, shape, weight, bias, norm.eps)
    return lambda h: F.rms_norm(h, shape, weight, eps)


def _feed_forward(mlp: nn.Module, B: int) -> Rows:
    if isinstance(mlp, GatedMLP):
        gate, up, end = (_product(m, B) for m in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        gated = mlp.activation
        return lambda x: end(activate(gate(x), gated) * up(x))
    assert isinstance(mlp, MLP)
    fc, down, activation = _product(mlp.c_fc, B), _product(mlp.c_proj, B), mlp.activation
    return lambda x: down(activate(fc(x), activation))


def _head(model: GPT, B: int) -> Rows:
    if model.lm_head is not None:
        return _product(model.lm_head, B)
    if isinstance(model.wte, Int8Embedding):
        return _int8(model.wte, None)
    return _float(model.wte.weight, None, B)


def _product(layer: nn.Module, B: int) -> Rows:
    if isinstance(layer, Int8Linear):
        return _int8(layer, layer.bias)
    if isinstance(layer, nn.Linear):
        return _float(layer.weight, layer.bias, B)
    return layer


def _int8(layer: Int8Linear | Int8Embedding, bias: Tensor | None) -> Rows:
    if not bytes_multiply_exactly():
        return lambda x: layer.product(x, bias)
    (packed, sums), scale = layer.ordered(), layer.scale
    return lambda x: rows_product(x, packed, scale, sums, bias)


def _float(w: Tensor, b: Tensor | None, B: int) -> Rows:
    """x W^T + b of B rows."""
    if w.dtype == torch.bfloat16 and B == 1:
        if b is None:
            return lambda x: torch.mv(w, x.view(-1)).view(1, -1)
        return lambda x: torch.mv(w, x.view(-1)).add_(b).view(1, -1)
    if (w.dtype == torch.bfloat16 and B <= 16) or 8 <= B <= 16:
        if b is None:
            return lambda x: torch.mm(w, x.t()).t().contiguous()
        return lambda x: torch.mm(w, x.t()).t().contiguous().add_(b)
    return lambda x: F.linear(x, w, b)


def _looked_up(weight: Tensor, token: Tensor) -> Tensor:
    return F.embedding(token, weight)
