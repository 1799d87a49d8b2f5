"""The recipe: pairs to JSONL, a GPT tuned on it, scores on what was held out."""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from examples.translation.dictionary import Dictionary
from examples.translation.pairs import Pair, divide, parts, short, unlike
from fastgpt import GPT, complete, lora
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
from fastgpt.train.device import pick_device
from fastgpt.train.given import given_model

FOLDS = 4
TRAIN, DEV, TEST = "train.jsonl", "dev.jsonl", "test.jsonl"
DICTIONARY, RUN, RESULTS = "dictionary.json", "run", "results.json"
NEW_TOKENS = 40
BATCH = 32  # texts continued side by side
SAMPLES = 1000  # of the bootstrap
EVERY = 25  # translations are shown


def prompt(source: str, dictionary: Dictionary) -> str:
    """What the model continues with the translation: the source, and its words one by one."""
    return f"Spanish: {source}\nWord by word: {dictionary.translate(source)}\nEnglish:"


def records(pairs: Iterable[Pair], dictionary: Dictionary) -> Iterator[dict[str, str]]:
    """As `fastgpt.data` reads them: the loss is on the completion alone."""
    for _, source, target in pairs:
        made = {"prompt": prompt(source, dictionary), "completion": f" {target}"}
        yield {**made, "source": source, "target": target}


