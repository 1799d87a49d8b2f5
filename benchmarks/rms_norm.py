"""As `fastgpt bench rms_norm`: see fastgpt/bench/ops."""

import sys

from fastgpt.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "rms_norm", *sys.argv[1:]]))
