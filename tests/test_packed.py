"""A GPT on packed rows: every document as if it were alone."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastgpt
from fastgpt import GPT, GPTConfig
from fastgpt.data import Part, Sampler
from tests.check import assert_one_graph

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


@pytest.mark.parametrize("config", [CONFIG, LLAMA], ids=["gpt2", "llama"])
def test_rows_may_be_longer_than_the_context_if_no_document_is(config: GPTConfig) -> None:
    model = model_of(config).double()
    whole = [ids[:24] for ids in documents()]
    flat = torch.tensor([id for ids in whole for id in ids])[None]
    cu = torch.tensor([0, *(len(ids) for ids in whole)]).cumsum(0)
    assert flat.shape[1] > config.block_size
    got = model(flat, cu_seqlens=cu)
    want = torch.cat([model(torch.tensor(ids)[None]) for ids in whole], 1)
    assert torch.allclose(got, want, rtol=1e-9, atol=1e-12)


def test_an_empty_document_is_none() -> None:
    model = model_of(CONFIG)
    idx = torch.randint(31, (2, 10))
    got = model(idx, cu_seqlens=torch.tensor([0, 0, 4, 4, 20, 20]), max_seqlen=16)
    assert torch.equal(got, model(idx, cu_seqlens=torch.tensor([0, 4, 20]), max_seqlen=16))


@pytest.mark.parametrize("config", [CONFIG, LLAMA], ids=["gpt2", "llama"])
def test_compiles_whole_for_any_number_of_documents(config: GPTConfig) -> None:
    model = model_of(config)
    idx = torch.randint(31, (2, 20))
    assert_one_graph(
        lambda cu_seqlens: (model(idx, idx, cu_seqlens=cu_seqlens, max_seqlen=20),),
        [
            {"cu_seqlens": torch.tensor(cu)}
            for cu in ([0, 4, 9, 20, 40], [0, 20, 21, 22, 33, 37, 40])
        ],
    )


def test_dropout_in_packed_rows_drops_and_keeps_the_mean() -> None:
    model = model_of(replace(CONFIG, dropout=0.3))
    idx, cu = torch.randint(31, (1, 20)), torch.tensor([0, 7, 20])
    with torch.no_grad():
        torch.manual_seed(0)
        drawn = torch.stack([model(idx, cu_seqlens=cu) for _ in range(3)])
        assert not torch.equal(drawn[0], drawn[1])
        model.eval()
        assert torch.equal(model(idx, cu_seqlens=cu), model(idx, cu_seqlens=cu))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_seqlen": 3}, r"max_seqlen needs cu_seqlens; got max_seqlen alone"),
        (
            {"cu_seqlens": [0, 12]},
            r"from 0 to 20, the tokens of idx, .*; got 0 to 12, steps from 12",
        ),
        ({"cu_seqlens": [1, 20]}, r"from 0 to 20, the tokens of idx, .*; got 1 to 20"),
        ({"cu_seqlens": [0, 9, 7, 20]}, r"and not fall; got 0 to 20, steps from -2"),
        ({"cu_seqlens": [20]}, r"cu_seqlens must be \(n \+ 1,\), n from 1; got \(1,\)"),
        ({"cu_seqlens": [0.0, 20.0]}, r"cu_seqlens must be int32 or int64; got torch.float32"),
        ({"cu_seqlens": [0, 5, 20], "max_seqlen": 14}, r"longest document, 15; got 14"),
        ({"cu_seqlens": [0, 20], "max_seqlen": 25}, r"at most block_size 24 tokens; got 25"),
    ],
)
def test_errors_say_what_is_wrong(options: dict[str, Any], message: str) -> None:
    options = {k: torch.tensor(v) if isinstance(v, list) else v for k, v in options.items()}
    with pytest.raises((ValueError, TypeError), match=rf"^GPT: .*{message}"):
        model_of(CONFIG)(torch.zeros(2, 10, dtype=torch.long), **options)


def test_a_cache_holds_one_document_a_row() -> None:
    model = model_of(CONFIG)
    idx = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"a cache holds one document a row; got cu_seqlens"):
        model.hidden(idx, model.new_cache(1), cu_seqlens=torch.tensor([0, 4]))