def crossed(pairs: Sequence[Pair], folds: int = FOLDS) -> Iterator[dict[str, str]]:
    """Records of training pairs: each fold of chapters has the dictionary of the others, so that
    it fails in training where it does on texts that it was not learned from."""
    of = divide(pairs, [len({p.chapter for p in pairs}) // folds] * (folds - 1))
    for n, fold in enumerate(of):
        others = [pair for m, other in enumerate(of) if m != n for pair in other]
        yield from records(fold, Dictionary.learn(others))


@dataclass(frozen=True)
class Recipe:
    """Prepare, train, evaluate, all in one folder.

    Attributes:
        out: the folder.
        init: weights to tune, as `fastgpt train --model.init` takes them.
        steps: of training.
        rows: of a step.
        block_size: tokens of a row.
        lr: learning rate.
        most_words: of a text, in each language.
        chapters: held out, to watch the training by, and for the scores.
    """

    out: Path
    init: str
    steps: int = 480
    rows: int = 3
    block_size: int = 192
    lr: float = 1e-3
    most_words: int = 16
    chapters: tuple[int, int] = (15, 60)

    def prepare(self, read: Callable[[], list[Pair]]) -> None:
        """Write records to train on and held-out ones, and the dictionary, unless they are there.

        Args:
            read: gives the pairs.
        """
        if (self.out / DICTIONARY).exists():
            return
        self.out.mkdir(parents=True, exist_ok=True)
        training, *held_out = divide(read(), self.chapters)
        training = [part for pair in training for part in parts(pair)]
        known = short(training, self.most_words)
        dictionary = Dictionary.learn(known)
        _write(self.out / TRAIN, crossed(known))
        for name, pairs in zip((DEV, TEST), held_out, strict=True):
            some = short(pairs, self.most_words)
            kept = unlike(some, training)
            _write(self.out / name, records(kept, dictionary))
            resembling = len(some) - len(kept)
            print(f"{name}: {len(kept)} verses; {resembling} that resemble others left out")
        print(f"{TRAIN}: {len(known):,} verses and parts of verses", flush=True)
        dictionary.save(self.out / DICTIONARY)

    def train(self) -> bool:
        """Tune by LoRA, or go on; whether it came to its end."""
        config = TrainConfig(
            out=str(self.out / RUN), steps=self.steps, resume="auto",
            model=ModelConfig(init=self.init, block_size=self.block_size),
            data=DataConfig(
                files=(str(self.out / TRAIN),), held_out_files=(str(self.out / DEV),),
                packing="documents",
            ),
            batch=BatchConfig(rows=self.rows),
            optim=OptimConfig(lr=self.lr, weight_decay=0.0, beta2=0.99),
            schedule=ScheduleConfig(warmup=5, floor=0.1),
            eval=EvalConfig(every=0, windows=6),
            checkpoint=CheckpointConfig(every=20, keep=1),
            lora=LoraConfig(rank=16, alpha=32.0),
        )  # fmt: skip
        return train(config).done

    def evaluate(self) -> dict[str, Any]:
        """Score the model, before and after, beside the dictionary on the held-out verses; print
        it, and write it to results.json, translations with it."""
        with open(self.out / TEST, encoding="utf-8") as file:
            test = [json.loads(line) for line in file]
        dictionary = Dictionary.load(self.out / DICTIONARY)
        tuned, tokenizer = load(self.out / RUN)
        begun = time.monotonic()
        systems = {"word by word": [dictionary.translate(one["source"]) for one in test]}
        for name, model in (
            ("as it came", given_model(self.init, block_size=self.block_size)),
            ("tuned", lora.merge(tuned)),
        ):
            model = model.to(pick_device("auto"), torch.bfloat16)
            systems[name] = translations(model, tokenizer, [one["prompt"] for one in test])
        seconds = time.monotonic() - begun
        scores = score(systems, [one["target"] for one in test])
        _print_table(scores, len(test))
        print(f"\nevery {EVERY}th of them, translated in {seconds:.0f} s")
        texts = [
            {"source": one["source"], "target": one["target"]}
            | {name: made[n] for name, made in systems.items()}
            for n, one in enumerate(test)
        ]
        for text in texts[::EVERY]:
            print("\n".join(f"  {name:<14}{words}" for name, words in text.items()), end="\n\n")
        results = {"scores": scores, "translations": texts}
        told = json.dumps(results, ensure_ascii=False, indent=1)
        (self.out / RESULTS).write_text(told, encoding="utf-8")
        return results


def translations(model: GPT, tokenizer: Tokenizer, prompts: Sequence[str]) -> list[str]:
    """The likeliest continuation of each prompt, up to the end of the line."""
    order = sorted(range(len(prompts)), key=lambda n: len(prompts[n]))
    made = [""] * len(prompts)
    for at in range(0, len(order), BATCH):
        rows = order[at : at + BATCH]
        texts = complete(
            model, [prompts[n] for n in rows], NEW_TOKENS, tokenizer=tokenizer, temperature=0.0
        )
        for n, (one,) in zip(rows, texts, strict=True):
            made[n] = one.text.strip().split("\n")[0].strip()
    return made


def score(systems: dict[str, list[str]], targets: list[str]) -> dict[str, Any]:
    """chrF and BLEU of each system by sacrebleu, with the half of a 95 % interval and, against the
    first system, p by paired bootstrap; and both signatures.

    Koehn, Statistical significance tests for machine translation evaluation, 2004,
    https://aclanthology.org/W04-3250.
    """
    try:
        from sacrebleu.metrics import BLEU, CHRF
        from sacrebleu.significance import PairedTest
    except ImportError:
        raise ImportError("translation: needs sacrebleu; pip install sacrebleu") from None
    metrics = {"chrF": CHRF(references=[targets]), "BLEU": BLEU(references=[targets])}
    signatures, found = PairedTest(list(systems.items()), metrics, None, "bs", SAMPLES)()
    scores: dict[str, Any] = {name: {} for name in systems}
    for metric in signatures:
        for name, one in zip(systems, found[metric], strict=True):
            told = {"score": one.score, "ci": one.ci, "p": one.p_value}
            scores[name][metric] = {k: v if v is None else float(v) for k, v in told.items()}
    scores["signatures"] = {metric: str(signatures[metric]) for metric in signatures}
    return scores


def _print_table(scores: dict[str, Any], size: int) -> None:
    metrics = scores["signatures"]
    title = f"{size} held-out verses"
    print(f"\n{title:<24}" + "".join(f"{metric:>14}" for metric in metrics))
    for name in scores:
        if name != "signatures":
            row = [f"{scores[name][m]['score']:.1f} ± {scores[name][m]['ci']:.1f}" for m in metrics]
            print(f"{name:<24}" + "".join(f"{cell:>14}" for cell in row))
    for metric, signature in metrics.items():
        print(f"{metric}: {signature}")


def _write(path: Path, records: Iterable[dict[str, str]]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for record in records:
            print(json.dumps(record, ensure_ascii=False), file=file)
