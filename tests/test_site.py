"""What the site is made with: formulas, signatures, notebooks, and all public names."""

import importlib
import importlib.util
import inspect
import json
import os
import re
import shutil
import subprocess
import sys

import griffe
import pytest
from mkdocs.exceptions import PluginError
from snippets import ROOT


DOCS = ROOT / "docs"
FORMULA = re.compile(r"\$\$(.+?)\$\$|\$(\S(?:[^$\n]*\S)?)\$", re.DOTALL)
CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)


def _hook(name):
    spec = importlib.util.spec_from_file_location(
        f"hooks_{name}", DOCS / "hooks" / f"{name}.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


maths, names, notebooks, pages, signatures = map(
    _hook, ("maths", "names", "notebooks", "pages", "signatures")
)


def test_every_public_name_has_an_entry():
    found = names.public_names()
    assert {"eqx_etrace.compile", "eqx_etrace.nn.LIF", "eqx_etrace.tasks.copy"} < {
        *found
    }
    assert names.undocumented(DOCS / "api") == []


@pytest.mark.parametrize("name", ["eqx_etrace.step", "eqx_etrace.nn.LI"])
def test_a_name_without_an_entry_stops_the_build(name, tmp_path):
    shutil.copytree(DOCS / "api", tmp_path / "api")
    for page in (tmp_path / "api").glob("*.md"):
        page.write_text(re.sub(rf"^::: {name}$", "", page.read_text(), flags=re.M))
    # Names that begin as this one does are there, and are no entry for it.
    assert names.undocumented(tmp_path / "api") == [name]
    with pytest.raises(PluginError, match=f"no entry for {name},"):
        names.on_pre_build({"docs_dir": str(tmp_path)})


def _formulas():
    for folder, kind in (
        (DOCS, "*.md"),
        (DOCS, "*.ipynb"),
        (ROOT / "eqx_etrace", "*.py"),
    ):
        for path in sorted(folder.rglob(kind)):
            text = path.read_text("utf-8")
            if kind == "*.ipynb":
                cells = json.loads(text)["cells"]
                cells = [cell for cell in cells if cell["cell_type"] == "markdown"]
                text = "\n\n".join("".join(cell["source"]) for cell in cells)
            for block, inline in FORMULA.findall(CODE.sub("", text)):
                yield block or inline


def test_every_formula_becomes_mathml():
    found = {formula.strip() for formula in _formulas()}
    assert len(found) > 150
    for formula in found:
        assert "</math>" in maths.mathml(formula, "inline")


@pytest.mark.parametrize("formula", [r"\nosuch x", "a$ $b", r"a & b"])
def test_a_formula_that_is_not_understood_stops_the_build(formula):
    with pytest.raises(PluginError, match="expected one formula"):
        maths.mathml(formula, "inline")


@pytest.mark.parametrize(
    "formula, part",
    [
        ("s'", '<mrow><mi>s</mi><mo lspace="0" rspace="0">\u2032</mo></mrow>'),
        ("h'_s", "\u2032</mo></mrow><mi>s</mi></msub>"),
        ("h^2", "<msup><mi>h</mi><mn>2</mn></msup>"),
        (r"\mathcal L", "\u2112"),
        (r"\text{nu\_log}", "<mtext>nu_log</mtext>"),
    ],
)
def test_mathml(formula, part):
    assert part in maths.mathml(formula, "inline")


def test_formulas_of_a_page_are_replaced():
    page = r'<p>so <span class="arithmatex">\(a &lt; b\)</span>.</p>'
    page += '\n<div class="arithmatex">\\[\nc\n\\]</div>'
    found = maths.on_page_content(page)
    assert "\\" not in found and found.count("<math") == 2
    assert 'display="inline"><mrow><mi>a</mi><mo>&lt;</mo>' in found
    assert 'display="block"><mrow><mi>c</mi>' in found


PAGE = """text
- one
  more

  inside
- two

1. first

   ```python
- no item
   ```
2. second
<!-- run:
x = 1
-->
"""
READ = """text

- one
    more

    inside

- two

1. first

    ```python
- no item
    ```
2. second
"""


def test_pages_are_read_as_they_are_written():
    assert pages.on_page_markdown(PAGE) == READ


def test_notebooks_are_pages():
    def code(*outputs):
        return {"cell_type": "code", "source": ["x = 1\n", "x"], "outputs": outputs}

    result = {"output_type": "execute_result", "data": {"text/plain": ["1"]}}
    printed = {"output_type": "stream", "name": "stdout", "text": ["a\n", "b\n"]}
    figure = {"image/png": "QUJD\n", "text/plain": ["<Figure>"]}
    drawn = {"output_type": "display_data", "data": figure}
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "\n", "$a$"]},
        code(result, printed),
        code(drawn),
    ]
    found = notebooks.as_markdown(json.dumps({"cells": cells}))
    assert found.startswith("# Title\n\n$a$\n\n````python\nx = 1\nx\n````\n\n")
    assert "````{ .text .output }\n1\n````" in found
    assert "````{ .text .output }\na\nb\n````" in found
    assert found.endswith("](data:image/png;base64,QUJD)\n") and "<Fig" not in found


def test_signatures_are_those_of_the_classes():
    extensions = griffe.load_extensions(signatures.Signatures())
    package = griffe.load("eqx_etrace", search_paths=[str(ROOT)], extensions=extensions)
    checked = 0
    for name in names.public_names():
        module, _, last = name.rpartition(".")
        thing = getattr(importlib.import_module(module), last)
        if not inspect.isclass(thing) or inspect.isabstract(thing):
            continue
        fields = hasattr(thing, "__dataclass_fields__") or hasattr(thing, "_fields")
        if not fields or thing.__name__ != last:  # PPProp is a second name.
            continue
        shown = package[name.removeprefix("eqx_etrace.")].final_target.parameters
        shown = [parameter.name for parameter in shown if parameter.name != "self"]
        assert shown == [*inspect.signature(thing).parameters], name
        checked += 1
    assert checked > 80


REMOTE = re.compile(
    r"""<(?:script|img|iframe)\b[^>]*\bsrc=["']?(?:https?:)?//"""
    r"""|<link\b[^>]*\bhref=["']?(?:https?:)?//"""
)


@pytest.mark.slow
def test_the_site_needs_no_network(tmp_path):
    env = os.environ | {"PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    # Not with --quiet, under which a warning is no error.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir"]
    done = subprocess.run(
        [*command, str(tmp_path / "site")],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    written = sorted((tmp_path / "site").rglob("*.html"))
    assert len(written) > 30
    for page in written:
        text = page.read_text("utf-8")
        assert not REMOTE.search(text), page
        assert "<!-- run:" not in text and 'class="arithmatex">\\' not in text, page
