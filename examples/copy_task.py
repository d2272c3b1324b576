"""Copying a string of symbols after a delay of 20 steps, learned online by a GRU.

    python examples/copy_task.py
    python examples/copy_task.py --delay 10 --length 3

The network reads five symbols, waits for twenty steps, sees a go cue and must repeat
the symbols in their order. It gets its gradient forward in time, in windows of eight
steps: within a window that of backpropagation, and for all that came before, the trace
of D-RTRL, here with all of the diagonal of the Jacobian (`scope="unit"`). Memory does
not grow with the length of the sequence. Beside it are backpropagation truncated to the
same windows, which no trace connects, and the whole of backpropagation through time
(BPTT): from the same weights, by the same samples, with as many updates.

Symbols that are right in 2000 fresh samples (three seeds, 130 s of CPU): D-RTRL 1.00,
BPTT 0.992 - 0.998, truncated BPTT 0.57 - 0.65.
"""

import argparse
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from tqdm import tqdm

import eqx_etrace as etrace
from eqx_etrace import nn, tasks


WIDTH, BATCH, BLOCKS = 128, 16, 20
WINDOW = 8
TEST = 2000  # fresh samples


def make_net(symbols, steps, *, key):
    """A GRU whose units start with time constants of up to the sequence's length."""
    one, two, three = jax.random.split(key, 3)
    cell = eqx.nn.GRUCell(symbols + 2, WIDTH, key=one)
    # As Tallec and Ollivier, "Can recurrent neural networks warp time?", ICLR 2018.
    times = jax.random.uniform(two, (WIDTH,), minval=1.0, maxval=steps)
    bias = cell.bias.at[WIDTH : 2 * WIDTH].set(jnp.log(times))
    new = bias, 2 * cell.weight_hh
    cell = eqx.tree_at(lambda cell: (cell.bias, cell.weight_hh), cell, new)
    return nn.Sequential([nn.GRU(cell), eqx.nn.Linear(WIDTH, symbols + 1, key=three)])


def rest(net, batch):
    return jax.tree.map(lambda a: jnp.zeros((batch, *a.shape)), net.init_state())


def run(net, xs, window=None):
    """Outputs of the plain model over a batch of sequences; with a window, credit does
    not go back beyond the start of the window."""

    def one(state, inputs):
        x, number = inputs
        if window is not None:
            first, cut = number % window == 0, jax.lax.stop_gradient(state)
            state = jax.tree.map(lambda a, b: jnp.where(first, a, b), cut, state)
        out, state = jax.vmap(net)(x, state)
        return state, out

    return jax.lax.scan(one, rest(net, xs.shape[1]), (xs, jnp.arange(len(xs))))[1]


def loss_fn(out, target):
    return optax.softmax_cross_entropy_with_integer_labels(out, target)


def online_gradient(net):
    """The gradient of D-RTRL, of the mean loss where the mask asks for a symbol."""
    state, rule = rest(net, BATCH), etrace.DRTRL(scope="unit")
    x = jnp.zeros((BATCH, net.layers[0].cell.input_size))
    graph = etrace.compile(net, state, x, rule, batched=True, vjp="multi-step")
    gradient = etrace.grad(graph, loss_fn, window=WINDOW, reduction="mean")
    return lambda params, sample: gradient(params, state, None, *sample)[0]


def bptt_gradient(net, window=None):
    _, static = eqx.partition(net, eqx.is_inexact_array)

    def loss(params, sample):
        outs = run(eqx.combine(params, static), sample.inputs, window)
        return jnp.mean(loss_fn(outs, sample.targets), where=sample.mask)

    return jax.grad(loss)


def train(gradient, net, make, updates, key, name):
    params, static = eqx.partition(net, eqx.is_inexact_array)
    schedule = optax.cosine_decay_schedule(3e-3, updates)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

    def body(carry, key):
        params, opt_state = carry
        sample = make(jax.random.split(key, BATCH))
        updates, opt_state = optimiser.update(gradient(params, sample), opt_state)
        return (optax.apply_updates(params, updates), opt_state), None

    block = jax.jit(functools.partial(jax.lax.scan, body))
    learned = params, optimiser.init(params)
    for part in tqdm(jax.random.split(key, BLOCKS), desc=name):
        learned, _ = block(learned, jax.random.split(part, updates // BLOCKS))
    return eqx.combine(learned[0], static)


@eqx.filter_jit
def accuracy(net, make, key):
    """The share of symbols that are right, and of strings that are right throughout."""
    sample = make(jax.random.split(key, TEST))
    right = run(net, sample.inputs).argmax(-1) == sample.targets
    return right.mean(where=sample.mask), (right | ~sample.mask).all(0).mean()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--symbols", type=int, default=4)
    parser.add_argument("--length", type=int, help="default: 5, or 2 with --quick")
    parser.add_argument("--delay", type=int, help="default: 20, or 5 with --quick")
    parser.add_argument("--updates", type=int, help="default: 5000, 600 with --quick")
    parser.add_argument("--quick", action="store_true", help="a short form")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    delay = args.delay or (5 if args.quick else 20)
    length = args.length or (2 if args.quick else 5)
    updates = args.updates or (600 if args.quick else 5000)
    one = functools.partial(
        tasks.copy, symbols=args.symbols, length=length, delay=delay
    )
    make = jax.vmap(one, out_axes=1)

    weights, data, test = jax.random.split(jax.random.key(args.seed), 3)
    net = make_net(args.symbols, 2 * length + delay + 1, key=weights)
    gradients = {
        f"D-RTRL, windows of {WINDOW}": online_gradient(net),
        f"BPTT, windows of {WINDOW}": bptt_gradient(net, WINDOW),
        "BPTT": bptt_gradient(net),
    }
    print(f"{length} of {args.symbols} symbols, delay {delay}, {updates} updates")
    for name, gradient in gradients.items():
        learned = train(gradient, net, make, updates, data, name)
        symbols, strings = accuracy(learned, make, test)
        print(f"{name}: {symbols:.4f} of symbols right, {strings:.4f} of strings")


if __name__ == "__main__":
    main()
