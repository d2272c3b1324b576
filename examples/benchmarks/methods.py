"""Every method of `windows.py` as something that runs, with its compiled memory."""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from by_hand import BY_HAND
from floor import forward_and_products
from windows_by_hand import (
    ES_DECAY,
    drtrl_per_step,
    drtrl_whole,
    drtrl_windows,
    es_per_step,
    es_windows,
    init_es_trace,
    init_trace,
)
from workloads import bptt, checkpointed_bptt, init_state, loss_fn, truncated_bptt

import eqx_etrace as etrace


@dataclasses.dataclass
class Job:
    """One sequence to learn from."""

    name: str  # of the workload
    net: Any
    xs: jax.Array
    ys: jax.Array

    @property
    def state(self):
        return init_state(self.net, self.name, self.xs.shape[1])

    def hand(self, *, folded):
        return BY_HAND[self.name](folded)

    @property
    def batch(self):
        return self.xs.shape[1]


@dataclasses.dataclass
class Runner:
    """`run()` gives the loss and the leaves of the gradient, or None for these."""

    run: Callable
    temp: int | None = None  # bytes that the compiled program allocates on its own
    trace: int = 0  # bytes that it is given and hands back
    steps: int = 0


def size_of(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def without_trace(job, fun, *args):
    """`fun(*args)` gives loss and gradient, and perhaps more."""

    def used(*args):
        loss, grads, *_ = fun(*args)
        return jnp.sum(loss), jax.tree.leaves(grads)

    compiled = jax.jit(used).lower(*args).compile()
    temp = compiled.memory_analysis().temp_size_in_bytes
    return Runner(lambda: compiled(*args), temp, 0, len(job.xs))


def keeping_trace(job, fun, trace, *args):
    """`fun(trace, *args)` gives loss, gradient, state and trace. Each call is handed
    the trace of the last to write into: pages that the system has to map anew would
    otherwise be much of the time of a short sequence."""

    def used(trace, *args):
        loss, grads, _, trace = fun(trace, *args)
        return jnp.sum(loss), jax.tree.leaves(grads), trace

    compiled = jax.jit(used, donate_argnums=0).lower(trace, *args).compile()
    bytes_of_trace = size_of(trace)
    temp = compiled.memory_analysis().temp_size_in_bytes

    def run():
        nonlocal trace
        loss, grads, trace = compiled(trace, *args)
        return loss, grads

    return Runner(run, temp, bytes_of_trace, len(job.xs))


def through_time(fun, job):
    return without_trace(job, fun, job.net, job.state, job.xs, job.ys)


def by_hand(fun, job, *, folded, init=init_trace):
    hand = job.hand(folded=folded)

    def ordered(trace, net, state, xs, ys):
        return fun(hand, net, state, trace, xs, ys)

    trace = init(hand, job.net, job.batch)
    return keeping_trace(job, ordered, trace, job.net, job.state, job.xs, job.ys)


def es_by_hand(fun, job):
    # To fold a linear synapse would make it another rule; what the plain cell forgets
    # makes none.
    return by_hand(fun, job, folded=job.name == "rnn", init=init_es_trace)


def whole_by_hand(job):
    hand = job.hand(folded=job.name == "rnn")
    fun = functools.partial(drtrl_whole, hand)
    return without_trace(job, fun, job.net, job.state, job.xs, job.ys)


def full_step_by_hand(job):
    return by_hand(drtrl_per_step, job, folded=False)


def folded_step_by_hand(job):
    if job.name == "gru":
        raise Unavailable("nothing in a GRU can be folded")
    return by_hand(drtrl_per_step, job, folded=True)


class Unavailable(Exception):
    """Why a method has no column here."""


def floor(job, **options):
    fun = functools.partial(forward_and_products, **options)
    return through_time(fun, job)


def library(job, *, window, rule="DRTRL", vjp="single-step"):
    """The public functions. A window as long as the sequence starts from no trace and
    hands none back."""
    if not (hasattr(etrace, "value_and_grad") and hasattr(etrace, rule)):
        raise Unavailable(f"this eqx_etrace has no value_and_grad or no {rule}")
    made = etrace.ESDRTRL(decay=ES_DECAY) if rule == "ESDRTRL" else etrace.DRTRL()
    state, xs, ys = job.state, job.xs, job.ys
    graph = etrace.compile(job.net, state, xs[0], rule=made, batched=True, vjp=vjp)
    fun = etrace.value_and_grad(graph, loss_fn, window=window)
    params = graph.params(job.net)
    if window >= len(xs):

        def whole(params, state, xs, ys):
            losses, grads, _, _ = fun(params, state, None, xs, ys)
            return losses, grads

        return without_trace(job, whole, params, state, xs, ys)

    def ordered(trace, params, state, xs, ys):
        return fun(params, state, trace, xs, ys)

    trace = etrace.init_trace(graph)
    return keeping_trace(job, ordered, trace, params, state, xs, ys)


def peer(job, **options):
    if importlib.util.find_spec("braintrace") is None:
        raise Unavailable("braintrace is not installed")
    import windows_peer

    return Runner(windows_peer.runner(job, **options), steps=len(job.xs))


WINDOW, ES_WINDOW = 32, 10
BPTT = "BPTT"
METHODS = {
    BPTT: functools.partial(through_time, bptt),
    "BPTT checkpointed": functools.partial(through_time, checkpointed_bptt),
    "BPTT truncated 32": functools.partial(
        through_time, functools.partial(truncated_bptt, window=WINDOW)
    ),
    "floor: forward": functools.partial(floor, window=ES_WINDOW, products=False),
    "floor: window 10": functools.partial(floor, window=ES_WINDOW),
    "floor: whole": lambda job: floor(job, window=len(job.xs)),
    "by hand: step": full_step_by_hand,
    "by hand: step, folded": folded_step_by_hand,
    "by hand: window 32": functools.partial(
        by_hand, functools.partial(drtrl_windows, window=WINDOW), folded=True
    ),
    "by hand: whole": whole_by_hand,
    "by hand: ES step": functools.partial(es_by_hand, es_per_step),
    "by hand: ES window 10": functools.partial(
        es_by_hand, functools.partial(es_windows, window=ES_WINDOW)
    ),
    "etrace: step": functools.partial(library, window=1),
    "etrace: window 32": functools.partial(library, window=WINDOW),
    "etrace: whole": lambda job: library(job, window=len(job.xs)),
    "etrace: ES step": functools.partial(library, window=1, rule="ESDRTRL"),
    "etrace: ES window 10": functools.partial(
        library, window=ES_WINDOW, rule="ESDRTRL"
    ),
    "etrace: multi-step 32": functools.partial(
        library, window=WINDOW, vjp="multi-step"
    ),
    "braintrace: D-RTRL": functools.partial(peer, algorithm="D_RTRL"),
    "braintrace: D-RTRL vmap": functools.partial(peer, algorithm="D_RTRL", vmap=True),
    "braintrace: pp_prop": functools.partial(peer, algorithm="pp_prop"),
}


def truth_of(name):
    """The method whose gradient a method must have, or None."""
    if (
        name.startswith(("braintrace", "floor"))
        or "multi-step" in name
        or "truncated" in name
    ):
        return None
    if name.startswith("BPTT"):
        return BPTT
    return "by hand: ES step" if ": ES " in name else "by hand: whole"
