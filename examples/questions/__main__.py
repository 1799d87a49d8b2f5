"""Question answering: prepare, fine-tune SmolLM2-135M on answers alone, evaluate, use.

python -m examples.questions [--out DIR] [--steps N]
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from examples.packages import smollm2
from examples.questions.data import LISTS, Question, divide, read
from examples.questions.retrieval import Retrieval
from fastgpt import GPT, lora
from fastgpt.answers import answers, exact_match, f1, normalised
from fastgpt.data import DataConfig
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
    load,
    train,
)

PROMPT = "Question: {}\nAnswer:"
SHOTS = 3
NEW_TOKENS = 12
SHOWN = 12


def write(questions: Sequence[Question], file: Path) -> str:
    """Questions as records with prompt and completion."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8") as out:
        for one in questions:
            record = {
                "prompt": PROMPT.format(one.text),
                "completion": f" {one.accepted[0]}",
            }
            print(json.dumps(record, ensure_ascii=False), file=out)
    return str(file)


def configuration(
    out: Path, train_file: str, held_out_file: str, init: str, steps: int, seed: int
) -> TrainConfig:
    """The run: LoRA on all linear layers, the loss on the answers alone."""
    return TrainConfig(
        out=str(out),
        seed=seed,
        steps=steps,
        resume="auto",
        model=ModelConfig(init=init, block_size=128),
        data=DataConfig(
            files=(train_file,), held_out_files=(held_out_file,), packing="documents",
            deduplicate="none",
        ),
        batch=BatchConfig(rows=4),
        optim=OptimConfig(lr=1e-3, weight_decay=0.0, beta2=0.99),
        schedule=ScheduleConfig(warmup=10, floor=0.1),
        eval=EvalConfig(every=0, windows=32),
        checkpoint=CheckpointConfig(every=50, keep=1),
        lora=LoraConfig(rank=16, alpha=32.0),
    )  # fmt: skip


def ask(model: GPT, tokenizer: Tokenizer, questions: Sequence[Question], before: str) -> list[str]:
    """The model's answer to each question, after the text before."""
    prompts = [before + PROMPT.format(one.text) for one in questions]
    return answers(model, tokenizer, prompts, NEW_TOKENS)


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Run it all; returns what is in results.json: for each way its exact match and F1, in %."""
    parser = argparse.ArgumentParser("python -m examples.questions", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/questions"))
    parser.add_argument("--init", help="the weights; SmolLM2-135M-Instruct without")
    parser.add_argument("--steps", type=int, default=130)
    parser.add_argument("--limit", type=int, help="use so many held-out questions")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    begun = time.monotonic()
    init = args.init or smollm2()
    training, held_out = divide(read(), args.seed)
    held_out = held_out[: args.limit]
    print(f"{len(training):,} questions to train on, {len(held_out):,} held out")
    files = [
        write(part, args.out / f"{name}.jsonl")
        for name, part in (("train", training), ("held_out", held_out))
    ]

    ways = {}
    usual = Counter(one.accepted[0] for one in training).most_common(1)[0][0]
    ways["the most frequent answer"] = [usual] * len(held_out)
    search = Retrieval([one.text for one in training])
    near = [training[search.nearest(one.text)] for one in held_out]
    ways["the nearest question's answer (TF-IDF)"] = [one.accepted[0] for one in near]

    train_file, held_out_file = files
    config = configuration(args.out, train_file, held_out_file, init, args.steps, args.seed)
    if not train(config).done:
        raise SystemExit("stopped; the same command goes on")
    model, tokenizer = load(args.out)
    tuned = ask(lora.merge(model).bfloat16(), tokenizer, held_out, "")
    model = GPT.from_pretrained(init, dtype=torch.bfloat16) if args.init is None else model
    shots = "".join(f"{PROMPT.format(o.text)} {o.accepted[0]}\n\n" for o in training[:SHOTS])
    ways["the model as it came"] = ask(model, tokenizer, held_out, "")
    ways[f"the same after {SHOTS} examples"] = ask(model, tokenizer, held_out, shots)
    ways["fine-tuned"] = tuned

    accepted = [one.accepted for one in held_out]
    results = {
        name: {
            "exact_match": 100.0 * sum(map(exact_match, given, accepted)) / len(accepted),
            "f1": 100.0 * sum(map(f1, given, accepted)) / len(accepted),
        }
        for name, given in ways.items()
    }
    print(f"\n{'held-out questions, %':<42}{'exact match':>12}{'F1':>8}")
    for name, row in results.items():
        print(f"{name:<42}{row['exact_match']:>12.1f}{row['f1']:>8.1f}")
    right = [exact_match(given, one) for given, one in zip(tuned, accepted, strict=True)]
    known = {normalised(one.accepted[0]) for one in training}
    new = [r for r, a in zip(right, accepted, strict=True) if known.isdisjoint(map(normalised, a))]
    print(f"\nfine-tuned: {sum(new):.0f} of {len(new)} whose answer no training question has")
    for name in LISTS:
        own = [r for r, one in zip(right, held_out, strict=True) if one.list == name]
        print(f"{name:<24}{sum(own):>4.0f} of {len(own)}")
    print("\nquestion | accepted | fine-tuned | nearest question's")
    for n, one in enumerate(held_out[:SHOWN]):
        near_answer = ways["the nearest question's answer (TF-IDF)"][n]
        print(f"{one.text} | {one.accepted[0]} | {tuned[n]} | {near_answer}")
    (args.out / "results.json").write_text(json.dumps(results, indent=1))
    print(f"\n{args.out / 'results.json'}; {time.monotonic() - begun:.0f} s in all. Ask it:")
    asked = PROMPT.format("What is the capital of Italy?").replace("\n", "\\n")
    print(f"fastgpt generate $'{asked}' --model {args.out} --temperature 0")
    return results


if __name__ == "__main__":
    main()
