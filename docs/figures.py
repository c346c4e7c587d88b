"""The figures of the last bench, for performance.md: what ``make bench`` wrote, as it wrote it.

A hook of MkDocs: the pictures are added to the site, the tables to the page.
"""

from pathlib import Path
from typing import Any

_RESULTS = Path(__file__).parent.parent / "bench" / "results"
_PLACE = "<!-- figures -->"
_PICTURES = "performance-figures"


def on_files(files: Any, config: Any) -> Any:
    """MkDocs: https://www.mkdocs.org/dev-guide/plugins/#on_files"""
    from mkdocs.structure.files import File

    for picture in sorted(_RESULTS.glob("*.svg")):
        name = f"{_PICTURES}/{picture.name}"
        files.append(File.generated(config, name, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    if _PLACE not in markdown:
        return markdown
    return markdown.replace(_PLACE, _figures())


def _figures() -> str:
    _, _, tables = (_RESULTS / "results.md").read_text().partition("\n\n")
    return tables.replace("\n## ", "\n### ").replace("](", f"]({_PICTURES}/")
