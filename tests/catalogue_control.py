"""Calls, branches and loops inside a step."""

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
from catalogue_case import IN, N, around, everything, leaky, table_of_cases, zeros


CONTROL, case = table_of_cases()
_refused = everything(
    "control flow that a weight or the hidden state passes is refused"
)


# Calls.


@case(
    params={"w": (N, IN), "u": (N, N)},
    state=zeros(N),
    oracle="twin",
    units=[(N, 1)],
    ops={"['w']": {"dense"}},
)
def jit_and_remat(p, x, h, taps):
    @jax.jit
    def drive(p, x, h):
        return p["w"] @ x + p["u"] @ h

    @eqx.filter_checkpoint
    def update(p, x, h):
        return leaky(h, jax.checkpoint(drive)(p, x, taps.recur(h)))

    h = eqx.filter_jit(update)(p, x, h)
    return h, h


@jax.custom_jvp
def _clipped(v):
    return jnp.clip(v, -1.0, 1.0)


@_clipped.defjvp
def _clipped_jvp(primals, tangents):
    return _clipped(primals[0]), tangents[0] * (1.0 + 0.1 * primals[0])


@case(
    params={"w": (N, IN), "u": (N, N), "tau": around(0.5, N)},
    state=zeros(N),
    oracle="twin",
    units=[(N, 1)],
)
def custom_jvp_on_the_way(p, x, h, taps):
    h = p["tau"] * h + _clipped(p["w"] @ x + p["u"] @ taps.recur(jax.nn.relu(h)))
    return jax.nn.silu(h), h


@case(
    params={"w": (2, 3, IN), "u": (3, 3), "tau": around(0.5, 3)},
    state=zeros(2, 3),
    oracle="twin",
    units=[(6, 1)],
)
def nested_vmaps(p, x, h, taps):
    def unit(w, u, tau, h, old):
        return tau * h + jnp.tanh(w @ x + u @ old)

    layer = jax.vmap(unit, in_axes=(0, 0, 0, 0, None))
    both = jax.vmap(layer, in_axes=(0, None, None, 0, 0))
    h = both(p["w"], p["u"], p["tau"], h, taps.recur(h))
    return h, h


# Branches.


@case(
    params={"w": (N, IN), "v": (N, IN)},
    state=zeros(N),
    oracle="bptt",
    units=[(N, 1)],
    ops={"['w']": {"dense"}, "['v']": {"dense"}},
)
def cond_of_weights(p, x, h, taps):
    drive = jax.lax.cond(x[0] > 0, lambda: p["w"] @ x, lambda: p["v"] @ (2.0 * x))
    h = leaky(h, drive)
    return h, h


@case(
    params={"w": (N, IN), "u": (N, N), "tau": around(0.5, N)},
    state=zeros(N),
    oracle="twin",
    units=[(N, 1)],
)
def cond_of_the_state(p, x, h, taps):
    """The predicate is of the state, too: it has no derivative."""
    drive = p["w"] @ x + p["u"] @ taps.recur(h)
    active = jnp.sum(h) > 0
    h = jax.lax.cond(
        active, lambda h: leaky(h, drive), lambda h: 0.9 * h + p["tau"] * drive, h
    )
    return h, h


@case(
    params={"a": around(1.0, N), "b": around(0.5, N), "w": (N, IN)},
    state=zeros(N),
    oracle="bptt",
    units=[(N, 1)],
)
def cond_with_nan_where_not_taken(p, x, h, taps):
    """The root of a negative number and its derivative, in the other branch."""
    drive = jax.lax.cond(
        x[0] > 0,
        lambda s: jnp.sqrt(p["a"] ** 2 * s) + jnp.log(s),
        lambda s: p["b"] * s,
        x[0],
    )
    h = leaky(h, drive + p["w"] @ x)
    return h, h


@case(
    params={"w": (3, N, IN), "tau": around(0.5, N)},
    state=zeros(N),
    x={"i": jnp.zeros((), int), "x": zeros(IN)},
    oracle="bptt",
    units=[(N, 1)],
)
def switch(p, x, h, taps):
    """Five kinds of input and three branches: an index past the last is the last."""
    branches = [
        lambda h: leaky(h, p["w"][0] @ x["x"]),
        lambda h: p["tau"] * h + p["w"][1] @ x["x"],
        lambda h: jnp.sin(h) + jnp.cos(p["w"][2] @ x["x"]),
    ]
    h = jax.lax.switch(x["i"], branches, h)
    return h, h


