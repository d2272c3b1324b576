"""Every public name has a docstring with an example, and every example runs."""

import inspect
import re
import textwrap

import jax
import pytest

from eqx_etrace import nn


PREAMBLE = """
import equinox as eqx
import jax
import jax.numpy as jnp
from eqx_etrace import nn

key = jax.random.key(0)
"""
NAMES = [name for name, thing in sorted(vars(nn).items()) if not name.startswith("_")]
NAMES = [name for name in NAMES if not inspect.ismodule(getattr(nn, name))]


def _examples(name):
    text = inspect.getdoc(getattr(nn, name)) or ""
    blocks = re.findall(r"^ *```python\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(block) for block in blocks]


@pytest.mark.parametrize("name", NAMES)
def test_public_names_are_documented(name):
    thing = getattr(nn, name)
    assert inspect.getdoc(thing), name
    if not issubclass(thing, tuple) if inspect.isclass(thing) else True:
        assert _examples(name), f"{name} has no example in its docstring"


@pytest.mark.parametrize("name", [name for name in NAMES if _examples(name)])
def test_examples_run(name):
    # As a user runs them: in JAX's default modes, not in the strict ones of the tests.
    with (
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        for example in _examples(name):
            names = {}
            exec(compile(PREAMBLE, "preamble", "exec"), names)
            exec(compile(example, name, "exec"), names)
