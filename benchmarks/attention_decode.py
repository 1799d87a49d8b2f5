"""As `fastgpt bench attention_decode`: see fastgpt/bench/ops."""

import sys

from fastgpt.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "attention_decode", *sys.argv[1:]]))
