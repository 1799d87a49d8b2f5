"""The attention weights of some rows, without the T x T matrix that the kernels never make."""

from collections.abc import Sequence

import torch
from einops import einsum
from torch import Tensor

from fastgpt.ops import backend
from fastgpt.ops.attention_reference import shown
from fastgpt.ops.watch import Seen


@torch.no_grad()
def weights_of_rows(call: Seen, heads: Sequence[int], rows: Sequence[int]) -> Tensor:
    """w_ij = exp(scale q_i . k_j - lse_i) over the keys j that query i sees, and 0 elsewhere.

    lse is the kernel's own, so that a row sums to one as nearly as the kernel's did. Where plain
    PyTorch ran, which keeps none, it is made of these rows' scores. Softcap, ALiBi, bias, masks,
    windows, documents and sequences end to end count as they did in the call; dropout does not.

    Args:
        call: what a watcher was told.
        heads: h query heads.
        rows: R queries of the call, from 0.

    Returns:
        (B, h, R, Tk) float32, or float64 of float64 inputs. Of sequences end to end the keys are
        those of all of them.
    """
    x, wide = call.extras, torch.promote_types(call.q.dtype, torch.float32)
    group = call.q.shape[2] // call.k.shape[2]
    i = torch.tensor(rows, device=call.q.device, dtype=torch.int64)
    h = torch.tensor(heads, device=call.q.device, dtype=torch.int64)
    q = call.q.detach()[:, i][:, :, h].to(wide)  # (B, R, h, D)
    k = shown(call.k.detach(), x.key_mask)[:, :, h // group].to(wide)  # (B, Tk, h, D)
    with backend.without_autocast(q):
        s = einsum(q, k, "b i h d, b j h d -> b h i j") * call.scale
    if x.softcap:
        s = x.softcap * torch.tanh(s / x.softcap)
    distance, see = _visible(call, i)
    if x.alibi_slopes is not None:
        slopes = x.alibi_slopes.detach().to(wide)[..., h]
        s = s - slopes.view(-1, len(heads), 1, 1) * distance.abs()[:, None]
    if x.bias is not None:
        bias = x.bias.detach()
        bias = bias if bias.shape[1] == 1 else bias[:, h]
        s = s + (bias if bias.shape[2] == 1 else bias[:, :, i])
    s = s.masked_fill(~see[:, None], float("-inf"))
    lse = s.logsumexp(-1) if call.lse is None else call.lse.detach()[:, h][:, :, i]
    return torch.where(s == float("-inf"), 0.0, torch.exp(s - lse[..., None].to(wide)))


def _visible(call: Seen, i: Tensor) -> tuple[Tensor, Tensor]:
    """How far key j lies to the right of query i, and whether i sees it, (B or 1, R, Tk) both."""
    x, Tq, Tk = call.extras, call.q.shape[1], call.k.shape[1]
    j = torch.arange(Tk, device=i.device)
    if x.cu_seqlens_q is None or x.cu_seqlens_k is None:
        d = (j - (i + Tk - Tq)[:, None])[None]
        see = torch.ones_like(d, dtype=torch.bool)
    else:
        cu_q, cu_k = x.cu_seqlens_q.long(), x.cu_seqlens_k.long()
        ours, theirs = (
            torch.searchsorted(cu[1:].contiguous(), at, right=True).clamp(max=len(cu) - 2)
            for cu, at in ((cu_q, i), (cu_k, j))
        )
        # Both counted from the end of their sequence: the last query sees the last key.
        d = ((j - cu_k[theirs + 1]) - (i - cu_q[ours + 1])[:, None])[None]
        see = (theirs == ours[:, None])[None]
    if call.left >= 0:
        see = see & (d >= -call.left)
    if call.right >= 0:
        see = see & (d <= call.right)
    if x.key_mask is not None:
        see = see & x.key_mask[:, None]
    if x.document_ids is not None:
        see = see & (x.document_ids[:, i + Tk - Tq, None] == x.document_ids[:, None])
    return d, see
