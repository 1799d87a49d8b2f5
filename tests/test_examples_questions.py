"""The recipe of question answering, small: its division, its baseline, and all of it in seconds."""

import json
from pathlib import Path

import pytest
import torch

from examples.questions.__main__ import PROMPT, main
from examples.questions.data import Question, divide
from examples.questions.retrieval import Retrieval
from fastgpt import GPT, GPTConfig
from fastgpt.cli import main as fastgpt
from fastgpt.tokenizer import Tokenizer

KINDS = ("river", "song", "poet", "bird")
FACTS = [
    Question(f"Which {kind} is named after City{n}?", (f"{kind}{n}",), "made up")
    for n in range(30) for kind in KINDS
]  # fmt: skip


def fact(q: Question) -> str:
    """Which of FACTS it is, however it is asked."""
    return next(f.accepted[0] for f in FACTS if f.accepted[0] in (q.text[:-1], *q.accepted))


def test_what_is_near_a_held_out_question_is_in_neither_part() -> None:
    twins = [
        Question(f"For point{n}: {q.text.lower()}", q.accepted, q.list) for n, q in enumerate(FACTS)
    ]  # two words of three the same
    turned = [Question(f"{q.accepted[0]}?", (q.text,), q.list) for q in FACTS]
    train, held_out = divide(FACTS + twins + turned, seed=1)
    assert len(held_out) == 72 and 100 < len(train) < 288

    assert not {fact(one) for one in train} & {fact(one) for one in held_out}
    assert divide(FACTS, 1) == divide(FACTS, 1) != divide(FACTS, 2)


def test_retrieval_finds_the_nearest() -> None:
    search = Retrieval(["who wrote Hamlet", "who wrote Faust", "the capital of Peru", "of Peru"])
    assert search.nearest("Which man wrote the Faust?") == 1
    assert search.nearest("What is the capital of Peru?") == 2
    assert search.nearest("nothing alike") == 0


def test_all_of_it_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("examples.questions.__main__.read", lambda: FACTS)
    tokenizer = Tokenizer.train([PROMPT.format(q.text) + q.accepted[0] for q in FACTS], 400)
    torch.manual_seed(0)
    folder = tmp_path / "model"
    model = GPT(GPTConfig(256, tokenizer.vocab_size, 2, 2, 32, variant="llama"))
    model.save_pretrained(folder)
    tokenizer.save(folder / "tokenizer.json")
    out = tmp_path / "run"
    told = ["--out", str(out), "--init", str(folder), "--steps", "3"]
    results = main(told)
    assert json.loads((out / "results.json").read_text()) == results
    assert set(results) > {"fine-tuned", "the model as it came", "the most frequent answer"}
    records = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    assert records[0]["prompt"].startswith("Question: ") and records[0]["completion"][0] == " "
    command = capsys.readouterr().out.splitlines()[-1]
    assert command.endswith(f"--model {out} --temperature 0")
    assert main(told) == results  # the run is at its end, and is not made again
    assert fastgpt(["generate", "Question: who?\nAnswer:", "--model", str(out),
                    "--temperature", "0", "--max-new-tokens", "3"]) == 0  # fmt: skip
