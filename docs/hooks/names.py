"""The build fails while a public name has no entry `::: name` in the API pages."""

import importlib
import inspect
import pathlib
import pkgutil
import re

from mkdocs.exceptions import PluginError


PACKAGE = "eqx_etrace"


def public_modules() -> list[str]:
    """The package, and the modules in it that do not start with an underscore."""
    found = pkgutil.iter_modules(importlib.import_module(PACKAGE).__path__)
    names = (module.name for module in found)
    return [PACKAGE, *(f"{PACKAGE}.{name}" for name in names if name[0] != "_")]


def public_names() -> list[str]:
    """The full public names, in the order of the modules."""
    return [
        f"{module}.{name}"
        for module in public_modules()
        for name, thing in vars(importlib.import_module(module)).items()
        if not name.startswith("_")
        and not inspect.ismodule(thing)
        and getattr(thing, "__module__", module).startswith(PACKAGE)
    ]


def undocumented(pages: pathlib.Path) -> list[str]:
    """The public names without an entry in the Markdown files of a folder."""
    text = "\n".join(page.read_text("utf-8") for page in pages.glob("*.md"))
    entries = set(re.findall(r"^::: +([\w.]+)", text, re.MULTILINE))
    return [name for name in public_names() if name not in entries]


def on_pre_build(config: dict[str, str], **_: object) -> None:
    """Raise for the names that are missing."""
    missing = undocumented(pathlib.Path(config["docs_dir"]) / "api")
    if missing:
        raise PluginError(
            f"docs/api: got no entry for {', '.join(missing)}, expected one for every "
            "public name. Add `::: name` to the page where it belongs."
        )
