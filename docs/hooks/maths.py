"""Formulas become MathML while the site is built: no script, nothing from a network.

Arithmatex marks the formulas of a page; this turns each mark into MathML.
"""

import html
import re
from xml.etree import ElementTree

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError


SPACE = "http://www.w3.org/1998/Math/MathML"
MARKED = re.compile(
    r'(<(span|div) class="arithmatex">)\\([(\[])(.*?)\\[)\]](</\2>)', re.DOTALL
)
# Without braces the converter gives an attribute that browsers do not know.
UNBRACED = re.compile(r"(\\math[a-z]+) +([A-Za-z])")
PRIMES = "\u2032\u2033\u2034"

ElementTree.register_namespace("", SPACE)


def _raised(element: ElementTree.Element) -> None:
    """Primes beside what they belong to. They are raised by themselves; as superscripts
    they would be too small to see, but for a few fonts."""
    for child in element:
        _raised(child)
    kind, prime = element.tag.removeprefix(f"{{{SPACE}}}"), element[-1:]
    if kind not in ("msup", "msubsup") or (prime[0].text or "-") not in PRIMES:
        return
    element.remove(prime[0])
    prime[0].tag = f"{{{SPACE}}}mo"
    prime[0].attrib = {"lspace": "0", "rspace": "0"}
    row = element
    if kind == "msubsup":
        row, base = ElementTree.Element(f"{{{SPACE}}}mrow"), element[0]
        element.tag = f"{{{SPACE}}}msub"
        element[0] = row
        row.append(base)
    else:
        element.tag = f"{{{SPACE}}}mrow"
    row.append(prime[0])


def mathml(formula: str, display: str) -> str:
    """A formula as MathML; `display` is `"inline"` or `"block"`."""
    braced = UNBRACED.sub(r"\1{\2}", formula)
    found = convert(braced, display=display).replace(r"\_", "_")
    try:
        root = ElementTree.fromstring(found)
    except ElementTree.ParseError:
        root = None
    # What it does not know, the converter leaves in the text as it is. A dollar comes
    # from two formulas without a blank line between.
    if root is None or "\\" in found or "$" in found:
        raise PluginError(
            f"formula: got {formula!r}, of which {found!r} came; expected one formula "
            "of commands that latex2mathml knows. Write it with others, and leave a "
            "blank line between two formulas."
        )
    _raised(root)
    return ElementTree.tostring(root, encoding="unicode")


def _replaced(match: re.Match[str]) -> str:
    opening, _, bracket, formula, closing = match.groups()
    display = "block" if bracket == "[" else "inline"
    return opening + mathml(html.unescape(formula).strip(), display) + closing


def on_page_content(page_html: str, **_: object) -> str:
    """The page with MathML."""
    return MARKED.sub(_replaced, page_html)
