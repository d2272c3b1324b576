"""`plan` against what is allocated."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from catalogue_case import one_in
from every_rule import RULES, Problem, with_extras
from models import MODELS
from scripts import run_code
from windows import squares

import eqx_etrace as etrace


STEPS, BATCH = 40, 4


def _specs(tree, *lead):
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((*lead, *leaf.shape), leaf.dtype), tree
    )


def _model(name):
    case = MODELS[name]
    net, state = case.make(jax.random.key(0))
    return net, state, jnp.zeros(5), jnp.zeros(3)


def _temporaries(compiled) -> Any:
    return compiled.memory_analysis().temp_size_in_bytes


def _trace(graph):
    return jax.eval_shape(lambda: etrace.init_trace(graph))


@one_in(8, RULES)
def test_traces_are_counted_to_the_byte(name):
    net, state, x, _ = _model("lif")
    if name in ("EProp adaptive", "DNI"):
        net = with_extras(name, Problem(net, state, x[None], None))
    rule = etrace.Budget(1200 * BATCH) if name == "Budget" else RULES[name]()
    if name == "ThreeFactor":  # Its modulator is an argument of its own.
        rule = etrace.DRTRL()
    options = {"batch": BATCH, "T": 6, "loss_fn": squares, "target": jnp.zeros((4, 3))}
    found = etrace.plan(net, state, x, rule, **options)
    batched = _specs(state, BATCH), _specs(x, BATCH)
    graph = etrace.compile(net, *batched, rule, batched=True)
    leaves = jax.tree.leaves(_trace(graph))
    assert found.trace == sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    assert found.params == sum(leaf.nbytes for leaf in jax.tree.leaves(net))
    assert found.state == BATCH * sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    if found.weights:
        assert sum(row.bytes for row in found.weights) == found.trace
    assert found.bptt > 0 and found.temporaries > 0


@pytest.mark.parametrize("batch", [None, BATCH])
@pytest.mark.parametrize("window", [None, 1, 16])
def test_temporaries_are_those_of_the_compiled_programs(window, batch):
    net, state, x, target = _model("gru")
    lead = () if batch is None else (batch,)
    target = _specs(target, *lead)
    options = {"window": window, "loss_fn": squares, "target": target}
    found = etrace.plan(net, state, x, batch=batch, T=STEPS, **options)
    assert found.window == (window or 16)
    start, first = _specs(state, *lead), _specs(x, *lead)
    graph = etrace.compile(net, start, first, batched=batch is not None)
    fun = etrace.value_and_grad(graph, squares, window=window)
    params = graph.params(net)
    data = params, start, _trace(graph), _specs(first, STEPS)
    online = jax.jit(fun).lower(*data, _specs(target, STEPS)).compile()
    expected = _temporaries(online)
    # This one is given a trace and hands one back.
    assert abs(found.temporaries - expected) <= 0.2 * expected + found.trace

    def through_time(net, state, xs, ts):
        def body(state, now):
            step = net if batch is None else jax.vmap(net)
            out, state = step(now[0], state)
            return state, squares(out, now[1])

        return jnp.sum(jax.lax.scan(body, state, (xs, ts))[1])

    data = net, start, _specs(first, STEPS), _specs(target, STEPS)
    bptt = jax.jit(jax.value_and_grad(through_time)).lower(*data).compile()
    expected = _temporaries(bptt)
    assert abs(found.bptt - expected) <= 0.2 * expected


def test_memory_against_time():
    net, state, x, _ = _model("gru")
    short, long = (etrace.plan(net, state, x, T=T, batch=64) for T in (112, 1008))
    assert long.temporaries < 1.05 * short.temporaries
    assert long.bptt > 5 * short.bptt
    assert "DRTRL, batch 64, 1008 steps, window 16" in str(long)
    assert str(long).splitlines()[-1].split()[0] == "bptt"
    again = json.loads(json.dumps(long.to_dict()))
    assert again["online"] == long.trace + long.temporaries
    assert again["weights"][0]["weight"] == long.weights[0].weight


BIG = """
    import resource
    import equinox as eqx, jax, jax.numpy as jnp
    import eqx_etrace as etrace

    def call(cell, x, h):
        h = cell(x, h)
        return h, h

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3

    cell = eqx.filter_eval_shape(eqx.nn.GRUCell, 64, 4096, key=jax.random.key(0))
    h, x = (jax.ShapeDtypeStruct((n,), jnp.float32) for n in (4096, 64))
    before = peak()
    found = etrace.plan(cell, h, x, T=500, batch=32, call=call)
    print(found.params / 1e6, found.trace / 1e6, peak() - before)
"""


def test_nothing_is_allocated():
    params, trace, grown = map(float, run_code(BIG).split())
    assert params > 200 and trace > 6000  # MB, of which nothing is there
    assert grown < 150


@pytest.mark.parametrize("name, value", [("T", 0), ("batch", 0)])
def test_sizes_are_checked(name, value):
    net, state, x, _ = _model("gru")
    with pytest.raises(ValueError, match=f"{name}: got {value}, expected an integer"):
        etrace.plan(net, state, x, **{name: value})
