"""As `fastgpt bench quantized_linear`: see fastgpt/bench/ops."""

import sys

from fastgpt.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "quantized_linear", *sys.argv[1:]]))
