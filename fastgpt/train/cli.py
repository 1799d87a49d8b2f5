"""The command `fastgpt train`, which `python -m fastgpt.train` is too."""

import argparse
import json
import time
from typing import Any

STOPPED = 130  # as a shell reports SIGINT
PATIENCE = 10.0  # seconds in which rank 0 can say why


def main(argv: list[str]) -> int:
    """Train as the options say; 0 if the run came to its end, STOPPED if a signal ended it.

    Raises:
        ValueError, TypeError, OSError, ImportError, FloatingPointError: on rank 0, which is to say
            why; the other ranks return 2.
    """
    try:
        return _train(argv)
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError):
        from fastgpt.parallel import rank

        if rank() == 0:
            raise
        time.sleep(PATIENCE)  # torchrun ends all ranks when the first one leaves
        return 2


def _train(argv: list[str]) -> int:
    try:
        import jsonargparse
    except ImportError:
        raise ImportError(
            "train: needs the package jsonargparse; pip install 'fastgpt-triton[train]'"
        ) from None
    from fastgpt.train import TrainConfig, checkpoint, train

    parser: Any = jsonargparse.ArgumentParser(
        "fastgpt train",
        description="Train a GPT. A YAML file of --config has these options; those after it count."
        " Under torchrun many processes share the work.",
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="YAML file of these options")
    parser.add_class_arguments(TrainConfig)
    try:
        options = parser.parse_args(_words(argv))
        made = parser.instantiate(options).as_dict()
    except (argparse.ArgumentError, jsonargparse.ArgumentError) as error:
        raise ValueError(f"fastgpt train: {error}; see fastgpt train --help") from None
    made.pop("config")
    config = TrainConfig(**made)
    trainer = train(config)
    folder = checkpoint.find(config.out)
    if trainer.layout.is_main:
        n = trainer.steps_done
        if trainer.done:
            print(f"done: {n} steps, checkpoint {folder}")
        else:
            print(f"stopped after {n} steps, checkpoint {folder}; --resume goes on")
    return 0 if trainer.done else STOPPED


def _words(argv: list[str]) -> list[str]:
    """The command line as jsonargparse takes it.

    --n-layer is --n_layer, as the other commands write theirs; a list, as --data.files, takes
    several words; a switch alone is true, and --resume alone must.
    """
    from fastgpt.train.config import TrainConfig, flat

    default = flat(TrainConfig())
    switches = {f"--{k}" for k, v in default.items() if isinstance(v, bool)}
    lists = {f"--{k}" for k, v in default.items() if isinstance(v, list)}
    words: list[str] = []
    at = 0
    while at < len(argv):
        word = argv[at]
        at += 1
        if not word.startswith("--"):
            words.append(word)
            continue
        name, equals, value = word.partition("=")
        word = name.replace("-", "_").replace("__", "--", 1) + equals + value
        end = at
        while end < len(argv) and not argv[end].startswith("-"):
            end += 1
        if word in lists and end > at:
            word, at = f"{word}={json.dumps(argv[at:end])}", end
        elif word == "--resume" and end == at:
            word = "--resume=must"
        elif word in switches and end == at:
            word += "=true"
        words.append(word)
    return words
