"""Key paths as a person writes them, in tables, reports and errors."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from catalogue import OWN
from catalogue_case import N, problem
from catalogue_structure import Quantity

import eqx_etrace as etrace
from eqx_etrace._stage import leaf_table, named_leaves


class _Pair:
    """Two children without keys; either may be None."""

    def __init__(self, first, second):
        self.children = first, second


jax.tree_util.register_pytree_node(
    _Pair, lambda pair: (pair.children, None), lambda _, both: _Pair(*both)
)
ONE, KEY = jnp.ones(2), jax.random.key(0)
PATHS = {
    "the tree itself": (Quantity(ONE, "mV"), ["state"]),
    "in containers": (
        {"a": Quantity(ONE, "mV"), "b": [ONE, Quantity(ONE, "mV")]},
        ["state['a']", "state['b'][0]", "state['b'][1]"],
    ),
    "of containers": (Quantity({"a": ONE, "b": ONE}, ""), ["state['a']", "state['b']"]),
    "one in another": (Quantity(Quantity(ONE, "mV"), ""), ["state"]),
    "two children": ((_Pair(ONE, ONE),), ["state[0][0]", "state[0][1]"]),
    "one of two is None": ([_Pair(None, ONE)], ["state[0][1]"]),
    "both": (_Pair(Quantity(ONE, ""), _Pair(ONE, None)), ["state[0]", "state[1][0]"]),
}


@pytest.mark.parametrize("name", PATHS)
def test_paths_through_classes_without_keys(name):
    tree, expected = PATHS[name]
    assert [path for path, _ in named_leaves("state", tree)] == expected
    assert leaf_table("state", tree).paths == tuple(expected)


def test_a_path_is_the_same_where_none_is_named_too():
    tree = {"a": _Pair(None, Quantity(ONE, "mV")), "b": Quantity(None, "mV")}
    assert [path for path, _ in named_leaves("s", tree)] == ["s['a'][1]"]
    every = [path for path, _ in named_leaves("s", tree, keep_none=True)]
    assert every == ["s['a'][0]", "s['a'][1]", "s['b']"]


def test_a_path_is_the_same_whatever_is_trained():
    """The array that is not trained is a None in the tree of params."""
    model = {"pair": _Pair(jnp.ones((N, N)), jnp.ones(N)), "w": Quantity(ONE, "")}
    trainable = jax.tree.map(lambda leaf: leaf.ndim == 2, model)

    def call(model, x, h):
        w, b = model["pair"].children
        h = jnp.tanh(w @ x + b * h)
        return h, h

    h, x = jnp.zeros(N), jnp.zeros(N)
    graph = etrace.compile(model, h, x, call=call, trainable=trainable)
    assert graph.param_leaves.paths == ("['pair'][0]",)


# A model whose params, state and input are such a class.


@pytest.fixture
def quantities():
    model, state, xs, _ = problem(OWN["quantities_with_units"])
    x = jax.tree.map(lambda a: a[0], xs)
    return etrace.compile(model, state, x), model, state, x


def test_reports_name_the_array_in_a_quantity(quantities):
    graph, *_ = quantities
    assert graph.param_leaves.paths == ("p['tau']", "p['u']", "p['w']")
    assert graph.groups[0].leaves == ("state['v']",)
    text = str(graph.report()) + str(graph.explain(weight="p['w']"))
    assert "state['v']" in text and "flat index" not in text
    for name in ("tau", "u", "w"):
        assert re.search(rf"^ *p\['{name}'\] ", text, re.MULTILINE)


def test_a_group_of_quantities_is_read_and_written(quantities):
    graph, _, state, _ = quantities
    (group,) = graph.groups
    h = group.concat(state)
    np.testing.assert_array_equal(h[:, 0], state["v"].value)
    new = group.split(2 * h, state)
    assert new["v"].unit == "mV"
    np.testing.assert_array_equal(new["v"].value, 2 * state["v"].value)


WRONG_STATES = {
    "another shape": ({"v": Quantity(ONE, "mV")}, r"state\['v'\]: got float64\[2\]"),
    "None": ({"v": Quantity(None, "mV")}, r"state\['v'\]: got None"),
    "no quantity": (
        {"v": jnp.zeros(N)},
        r"state\['v'\]: got PyTreeDef\(\*\), expected PyTreeDef\(.*Quantity\[mV\]",
    ),
    "another unit": (
        {"v": Quantity(jnp.zeros(N), "V")},
        r"state\['v'\]: got PyTreeDef\(.*\[V\].*, expected PyTreeDef\(.*\[mV\]",
    ),
}


@pytest.mark.parametrize("name", WRONG_STATES)
def test_errors_name_the_array_in_a_quantity(name, quantities):
    graph, model, _, x = quantities
    state, message = WRONG_STATES[name]
    params, trace = graph.params(model), etrace.init_trace(graph)
    with pytest.raises(ValueError, match=message):
        etrace.step(graph, params, state, trace, x)


def test_of_two_structures_the_part_that_differs_is_said():
    """A part of several leaves is said with the name of the whole."""
    whole = {"a": ONE, "b": [ONE, (ONE, ONE)]}
    table = leaf_table("state", whole)
    with pytest.raises(ValueError) as info:
        table.flatten({"a": ONE, "b": [ONE, [ONE, ONE]]}, None, "Remedy.")
    expected = "state: got PyTreeDef([*, *]), expected PyTreeDef((*, *)). Remedy."
    assert str(info.value) == expected


def test_equinox_states_are_numbered():
    class Layers(eqx.Module):
        first: eqx.nn.StateIndex
        second: eqx.nn.StateIndex

        def __init__(self):
            self.first, self.second = map(eqx.nn.StateIndex, (ONE, ONE))

    _, state = eqx.nn.make_with_state(Layers)()
    assert leaf_table("state", state).paths == ("state[0]", "state[1]")


@pytest.mark.parametrize("batched", [False, True])
def test_an_error_of_the_model_says_what_it_was_traced_with(batched):
    def swapped(model, x, h):
        return (model(h, x),) * 2

    net, h, x = eqx.nn.GRUCell(3, 4, key=KEY), jnp.ones((2, 4)), jnp.ones((2, 3))
    with pytest.raises(TypeError) as info:
        etrace.compile(net, h, x, call=swapped, batched=batched)
    (note,) = [note for note in info.value.__notes__ if "etrace" in note]
    lead = "" if batched else "2, "
    hint = "batch is left out" if batched else "compile with batched=True"
    assert f"with x float64[{lead}3], state float64[{lead}4]. " in note
    assert hint in note and "`call=`" in note


def test_params_of_another_structure_are_named():
    table = leaf_table("", {"a": ONE, "b": (ONE, ONE)})
    with pytest.raises(ValueError, match=r"^params: got PyTreeDef"):
        table.flatten({"a": ONE, "b": [ONE, ONE]}, None, "Remedy.")
