"""The figures of the pages in this folder.

python docs/nn/plots.py
"""

import pathlib

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from eqx_etrace import nn, plot, tasks


HERE = pathlib.Path(__file__).parent
SURROGATES = (
    nn.triangle(),
    nn.sigmoid(4.0),
    nn.arctan(),
    nn.relu_grad(),
    nn.boxcar(),
    nn.superspike(10.0),
    nn.gaussian(),
    nn.multi_gaussian(),
)
# Neuron, its current, and how long, in ms.
NEURONS = {
    "IF": (nn.IF(1), 0.07, 100),
    "LIF": (nn.LIF(1), 1.5, 100),
    "Refractory(LIF, 10 ms)": (nn.Refractory(nn.LIF(1), 10.0), 1.5, 100),
    "ALIF": (nn.ALIF(1, beta=0.3), 2.0, 200),
    "GIF": (nn.GIF(1, a=0.005, jump_1=0.5, jump_2=-0.03), 1.5, 200),
    "AdEx": (nn.AdEx(1, dt=0.1), 800.0, 200),
    "Izhikevich": (nn.Izhikevich(1, dt=0.5), 10.0, 200),
    "Hodgkin-Huxley": (nn.HodgkinHuxley(1, dt=0.1), 10.0, 60),
    "LI": (nn.LI(1), 1.0, 100),
}
CELLS = {
    "RNN": nn.RNN,
    "GRU": lambda *sizes, key: nn.GRU(eqx.nn.GRUCell(*sizes, key=key)),
    "LSTM": lambda *sizes, key: nn.LSTM(eqx.nn.LSTMCell(*sizes, key=key)),
    "MGU": nn.MGU,
    "MinimalRNN": nn.MinimalRNN,
    "CFN": nn.CFN,
    "URLSTM": nn.URLSTM,
    "IndRNN": nn.IndRNN,
    "MinGRU": nn.MinGRU,
    "MinLSTM": nn.MinLSTM,
    "QuasiLSTM": nn.QuasiLSTM,
    "LRU": lambda *sizes, key: nn.LRU(*sizes, sizes[-1], key=key),
    "RTU": nn.RTU,
    "NonlinearRTU": nn.NonlinearRTU,
}


def run(piece, xs):
    """Outputs and states of a sequence, time first."""

    def body(state, x):
        out, state = piece(x, state)
        return state, (out, state)

    return jax.lax.scan(body, piece.init_state(), xs)[1]


def panels(rows, columns, height):
    figure = Figure(figsize=(8, height), layout="constrained")
    axes = figure.subplots(rows, columns).reshape(-1)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=7)
    return figure, axes


def save(figure, name):
    figure.savefig(HERE / f"{name}.png", dpi=70)


def surrogates():
    figure, axes = panels(2, 4, 3.4)
    for axis, spike in zip(axes, SURROGATES, strict=True):
        plot.surrogates(spike, ax=axis)
        axis.set(xlabel="", ylabel="")
        axis.title.set_fontsize(9)
    save(figure, "surrogates")


def neurons():
    figure, axes = panels(3, 3, 5.5)
    for axis, (name, (neuron, current, ms)) in zip(axes, NEURONS.items(), strict=True):
        steps = round(ms / neuron.dt)
        on = np.arange(steps) >= steps // 10
        xs = current * jnp.asarray(on, float)[:, None]
        spikes, state = run(neuron, xs)
        inner = state.neuron if isinstance(neuron, nn.Refractory) else state
        time = neuron.dt * np.arange(1, steps + 1)
        # The last step of an upswing goes far beyond the peak.
        v = np.minimum(inner.v[:, 0], 50)
        axis.plot(time, v, color="C0", linewidth=1)
        if not isinstance(neuron, nn.LI):
            at = time[np.asarray(spikes[:, 0]) > 0]
            top = v.max() + 0.1 * np.ptp(v)
            axis.plot(at, np.full(at.shape, top), "|", color="C3")
        axis.set_title(name, fontsize=9)
    axes[-2].set_xlabel("ms", fontsize=8)
    save(figure, "neurons")


