"""Spread over four devices a graph gives what it gives on one, and sends little."""

import dataclasses
import re
from typing import Any

import equinox as eqx
import every_rule
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec as P
from oracles import quick_jit
from spread import (
    BATCH,
    KEY,
    OUT,
    STEPS,
    UNITS,
    WAYS,
    alike,
    compiled,
    conv,
    data,
    delayed,
    gru,
    lif,
    loss_fn,
    lru,
    mesh_of,
)

import eqx_etrace as etrace


GLOBAL = "RTRL", "SnAp(2)", "SKRTRL(2)", "UORO", "KFRTRL"
RULES = {
    **every_rule.RULES,
    "OSTTP": lambda: etrace.OSTTP(KEY, OUT),
    "ByWeight": lambda: etrace.ByWeight(etrace.DRTRL(), {"u": etrace.ESDRTRL(0.8)}),
    "Budget": lambda: etrace.Budget(5000),
}
LOCAL = [name for name in RULES if name not in (*GLOBAL, "SnAp(1)")]


def also_long(way):
    return pytest.param(way, marks=pytest.mark.long)


def learner(name):
    """The network with what a learned signal needs beside it."""
    net, state = lif()
    xs, _ = data()
    if name == "EProp adaptive":
        rule = etrace.DRTRL(signal=every_rule.FEEDBACK)
        graph = etrace.compile(net, state, xs[0], rule, batched=True)
        matrices = graph.rule.signal.matrices  # pyright: ignore
        return every_rule.Learner(net, feedback=matrices), state
    if name == "DNI":
        guess = eqx.nn.Linear(2 * UNITS, 2 * UNITS, key=KEY)
        return every_rule.Learner(net, synthesiser=guess), state
    return net, state


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", LOCAL)
def test_every_local_rule_and_window(name, way):
    model, state = learner(name)
    rule = RULES[name]()
    xs, targets = data()
    graph = etrace.compile(model, state, xs[0], rule, batched=True)
    # Global rules draw other numbers for each sample, wherever it is.
    params = graph.params(model)
    trace = None if name in GLOBAL else etrace.init_trace(graph)
    signal = -jnp.sin(jnp.arange(float(STEPS))) if name == "ThreeFactor" else None
    there = etrace.shardings(graph, mesh_of(way))

    def both(graph, params, state, trace, xs, targets):
        found = []
        for window in (1, 5):
            fun = etrace.value_and_grad(graph, loss_fn, window=window)
            args = params, state, trace, xs, targets
            found.append(fun(*args, signal=signal))
        return found

    args = params, state, trace, xs, targets
    expected = quick_jit(lambda *args: both(graph, *args))(*args)
    assert max(float(abs(g).max()) for g in jax.tree.leaves(expected[0][1])) > 1e-3
    at_trace = None if trace is None else there.trace
    where = there.params, there.state, at_trace, there.sequence, there.sequence
    found = quick_jit(lambda *args: both(there.graph, *args))(
        *jax.device_put(args, where)
    )
    alike(found, expected)


@pytest.mark.parametrize("name", GLOBAL)
def test_global_rules_by_samples(name):
    test_every_local_rule_and_window(name, "samples")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make", [lif, gru])
def test_every_driver(make, way):
    graph, params, state = compiled(make)
    xs, targets = data()
    optimiser = optax.sgd(1e-2, momentum=0.9)
    there = etrace.shardings(graph, mesh_of(way))

    def run(graph, params, state, xs, targets):
        def of_step(fun):
            def loss(params, state, trace, xs, targets):
                out, *new = fun(graph, params, state, trace, xs)
                return jnp.sum(loss_fn(out, targets)), new

            return jax.value_and_grad(loss, has_aux=True)

        trace = etrace.init_trace(graph)
        one = of_step(etrace.step)(params, state, trace, xs[0], targets[0])
        many = of_step(etrace.steps)(params, state, trace, xs, targets)
        outs, late, trace = etrace.evolve(graph, params, state, None, xs)
        opt_state = optimiser.init(params)
        learnt = [
            etrace.learn(graph, loss_fn, optimiser, every=every)(
                params, opt_state, late, trace, xs, targets
            )
            for every in (1, 5)
        ]
        return one, many, outs, late, trace, learnt

    expected = quick_jit(lambda *args: run(graph, *args))(params, state, xs, targets)
    where = there.params, there.state, there.sequence, there.sequence
    args = jax.device_put((params, state, xs, targets), where)
    found = quick_jit(lambda *args: run(there.graph, *args))(*args)
    alike(found, expected)


