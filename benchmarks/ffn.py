"""As `fastgpt bench ffn`: see fastgpt/bench/ops."""

import sys

from fastgpt.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "ffn", *sys.argv[1:]]))
