"""Online rules by hand, per step and fused over windows of steps.

With D = dh'/dh, f = dh'/dy and l = dL/dh' of every step, D-RTRL carries for each weight
the trace eps' = D eps + f x and has the gradient sum_t l eps'. Over a window of K steps
the same gradient and the same last trace come out of vectors alone:

    lambda_t = l_t + D_{t+1}^T lambda_{t+1}        Psi_t = D_K ... D_{t+1}
    dW = sum_t (lambda_t f_t) (x) x_t + (D_1^T lambda_1) eps_0
    eps_K = Psi_0 eps_0 + sum_t (Psi_t f_t) (x) x_t

which is one product over batch and time for dW and one per sample for eps_K, and the
large trace is touched once a window. A whole sequence in one window has no trace.

ES-D-RTRL carries a vector on either side, x' = c x + x_t and f' = c D f + (1 - c) f_t,
and takes f (x) x for the trace, divided by 1 - c^t for the start-up. It too can leave
its products to the end of a window.

`check_by_hand.py` compares all of them with BPTT.
"""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import traces
from by_hand import (
    as_gradient,
    driven,
    filter_inputs,
    observe_step,
    observe_window,
    tile,
    zero_totals,
)
from workloads import in_windows


ES_DECAY = 0.9


# D-RTRL.


def init_trace(hand, net, batch):
    """The traces `eps` of each block and slot, and its filtered input `x`."""
    trace = {"eps": {}, "x": {}}
    for name, shape in hand.blocks(net.cell).items():
        trace["eps"][name] = {s: jnp.zeros((batch, *shape)) for s in hand.traced}
        if hand.input_decay is not None:
            trace["x"][name] = jnp.zeros((batch, shape[1]))
    return trace


def drtrl_per_step(hand, net, state, trace, xs, ys):
    """The loss and gradient of a sequence, the last state and trace."""

    def body(carry, xy):
        state, trace, seen, blocks = carry
        state, derivatives, new, signal = observe_step(hand, net, state, *xy)
        uses, filtered = filter_inputs(hand, derivatives.uses, trace["x"])
        trace, blocks = {"eps": dict(trace["eps"]), "x": filtered}, dict(blocks)
        for name, use in uses.items():
            rows = blocks[name].shape[0]
            trace["eps"][name], blocks[name] = drtrl_block(
                use,
                tile(derivatives.decay, rows),
                tile(signal, rows),
                trace["eps"][name],
                blocks[name],
            )
        return (state, trace, jax.tree.map(jnp.add, seen, new), blocks), None

    start = state, trace, *zero_totals(hand, net)
    (state, trace, *totals), _ = jax.lax.scan(body, start, (xs, ys))
    return *as_gradient(hand, net, *totals), state, trace


def drtrl_block(use, decay, signal, eps, total):
    if not eps:
        return eps, traces.weight_product(total, driven(signal, use.drive), use.x)
    if len(eps) == 1:
        eps = traces.advance(decay, use.drive, use.x, eps)
        return eps, traces.contract(total, signal, eps)
    added = traces.outer_of_samples(use.drive, use.x)
    return traces.advance_mixing(total, signal, decay, added, eps, read="new")


def closure(decay, traced):
    """The pairs (s, r) where Psi[s, r] is not always zero."""
    pairs = {(s, s) for s in traced}
    while more := {(s, r) for s, p in pairs for q, r in decay if p == q} - pairs:
        pairs |= more
    return sorted(pairs)


def sweep(decay, signal, traced):
    """The reverse loop: D_1^T lambda_1 and Psi_0, and lambda_t and Psi_t of every step.
    Psi has the rows of the traced slots."""
    if not decay:
        return ({}, {}), (signal, {})
    fixed = {k: d for k, d in decay.items() if not isinstance(d, jax.Array)}
    moving = {k: d for k, d in decay.items() if k not in fixed}
    slots = sorted({slot for pair in decay for slot in pair})
    zero = jnp.zeros_like(next(iter(signal.values()))[0])
    psi = {(s, r): zero + (s == r) for s, r in closure(decay, traced)}

    def body(carry, step):
        (back, psi), (signal, moving) = carry, step
        decay = fixed | moving
        credit = {s: back[s] + signal[s] if s in signal else back[s] for s in slots}

        def from_right(row, slot):
            terms = [
                row[s] * d for (s, r), d in decay.items() if r == slot and s in row
            ]
            return traces.total_of(terms) if terms else zero

        back = {slot: from_right(credit, slot) for slot in slots}
        rows = {s: {r: psi[p, r] for p, r in psi if p == s} for s in traced}
        earlier = {(s, r): from_right(rows[s], r) for s, r in psi}
        return (back, earlier), (credit, psi)

    start = dict.fromkeys(slots, zero), psi
    return jax.lax.scan(body, start, (signal, moving), reverse=True)


def suffix_drive(hand, psi, drive):
    """Psi_t f_t of the slots with a trace."""
    found = {}
    for slot in hand.traced:
        terms = [psi[slot, r] * f for r, f in drive.items() if (slot, r) in psi]
        found[slot] = traces.total_of(terms)
    return found


def advance_over_window(hand, uses, psi_0, psi, eps, back, blocks):
    """The traces at the end of a window; adds to the blocks what they were at its start
    times the signal that came back to there."""
    eps, blocks = dict(eps), dict(blocks)
    for name, use in uses.items():
        if eps[name]:
            rows = len(blocks[name])
            vectors = suffix_drive(hand, tile(psi, rows), use.drive)
            eps[name], blocks[name] = traces.advance_mixing(
                blocks[name],
                tile(back, rows),
                tile(psi_0, rows),
                traces.products_of_samples(vectors, use.x),
                eps[name],
                read="old",
            )
    return eps, blocks


