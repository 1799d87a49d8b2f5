"""Spanish to English by a GPT: python -m examples.translation, see docs/translation.md."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from examples.packages import smollm2
from examples.translation.dictionary import Dictionary
from examples.translation.pairs import read_pairs
from examples.translation.recipe import DICTIONARY, RESULTS, RUN, Recipe, prompt

STOPPED = 130  # as a shell reports SIGINT


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare, train, evaluate; or tell what the model is to be asked for a sentence."""
    parser = argparse.ArgumentParser("python -m examples.translation", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/translation"), help="(%(default)s)")
    parser.add_argument("--init", help="weights to tune; SmolLM2-135M-Instruct without")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="(%(default)s)")
    parser.add_argument("--prompt", metavar="TEXT", help="print the prompt of a Spanish text")
    args = parser.parse_args(argv)
    begun = time.monotonic()
    try:
        if args.prompt is not None:
            print(prompt(args.prompt, Dictionary.load(args.out / DICTIONARY)))
            return 0
        recipe = Recipe(args.out, args.init or smollm2(), args.steps)
        recipe.prepare(read_pairs)
        if not recipe.train():
            print("stopped; the same command goes on")
            return STOPPED
        recipe.evaluate()
        asked = "Y el rey dijo á su siervo: Toma el pan."
        print(f"{args.out / RESULTS}; {time.monotonic() - begun:.0f} s in all. Ask it:")
        print(
            f"fastgpt generate --checkpoint {args.out / RUN} --temperature 0 --max-new-tokens 40"
            f" --prompt \"$(python -m examples.translation --out {args.out} --prompt '{asked}')\""
        )
    except (ValueError, OSError, ImportError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
