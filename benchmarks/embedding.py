"""As `fastgpt bench embedding`: see fastgpt/bench/ops."""

import sys

from fastgpt.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "embedding", *sys.argv[1:]]))
