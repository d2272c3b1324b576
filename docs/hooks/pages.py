"""Pages are written as GitHub and Jupyter read them; Python-Markdown differs a little.

A list may follow a paragraph without a blank line between, and what belongs to an item
may be indented as far as its text, in place of four columns.
"""

import re
from collections.abc import Iterator


ITEM = re.compile(r"(?:[-*+]|\d+[.)]) +(?=\S)")
FENCE = re.compile(r" *(`{3,}|~{3,})")
RUN = re.compile(r"^<!-- run:\n.*?^-->\n", re.MULTILINE | re.DOTALL)


def _lines(text: str) -> Iterator[str]:
    fence, indent, previous, parts = "", 0, "", False
    for line in text.split("\n"):
        mark = FENCE.match(line)
        if mark and not fence:
            fence = mark[1]
        elif mark and line.strip() == fence:
            fence = ""
        elif fence == "":
            item = ITEM.match(line)
            if item:
                if previous.strip() and (parts or not indent):
                    yield ""
                indent, parts = item.end(), False
            elif line.strip() and not previous.strip():
                indent = indent if line.startswith(" ") else 0
                parts = indent > 0
        inside = indent and line.startswith(" " * indent)
        yield " " * 4 + line[indent:] if inside and indent < 4 else line
        previous = line


def on_page_markdown(markdown: str, **_: object) -> str:
    """The page as Python-Markdown reads it, without what only the tests run."""
    return "\n".join(_lines(RUN.sub("", markdown)))
