"""For mkdocs.yml: links to files outside docs/, and arguments documented together."""

import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
OUTSIDE = re.compile(r"\]\(\.\./([^)#]+)(#[^)]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Files of the repository that pages link to are on the site, under source/."""
    for page in list(files.documentation_pages()):
        for path, _ in OUTSIDE.findall(page.content_string):
            name = f"source/{path}"
            if (ROOT / path).is_file() and name not in files.src_uris:
                files.append(File.generated(config, name, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return OUTSIDE.sub(r"](source/\1)", markdown)


class Together(griffe.Extension):
    """`q, k, v: text` is `q: text`, `k: text`, `v: text`, so that each has its type."""

    LINE = re.compile(r"^( {4})([\w*]+(?:,\s+[\w*]+)+)(:.*(?:\n {5,}.*|\n(?=\n {5}))*)", re.M)

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = self.LINE.sub(
                lambda m: "\n".join(f"    {name}{m[3]}" for name in re.split(r",\s+", m[2])),
                obj.docstring.value,
            )
