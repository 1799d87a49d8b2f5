"""As `fastgpt bench adamw`: see fastgpt/bench/ops."""

import sys

from fastgpt.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "adamw", *sys.argv[1:]]))
