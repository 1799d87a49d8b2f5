"""As `fastgpt bench cross_entropy`: see fastgpt/bench/ops."""

import sys

from fastgpt.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "cross_entropy", *sys.argv[1:]]))