def membrane(drive):
    """A resting membrane behind conductances that never reaches its threshold."""
    lif = nn.LIF(1, v_rest=-65.0, threshold=0.0, v_reset=-65.0, dt=0.5)
    coba = nn.COBA(lif, e_exc=0.0, e_inh=-80.0)
    return run(coba, drive)[1].neuron.v


def synapses():
    figure, axes = panels(2, 4, 3.8)
    time = 0.5 * np.arange(100)
    pulse = jnp.zeros((100, 1)).at[10].set(1.0)
    nothing = jnp.zeros((100, 1))
    train = jnp.zeros((100, 1)).at[10:90:10].set(1.0)
    responses = {
        "Exponential": run(nn.Exponential(1, dt=0.5), pulse)[0],
        "Alpha": run(nn.Alpha(1, dt=0.5), pulse)[0],
        "DualExponential": run(nn.DualExponential(1, dt=0.5), pulse)[0],
        "Delay, 20 steps": run(nn.Delay(1, 20), pulse)[0],
        "COBA, excited": membrane(nn.Drive(exc=0.3 * pulse, inh=nothing)),
        "COBA, inhibited": membrane(nn.Drive(exc=nothing, inh=0.3 * pulse)),
        "STP, facilitating": run(nn.STP(1, tau_d=10.0, dt=0.5), train)[0],
        "STD": run(nn.STD(1, dt=0.5), train)[0],
    }
    for axis, (name, response) in zip(axes, responses.items(), strict=True):
        axis.plot(time, response[:, 0], color="C0", linewidth=1)
        axis.set_title(name, fontsize=9)
    for axis in axes[4:]:
        axis.set_xlabel("ms", fontsize=8)
    save(figure, "synapses")


def cells():
    """Four outputs of each cell, with its first weights, to a pulse of ten steps."""
    figure, axes = panels(2, 7, 3.6)
    on = (np.arange(60) >= 5) & (np.arange(60) < 15)
    xs = 3.0 * jnp.asarray(on, float)[:, None]
    for axis, (name, make) in zip(axes, CELLS.items(), strict=True):
        axis.axvspan(5, 15, color="0.92", linewidth=0)
        axis.plot(run(make(1, 8, key=jax.random.key(3)), xs)[0][:, :4], linewidth=1)
        axis.set_title(name, fontsize=9)
        axis.set_yticks([])
    for axis in axes[7:]:
        axis.set_xlabel("steps", fontsize=8)
    save(figure, "cells")


def readouts():
    figure, axes = panels(1, 4, 2.2)
    spikes = jax.random.bernoulli(jax.random.key(0), 0.1, (100, 1)).astype(float)
    plain = jnp.ones((1, 1)), jnp.zeros(1)
    linear, leaky = (
        eqx.tree_at(lambda r: (r.weight, r.bias), made, plain)
        for made in (
            nn.LinearReadout(1, 1, key=jax.random.key(0)),
            nn.LeakyReadout(1, 1, tau=10.0, key=jax.random.key(0)),
        )
    )
    pieces = {
        "LinearReadout": (linear, spikes),
        "LeakyReadout, 10 ms": (leaky, spikes),
        "MaxOverTime of it": (nn.MaxOverTime(1), run(leaky, spikes)[0]),
        "SpikeCount": (nn.SpikeCount(1), spikes),
    }
    for axis, (name, (piece, xs)) in zip(axes, pieces.items(), strict=True):
        axis.plot(run(piece, xs)[0][:, 0], color="C0", linewidth=1)
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("steps", fontsize=8)
    save(figure, "readouts")


