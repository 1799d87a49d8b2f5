"""How long it takes until something happens: imports and --help, in processes of their own."""

import subprocess
import sys
from typing import Any

from fastgpt.bench.case import Start

START = "start"
PROVIDERS = {
    "import torch": ("-c", "import torch"),
    "import fastgpt, all of it": ("-c", "from fastgpt import *"),
    "fastgpt --help": ("-m", "fastgpt", "--help"),
}


class Starts:
    """See `case.Work`."""

    what = name = START
    modes = (START,)
    offers = tuple(PROVIDERS)

    def __init__(self) -> None:
        self.sizes: dict[str, int] = {}
        self.absent: dict[str, str] = {}

    def ready(self, provider: str) -> None:
        """Nothing: the processes are what is timed."""

    def start(self, provider: str, mode: str) -> Start:
        command = [sys.executable, *PROVIDERS[provider]]
        return lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    def first(self, provider: str, mode: str) -> Any:
        return self.start(provider, mode)()

    def wrong(self, provider: str, mode: str) -> None:
        return None

    def memory(self, provider: str, call: Start) -> tuple[None, None]:
        return None, None

    def saved(self, provider: str) -> None:
        return None

    def counts(self, mode: str) -> dict[str, int]:
        return {}
