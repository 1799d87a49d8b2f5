import sys

from fastgpt.cli import main

sys.exit(main(["train", *sys.argv[1:]]))
