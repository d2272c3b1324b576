"""Every Python block of the pages runs."""

import pytest
from snippets import ROOT, page_blocks, run


# Those of the README are run in `test_readme.py`.
PAGES = {
    page.relative_to(ROOT).as_posix(): page_blocks(page.read_text("utf-8"))
    for page in sorted((ROOT / "docs").rglob("*.md"))
}


SLOW = {
    f"docs/{page}.md"
    for page in ("coming-from", "faq", "plots", "tools", "writing-a-rule")
}


def _marked(name):
    if name not in SLOW:
        return name
    mark = pytest.mark.slow if name == "docs/tools.md" else pytest.mark.long
    return pytest.param(name, marks=mark)


@pytest.mark.parametrize("name", [_marked(name) for name in PAGES if PAGES[name]])
def test_blocks_run(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run(name, PAGES[name])
    capsys.readouterr()


def test_a_block_that_fails_is_found():
    text = "# A page\n\n```python\nx = 1\n```\n\nand\n\n```python\nassert x == 2\n```\n"
    with pytest.raises(AssertionError) as caught:
        run("a page", page_blocks(text))
    last = caught.traceback[-1]
    assert str(last.path).endswith("a page") and last.lineno + 1 == 10


def test_comments_run_in_order():
    text = "<!-- run:\nx = 1\n-->\n```python\ny = x + 1\n```\n<!-- run:\nz = y\n-->\n"
    assert run("a page", page_blocks(text))["z"] == 2
