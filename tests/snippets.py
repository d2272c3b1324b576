"""Blocks of Python in pages and docstrings, and how a reader would run them."""

import contextlib
import pathlib
import re
import textwrap
from collections.abc import Iterator, Sequence

import jax
import matplotlib
import matplotlib.pyplot as plt


matplotlib.use("Agg")

ROOT = pathlib.Path(__file__).parent.parent
BLOCK = re.compile(r"^ *```python\b[^\n]*\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
RUN = re.compile(r"^<!-- run:\n(.*?)^-->$", re.MULTILINE | re.DOTALL)


def blocks(text: str) -> list[str]:
    """The fenced blocks of a text that are marked as Python."""
    return [textwrap.dedent(block) for block in BLOCK.findall(text)]


def page_blocks(text: str) -> list[tuple[int, str]]:
    """The blocks of a page with their first line, and what comments tell to run: what
    a page takes for granted, or what it does not show."""
    found = [
        (text.count("\n", 0, match.start(1)) + 1, textwrap.dedent(match[1]))
        for pattern in (BLOCK, RUN)
        for match in pattern.finditer(text)
    ]
    return sorted(found)


# What the examples take for granted: a model, its graph and one sample of data.
(PREAMBLE,) = blocks((ROOT / "docs" / "api" / "index.md").read_text("utf-8"))


@contextlib.contextmanager
def default_modes() -> Iterator[None]:
    """JAX as a user has it, not in the strict modes of the tests."""
    with (
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        yield


def run(name: str, found: Sequence[tuple[int, str]]) -> dict[str, object]:
    """Runs the preamble and then blocks, in one namespace; gives that namespace.

    Figures are closed. A failure names the page and has the number of the line in it.
    """
    names: dict[str, object] = {}
    try:
        with default_modes():
            exec(compile(PREAMBLE, "preamble", "exec"), names)
            for line, block in found:
                exec(compile("\n" * (line - 1) + block, name, "exec"), names)
    finally:
        plt.close("all")
    return names
