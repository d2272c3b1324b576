"""Every public name has a docstring with an example, and every example runs."""

import inspect

import pytest
from snippets import blocks, run

import eqx_etrace
from eqx_etrace import nn, plot, tasks


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
    return blocks(inspect.getdoc(thing) or "")


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
    run(name, [(1, EXAMPLES[name])])
    capsys.readouterr()


@pytest.mark.parametrize("name", ["HiddenGroup.concat", "HiddenGroup.transition"])
def test_examples_of_methods_are_found(name):
    assert f"{name}-0" in EXAMPLES