LAYOUTS = {
    lru: (P("data", "model"), P("model")),
    conv: (P("data", "model"), P("model")),
    delayed: (P("data", None, "model"), P("model")),
}


@pytest.mark.parametrize("make", LAYOUTS)
def test_where_units_are_along_other_axes(make):
    graph, params, state = compiled(make)
    xs, targets = data()
    there = etrace.shardings(graph, mesh_of("both"))
    of_state, of_weight = LAYOUTS[make]
    weight = there.params.conv.weight if make is conv else there.params.w
    assert (there.state.spec, weight.spec) == (of_state, of_weight)

    def run(graph, *args):
        fun = etrace.value_and_grad(graph, loss_fn, window=5)
        params, state, xs, targets = args
        return fun(params, state, etrace.init_trace(graph), xs, targets)

    args = params, state, xs, targets
    expected = quick_jit(lambda *args: run(graph, *args))(*args)
    where = there.params, there.state, there.sequence, there.sequence
    given = jax.device_put(args, where)
    alike(quick_jit(lambda *args: run(there.graph, *args))(*given), expected)


def test_masks_resets_and_what_comes_with_a_loss():
    graph, params, state = compiled(lif)
    xs, targets = data()
    rng = np.random.default_rng(0)
    mask, reset = (jnp.asarray(rng.random((STEPS, BATCH)) < p) for p in (0.7, 0.2))
    constant = etrace.SingleStepData(xs[0])
    there = etrace.shardings(graph, mesh_of("samples"))

    def with_aux(out, target):
        return loss_fn(out, target), {"right": out.argmax(-1) == target.argmax(-1)}

    def run(graph, params, state, xs, targets):
        fun = etrace.value_and_grad(
            graph, with_aux, window=5, reduction="mean", has_aux=True
        )
        args = params, state, None
        return (
            fun(*args, xs, targets, mask, reset=reset),
            fun(*args, xs, targets, mask[:, 0], reset=reset[:, 0], initial=state),
            fun(*args, constant, targets),
        )

    args = params, state, xs, targets
    expected = quick_jit(lambda *args: run(graph, *args))(*args)
    alike(quick_jit(lambda *args: run(there.graph, *args))(*args), expected)


def test_a_shard_map_of_ones_own():
    graph, params, state = compiled(lif)
    xs, targets = data()
    there = etrace.shardings(graph, mesh_of("samples"))

    def run(params, state, xs, targets):
        fun = etrace.value_and_grad(there.local, loss_fn)
        losses, grads, state, trace = fun(params, state, None, xs, targets)
        return losses, jax.lax.psum(grads, "data"), state, trace

    whole, batch, sequence = (
        P(),
        P("data"),
        P(None, "data"),
    )
    mapped = jax.shard_map(
        run,
        mesh=mesh_of("samples"),
        in_specs=(whole, batch, sequence, sequence),
        out_specs=(sequence, whole, batch, batch),
        check_vma=False,
    )
    expected = etrace.value_and_grad(graph, loss_fn)(params, state, None, xs, targets)
    alike(quick_jit(mapped)(params, state, xs, targets), expected)


def test_samples_over_two_axes():
    graph, params, state = compiled(lif)
    xs, targets = data()
    axes = "host", "device"
    mesh = jax.make_mesh((2, 2), axes, axis_types=(AxisType.Auto,) * 2)
    there = etrace.shardings(graph, mesh, batch=axes, units=None)
    assert there.sequence.spec == P(None, axes) and there.local.batch == BATCH // 4
    found, expected = (
        quick_jit(etrace.value_and_grad(each, loss_fn, window=5))(
            params, state, None, xs, targets
        )
        for each in (there.graph, graph)
    )
    alike(found, expected)


def test_explicit_axes_of_samples():
    graph, params, state = compiled(lif)
    xs, targets = data()
    mesh = mesh_of("samples", AxisType.Explicit)
    there = etrace.shardings(graph, mesh)
    args = params, state, xs, targets
    where = there.params, there.state, there.sequence, there.sequence
    given = jax.device_put(args, where)

    def run(graph, params, state, xs, targets):
        trace = etrace.evolve(graph, params, state, None, xs)[2]
        fun = etrace.value_and_grad(graph, loss_fn, window=5)
        learn = etrace.learn(graph, loss_fn, optax.sgd(0.1), every=1)
        opt_state = optax.sgd(0.1).init(params)
        return (
            fun(params, state, trace, xs, targets),
            learn(params, opt_state, state, trace, xs, targets),
        )

    expected = quick_jit(lambda *args: run(graph, *args))(*args)
    alike(quick_jit(lambda *args: run(there.graph, *args))(*given), expected)
    with pytest.raises(ValueError, match=r"axis 'model' of type Explicit.*axis_types="):
        etrace.shardings(graph, mesh_of("both", AxisType.Explicit))


