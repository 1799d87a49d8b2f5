"""Where a run is shown besides its JSON and CSV: a page of docs, an HTML page, a picture."""

from dataclasses import dataclass
from pathlib import Path

from fastgpt.bench.result import Run


@dataclass(frozen=True)
class Shown:
    """Files to write, those that are wanted.

    Attributes:
        markdown: a page that has the two lines of `report.MARKS`; what lies between is replaced.
        html: one file that needs no network.
        png: pictures of times and memory.
    """

    markdown: Path | None = None
    html: Path | None = None
    png: Path | None = None

    def check(self) -> None:
        """Before minutes of work.

        Raises:
            ValueError: the page has not the two lines, or a folder is not there.
            ImportError: what draws is not installed.
        """
        if self.png is not None:
            from fastgpt.bench import plot

            plot.needs_matplotlib()
        if self.html is not None:
            try:
                import jinja2  # noqa: F401
            except ImportError:
                raise ImportError(
                    "bench: --html needs the package jinja2; pip install 'fastgpt-triton[lab]'"
                ) from None
        if self.markdown is not None:
            from fastgpt.bench.report import parts

            parts(self.markdown)
        for file in (self.html, self.png):
            if file is not None and not file.parent.is_dir():
                raise ValueError(f"bench: {file} must lie in a folder that is there")

    def write(self, run: Run) -> list[Path]:
        if self.markdown is not None:
            from fastgpt.bench import report

            report.put(run, self.markdown)
        if self.html is not None:
            from fastgpt.bench import page

            page.write(run, self.html)
        if self.png is not None:
            from fastgpt.bench import plot

            plot.draw(run.rows, self.png)
        return [file for file in (self.markdown, self.html, self.png) if file is not None]
