"""Type aliases shared by all rooms."""

from typing import Any, Literal, TypeAlias

from jaxtyping import Array, PyTree, Shaped


Labels: TypeAlias = Any
"""A NumPy integer array that holds, per element, a unit or an element number."""

Params: TypeAlias = PyTree
"""The trainable part of the user's model, as `eqx.partition` gives it."""

State: TypeAlias = PyTree
"""The user's own state, whatever its structure."""

Values: TypeAlias = tuple[Shaped[Array, "..."], ...]
"""A flat tuple of arrays of any shape and dtype."""

Scope: TypeAlias = Literal["local", "unit"]
"""How much of a recurrent product a rule keeps: nothing, or what stays in a unit."""
