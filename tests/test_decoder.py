"""What a Decoder gives step by step are the logits of the whole forward."""

import torch
from torch import Tensor

from fastgpt.decoder import Decoder
from tests.test_decode import model_of, prompts


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_each_way_to_add_tokens_gives_the_logits_of_the_whole() -> None:
    model, ids = model_of("llama"), prompts(3, 24)
    with torch.no_grad():
        want = model(ids)
    decoder = Decoder(model, 3, 24)
    close(decoder.prefill(ids[:, :9]), want[:, 8])
    close(decoder.step(ids[:, 9]), want[:, 9])
    close(decoder.extend(ids[:, 10:15]), want[:, 10:15])
    decoder.truncate([12, 12, 12])
    assert decoder.lengths == [12, 12, 12]
    close(decoder.step(ids[:, 12]), want[:, 12])
    rows = torch.tensor([2, 2, 0])
    decoder.reorder(rows)
    close(decoder.step(ids[rows, 13]), want[rows, 13])
    rows = torch.tensor([1, 1, 0, 2])
    decoder.reorder(rows)
    close(decoder.step(ids[torch.tensor([2, 2, 2, 0]), 14]), want[torch.tensor([2, 2, 2, 0]), 14])
