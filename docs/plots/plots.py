"""The figures of plots.md: its code, run on a network of its own.

python docs/plots/plots.py
"""

import pathlib
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt

import eqx_etrace
from eqx_etrace import nn


HERE = pathlib.Path(__file__).parent


class Net(eqx.Module):
    cell: eqx.nn.GRUCell
    readout: eqx.nn.Linear

    def __call__(self, x, state):
        state = self.cell(x, state)
        return self.readout(state), state


def names():
    """What the page takes for granted."""
    keys = jax.random.split(jax.random.key(0), 4)
    net = Net(eqx.nn.GRUCell(3, 32, key=keys[0]), eqx.nn.Linear(32, 2, key=keys[1]))
    state, xs = jnp.zeros(32), jax.random.normal(keys[2], (40, 3))
    graph = eqx_etrace.compile(net, state, xs[0])
    return {
        **{"jax": jax, "jnp": jnp, "eqx": eqx, "eqx_etrace": eqx_etrace, "nn": nn},
        **{"key": keys[3], "net": net, "state": state, "x": xs[0], "graph": graph},
        **{"params": graph.params(net), "xs": xs, "targets": jnp.roll(xs[:, :2], 3)},
        "loss_fn": lambda out, target: jnp.sum((out - target) ** 2),
    }


def main():
    plt.switch_backend("Agg")
    text, known = (HERE.parent / "plots.md").read_text(), names()
    block_or_image = r"^```python\n(.*?)^```$|!\[.*?\]\(plots/(\w+)\.png\)"
    for code, image in re.findall(block_or_image, text, re.MULTILINE | re.DOTALL):
        if code:
            exec(compile(code, "plots.md", "exec"), known)
        else:
            plt.gcf().savefig(HERE / f"{image}.png", dpi=70)
            plt.close("all")


if __name__ == "__main__":
    main()
