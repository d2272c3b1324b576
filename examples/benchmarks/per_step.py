"""Microseconds per time step of one spiking network, learnt in several ways.

All methods run in one process, one after the other in every round, so that a busy
machine disturbs them alike. Read the ratios; run with `--help` for the options.
"""

import argparse
import importlib.util
import json
import statistics
import time
from pathlib import Path

import handwritten
import jax
import jax.numpy as jnp
from network import bptt, init_data, init_net, init_state, loss_fn


FULL = {"inputs": 100, "units": 512, "batch": 32, "steps": 50, "rounds": 9}
QUICK = {"inputs": 20, "units": 64, "batch": 8, "steps": 20, "rounds": 3}
# A method that has used this many seconds sits out the rounds that remain.
PATIENCE = 60.0


def bptt_runner(net, xs, ys):
    state = init_state(net, xs.shape[1])
    fun = jax.jit(bptt)
    return lambda: fun(net, state, xs, ys)


def keeping_trace(fun, params, state, trace, xs, ys):
    """Hands each call the trace of the last one to write into: pages that the system
    has to map anew would otherwise be most of the time of a short sequence."""
    fun = jax.jit(fun, donate_argnums=2)

    def run():
        nonlocal trace
        loss, grads, _, trace = fun(params, state, trace, xs, ys)
        return loss, grads

    return run


def handwritten_runner(net, xs, ys):
    batch = xs.shape[1]
    state, trace = init_state(net, batch), handwritten.init_trace(net, batch)
    return keeping_trace(handwritten.drtrl, net, state, trace, xs, ys)


def library_runner(net, xs, ys):
    import eqx_etrace as etrace

    state = init_state(net, xs.shape[1])
    graph = etrace.compile(net, state, xs[0], rule=etrace.DRTRL(), batched=True)

    def sequence(params, state, trace, xs, ys):
        def body(carry, xy):
            state, trace, total, grads = carry

            def loss(params):
                out, *new = etrace.step(graph, params, state, trace, xy[0])
                return loss_fn(out, xy[1]), new

            (value, (state, trace)), new = jax.value_and_grad(loss, has_aux=True)(
                params
            )
            grads = jax.tree.map(jnp.add, grads, new)
            return (state, trace, total + value, grads), None

        start = state, trace, jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
        (state, trace, loss, grads), _ = jax.lax.scan(body, start, (xs, ys))
        return loss, grads, state, trace

    trace = etrace.init_trace(graph)
    return keeping_trace(sequence, graph.params(net), state, trace, xs, ys)


def peer_runner(net, xs, ys, *, vmap):
    import peer

    run = peer.runner(net, xs, ys, vmap=vmap)

    def loss_and_no_gradient():
        grads, losses = jax.block_until_ready(run())
        del grads  # In a layout of its own, and of a rule that counts some paths twice.
        return jnp.sum(losses), None

    return loss_and_no_gradient


HAND = "D-RTRL by hand"
METHODS = {
    "BPTT": bptt_runner,
    HAND: handwritten_runner,
    "eqx_etrace step": library_runner,
    "braintrace batched": lambda *a: peer_runner(*a, vmap=False),
    "braintrace vmap": lambda *a: peer_runner(*a, vmap=True),
}
NEEDS = {
    "eqx_etrace step": "eqx_etrace",
    "braintrace batched": "braintrace",
    "braintrace vmap": "braintrace",
}


def build(names, net, xs, ys):
    """The runners of what is installed, each compared with the work by hand."""
    loss, want = handwritten_runner(net, xs, ys)()
    runners = {}
    for name in names:
        make, package = METHODS[name], NEEDS.get(name)
        if package and importlib.util.find_spec(package) is None:
            print(f"{name}: left out, {package} is not installed")
            continue
        run = make(net, xs, ys)
        got_loss, got = jax.block_until_ready(run())
        errors = [f"loss {handwritten.relative_error(got_loss, loss):.0e}"]
        if got is not None:
            errors += [f"gradient {handwritten.relative_error(got, want):.0e}"]
        print(f"{name}: away from {HAND}:", ", ".join(errors))
        runners[name] = run
    return runners


def measure(runners, rounds):
    """Seconds of every call, in rounds over all methods."""
    seconds = {name: [] for name in runners}
    for _ in range(rounds):
        for name, run in runners.items():
            if sum(seconds[name]) > PATIENCE:
                continue
            start = time.perf_counter()
            jax.block_until_ready(run())
            seconds[name].append(time.perf_counter() - start)
    return seconds


def summarise(seconds, steps):
    """Per method the median, quartiles and fastest in microseconds per step."""
    table = {}
    for name, each in seconds.items():
        each = sorted(1e6 * second / steps for second in each)
        low, median, high = statistics.quantiles(each, n=4, method="inclusive")
        table[name] = {"median": median, "low": low, "high": high, "min": each[0]}
    return table


def show(table):
    print(f"\n{'us per step':20} {'median':>8} {'quartiles':>18} {'min':>8}", end="")
    print(f" {'/ by hand':>10} {'/ BPTT':>8}")
    for name, row in table.items():
        spread = f"{row['low']:.0f} to {row['high']:.0f}"
        print(f"{name:20} {row['median']:8.0f} {spread:>18} {row['min']:8.0f}", end="")
        print(f" {row['median'] / table[HAND]['median']:10.2f}", end="")
        print(f" {row['median'] / table['BPTT']['median']:8.1f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the table to this file too")
    parser.add_argument("--quick", action="store_true", help="a small network")
    parser.add_argument(
        "--reset", choices=("detached", "attached"), default="detached",
        help="how the spike that resets the membrane is differentiated",
    )  # fmt: skip
    parser.add_argument(
        "--without", nargs="*", default=[], choices=sorted(NEEDS), help="leave out"
    )  # fmt: skip
    args = parser.parse_args()
    names = [name for name in METHODS if name not in args.without]
    size = QUICK if args.quick else FULL
    net = init_net(
        jax.random.key(0), size["inputs"], size["units"], outputs=10, reset=args.reset
    )
    xs, ys = init_data(jax.random.key(1), net, size["steps"], size["batch"])
    print(f"jax {jax.__version__} on {jax.default_backend()}, {size}, {args.reset}")
    table = summarise(measure(build(names, net, xs, ys), size["rounds"]), size["steps"])
    show(table)
    if args.json:
        facts = {"jax": jax.__version__, "backend": jax.default_backend(), **size}
        facts["reset"] = args.reset
        args.json.write_text(json.dumps({**facts, "us_per_step": table}, indent=2))


if __name__ == "__main__":
    main()
