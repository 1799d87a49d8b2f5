"""CapturedStep: a training step as a CUDA graph."""

import copy

import pytest
import torch
from torch import Tensor

from fastgpt import GPT, GPTConfig
from fastgpt.optim import AdamW
from fastgpt.train import CapturedStep
from tests.conftest import HAS_CUDA, SANITIZED

REAL = HAS_CUDA and not SANITIZED


@pytest.mark.skipif(HAS_CUDA, reason="is of a machine without a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(ValueError, match="CapturedStep: needs a GPU with CUDA graphs; got none"):
        CapturedStep(lambda x: x, torch.zeros(1))


@pytest.mark.gpu
@pytest.mark.skipif(not REAL, reason="CUDA graphs are recorded on a GPU only")
@pytest.mark.parametrize("variant", ["gpt2", "llama"])
def test_the_graph_trains_as_the_step_does(variant: str) -> None:
    config = GPTConfig(32, 101, 2, 2, 64, variant=variant)  # type: ignore[arg-type]
    model = GPT(config).to("cuda", torch.bfloat16)
    ids = torch.randint(101, (8, 4, 33), device="cuda")

    def steps_of(model: GPT, captured: bool) -> list[float]:
        lr = torch.tensor(1e-3, device="cuda")
        optimizer = AdamW(model.parameters(), lr, max_grad_norm=1.0, skip_nonfinite=True)

        def step(idx: Tensor, targets: Tensor) -> Tensor:
            optimizer.zero_grad(set_to_none=True)
            loss: Tensor = model(idx, targets)
            loss.backward()
            optimizer.step()
            return loss.detach()

        batches = [(x[:, :-1].contiguous(), x[:, 1:].contiguous()) for x in ids]
        if captured:
            run = CapturedStep(step, *batches[0], warmup=3)
        else:
            for _ in range(3):
                step(*batches[0])
            run = step  # type: ignore[assignment]
        losses = []
        for n, batch in enumerate(batches):
            lr.fill_(1e-3 / (n + 1))
            losses.append(run(*batch).item())
        return losses

    twin = copy.deepcopy(model)
    assert steps_of(model, True) == steps_of(twin, False)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.gpu
@pytest.mark.skipif(not REAL, reason="CUDA graphs are recorded on a GPU only")
def test_each_replay_drops_out_anew_and_shapes_must_fit() -> None:
    model = GPT(GPTConfig(32, 101, 1, 2, 64, dropout=0.5)).to("cuda", torch.bfloat16)

    def step(idx: Tensor) -> Tensor:
        loss: Tensor = model(idx, idx)
        return loss.detach()

    idx = torch.randint(101, (4, 32), device="cuda")
    run = CapturedStep(step, idx)
    assert len({run(idx).item() for _ in range(8)}) > 4
    with pytest.raises(ValueError, match=r"input 0 must be \(4, 32\) torch\.int64 as recorded"):
        run(idx[:2])
    with pytest.raises(ValueError, match="takes 1 inputs; got 2"):
        run(idx, idx)
    with pytest.raises(ValueError, match="examples must be on the GPU; got 0 on cpu"):
        CapturedStep(step, idx.cpu())
