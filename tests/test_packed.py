"""A GPT on packed rows: every document as if it were alone."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import fastgpt
from fastgpt import GPT, GPTConfig
from fastgpt.data import Part, Sampler

CONFIG = GPTConfig(block_size=24, vocab_size=31, n_layer=2, n_head=2, n_embd=32)
LLAMA = GPTConfig(24, 31, 2, 4, 32, variant="llama", n_kv_head=2, n_inner=48, qk_norm=True)
LENGTHS = (1, 2, 9, 24, 5, 17, 3, 11, 25, 60)  # of documents, in tokens


def documents(seed: int = 0) -> list[list[int]]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(31, (n,), generator=g).tolist() for n in LENGTHS]


def model_of(config: GPTConfig, device: str = "cpu") -> GPT:
    torch.manual_seed(0)
    model = GPT(config).to(device)
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)  # away from the ones and zeros of the start
    return model


def gradients(model: GPT, loss: Tensor) -> dict[str, Tensor]:
    names = [name for name, _ in model.named_parameters()]
    grads = torch.autograd.grad(loss, list(model.parameters()))
    return {"loss": loss.detach(), **dict(zip(names, grads, strict=True))}


def alone(model: GPT) -> dict[str, Tensor]:
    """Loss and gradients of the documents one by one; a longer one in pieces of block_size."""
    T, device = model.config.block_size, model.wte.weight.device
    losses, count = [], 0
    for ids in documents():
        for at in range(0, len(ids) - 1, T):
            piece = torch.tensor(ids[at : at + T + 1], device=device)[None]
            losses.append(model(piece[:, :-1], piece[:, 1:]) * (piece.shape[1] - 1))
            count += piece.shape[1] - 1
    return gradients(model, torch.stack(losses).sum() / count)


def packed(model: GPT) -> dict[str, Tensor]:
    sampler = Sampler(Part.of(documents()), model.config.block_size, 1, packing="documents")
    batch = sampler.take(list(range(sampler.windows))).to(model.wte.weight.device)
    assert batch.cu_seqlens is not None and len(batch.cu_seqlens) > batch.idx.shape[0] + 3
    return gradients(
        model,
        model(batch.idx, batch.targets, cu_seqlens=batch.cu_seqlens, max_seqlen=batch.max_seqlen),
    )


CASES = pytest.mark.parametrize(
    "config", [CONFIG, replace(CONFIG, recompute=2), LLAMA], ids=["gpt2", "recompute", "llama"]
)


@CASES
def test_a_packed_batch_is_its_documents_one_by_one(config: GPTConfig) -> None:
    model = model_of(config)
    want = alone(model.double())
    for name, got in packed(model).items():
        assert torch.allclose(got, want[name], rtol=1e-6, atol=1e-9), name


@pytest.mark.gpu
@CASES
def test_on_kernels_a_packed_batch_is_its_documents(config: GPTConfig, device: str) -> None:
    model = model_of(config, device)
    with fastgpt.use("triton"):
        got = packed(model)
    with fastgpt.use("reference"):
        same = packed(model)
        gold = alone(model.double())
    for name, truth in gold.items():
        err = (got[name].double() - truth).abs().max().item()
        allowed = 2 * (same[name].double() - truth).abs().max().item() + 1e-6
        assert err <= allowed, f"{name}: off by {err:.2e}, PyTorch allows {allowed:.2e}"
