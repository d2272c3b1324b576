"""The report names every weight, every reason, and the bytes that are allocated."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from models import MODELS, sequence, spike
from windows import local

import eqx_etrace as etrace
from eqx_etrace._report import size
from eqx_etrace._space import spaces


N, IN, OUT, BATCH = 6, 4, 2, 3
KEY = jax.random.key(0)


class Net(eqx.Module):
    """Has a weight of every kind: traced, current-step, cut, unused."""

    cell: eqx.nn.GRUCell
    down: eqx.nn.Linear
    up: eqx.nn.Linear
    second: eqx.nn.GRUCell
    readout: eqx.nn.Linear
    unused: jax.Array

    def __call__(self, x, state):
        first, second, count = state
        first = self.cell(self.up(self.down(x)), first)
        second = self.second(first, second)
        return self.readout(second), (first, second, count + 1)


def _net():
    keys = jax.random.split(KEY, 5)
    return Net(
        eqx.nn.GRUCell(IN, N, key=keys[0]),
        eqx.nn.Linear(IN, 2, key=keys[1]),
        eqx.nn.Linear(2, IN, key=keys[2]),
        eqx.nn.GRUCell(N, N, key=keys[3]),
        eqx.nn.Linear(N, OUT, key=keys[4]),
        jnp.ones(3),
    )


def _compile(**options):
    lead = (BATCH,) if options.get("batched") else ()
    state = (jnp.zeros((*lead, N)), jnp.zeros((*lead, N)), jnp.zeros(lead, int))
    return etrace.compile(_net(), state, jnp.zeros((*lead, IN)), **options)


def _row(text, name):
    return next(line for line in text.splitlines() if line.split()[:1] == [name])


def test_every_weight_is_in_the_table():
    graph = _compile()
    text = str(graph.report())
    for path in graph.param_leaves.paths:
        assert _row(text, path)


def test_weights_without_temporal_credit_say_why():
    text = str(_compile().report())
    assert "acts after the state" in _row(text, "readout.weight")
    assert "only through a mixing equation" in _row(text, "down.weight")
    assert "only through a mixing equation" in _row(text, "up.weight")
    assert "no gradient at all" in _row(text, "unused")
    assert "trace on state[0]" in _row(text, "cell.weight_hh")
    assert "trace on state[1]" in _row(text, "second.weight_ih")


def test_groups_state_and_layers():
    text = str(_compile().report())
    assert "6 x 1          state[0]" in text
    assert "state[2]: no trainable weight influences it" in text
    assert "memory of state[1] is not carried back" in text
    assert "through the recurrent product `dot_general` at _rnn.py:" in text
    assert text.startswith("DRTRL, single-step, unbatched, trace ")


@pytest.mark.parametrize("batched", [False, True])
def test_bytes_are_those_allocated(batched):
    graph = _compile(batched=batched)
    allocated = sum(leaf.nbytes for leaf in jax.tree.leaves(etrace.init_trace(graph)))
    lead = graph.batch or 1
    assert allocated == lead * sum(local(graph).trace_bytes(r) for r in graph.relations)
    assert f"trace {size(allocated)}" in str(graph.report()).splitlines()[0]


def test_multi_step_reasons():
    def reset(model, x, v):
        v = 0.9 * v + model(x)
        z = spike(v - 1)
        return z, v * (1 - jax.lax.stop_gradient(z))

    linear = eqx.nn.Linear(IN, N, key=KEY)
    graph = etrace.compile(linear, jnp.zeros(N), jnp.zeros(IN), call=reset)
    text = str(graph.report())
    assert graph.vjp == "multi-step"
    assert "Why multi-step" in text
    assert "reaches the output out without passing the new state" in text
    forced = etrace.compile(
        linear, jnp.zeros(N), jnp.zeros(IN), call=reset, vjp="single-step"
    )
    assert forced.vjp == "single-step"
    assert "Warnings" in str(forced.report())
    assert "misses it" in str(forced.report())


def test_layernorm_between_is_reported():
    model, state = MODELS["layernorm_between"].make(KEY)
    graph = etrace.compile(model, state, jnp.zeros(MODELS["layernorm_between"].inputs))
    reasons = str(graph.report()).split("Why multi-step")[1]
    assert "layer.w_rec.weight" in reasons
    assert "moves other units, too, through `sub` at _normalisation.py:" in reasons


def test_default_op_rule_shows_its_cost():
    def convolve(w, x, h):
        # With x as the kernel: only a weight as the kernel has a closed form.
        y = jax.lax.conv(w, x[None, None], (1,), "SAME")[0, 0]
        h = 0.9 * h + y
        return h, h

    graph = etrace.compile(
        jnp.ones((1, 1, IN)), jnp.zeros(IN), jnp.zeros(IN), call=convolve
    )
    text = str(graph.report())
    assert "by AD" in _row(text, "model")
    assert "`conv_general_dilated` has no op rule" in text
    assert "1 x 1 x 4 x 1 x 1 x 4 entries" in text


def test_explain():
    graph = _compile()
    text = str(graph.explain(weight="cell.weight_hh"))
    assert "trace on state[0]" in text and "readout" not in text
    text = str(graph.explain(state="state[1]"))
    assert "second.weight_hh" in text and "cell.bias_n" in text
    text = str(graph.explain(weight="readout.bias", state="state[1]"))
    assert "nothing was decided" in text
    with pytest.raises(ValueError, match="one of the key paths cell.weight_ih"):
        graph.explain(weight="weight_hh")
    with pytest.raises(ValueError, match=r"got 'h', expected one of .* state\[0\]"):
        graph.explain(state="h")
    with pytest.raises(ValueError, match="neither a weight nor a state"):
        graph.explain()


def test_reports_show_themselves_at_a_prompt():
    report = _compile().report()
    assert repr(report) == str(report) and "\n" in report


def test_repr_of_the_graph():
    text = repr(_compile(batched=True))
    assert text.startswith("ETraceGraph(") and "batch=3" in text and len(text) < 200


def test_decisions_have_paths_sources_and_sentences():
    for decision in _compile().decisions:
        assert isinstance(decision.kind, etrace.Kind)
        assert decision.weight or decision.state
        assert len(decision.reason) > 10


def test_what_is_rewritten_behind_a_weight_names_the_weight():
    """Neither a weight nor the state is read there, but what the weight adds."""

    def looped(w, x, h):
        seen = w @ x
        turned, _ = jax.lax.scan(lambda a, _: (jnp.tanh(a)[::-1], None), seen, None, 3)
        h = jnp.tanh(0.5 * h + seen) + turned
        return h, h

    graph = etrace.compile(jnp.ones((N, IN)), jnp.zeros(N), jnp.zeros(IN), call=looped)
    (rewritten,) = (d for d in graph.decisions if d.kind is etrace.Kind.REWRITTEN)
    assert (rewritten.weight, rewritten.state) == (("model",), ())
    assert "unrolled to 3 steps" in rewritten.because


def test_sizes():
    assert [size(n) for n in (12, 3400, 5_600_000, 7_800_000_000)] == [
        "12 B",
        "3.4 kB",
        "5.6 MB",
        "7.8 GB",
    ]


GLOBAL = {
    "RTRL": lambda n, p: n * p,
    "UORO": lambda n, p: n + p,
    "SnAp": None,
    "SKRTRL": None,
    "KFRTRL": None,
}
MADE = {
    "RTRL": etrace.RTRL(),
    "UORO": etrace.UORO(jax.random.key(0)),
    "SnAp": etrace.SnAp(2),
    "SKRTRL": etrace.SKRTRL(2),
    "KFRTRL": etrace.KFRTRL(jax.random.key(0)),
}


@pytest.mark.parametrize("name", GLOBAL)
def test_bytes_of_global_rules_are_those_allocated(name):
    case = MODELS["gru"]
    model, state = case.make(jax.random.key(0))
    x = sequence(KEY, case, 1)[0][0]
    graph = etrace.compile(model, state, x, MADE[name])
    leaves = jax.tree.leaves(etrace.init_trace(graph))
    allocated = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    assert f"trace {size(allocated)}\n" in str(graph.report())
    formula = GLOBAL[name]
    if formula is not None:
        keys = [a for a in leaves if jnp.issubdtype(a.dtype, jax.dtypes.prng_key)]
        numbers = (allocated - sum(k.dtype.itemsize for k in keys)) // 8
        n, reaching = state.size, spaces(graph).weights.size
        assert numbers == formula(n, reaching)
