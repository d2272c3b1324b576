"""Sums over traces, spelled for XLA on CPU.

A trace is an array (batch, outputs, inputs) for each slot, and bound by memory: what
counts is how often it passes through. Two spellings to keep away from: an einsum over
the batch and a trace makes a copy of it in another layout; and to read a trace beside
its update in place makes XLA copy all of it, in a loop for every sample, since nothing
tells it which comes first.
"""

import jax
import jax.numpy as jnp


def column(factor):
    return factor[..., None] if isinstance(factor, jax.Array) else factor


def at(factor, sample):
    return factor[sample] if isinstance(factor, jax.Array) else factor


def total_of(terms):
    first, *rest = terms
    for term in rest:
        first = first + term
    return first


def contract(total, signals, traces):
    """total + sum_b signal[b, o] trace[b, o, i] over all slots, sample by sample."""
    signals = {slot: signals[slot] for slot in traces if slot in signals}
    traces = {slot: traces[slot] for slot in signals}

    def add(total, sample):
        signals, traces = sample
        parts = [signals[slot][:, None] * traces[slot] for slot in traces]
        return total + total_of(parts), None

    return jax.lax.scan(add, total, (signals, traces))[0] if signals else total


def mixed(decay, slot, old):
    """sum_r decay[slot, r] old[r]"""
    return [column(decay[slot, r]) * old[r] for r in old if (slot, r) in decay]


def advance(decay, drive, x, trace):
    """One step of the traces of one block of weights, where no slot reads another."""
    x = x[:, None, :]
    return {
        slot: total_of(mixed(decay, slot, trace) + [column(drive[slot]) * x])
        for slot in trace
    }


def advance_mixing(total, signals, decay, added, trace, *, read):
    """In place, for slots that read each other: decay[s, r] trace[r] + added(b)[s].

    Adds to the total the traces times the signals, which read the "old" or the "new".
    A sample's new slices are written one turn later, before that turn reads from the
    same arrays: so XLA sees an order and copies nothing.
    """

    def write(trace, slices, sample):
        put = jax.lax.dynamic_update_index_in_dim
        return {slot: put(trace[slot], slices[slot], sample, 0) for slot in trace}

    def body(sample, carry):
        trace, slices, total = carry
        trace = write(trace, slices, jnp.maximum(sample - 1, 0))
        old = {slot: trace[slot][sample] for slot in trace}
        here = {pair: at(factor, sample) for pair, factor in decay.items()}
        extra = added(sample)
        new = {
            slot: total_of(
                mixed(here, slot, old) + ([extra[slot]] if slot in extra else [])
            )
            for slot in old
        }
        seen = old if read == "old" else new
        parts = [signals[s][sample][:, None] * seen[s] for s in seen if s in signals]
        return trace, new, total_of([total, *parts])

    samples = len(next(iter(trace.values())))
    first = {slot: trace[slot][0] for slot in trace}
    start = trace, first, total
    trace, slices, total = jax.lax.fori_loop(0, samples, body, start)
    return write(trace, slices, samples - 1), total


def products_of_samples(vectors, x):
    """sum_t vectors[t, b, o] x[t, b, i] for one sample b, of every slot.

    One product for all slots, each vector and x laid out by sample before the loop.
    """
    slots, width = tuple(vectors), next(iter(vectors.values())).shape[-1]
    stacked = jnp.concatenate([vectors[slot] for slot in slots], axis=-1)
    stacked, x = jnp.transpose(stacked, (1, 2, 0)), jnp.swapaxes(x, 0, 1)

    def added(sample):
        product = stacked[sample] @ x[sample]
        return {
            slot: product[i * width : (i + 1) * width] for i, slot in enumerate(slots)
        }

    return added


def outer_of_samples(vectors, x):
    """vector[b, o] x[b, i] for one sample b, of every slot."""

    def added(sample):
        return {s: column(at(v, sample)) * x[sample] for s, v in vectors.items()}

    return added


def weight_product(total, vectors, x):
    """total + sum vectors[..., o] x[..., i], all leading axes as one."""
    flat = vectors.reshape(-1, vectors.shape[-1]), x.reshape(-1, x.shape[-1])
    return total + flat[0].T @ flat[1]