@case(
    params={"w": (N, IN), "u": (N, N), "tau": around(0.5, N)},
    state=zeros(N),
    oracle="twin",
    units=[(N, 1)],
)
def cond_of_each_unit(p, x, h, taps):
    """Under a vmap a branch is a select."""
    drive = p["w"] @ x + p["u"] @ taps.recur(h)

    def unit(h, drive, tau):
        return jax.lax.cond(h > 0, lambda: tau * h + drive, lambda: leaky(h, drive))

    h = jax.vmap(unit)(h, drive, p["tau"])
    return h, h


# Loops.


@case(
    params={"w": (N, IN), "u": (N, N), "tau": around(1.0, N)},
    state=zeros(N),
    oracle="twin",
    units=[(N, 1)],
)
def scan_of_substeps(p, x, h, taps):
    """The products are made once, outside of the loop."""
    drive = p["w"] @ x + p["u"] @ taps.recur(h)

    def substep(h, _):
        return h + 0.2 * (jnp.tanh(drive) - p["tau"] * h), None

    h, _ = jax.lax.scan(substep, h, length=4)
    return h, h


@case(
    params={"w": (N, IN), "tau": around(1.0, N)},
    state=zeros(N),
    x=zeros(3, IN),
    oracle="bptt",
    units=[(N, 1)],
    ops={"['w']": {"dense"}},
)
def scan_with_weights_inside(p, x, h, taps):
    """Three inputs arrive in one step."""

    def substep(h, x):
        h = leaky(h, p["w"] @ x - p["tau"] * h)
        return h, None

    h, _ = jax.lax.scan(substep, h, x)
    return h, h


@case(
    params={"w": (N, IN), "u": (N, N)},
    state=zeros(N),
    oracle="multi",
    vjp="multi-step",
    units=[(N, 1)],
)
def scan_with_recurrence_inside(p, x, h, taps):
    """The second substep reads what the first made: a product moves other units."""

    def substep(h, _):
        return leaky(h, p["w"] @ x + p["u"] @ taps.recur(h)), None

    h, _ = jax.lax.scan(substep, h, length=3)
    return h, h


@case(
    params={"w": (N, IN), "tau": around(1.0, N)},
    state=(zeros(N), zeros(N)),
    oracle="bptt",
    vjp="multi-step",
    units=[(N, 2)],
)
def scan_that_gives_out_its_substeps(p, x, state, taps):
    """The mean over the substeps does not pass the new state."""
    drive = p["w"] @ x

    def substep(carry, _):
        v, g = carry
        g = 0.7 * g + drive
        v = v + 0.2 * (jnp.tanh(g) - p["tau"] * v)
        return (v, g), v

    state, vs = jax.lax.scan(substep, state, length=3)
    return vs.mean(0), state


@case(
    params={"w": (N, IN), "u": (N, N), "tau": around(1.0, N)},
    state=(zeros(N), zeros(N)),
    oracle="twin",
    units=[(N, 2)],
)
def long_scan(p, x, state, taps):
    """120 elementwise substeps of a neuron: too many to be unrolled."""
    drive = p["w"] @ x + p["u"] @ taps.recur(state[0])

    def substep(carry, phase):
        v, a = carry
        a = a + 0.01 * (jnp.tanh(v) - a)
        v = v + 0.01 * (drive * (1.0 + 0.1 * jnp.sin(phase)) - p["tau"] * v - a)
        return (v, a), None

    state, _ = jax.lax.scan(substep, state, jnp.arange(120.0))
    return state[0], state


@case(
    params={"w": (N, IN), "u": (N, N)},
    state=zeros(N),
    oracle="multi",
    vjp="multi-step",
    units=[(N, 1)],
)
def long_scan_with_recurrence(p, x, h, taps):
    def substep(h, _):
        rec = p["u"] @ jnp.tanh(taps.recur(h))
        return h + 0.02 * (p["w"] @ x + rec - h), None

    h, _ = jax.lax.scan(substep, h, length=100)
    return h, h


