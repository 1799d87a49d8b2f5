"""A tiny model with a tokenizer of its own, and a text that is hard to show."""

from functools import lru_cache

import torch

from fastgpt import GPT, GPTConfig
from fastgpt.interpret import Explanation, explain_text
from fastgpt.tokenizer import Tokenizer

TEXT = "人工智能将改变世界。 The model looks at words.\n人工智能 model words, and looks\n" * 8
# Characters that the tokenizer's text has; one that it has not, of four tokens; and markup.
PROMPT = "人工智能 🌍</script><b id=x>\nlooks"


@lru_cache
def tiny() -> tuple[GPT, Tokenizer]:
    tokenizer = Tokenizer.train([TEXT], 300)
    torch.manual_seed(0)
    model = GPT(GPTConfig(64, tokenizer.vocab_size, n_layer=2, n_head=2, n_embd=32)).eval()
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return model, tokenizer


@lru_cache
def explanation() -> Explanation:
    return explain_text(*tiny(), PROMPT)
