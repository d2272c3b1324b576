"""D-RTRL of one network by hand: what the per-step speed of a library is measured by.

The network is that of `network.py`, with z the old spikes and a the membrane decay:

    g' = 0.9 g + W_in x + b + W_rec z        v' = a (v - z) + (1 - a) g'

D-RTRL cuts the path through W_rec z, so every unit keeps its own derivatives, one trace
per weight and slot. With A = dv'/dv and y the product that the weight makes:

    eps_g' = 0.9 eps_g + dy/dW               eps_v' = A eps_v + (1 - a) eps_g'

and the gradient of this step is sum_batch l * eps_v', with l = dL/dv'. Nothing but v'
reads g', so the learning signal of that slot is zero: the trace carries the way through
the current. Both traces are kept in full, (batch, out, in), as any D-RTRL must that
does not know that a linear synapse has the same trace for every unit. What is tuned is
the spelling, for XLA on CPU: the obvious one takes two to four times as long.

Run this file to check it: `python handwritten.py`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from network import (
    CURRENT_DECAY,
    MEMBRANE_DECAY,
    THRESHOLD,
    bptt,
    init_data,
    init_net,
    init_state,
    loss_fn,
    spike,
    surrogate,
)


def init_trace(net, batch):
    """The traces of both slots (g, v), arrays of their own, for every weight."""
    weights = {"w_in": net.w_in, "b": net.b, "w_rec": net.w_rec}
    zeros = {k: jnp.zeros((batch, *w.shape)) for k, w in weights.items()}
    return {k: (zero, zero.copy()) for k, zero in zeros.items()}


def advance(trace, decay_v, df_g, x):
    """The current first, and the membrane from the new current: XLA then updates both
    in place. A membrane that reads the old current costs a copy of that trace."""
    g, v = trace
    g = CURRENT_DECAY * g + df_g * x
    return g, decay_v * v + (1 - MEMBRANE_DECAY) * g


def contract(signal, trace):
    """sum_b signal[b, o] trace[b, o, i], one sample after the other: as an einsum over
    a leading axis XLA's CPU backend makes it about five times as slow."""

    def add(total, sample):
        signal, trace = sample
        return total + signal[:, None] * trace, None

    zero = jnp.zeros(trace.shape[1:], trace.dtype)
    return jax.lax.scan(add, zero, (signal, trace))[0]


def step(net, state, trace, x, y):
    """One step: its loss and gradient, the new state and the new trace."""
    z = spike(state[1] - THRESHOLD)
    out, new_state = jax.vmap(net)(x, state)
    v = new_state[1]
    error = (out - y) / out.shape[0]
    signal = (error @ net.w_out) * surrogate(v - THRESHOLD)
    attached = net.reset == "attached"
    slope = surrogate(state[1] - THRESHOLD) if attached else jnp.zeros_like(v)
    decay_v = MEMBRANE_DECAY * (1 - slope)

    # Hides from XLA that it is one. Else the sum in `advance` looks cheap enough to be
    # computed again within the membrane's update, from a copy of the whole old trace.
    df_g = jax.lax.optimization_barrier(jnp.ones_like(v))

    d, df = decay_v[:, :, None], df_g[:, :, None]
    trace = {
        "w_in": advance(trace["w_in"], d, df, x[:, None, :]),
        "b": advance(trace["b"], decay_v, df_g, 1.0),
        "w_rec": advance(trace["w_rec"], d, df, z[:, None, :]),
    }
    grads = dataclasses.replace(
        net,
        w_in=contract(signal, trace["w_in"][1]),
        b=jnp.sum(signal * trace["b"][1], axis=0),
        w_rec=contract(signal, trace["w_rec"][1]),
        w_out=error.T @ spike(v - THRESHOLD),
        b_out=jnp.sum(error, axis=0),
    )
    return loss_fn(out, y), grads, new_state, trace


def drtrl(net, state, trace, xs, ys):
    """A sequence: the summed loss and gradient, the last state and trace."""

    def body(carry, xy):
        state, trace, total, grads = carry
        loss, new, state, trace = step(net, state, trace, *xy)
        return (state, trace, total + loss, jax.tree.map(jnp.add, grads, new)), None

    start = state, trace, jnp.zeros(()), jax.tree.map(jnp.zeros_like, net)
    (state, trace, loss, grads), _ = jax.lax.scan(body, start, (xs, ys))
    return loss, grads, state, trace


def relative_error(got, want):
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    return max(float(jnp.abs(g - w).max() / jnp.abs(w).max()) for g, w in pairs)


def check(reset):
    """How far from BPTT of the twin without recurrent credit, and from full BPTT."""
    net = init_net(jax.random.key(0), inputs=9, units=16, outputs=3, reset=reset)
    xs, ys = init_data(jax.random.key(1), net, steps=40, batch=4)
    state, trace = init_state(net, 4), init_trace(net, 4)
    _, got, _, _ = jax.jit(drtrl)(net, state, trace, xs, ys)

    _, local = jax.jit(bptt)(dataclasses.replace(net, local=True), state, xs, ys)
    _, full = jax.jit(bptt)(net, state, xs, ys)
    return relative_error(got, local), relative_error(got, full)


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    for reset in ("detached", "attached"):
        local, full = check(reset)
        print(f"{reset} reset: error {local:.1e} (and {full:.1e} from full BPTT)")
        assert local < 1e-10 < full
