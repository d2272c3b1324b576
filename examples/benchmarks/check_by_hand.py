"""Checks every rule written by hand against BPTT, in float64.

D-RTRL must have the gradient of a twin whose credit is cut where it enters the
recurrent product, and another one than the network itself. ES-D-RTRL must have that of
a sequence of one step, and without memory that of BPTT truncated to one step. The
multi-step rules are exact on the twin for any window, and on the network where one
window holds the sequence. Run it: `python check_by_hand.py`.
"""

import jax
from by_hand import BY_HAND
from handwritten import relative_error
from multi_step_by_hand import drtrl_before, es_before, multi_step
from windows_by_hand import (
    drtrl_per_step,
    drtrl_whole,
    drtrl_windows,
    es_per_step,
    es_windows,
    init_es_trace,
    init_trace,
)
from workloads import (
    WORKLOADS,
    bptt,
    checkpointed_bptt,
    init_data,
    init_net,
    init_state,
    truncated_bptt,
    twin,
)


BATCH, STEPS = 4, 21  # a window of 8 leaves a rest


def setting(name):
    net = init_net(jax.random.key(0), name, inputs=9, units=16, outputs=3)
    xs, ys = init_data(jax.random.key(1), net, name, STEPS, BATCH)
    return net, init_state(net, name, BATCH), xs, ys


def drtrl_errors(name, folded):
    """Away from BPTT of the twin: per step, in windows and their last traces."""
    net, state, xs, ys = setting(name)
    hand = BY_HAND[name](folded)
    want = bptt(twin(net), state, xs, ys)
    want = want[0], net_like(net, want[1]), want[2]
    start = hand, net, state, init_trace(hand, net, BATCH), xs, ys
    *per_step, trace = drtrl_per_step(*start)
    *windows, window_trace = drtrl_windows(*start, window=8)
    errors = {
        "per step": relative_error(per_step, want),
        "windows": relative_error(windows, want),
    }
    if hand.input_decay is None:
        whole = drtrl_whole(hand, net, state, xs, ys)
        errors["whole"] = relative_error(whole, want)
    if jax.tree.leaves(trace):
        errors["trace"] = relative_error(window_trace, trace)
    full = bptt(net, state, xs, ys)[1]
    return errors, relative_error(per_step[1].cell, full.cell)


def net_like(net, grads):
    """The gradient of a twin as one of the network."""
    return jax.tree.unflatten(jax.tree.structure(net), jax.tree.leaves(grads))


def es_errors(name):
    net, state, xs, ys = setting(name)
    hand = BY_HAND[name](folded=False)
    trace = init_es_trace(hand, net, BATCH)
    start = hand, net, state, trace, xs, ys
    first = hand, net, state, trace, xs[:1], ys[:1]
    forgetful = truncated_bptt(net, state, xs, ys, window=1)[1]
    per_step = es_per_step(*start)
    full = bptt(net, state, xs, ys)[1]
    return {
        "one step": relative_error(
            es_per_step(*first)[1], bptt(net, state, xs[:1], ys[:1])[1]
        ),
        "no memory": relative_error(es_per_step(*start, decay=0.0)[1], forgetful),
        "windows": relative_error(es_windows(*start, window=8), per_step),
    }, relative_error(per_step[1].cell, full.cell)


def multi_step_errors(name):
    net, state, xs, ys = setting(name)
    hand = BY_HAND[name](folded=name != "rnn")
    flat = BY_HAND[name](folded=False)
    trace, es_trace = init_trace(hand, net, BATCH), init_es_trace(flat, net, BATCH)
    cut, full = bptt(twin(net), state, xs, ys), bptt(net, state, xs, ys)
    sequence = state, trace, xs, ys
    es_sequence = state, es_trace, xs, ys
    online = multi_step(drtrl_before, hand, net, *sequence, window=8)
    exact = multi_step(drtrl_before, hand, twin(net), *sequence, window=8)
    whole = multi_step(es_before, flat, net, *es_sequence, window=STEPS)
    return {
        "twin": relative_error(exact[:3], cut),
        "trace": relative_error(exact[3], drtrl_per_step(hand, net, *sequence)[3]),
        "whole": relative_error(whole[:3], full),
    }, relative_error(online[1].cell, full[1].cell)


def baseline_errors(name):
    net, state, xs, ys = setting(name)
    want = bptt(net, state, xs, ys)
    cut = truncated_bptt(net, state, xs, ys, window=8)
    return {
        "checkpointed": relative_error(checkpointed_bptt(net, state, xs, ys), want),
        "one window": relative_error(
            truncated_bptt(net, state, xs, ys, window=STEPS), want
        ),
    }, relative_error(cut[1].cell, want[1].cell)


def main():
    jax.config.update("jax_enable_x64", True)
    for name in WORKLOADS:
        found = {
            "D-RTRL": drtrl_errors(name, folded=False),
            "D-RTRL folded": drtrl_errors(name, folded=True),
            "ES-D-RTRL": es_errors(name),
            "multi-step": multi_step_errors(name),
            "baselines": baseline_errors(name),
        }
        for rule, (errors, from_bptt) in found.items():
            shown = ", ".join(f"{key} {error:.0e}" for key, error in errors.items())
            print(f"{name} {rule}: {shown} (from full BPTT: {from_bptt:.0e})")
            assert max(errors.values()) < 1e-10 < from_bptt, (name, rule)


if __name__ == "__main__":
    main()
