"""As `fastgpt bench rotary`: see fastgpt/bench/ops."""

import sys

from fastgpt.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "rotary", *sys.argv[1:]]))
