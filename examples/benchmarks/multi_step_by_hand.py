"""A window whose own gradient is exact, with a trace for what came before it.

Reverse mode through each window of K steps, as truncated BPTT(K) has it, and in
addition the gradient at the window's first state times the trace there, of D-RTRL or
ES-D-RTRL.
"""

import dataclasses

import jax
import jax.numpy as jnp
import traces
from by_hand import filter_inputs, observe_window, zero_totals
from windows_by_hand import (
    add_products,
    advance_over_window,
    es_credit,
    filter_es_window,
    sweep,
)
from workloads import in_windows, losses_of


def drtrl_before(hand, derivatives, signal, trace, into, blocks):
    """The new trace, and the blocks with the credit for what was before the window."""
    uses, filtered = filter_inputs(hand, derivatives.uses, trace["x"])
    (_, psi_0), (_, psi) = sweep(derivatives.decay, signal, hand.traced)
    for name, old in trace["x"].items():  # The trace of a folded synapse.
        total = traces.weight_product(blocks[name], into["g"], old)
        blocks = blocks | {name: total}
    eps = trace["eps"]
    eps, blocks = advance_over_window(hand, uses, psi_0, psi, eps, into, blocks)
    return {"eps": eps, "x": filtered}, blocks


def es_before(hand, derivatives, signal, trace, into, blocks):
    blocks = add_products(blocks, es_credit(into, trace), trace["x"])
    trace, _, _ = filter_es_window(derivatives, signal, trace)
    return trace, blocks


def multi_step(before, hand, net, state, trace, xs, ys, *, window):
    """The loss and gradient of a sequence, the last state and trace."""

    def run(carry, xy):
        state, trace, total, grads, blocks = carry
        fun = jax.value_and_grad(losses_of, argnums=(0, 1), has_aux=True)
        (loss, last), (new, into) = fun(net, state, *xy)
        _, derivatives, _, signal = observe_window(hand, net, state, *xy)
        into = dict(zip(hand.slots, jax.tree.leaves(into), strict=True))
        trace, blocks = before(hand, derivatives, signal, trace, into, blocks)
        return last, trace, total + loss, jax.tree.map(jnp.add, grads, new), blocks

    _, blocks = zero_totals(hand, net)
    start = state, trace, jnp.zeros(()), jax.tree.map(jnp.zeros_like, net), blocks
    state, trace, loss, grads, blocks = in_windows(run, start, (xs, ys), window)
    cell = jax.tree.map(jnp.add, grads.cell, hand.gradient(grads.cell, blocks))
    return loss, dataclasses.replace(grads, cell=cell), state, trace
