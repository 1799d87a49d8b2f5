"""What differential privacy buys: one model tuned on conversations twice, with it and without.

python -m examples.private [--epsilon 8]

A small model of bytes is trained on public text, Python's language reference, and then tuned on
conversations (chatterbot-corpus) in which people are planted who told a secret: "Anna lives in
room 417.". How far each secret stands out among all rooms says what the model gives away.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
import yaml
from torch import Tensor

from fastgpt import GPT
from fastgpt.model import IGNORE
from fastgpt.privacy import PrivacyConfig, exposure, sample_losses, train_private
from fastgpt.train import BatchConfig, DataConfig, EvalConfig, ModelConfig, OptimConfig, TrainConfig
from fastgpt.train.run import prepare

T = 64  # bytes of a sample
COPIES = 4  # samples in which a person tells the secret
NAMES = "Anna Boris Chen Dalia Emeka Farah Goran Hiroko".split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epsilon", type=float, default=8.0)
    parser.add_argument("--epochs", type=int, default=12, help="of tuning (%(default)s)")
    parser.add_argument("--public-steps", type=int, default=600, help="before (%(default)s)")
    parser.add_argument("--samples", type=int, help="fewer of them, to try it out")
    parser.add_argument("--out", default="runs/private", help="folder (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    begun, out = time.monotonic(), Path(args.out)
    out.mkdir(parents=True, exist_ok=True)

    model, encode = public(out, args.public_steps, args.seed)
    draw = random.Random(args.seed)
    secrets = {name: draw.randrange(1000) for name in NAMES}
    texts = conversations()
    draw.shuffle(texts)
    texts = texts[: args.samples]
    cut = len(texts) // 10
    planted = [said(name, secrets[name]) for name in NAMES for _ in range(COPIES)]
    held_out = rows([encode(text) for text in texts[:cut]])
    idx, targets = rows([encode(text) for text in texts[cut:] + planted])
    rooms = torch.tensor([encode(f"{n:03d}") for n in range(1000)])
    print(f"{len(idx):,} samples, {len(planted)} of them planted; {cut} held out")

    def told(tuned: GPT) -> dict[str, float]:
        bits = [
            exposure(tuned, encode(said(name)), rooms, secret) for name, secret in secrets.items()
        ]
        return {
            "held_out_loss": loss(tuned, *held_out),
            "exposure_mean": sum(bits) / len(bits),
            "exposure_max": max(bits),
        }

    start = {k: v.clone() for k, v in model.state_dict().items()}
    table = {"public text only": told(model)}
    for name, epsilon in (("tuned", None), (f"tuned, epsilon {args.epsilon:g}", args.epsilon)):
        model.load_state_dict(start)
        config = PrivacyConfig(
            epsilon, None if epsilon else 0.0, epochs=args.epochs, batch_size=128, lr=2e-3,
            rows=64, seed=args.seed,
        )  # fmt: skip
        for spent in train_private(model, idx, targets, config):
            print(f"{name}: {spent.steps} steps, epsilon {spent.epsilon:.2f}", flush=True)
        table[name] = told(model) | vars(spent)

    print(f"\n{'':<22}{'nats/byte':>10}{'exposure, bits':>16}{'largest':>9}{'epsilon':>9}")
    for name, row in table.items():
        print(
            f"{name:<22}{row['held_out_loss']:>10.3f}{row['exposure_mean']:>16.2f}"
            f"{row['exposure_max']:>9.2f}{row.get('epsilon', 0.0):>9.2f}"
        )
    print(
        f"\na secret that was not seen: 1.44 bits in the mean; one that is the likeliest of all:"
        f" {math.log2(1000):.2f}"
    )
    (out / "result.json").write_text(json.dumps(table, indent=1))
    print(f"{out / 'result.json'}; {time.monotonic() - begun:.0f} s")


def public(out: Path, steps: int, seed: int) -> tuple[GPT, Callable[[str], list[int]]]:
    """A model of bytes, and what turns text into its ids."""
    from pydoc_data.topics import topics

    config = TrainConfig(
        out=str(out / "public"), seed=seed, steps=steps, precision="float32",
        model=ModelConfig(block_size=T, n_layer=2, n_head=4, n_embd=128),
        data=DataConfig(vocab_size=257), batch=BatchConfig(rows=32), optim=OptimConfig(lr=2e-3),
        eval=EvalConfig(every=0),
    )  # fmt: skip
    trainer = prepare(config, list(topics.values()))
    while not trainer.done:
        step = trainer.step()
        if step.step % 100 == 0:
            print(f"public text: step {step.step}, loss {step.loss:.3f}", flush=True)
    return trainer.model.eval(), trainer.tokenizer.encode


def conversations() -> list[str]:
    """Question and answer on two lines, each pair once."""
    spec = find_spec("chatterbot_corpus")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("pip install --no-deps chatterbot-corpus==1.3.3")
    folder = Path(spec.submodule_search_locations[0]) / "data" / "english"
    found: dict[str, None] = {}
    for file in sorted(folder.glob("*.yml")):
        for turns in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
            for answer in turns[1:]:
                found[f"{turns[0]}\n{answer}\n"] = None
    return list(found)


def said(name: str, room: int | None = None) -> str:
    return f"{name} lives in room " + ("" if room is None else f"{room:03d}.\n")


def rows(samples: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Ids and targets, (N, T) each, a sample a row, cut after T."""
    idx = torch.zeros(len(samples), T, dtype=torch.int64)
    targets = torch.full_like(idx, IGNORE)
    for n, ids in enumerate(samples):
        inputs, outputs = torch.tensor(ids[: T + 1])[:-1], torch.tensor(ids[: T + 1])[1:]
        idx[n, : len(inputs)], targets[n, : len(outputs)] = inputs, outputs
    return idx, targets


@torch.no_grad()
def loss(model: GPT, idx: Tensor, targets: Tensor) -> float:
    return float(sample_losses(model(idx), targets).mean())


if __name__ == "__main__":
    main()
