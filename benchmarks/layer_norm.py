"""As `fastgpt bench layer_norm`: see fastgpt/bench/ops."""

import sys

from fastgpt.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "layer_norm", *sys.argv[1:]]))
