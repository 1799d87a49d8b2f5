"""What is exported here loads in TransformerLens, with the same logits and attention weights."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformer_lens", reason="transformer-lens is not installed")

from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastgpt import GPT, GPTConfig, capture_attention
from fastgpt.tokenizer import Tokenizer
from tests.explained import TEXT
from tests.test_packed import LLAMA


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@torch.no_grad()
def test_a_bridge_sees_the_same_numbers(kind: str, tmp_path: Path) -> None:
    ours = Tokenizer.train([TEXT], 300)
    config = GPTConfig(64, ours.vocab_size, n_layer=2, n_head=2, n_embd=32)
    if kind == "llama":
        config = replace(LLAMA, block_size=64, vocab_size=ours.vocab_size, qk_norm=False)
    model = GPT(config).eval()
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    model.save_pretrained(tmp_path)
    ours.save(tmp_path / "tokenizer.json")

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    bridge = TransformerBridge.boot_transformers(
        str(tmp_path), hf_model=theirs, tokenizer=tokenizer
    )
    idx = torch.tensor([ours.encode("The model looks at words.")])
    if kind == "gpt2":
        assert tokenizer.encode("The model looks at words.") == idx[0].tolist()
    logits, cache = bridge.run_with_cache(idx)
    with capture_attention(model, rows=None) as captured:
        torch.testing.assert_close(logits, model(idx), atol=1e-4, rtol=1e-4)
    for layer in range(2):
        pattern = cache[f"blocks.{layer}.attn.hook_pattern"]
        torch.testing.assert_close(pattern, captured[layer].weights, atol=1e-5, rtol=1e-4)
