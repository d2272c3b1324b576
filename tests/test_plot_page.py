"""The page about plots shows all of them, and its code runs."""

import pathlib
import re

import jax
import matplotlib.pyplot as plt
import pytest
from test_docstrings import PREAMBLE


PAGE = pathlib.Path(__file__).parent.parent / "docs" / "plots.md"
NAMES = "raster", "alignment", "scaling", "graph", "surrogates"


def test_the_page_shows_every_function():
    text = PAGE.read_text()
    assert all(f"plot.{name}(" in text for name in NAMES)
    images = re.findall(r"!\[.*?\]\((plots/\w+\.png)\)", text)
    assert len(images) == 5
    for image in images:
        assert (PAGE.parent / image).stat().st_size < 60_000


@pytest.mark.long
def test_the_page_runs_as_it_stands():
    text = PAGE.read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 8
    names = {}
    with (
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        for code in (PREAMBLE, *blocks):
            exec(compile(code, "plots.md", "exec"), names)
    plt.close("all")
