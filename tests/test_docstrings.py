"""Every public name has a docstring with an example, and every example runs."""

import inspect
import re
import textwrap

import jax
import matplotlib.pyplot as plt
import pytest

import eqx_etrace
from eqx_etrace import nn, plot, tasks


# What the examples take for granted: a model, its graph and one sample of data.
PREAMBLE = """
import dataclasses
import equinox as eqx
import jax
import jax.numpy as jnp
import eqx_etrace
from eqx_etrace import nn, tasks

class Net(eqx.Module):
    cell: eqx.nn.GRUCell
    readout: eqx.nn.Linear

    def __call__(self, x, state):
        state = self.cell(x, state)
        return self.readout(state), state

key = jax.random.key(0)
net = Net(eqx.nn.GRUCell(3, 8, key=key), eqx.nn.Linear(8, 2, key=key))
state, x, target = jnp.zeros(8), jnp.ones(3), jnp.ones(2)
graph = eqx_etrace.compile(net, state, x)
params, trace = graph.params(net), eqx_etrace.init_trace(graph)
xs, targets = jnp.ones((12, 3)), jnp.ones((12, 2))
loss_fn = lambda out, target: jnp.sum((out - target) ** 2)
"""


DATA = {"tasks.japanese_vowels", "tasks.gun_point", "tasks.basic_motions"}
MODULES = {"": eqx_etrace, "nn.": nn, "plot.": plot, "tasks.": tasks}


def _documented():
    """Public names, and the public methods of public classes, with their docstring."""
    for prefix, module in MODULES.items():
        for name, thing in sorted(vars(module).items()):
            if name.startswith("_") or inspect.ismodule(thing):
                continue
            yield prefix + name, thing
            if inspect.isclass(thing) and thing.__module__.startswith("eqx_etrace"):
                for method, function in sorted(vars(thing).items()):
                    if not method.startswith("_") and callable(function):
                        yield f"{prefix}{name}.{method}", function


THINGS = dict(_documented())
NAMES = [
    prefix + name
    for prefix, module in MODULES.items()
    for name in vars(module)
    if prefix + name in THINGS
]


def _examples(thing):
    text = inspect.getdoc(thing) or ""
    blocks = re.findall(r"^ *```python\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(block) for block in blocks]


EXAMPLES = {
    f"{name}-{i}": example
    for name, thing in THINGS.items()
    for i, example in enumerate(_examples(thing))
    if name not in DATA
}


@pytest.mark.parametrize("name", NAMES)
def test_public_names_have_an_example(name):
    thing = THINGS[name]
    if inspect.isclass(thing) and issubclass(thing, tuple):
        assert inspect.getdoc(thing), f"{name} has no docstring"
    else:
        assert _examples(thing), f"{name} has no example in its docstring"


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(name, capsys):
    # As a user runs them: in JAX's default modes, not in the strict ones of the tests.
    with (
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        names = {}
        exec(compile(PREAMBLE, "preamble", "exec"), names)
        exec(compile(EXAMPLES[name], name, "exec"), names)
    plt.close("all")
    capsys.readouterr()


@pytest.mark.parametrize("name", ["HiddenGroup.concat", "HiddenGroup.transition"])
def test_examples_of_methods_are_found(name):
    assert f"{name}-0" in EXAMPLES