def test_fit_goes_on_over_devices():
    graph, params, state = compiled(lif)
    xs, targets = data()
    optimiser = optax.sgd(1e-2, momentum=0.9)
    there = etrace.shardings(graph, mesh_of("both"))
    start = etrace.Checkpoint(params, optimiser.init(params), state, None, 0)
    batches = [(xs, targets)] * 3
    found, expected = (
        etrace.fit(g, loss_fn, optimiser, start, batches) for g in (there.graph, graph)
    )
    alike(found[:4], expected[:4])


# What is sent.

COLLECTIVE = re.compile(
    r" = (.*?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)"
    r"(?:-start)?\("
)


@dataclasses.dataclass(frozen=True)
class Sent:
    kind: str
    size: int
    """Elements of what comes out of it."""
    in_loop: bool


def sent(fun, *args):
    """All collectives of the compiled program."""
    text = str(jax.jit(fun).lower(*args).compile().as_text())
    bodies = set(re.findall(r"(?:body|condition)=%?([\w.-]+)", text))
    found, inside = [], ""
    for line in text.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.-]+) .*\{$", line):
            inside = head[1]
        if match := COLLECTIVE.search(line):
            shapes = re.findall(r"\w+\[([\d,]*)\]", match[1])
            sizes = [np.prod([int(n) for n in s.split(",") if n]) for s in shapes]
            found.append(Sent(match[2], int(sum(sizes)), inside in bodies))
    return found


def test_samples_add_up_gradients_once():
    graph, params, state = compiled(lif)
    xs, targets = data(20)
    there = etrace.shardings(graph, mesh_of("samples"))
    graph = there.graph
    args = params, state, etrace.init_trace(graph), xs, targets
    weights = sum(leaf.size for leaf in jax.tree.leaves(params))
    for window in (1, 5, 20):
        fun = etrace.value_and_grad(graph, loss_fn, window=window)
        assert sent(fun, *args) == [Sent("all-reduce", weights, False)]
    optimiser = optax.sgd(1e-2, momentum=0.9)
    opt_state = optimiser.init(params)
    for every in (1, 5):
        fun = etrace.learn(graph, loss_fn, optimiser, every=every)
        found = sent(fun, params, opt_state, *args[1:])
        assert found == [Sent("all-reduce", weights, True)]
    assert sent(lambda *args: etrace.evolve(graph, *args), *args[:4]) == []


@pytest.mark.parametrize("rule", [etrace.DRTRL, lambda: etrace.ESDRTRL(0.8)])
def test_units_send_their_activity_alone(rule):
    units, steps = 32, 20
    model, state = lif(units)
    xs, targets = data(steps)
    graph = etrace.compile(model, state, xs[0], rule(), batched=True)
    there = etrace.shardings(graph, mesh_of("units"))
    where = there.params, there.state, there.trace, there.sequence, there.sequence
    args = graph.params(model), state, etrace.init_trace(graph), xs, targets
    args = jax.device_put(args, where)

    def one(params, state, trace, xs, _):
        return etrace.step(there.graph, params, state, trace, xs[0])

    activity, outputs = BATCH * units, BATCH * OUT
    found = sent(one, *args)
    assert {at.kind for at in found if at.size == activity} == {"all-gather"}
    rest = [at for at in found if at.size != activity]
    assert rest == [Sent("all-reduce", outputs, False)]
    # A trace of zeros is born where it belongs.
    fun = etrace.value_and_grad(there.graph, loss_fn, window=1)
    for at in sent(fun, *args) + sent(fun, *args[:2], None, *args[3:]):
        limit = activity if at.kind == "all-gather" else outputs
        assert at.size <= limit and at.kind in ("all-gather", "all-reduce")
    # A window sends what it has kept of all its steps, at most.
    fun = etrace.value_and_grad(there.graph, loss_fn, window=10)
    for at in sent(fun, *args):
        limit = activity * 10 if at.kind == "all-gather" else 2 * outputs * 10
        assert at.size <= limit and at.kind in ("all-gather", "all-reduce")


@pytest.mark.parametrize("way", [*map(also_long, ("samples", "units")), "both"])
def test_memory_of_a_device(way):
    """What a larger problem adds: the parts that are on all devices cancel, which are
    params where samples are spread, and the activity where units are."""

    def memory(batch, units):
        model, state = lif(units, batch)
        xs, targets = data(20, batch)
        graph = etrace.compile(model, state, xs[0], batched=True)
        there = etrace.shardings(graph, mesh_of(way))
        args = graph.params(model), state, etrace.init_trace(graph), xs, targets
        where = there.params, there.state, there.trace, there.sequence, there.sequence
        spread = jax.device_put(args, where)
        for each, given in ((graph, args), (there.graph, spread)):
            fun = etrace.value_and_grad(each, loss_fn, window=5)
            program = quick_jit(fun).lower(*given).compile()
            found: Any = program.memory_analysis()
            sizes = found.argument_size_in_bytes, found.output_size_in_bytes
            yield sum(sizes) + found.temp_size_in_bytes

    sizes = ((8, 64), (8, 128)) if way == "units" else ((8, 64), (32, 64))
    small, large = (np.array([*memory(*size)]) for size in sizes)
    one, each = large - small
    assert each < 1.1 * one / 4


def test_where_things_are():
    graph, *_ = compiled(gru)
    there = etrace.shardings(graph, mesh_of("both"))
    rows, both = P("model"), P("data", "model")
    trees = there.params.cell.weight_hh, there.params.cell.bias, there.state
    assert [at.spec for at in trees] == [rows, rows, both]
    assert {at.spec for at in jax.tree.leaves(there.trace)} == {both}
    assert there.params.readout.weight.spec == P()
    assert there.x.spec == P("data")
    assert there.sequence.spec == P(None, "data")
    assert "batch=8 over 2 devices" in repr(there.graph)
    trace = etrace.init_trace(there.graph)
    pairs = zip(jax.tree.leaves(trace), jax.tree.leaves(there.trace), strict=True)
    assert all(leaf.sharding.is_equivalent_to(at, leaf.ndim) for leaf, at in pairs)
    alone = etrace.shardings(graph, mesh_of("units"), batch=None)
    assert alone.sequence.spec == P()  # A mask of one number a step fits, too.


def test_what_does_not_divide_is_on_all_devices():
    model, state = lif(6)
    graph = etrace.compile(model, state, data()[0][0], batched=True)
    there = etrace.shardings(graph, mesh_of("both"))
    assert there.params.u.spec == P("model")
    there = etrace.shardings(graph, mesh_of("units"))
    assert there.params.u.spec == P()


def test_refused():
    graph, params, state = compiled(lif)
    xs, targets = data()
    mesh = jax.make_mesh((4,), ("date",))
    with pytest.raises(ValueError, match=r"axes date, expected each.*what 'date' is"):
        etrace.shardings(graph, mesh)
    assert etrace.shardings(graph, mesh, batch="date").graph.batch == BATCH
    mesh = mesh_of("samples")
    with pytest.raises(ValueError, match=r"Say what 'data' is for"):
        etrace.shardings(graph, mesh, units="data")
    with pytest.raises(ValueError, match=r"a batch of 6, expected a multiple of 4"):
        six = jax.tree.map(lambda leaf: leaf[:6], (state, xs[0]))
        model = lif()[0]
        etrace.shardings(etrace.compile(model, *six, batched=True), mesh)
    with pytest.raises(ValueError, match=r"an unbatched graph, expected a multiple"):
        one = jax.tree.map(lambda leaf: leaf[0], (state, xs[0]))
        etrace.shardings(etrace.compile(lif()[0], *one), mesh)
    there = etrace.shardings(graph, mesh)
    with pytest.raises(ValueError, match="spread over devices already"):
        etrace.shardings(there.graph, mesh)
    args = params, state, None, xs, targets

    def mean(out, target):
        return jnp.mean((out - target) ** 2)

    with pytest.raises(ValueError, match=r"loss_fn: got float64\[\], expected one ent"):
        etrace.value_and_grad(there.graph, mean)(*args)

    def aux(out, target):
        return loss_fn(out, target), {"mean": jnp.mean(out)}

    fun = etrace.value_and_grad(there.graph, aux, has_aux=True)
    with pytest.raises(ValueError, match=r"aux of loss_fn.*mean.*: got float64\[\]"):
        fun(*args)
    fun = etrace.value_and_grad(there.graph, loss_fn)
    with pytest.raises(ValueError, match=r"targets: got float64\[13, 1, 2\], expe"):
        fun(*args[:4], targets[:, :1])
