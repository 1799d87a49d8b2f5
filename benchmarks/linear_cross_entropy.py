"""As `fastgpt bench linear_cross_entropy`: see fastgpt/bench/ops."""

import sys

from fastgpt.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "linear_cross_entropy", *sys.argv[1:]]))
