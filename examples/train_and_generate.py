"""Train a small GPT on a text file from Python, and let it write.

python examples/train_and_generate.py book.txt
"""

import sys

import torch

import fastgpt
from fastgpt.data import read_text
from fastgpt.train import BatchConfig, ModelConfig, OptimConfig, TrainConfig
from fastgpt.train.run import prepare

config = TrainConfig(
    steps=300,
    model=ModelConfig(block_size=128),
    batch=BatchConfig(rows=8),
    optim=OptimConfig(lr=2e-3),
)
trainer = prepare(config, [read_text(path) for path in sys.argv[1:]])
while not trainer.done:
    step = trainer.step()
    if step.step % 20 == 0:
        print(f"step {step.step}: loss {step.loss:.3f}")
print(trainer.evaluate())

model, tokenizer = trainer.model, trainer.tokenizer
prompt = torch.tensor([tokenizer.encode("The")], device=trainer.layout.device)
tokens = fastgpt.stream(model, prompt, 100, temperature=0.8, top_p=0.95, seed=0)
for piece in tokenizer.stream(int(token) for token in tokens):
    print(piece, end="", flush=True)
print()