@case(
    params={"w": (N, IN), "tau": around(1.0, N)},
    state=zeros(N),
    oracle="bptt",
    units=[(N, 1)],
)
def fori_loop(p, x, h, taps):
    """A fixed number of passes, so that it has a derivative."""
    drive = jnp.tanh(p["w"] @ x)
    h = jax.lax.fori_loop(0, 3, lambda i, h: h + 0.3 * (drive - p["tau"] * h), h)
    return h, h


@case(
    params={"w": (N, IN), "tau": around(0.5, N)},
    state=zeros(N),
    oracle="bptt",
    units=[(N, 1)],
)
def map_over_units(p, x, h, taps):
    def unit(args):
        h, drive, tau = args
        return leaky(h, drive - tau * h)

    h = jax.lax.map(unit, (h, p["w"] @ x, p["tau"]))
    return h, h


def _root(x):
    """A number of passes that depends on the data."""

    def body(carry):
        y, _ = carry
        return 0.5 * (y + jnp.abs(x) / y), y

    def going(carry):
        return jnp.any(jnp.abs(carry[0] - carry[1]) > 1e-3)

    start = (jnp.abs(x) + 1.0, jnp.abs(x) + 3.0)
    return jax.lax.while_loop(going, body, start)[0]


@case(
    params={"w": (N, IN), "u": (N, N)},
    state=(zeros(N), zeros(IN)),
    oracle="twin",
    units=[(N, 1)],
)
def loops_over_data(p, x, state, taps):
    """A while loop, a scan and a branch that neither a weight nor hidden state
    passes: any of them may stay."""
    h, filtered = state
    filtered = jax.lax.fori_loop(0, 5, lambda i, f: 0.8 * f + 0.2 * x, filtered)
    seen = jax.lax.cond(x[0] > 0, lambda: filtered, lambda: _root(x))
    h = leaky(h, p["w"] @ seen + p["u"] @ taps.recur(h))
    return h, (h, filtered)


def _composed(first, second):
    return first[0] * second[0], second[0] * first[1] + second[1]


@case(
    params={"w": (N, IN), "tau": around(0.5, N)},
    state=zeros(N),
    oracle="bptt",
    units=[(N, 1)],
    ops={"['w']": {"dense"}},
)
def associative_scan_of_one_step(p, x, h, taps):
    """A layer for whole sequences, called on one step: some slices are empty."""
    decays = jnp.stack([jnp.ones(N), p["tau"]])
    drives = jnp.stack([h, p["w"] @ x])
    h = jax.lax.associative_scan(_composed, (decays, drives))[1][-1]
    return h, h


@case(params={"w": (N, IN)}, state=zeros(N), oracle="bptt", units=[(N, 1)])
def product_of_nothing(p, x, h, taps):
    """Two kinds of inputs, of the second of which there is none."""
    h = 0.9 * h + jnp.tanh(p["w"] @ x + p["w"][:, IN:] @ x[IN:])
    return h, h


@case(
    params={"w": (N, IN), "u": (N, N), "tau": around(1.0, N)},
    state=zeros(N),
    oracle="twin",
    units=[(N, 1)],
)
def equinox_scan(p, x, h, taps):
    drive = p["w"] @ x + p["u"] @ taps.recur(h)

    def substep(h, _):
        return h + 0.2 * (jnp.tanh(drive) - p["tau"] * h), None

    h, _ = eqxi.scan(substep, h, None, length=4, kind="checkpointed")
    return h, h


@case(
    params={"w": (N, IN), "u": (N, N), "tau": around(1.0, N)},
    state=zeros(N),
    x={"n": jnp.zeros((), int), "x": zeros(IN)},
    oracle="twin",
    units=[(N, 1)],
)
def equinox_while_loop(p, x, h, taps):
    """The number of passes is data, and at most four."""
    drive = p["w"] @ x["x"] + p["u"] @ taps.recur(h)

    def body(carry):
        i, h = carry
        return i + 1, h + 0.2 * (jnp.tanh(drive) - p["tau"] * h)

    def going(carry):
        return carry[0] < x["n"]

    start = (jnp.zeros((), int), h)
    _, h = eqxi.while_loop(going, body, start, max_steps=4, kind="bounded")
    h = leaky(h, drive)
    return h, h
