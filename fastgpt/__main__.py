"""python -m fastgpt: the command line."""

import sys

from fastgpt.cli import main

sys.exit(main())
