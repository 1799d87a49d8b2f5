"""Files that are written whole or not at all."""

import os
from pathlib import Path


def write_whole(path: str | Path, text: str) -> None:
    """Write text to path by way of a file beside it, which takes its place when it is complete.

    Raises:
        OSError: the folder is not there, or cannot be written.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
