"""As `fastgpt bench attention`: see fastgpt/bench/ops."""

import sys

from fastgpt.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "attention", *sys.argv[1:]]))