def encoders():
    """A rising number, or a wave, as spikes."""
    figure, axes = panels(2, 3, 3.6)
    rising, key = jnp.linspace(0, 1, 30), jax.random.key(0)
    wave = jnp.sin(jnp.arange(100) / 8)
    bumps = nn.population_encode(jnp.sin(jnp.arange(100) / 8), 12, low=-1.0, high=1.0)
    images = {
        "rate_encode": nn.rate_encode(rising, 100, key=key, gain=0.3),
        "poisson_encode": nn.poisson_encode(rising, 100, key=key, dt=0.3),
        "latency_encode": nn.latency_encode(rising, 100, tau=40.0, threshold=0.3),
        "linear_latency_encode": nn.linear_latency_encode(rising, 100),
        "population_encode": bumps,
    }
    for axis, (name, image) in zip(axes, images.items(), strict=False):
        axis.imshow(image.T, "Greys", aspect="auto", origin="lower")
        axis.set_title(name, fontsize=9)
    axes[0].set_ylabel("x from 0 to 1", fontsize=8)
    axes[4].set_ylabel("unit", fontsize=8)
    axes[-1].plot(wave, color="0.75", linewidth=1)
    for shift, encode in ((1.4, nn.delta_encode), (1.9, nn.step_forward_encode)):
        spikes = np.asarray(encode(wave, threshold=0.12))
        for sign, color in ((1, "C3"), (-1, "C0")):
            at = np.flatnonzero(spikes == sign)
            axes[-1].plot(at, np.full(at.shape, shift), "|", color=color)
    axes[-1].set_title("delta (lower), step_forward", fontsize=9)
    save(figure, "encoders")


TASKS = {
    "copy": lambda key: tasks.copy(key, symbols=4, length=6, delay=12),
    "delayed match": lambda key: tasks.delayed_match_to_sample(key),
    "evidence (a sixth)": lambda key: tasks.evidence_accumulation(
        key, gap_steps=8, cue_steps=17, delay_steps=175, recall_steps=25
    ),
    "adding": lambda key: tasks.adding(key, steps=40),
    "a^n b^n": lambda key: tasks.anbn(key),
    "flip_flop": lambda key: tasks.flip_flop(key, steps=60),
    "integrator": lambda key: tasks.integrator(key, steps=60),
    "rotation": lambda key: tasks.rotation(key, steps=60),
    "mackey_glass": lambda key: tasks.mackey_glass(key, steps=300, horizon=15),
    "lorenz": lambda key: tasks.lorenz(key, steps=300, horizon=10),
    "henon": lambda key: tasks.henon(key, steps=60),
}
LINES = "flip_flop", "integrator", "rotation", "mackey_glass", "lorenz", "henon"


def one_of_each_task():
    """Inputs, the target in orange where it counts."""
    figure, axes = panels(3, 4, 5.4)
    for axis, (name, make) in zip(axes, TASKS.items(), strict=False):
        inputs, targets, mask = map(np.asarray, make(jax.random.key(4)))
        time = np.arange(len(inputs))
        if name in LINES:
            axis.plot(inputs[:, 0], color="0.5", linewidth=0.8)
        else:
            axis.imshow(inputs.T, "Greys", aspect="auto", interpolation="none")
        target = targets.reshape(len(time), -1)[:, 0].astype(float)
        if name in ("copy", "delayed match", "evidence (a sixth)", "a^n b^n", "adding"):
            axis.axvspan(*time[mask][[0, -1]], color="C1", alpha=0.2, linewidth=0)
        elif name == "flip_flop":
            axis.step(time, target, color="C1", linewidth=1)
        else:
            axis.plot(np.where(mask, target, np.nan), color="C1", linewidth=0.8)
        axis.set_title(name, fontsize=9)
        axis.set_yticks([])
    axes[-1].axis("off")
    figure.savefig(HERE.parent / "tasks.png", dpi=70)


if __name__ == "__main__":
    surrogates()
    neurons()
    synapses()
    cells()
    readouts()
    encoders()
    one_of_each_task()
