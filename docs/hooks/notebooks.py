"""Notebooks as pages: their cells and stored outputs in Markdown, and nothing is run.

So they look like the other pages, with the same formulas, colours and links.
"""

import json
import pathlib
from collections.abc import Iterator
from typing import Any

from mkdocs.structure.files import File, Files


IMAGES = {"image/png": "base64,", "image/jpeg": "base64,"}


class Notebook(File):
    """A notebook that is made into a page, as a Markdown file is."""

    def is_documentation_page(self) -> bool:
        return True


def _fenced(text: str, kind: str) -> str:
    return f"````{kind}\n{text.rstrip()}\n````"


def _shown(output: dict[str, Any]) -> str:
    """An output in the richest form that a page can show."""
    data = {kind: "".join(value) for kind, value in output.get("data", {}).items()}
    for kind, encoding in IMAGES.items():
        if kind in data:
            image = data[kind].replace("\n", "")
            return f"![What the cell draws](data:{kind};{encoding}{image})"
    if "text/markdown" in data:
        return data["text/markdown"]
    text = output.get("text", data.get("text/plain", ""))
    return _fenced("".join(text), "{ .text .output }")


def _parts(notebook: dict[str, Any]) -> Iterator[str]:
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            yield source
        elif cell["cell_type"] == "code" and source.strip():
            yield _fenced(source, "python")
            yield from map(_shown, cell["outputs"])


def as_markdown(text: str) -> str:
    """The text of a notebook file as Markdown."""
    return "\n\n".join(_parts(json.loads(text))) + "\n"


def on_files(files: Files, **_: object) -> Files:
    """Notebooks are pages."""
    for file in list(files):
        if pathlib.PurePosixPath(file.src_uri).suffix == ".ipynb":
            files.remove(file)
            src, dest, urls = file.src_dir, file.dest_dir, file.use_directory_urls
            files.append(Notebook(file.src_uri, src, dest, urls))
    return files


def on_page_read_source(page: Any, **_: object) -> str | None:
    """The Markdown of a notebook; None for other pages, which are read as they are."""
    if isinstance(page.file, Notebook):
        return as_markdown(page.file.content_string)
    return None
