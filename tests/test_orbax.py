"""The recipe of the docs for Orbax: what it restores goes on bit for bit."""

import functools
import os

import jax
import numpy as np
import pytest
from oracles import quick_options
from snippets import PREAMBLE, ROOT, blocks, default_modes

import eqx_etrace


ocp = pytest.importorskip("orbax.checkpoint")
TOOLS = ROOT / "docs" / "tools.md"
RULES = {"drtrl": "eqx_etrace.DRTRL()", "uoro": "eqx_etrace.UORO(key)"}


def _recipe():
    (found,) = [block for block in blocks(TOOLS.read_text()) if "orbax" in block]
    return found


@pytest.fixture(params=RULES)
def names(request, tmp_path, monkeypatch):
    """What the recipe takes for granted, in JAX's default modes, as a user runs it."""
    monkeypatch.chdir(tmp_path)
    quick = functools.partial(jax.jit, compiler_options=quick_options())
    monkeypatch.setattr(jax, "jit", quick)
    with default_modes():
        names = {}
        rule = RULES[request.param]
        compiled = PREAMBLE + f"graph = eqx_etrace.compile(net, state, x, {rule})\n"
        exec(compiled + "trace = eqx_etrace.init_trace(graph)\n", names)
        yield names


def _leaves(now):
    assert isinstance(now, eqx_etrace.Checkpoint)
    return [
        np.asarray(jax.random.key_data(leaf) if "key<" in str(leaf.dtype) else leaf)
        for leaf in jax.tree.leaves(now[:4])
    ]


def test_the_recipe_goes_on_where_it_stopped(names):
    recipe = _recipe()
    assert recipe.count("* 10") == 1
    exec(recipe.replace("* 10", "* 4"), names)
    stopped = names["now"]
    assert stopped.step == 4
    exec(recipe, names)
    got, restored = names["now"], names["start"]
    assert sorted(os.listdir("orbax")) == ["10", "6", "8"]

    assert type(restored.step) is int and restored.step == 4
    assert jax.tree.structure(restored) == jax.tree.structure(stopped)
    for a, b in zip(_leaves(restored), _leaves(stopped), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)

    params, state, trace = (names[name] for name in ("params", "state", "trace"))
    optimiser = names["optimiser"]
    start = eqx_etrace.Checkpoint(params, optimiser.init(params), state, trace, 0)
    graph, loss_fn, batches = (names[name] for name in ("graph", "loss_fn", "batches"))
    whole = eqx_etrace.fit(graph, loss_fn, optimiser, start, batches)
    assert got.step == whole.step == 10
    for a, b in zip(_leaves(got), _leaves(whole), strict=True):
        np.testing.assert_array_equal(a, b)

    # With other shapes it is refused as well, but Orbax then warns of its own threads.
    other = start._replace(opt_state=())
    with ocp.CheckpointManager(os.path.abspath("orbax")) as manager:
        with pytest.raises(ValueError, match="structures do not match"):
            manager.restore(10, args=ocp.args.StandardRestore(other))
