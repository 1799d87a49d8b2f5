"""人工智能将改变世界: a GPT is trained on Chinese text, and its numbers go into the docs.

python -m examples.next_word
"""

import argparse
import re
import time
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path

import yaml

from examples.next_word import walk
from fastgpt.tokenizer import Tokenizer
from fastgpt.train import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    load,
    train,
)

DOCS = Path(__file__).parents[2] / "docs"
REFERENCE = Path("/usr/share/debian-reference")
SENTENCE, PROMPT = "人工智能将改变世界", "人工智能将"
OTHERS = ("如果你想安装", "语言模型将", "他们将")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="runs/next_word", help="folder (%(default)s)")
    parser.add_argument("--steps", type=int, default=900, help="of pretraining (%(default)s)")
    parser.add_argument("--tune-steps", type=int, default=500, help="after it (%(default)s)")
    parser.add_argument("--pages", default=str(DOCS), help="folder of the pages to update")
    args = parser.parse_args()
    begun, out = time.monotonic(), Path(args.out)
    out.mkdir(parents=True, exist_ok=True)

    large, said = reference(), conversations()
    small = said + prose(Path(args.pages) / "next_word.zh.md")
    if not large:
        print(f"{REFERENCE} is not there: apt-get install debian-reference-zh-cn gives it; without")
    texts = {"base": "\n\n".join(large or small), "tuned": "\n\n".join(small)}
    for name, text in texts.items():
        (out / f"{name}.txt").write_text(text, encoding="utf-8")
    # The page repeats itself: its own phrases would become tokens.
    Tokenizer.train([*large, *said], 3000).save(out / "tokenizer.json")

    base = TrainConfig(
        out=str(out / "base"), steps=args.steps, resume="auto",
        model=ModelConfig(block_size=64, n_layer=4, n_head=4, n_embd=128),
        data=DataConfig((str(out / "base.txt"),), tokenizer=str(out / "tokenizer.json")),
        batch=BatchConfig(rows=16), optim=OptimConfig(lr=2e-3), eval=EvalConfig(every=300),
        checkpoint=CheckpointConfig(every=0, keep=1), log=LogConfig(every=50),
    )  # fmt: skip
    tuned = TrainConfig(
        out=str(out / "tuned"), steps=args.tune_steps, resume="auto",
        model=ModelConfig(init=base.out),
        data=DataConfig((str(out / "tuned.txt"),), deduplicate="none", held_out=0.02),
        batch=BatchConfig(rows=16), optim=OptimConfig(lr=3e-3), eval=EvalConfig(every=0),
        checkpoint=CheckpointConfig(every=0, keep=1), log=LogConfig(every=50),
    )  # fmt: skip
    for config in (base, tuned):
        train(config)
    model, tokenizer = load(tuned.out)
    blocks = walk.through(model.eval(), tokenizer, SENTENCE, PROMPT, OTHERS)
    for name, text in blocks.items():
        print(f"\n{name}\n{text}")
    for page in ("next_word.md", "next_word.zh.md"):
        fill(Path(args.pages) / page, blocks)
    print(f"\n{args.pages}/next_word.md, next_word.zh.md; {time.monotonic() - begun:.0f} s")


def reference() -> list[str]:
    """Paragraphs of the Debian Reference in Chinese (GPL-2+), of the package's HTML."""

    class Paragraphs(HTMLParser):
        found: list[str]
        inside = False

        def handle_starttag(self, tag: str, attrs: object) -> None:
            if tag == "p":
                self.inside = True
                self.found.append("")

        def handle_endtag(self, tag: str) -> None:
            self.inside = self.inside and tag != "p"

        def handle_data(self, data: str) -> None:
            if self.inside:
                self.found[-1] += data

    parser = Paragraphs()
    parser.found = []
    for file in sorted(REFERENCE.glob("*.zh-cn.html")):
        parser.feed(file.read_text(encoding="utf-8"))
    flat = (" ".join(text.split()) for text in parser.found)
    return [text for text in flat if len(re.findall("[\u4e00-\u9fff]", text)) > len(text) / 3]


def conversations() -> list[str]:
    """Question and answers of chatterbot-corpus in Chinese (BSD)."""
    spec = find_spec("chatterbot_corpus")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("pip install --no-deps chatterbot-corpus==1.3.3")
    folder = Path(spec.submodule_search_locations[0]) / "data" / "chinese"
    found = []
    for file in sorted(folder.glob("*.yml")):
        for turns in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
            found.append("\n".join(map(str, turns)))
    return found


def prose(page: Path) -> list[str]:
    """What is written on the page, without its tables, formulas and numbers."""
    text = re.sub(
        r"<!-- next_word.*?<!-- end -->", "", page.read_text(encoding="utf-8"), flags=re.S
    )
    paragraphs = (" ".join(p.split("\n")) for p in text.split("\n\n"))
    return [p for p in paragraphs if p and p[0] not in "|#[<" and not p.startswith("    ")]


def fill(page: Path, blocks: dict[str, str]) -> None:
    """Put each block between its marks."""
    text = page.read_text(encoding="utf-8")
    for name, block in blocks.items():
        mark = f"<!-- next_word: {name} -->\n"
        before, rest = text.split(mark)
        text = (
            f"{before}{mark}```text\n{block}\n```\n<!-- end -->{rest.split('<!-- end -->', 1)[1]}"
        )
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
