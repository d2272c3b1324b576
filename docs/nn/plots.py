"""The figures of the pages in this folder.

python docs/nn/plots.py
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from eqx_etrace import nn


HERE = pathlib.Path(__file__).parent
SURROGATES = {
    "triangle()": nn.triangle(),
    "sigmoid(4)": nn.sigmoid(4.0),
    "arctan()": nn.arctan(),
    "relu_grad()": nn.relu_grad(),
    "boxcar()": nn.boxcar(),
    "superspike(10)": nn.superspike(10.0),
    "gaussian()": nn.gaussian(),
    "multi_gaussian()": nn.multi_gaussian(),
}
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
    x = jnp.linspace(-2, 2, 801)
    for axis, (name, spike) in zip(axes, SURROGATES.items(), strict=True):
        axis.step(x, spike(x), color="0.75", linewidth=1)
        axis.plot(x, spike.slope(x), color="C0")
        axis.set_title(name, fontsize=9)
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


if __name__ == "__main__":
    surrogates()
    neurons()
    synapses()
