"""An extension of griffe: the signature of a class that takes its fields as arguments.

Griffe reads sources alone. It knows the fields of a dataclass, but not that every
Equinox module is one, nor what it has from its bases.
"""

import importlib
import inspect
from typing import Any

import griffe


def _text(value: Any, attribute: Any) -> str | None:
    if value is inspect.Parameter.empty:
        return None
    text = repr(value)
    # Of functions and sentinels the source says more.
    return str(attribute.value) if text.startswith("<") and attribute else text


def _annotation(parameter: inspect.Parameter, attribute: Any) -> Any:
    if attribute is not None:
        return attribute.annotation
    found = parameter.annotation
    if found is inspect.Parameter.empty:
        return None
    return found.__name__ if inspect.isclass(found) else str(found)


class Signatures(griffe.Extension):
    """Gives classes without an `__init__` in their source the one that they have."""

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        if "__init__" in cls.members or not cls.parent or not cls.parent.is_module:
            return
        thing: Any = getattr(importlib.import_module(cls.parent.path), cls.name, None)
        fields = getattr(thing, "__dataclass_fields__", getattr(thing, "_fields", ()))
        if not fields or inspect.isabstract(thing):
            return
        parameters = []
        for name, parameter in inspect.signature(thing).parameters.items():
            attribute = cls.members.get(name)
            parameters.append(
                griffe.Parameter(
                    name,
                    annotation=_annotation(parameter, attribute),
                    kind=griffe.ParameterKind(parameter.kind.description),
                    default=_text(parameter.default, attribute),
                )
            )
        itself = griffe.Parameter(
            "self", kind=griffe.ParameterKind.positional_or_keyword
        )
        made = griffe.Parameters(itself, *parameters)
        cls.set_member("__init__", griffe.Function("__init__", parameters=made))