def drtrl_window(hand, net, carry, xy):
    state, trace, seen, blocks = carry
    state, derivatives, new, signal = observe_window(hand, net, state, *xy)
    uses, filtered = filter_inputs(hand, derivatives.uses, trace["x"])
    (back, psi_0), (credit, psi) = sweep(derivatives.decay, signal, hand.traced)
    blocks = add_products(
        blocks,
        {k: driven(tile(credit, len(blocks[k])), use.drive) for k, use in uses.items()},
        {k: use.x for k, use in uses.items()},
    )
    eps = trace["eps"]
    eps, blocks = advance_over_window(hand, uses, psi_0, psi, eps, back, blocks)
    return state, {"eps": eps, "x": filtered}, jax.tree.map(jnp.add, seen, new), blocks


def drtrl_windows(hand, net, state, trace, xs, ys, *, window):
    """The same numbers as `drtrl_per_step`, `window` steps at a time."""
    run = functools.partial(drtrl_window, hand, net)
    start = state, trace, *zero_totals(hand, net)
    state, trace, *totals = in_windows(run, start, (xs, ys), window)
    return *as_gradient(hand, net, *totals), state, trace


def drtrl_whole(hand, net, state, xs, ys):
    """The same of a sequence with nothing before it, without a trace. Vectors alone, so
    nothing is won by folding a linear synapse."""
    assert hand.input_decay is None
    state, derivatives, seen, signal = observe_window(hand, net, state, xs, ys)
    _, (credit, _) = sweep(derivatives.decay, signal, ())
    blocks = {}
    for name, (rows, _) in hand.blocks(net.cell).items():
        use = derivatives.uses[name]
        vectors = driven(tile(credit, rows), use.drive)
        blocks[name] = traces.weight_product(0.0, vectors, use.x)
    return *as_gradient(hand, net, seen, blocks), state


# ES-D-RTRL.


def init_es_trace(hand, net, batch):
    """Filtered inputs, filtered drives by slot, and c^t."""
    xs, drives = {}, {}
    for name, (rows, inputs) in hand.blocks(net.cell).items():
        xs[name] = jnp.zeros((batch, inputs))
        drives[name] = {s: jnp.zeros((batch, rows)) for s in hand.slots}
    return {"x": xs, "f": drives, "left": jnp.ones(())}


def filter_es(derivatives, trace, decay=ES_DECAY):
    """One step of all filters."""
    uses = derivatives.uses
    xs = {name: decay * trace["x"][name] + use.x for name, use in uses.items()}
    drives = {}
    for name, use in uses.items():
        old = trace["f"][name]
        factors = tile(derivatives.decay, next(iter(old.values())).shape[-1])
        drives[name] = {}
        for slot in old:
            terms = [f * old[r] for (s, r), f in factors.items() if s == slot]
            terms = [decay * term for term in terms]
            if slot in use.drive:
                terms.append((1 - decay) * use.drive[slot])
            drives[name][slot] = traces.total_of(terms)
    return {"x": xs, "f": drives, "left": decay * trace["left"]}


def es_credit(signal, trace):
    """The signal at the rows of each block, by the filtered drives."""
    found = {}
    started = jnp.maximum(1 - trace["left"], 1e-9)  # Before the first step all is zero.
    for name, drives in trace["f"].items():
        rows = next(iter(drives.values())).shape[-1]
        found[name] = driven(tile(signal, rows), drives) / started
    return found


def filter_es_window(derivatives, signal, trace, decay=ES_DECAY):
    """All steps of the filters; the credit and filtered inputs of each."""
    moving, fixed = eqx.partition(derivatives, eqx.is_array)

    def body(trace, step):
        moving, signal = step
        trace = filter_es(eqx.combine(moving, fixed), trace, decay)
        return trace, (es_credit(signal, trace), trace["x"])

    trace, (credit, inputs) = jax.lax.scan(body, trace, (moving, signal))
    return trace, credit, inputs


def add_products(blocks, credit, inputs):
    return {
        name: traces.weight_product(total, credit[name], inputs[name])
        for name, total in blocks.items()
    }


def es_per_step(hand, net, state, trace, xs, ys, *, decay=ES_DECAY):
    def body(carry, xy):
        state, trace, seen, blocks = carry
        state, derivatives, new, signal = observe_step(hand, net, state, *xy)
        trace = filter_es(derivatives, trace, decay)
        blocks = add_products(blocks, es_credit(signal, trace), trace["x"])
        return (state, trace, jax.tree.map(jnp.add, seen, new), blocks), None

    start = state, trace, *zero_totals(hand, net)
    (state, trace, *totals), _ = jax.lax.scan(body, start, (xs, ys))
    return *as_gradient(hand, net, *totals), state, trace


def es_windows(hand, net, state, trace, xs, ys, *, window, decay=ES_DECAY):
    """The same numbers, with the products left to the end of each window."""

    def run(carry, xy):
        state, trace, seen, blocks = carry
        state, derivatives, new, signal = observe_window(hand, net, state, *xy)
        trace, credit, inputs = filter_es_window(derivatives, signal, trace, decay)
        blocks = add_products(blocks, credit, inputs)
        return state, trace, jax.tree.map(jnp.add, seen, new), blocks

    start = state, trace, *zero_totals(hand, net)
    state, trace, *totals = in_windows(run, start, (xs, ys), window)
    return *as_gradient(hand, net, *totals), state, trace
