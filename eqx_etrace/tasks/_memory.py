"""Tasks that ask for what was seen some time ago."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from ._common import Sample, check_count, check_least, check_share, default_dtype


def copy(
    key: PRNGKeyArray,
    *,
    symbols: int = 8,
    length: int = 10,
    delay: int = 20,
    dtype: Any = None,
) -> Sample:
    """Repeat a string of symbols after a delay.

    `length` symbols, drawn uniformly, `delay` blanks, a go cue, `length` blanks; the
    symbols are asked for in the last `length` steps. T = 2 length + delay + 1.

    **Arguments:**

    - `key`: a key for the symbols.
    - `symbols`: how many different ones there are.
    - `length`, `delay`: numbers of steps, at least 1 and 0.
    - `dtype`: of the inputs; JAX's default float if None.

    **Returns:** a `Sample` with inputs (T, symbols + 2), one-hot: the symbols, the
    blank and the go cue in this order; targets (T,), the number of a symbol, or
    `symbols`, the blank, before the recall; a mask that is true in the recall.

    **Raises:** `ValueError` for another size.

    **Source:** Arjovsky, Shah and Bengio, *Unitary evolution recurrent neural
    networks*, ICML 2016, after Hochreiter and Schmidhuber, 1997.

    !!! example

        ```python
        from eqx_etrace import tasks

        inputs, targets, mask = tasks.copy(jax.random.key(0), symbols=4, length=3)
        ```
    """
    check_count("tasks.copy", symbols=symbols, length=length)
    check_count("tasks.copy", 0, delay=delay)
    drawn = jax.random.randint(key, (length,), 0, symbols)
    blanks = jnp.full(length + delay, symbols, drawn.dtype)
    go = jnp.full(1, symbols + 1, drawn.dtype)
    shown = jnp.concatenate([drawn, blanks[:delay], go, blanks[:length]])
    targets = jnp.concatenate([blanks, blanks[:1], drawn])
    mask = jnp.arange(len(shown)) >= len(shown) - length
    one_hot = jax.nn.one_hot(shown, symbols + 2, dtype=default_dtype(dtype))
    return Sample(one_hot, targets, mask)


def delayed_match_to_sample(
    key: PRNGKeyArray,
    *,
    stimuli: int = 4,
    sample_steps: int = 5,
    delay_steps: int = 20,
    test_steps: int = 5,
    noise: float = 0.0,
    dtype: Any = None,
) -> Sample:
    """Say whether a second stimulus is the same as the first, shown before a delay.

    Half of the samples match; otherwise the second stimulus is any of the others.
    T = sample_steps + delay_steps + test_steps.

    **Arguments:**

    - `key`: a key for stimuli and noise.
    - `stimuli`: how many different ones there are, at least 2.
    - `sample_steps`, `delay_steps`, `test_steps`: how long each phase is.
    - `noise`: the standard deviation of normal noise on the inputs.
    - `dtype`: of the inputs; JAX's default float if None.

    **Returns:** a `Sample` with inputs (T, stimuli), one-hot during the first and the
    last phase, zero in between; targets (T,), 1 for a match and 0 for none; a mask that
    is true in the last phase.

    **Raises:** `ValueError` for another size or a negative noise.

    **Source:** Miyashita and Chang, *Neuronal correlate of pictorial short-term memory
    in the primate temporal cortex*, Nature 331, 1988.

    !!! example

        ```python
        from eqx_etrace import tasks

        inputs, targets, mask = tasks.delayed_match_to_sample(jax.random.key(0))
        ```
    """
    where = "tasks.delayed_match_to_sample"
    check_count(where, 2, stimuli=stimuli)
    check_count(where, sample_steps=sample_steps, test_steps=test_steps)
    check_count(where, 0, delay_steps=delay_steps)
    check_least(where, noise=noise)
    keys, dtype = jax.random.split(key, 4), default_dtype(dtype)
    first = jax.random.randint(keys[0], (), 0, stimuli)
    match = jax.random.bernoulli(keys[1])
    shift = jax.random.randint(keys[2], (), 1, stimuli)
    second = jnp.where(match, first, (first + shift) % stimuli)
    phases = [
        jnp.tile(jax.nn.one_hot(shown, stimuli, dtype=dtype), (steps, 1))
        for shown, steps in ((first, sample_steps), (second, test_steps))
    ]
    silence = jnp.zeros((delay_steps, stimuli), dtype)
    inputs = jnp.concatenate([phases[0], silence, phases[1]])
    inputs = inputs + noise * jax.random.normal(keys[3], inputs.shape, dtype)
    steps = len(inputs)
    mask = jnp.arange(steps) >= steps - test_steps
    return Sample(inputs, jnp.full(steps, match.astype(first.dtype)), mask)


def adding(key: PRNGKeyArray, *, steps: int = 50, dtype: Any = None) -> Sample:
    """Add the two marked numbers of a long list.

    **Arguments:**

    - `key`: a key for numbers and marks.
    - `steps`: T, at least 2.
    - `dtype`: of inputs and targets; JAX's default float if None.

    **Returns:** a `Sample` with inputs (T, 2): numbers uniform within (0, 1), and a
    mark that is 1 in one step of the first half and in one of the second, else 0;
    targets (T, 1), the sum in every step; a mask that is true in the last step.

    **Raises:** `ValueError` for another size.

    **Source:** Hochreiter and Schmidhuber, *Long short-term memory*, Neural Computation
    9, 1997; with marks as in Arjovsky, Shah and Bengio, ICML 2016.

    !!! example

        ```python
        from eqx_etrace import tasks

        inputs, targets, mask = tasks.adding(jax.random.key(0), steps=20)
        ```
    """
    check_count("tasks.adding", 2, steps=steps)
    keys, dtype = jax.random.split(key, 3), default_dtype(dtype)
    numbers = jax.random.uniform(keys[0], (steps,), dtype)
    first = jax.random.randint(keys[1], (), 0, steps // 2)
    second = jax.random.randint(keys[2], (), steps // 2, steps)
    time = jnp.arange(steps)
    marks = ((time == first) | (time == second)).astype(dtype)
    targets = jnp.full((steps, 1), jnp.sum(numbers * marks))
    mask = time == steps - 1
    return Sample(jnp.stack([numbers, marks], axis=1), targets, mask)


def anbn(
    key: PRNGKeyArray, *, min_count: int = 1, max_count: int = 10, dtype: Any = None
) -> Sample:
    r"""The language $a^n b^n$: predict the next symbol of `# a ... a b ... b #`.

    How many b follow and where the string ends is known from the first b on; only these
    steps count. n is uniform from `min_count` to `max_count`, and T = 2 max_count + 1
    whatever n is: behind the string there are more `#`.

    **Arguments:**

    - `key`: a key for n.
    - `min_count`, `max_count`: of n, at least 1.
    - `dtype`: of the inputs; JAX's default float if None.

    **Returns:** a `Sample` with inputs (T, 3), one-hot for `#`, a and b in this order;
    targets (T,), the number of the next symbol; a mask that is true where a b is read.

    **Raises:** `ValueError` for counts that are none.

    **Source:** Gers and Schmidhuber, *LSTM recurrent networks learn simple context-free
    and context-sensitive languages*, IEEE Transactions on Neural Networks 12, 2001.

    !!! example

        ```python
        from eqx_etrace import tasks

        inputs, targets, mask = tasks.anbn(jax.random.key(0), max_count=4)
        assert inputs.shape == (9, 3)
        ```
    """
    check_count("tasks.anbn", min_count=min_count)
    check_count("tasks.anbn", min_count, max_count=max_count)
    n = jax.random.randint(key, (), min_count, max_count + 1)
    time = jnp.arange(2 * max_count + 2)
    symbols = jnp.where((time >= 1) & (time <= n), 1, 0)
    symbols = jnp.where((time > n) & (time <= 2 * n), 2, symbols)
    inputs = jax.nn.one_hot(symbols[:-1], 3, dtype=default_dtype(dtype))
    return Sample(inputs, symbols[1:], symbols[:-1] == 2)


def evidence_accumulation(
    key: PRNGKeyArray,
    *,
    cues: int = 7,
    gap_steps: int = 50,
    cue_steps: int = 100,
    delay_steps: int = 1050,
    recall_steps: int = 150,
    channels: int = 10,
    bias: float = 0.7,
    cue_rate: float = 0.04,
    noise_rate: float = 0.01,
    dtype: Any = None,
) -> Sample:
    """Say on which side there were more cues, after a delay.

    One side is drawn, and each cue is on that side with the probability `bias`; the
    target is the side where there were more. Each cue comes after a gap. Defaults are
    those of the source, in steps of a millisecond: T = 2250.

    **Arguments:**

    - `key`: a key for cues and spikes.
    - `cues`: how many there are; an odd number.
    - `gap_steps`, `cue_steps`, `delay_steps`, `recall_steps`: how long each phase is;
      T = cues (gap_steps + cue_steps) + delay_steps + recall_steps.
    - `channels`: how many inputs each of the four groups has.
    - `bias`: the probability of a cue on the side that was drawn.
    - `cue_rate`, `noise_rate`: the probability of a spike in a step, of a group that is
      on, and of the last group.
    - `dtype`: of the inputs; JAX's default float if None.

    **Returns:** a `Sample` with inputs (T, 4 channels), spikes of the groups for a cue
    on the left, one on the right, the recall, and noise; targets (T,), 0 for left and 1
    for right; a mask that is true in the recall.

    **Raises:** `ValueError` for another size, an even number of cues, or a number that
    is no probability.

    **Source:** Bellec et al., *A solution to the learning dilemma for recurrent
    networks of spiking neurons*, Nature Communications 11, 2020, after Morcos and
    Harvey, *History-dependent variability in population dynamics during evidence
    accumulation in cortex*, Nature Neuroscience 19, 2016.

    !!! example

        ```python
        from eqx_etrace import tasks

        inputs, targets, mask = tasks.evidence_accumulation(jax.random.key(0))
        assert inputs.shape == (2250, 40)
        ```
    """
    where = "tasks.evidence_accumulation"
    check_count(where, cue_steps=cue_steps, recall_steps=recall_steps)
    check_count(where, cues=cues, channels=channels)
    check_count(where, 0, gap_steps=gap_steps, delay_steps=delay_steps)
    check_share(where, bias=bias, cue_rate=cue_rate, noise_rate=noise_rate)
    if cues % 2 == 0:
        raise ValueError(
            f"{where}: got cues={cues!r}, expected an odd number. An even one may "
            "leave no side with more."
        )
    keys, dtype = jax.random.split(key, 3), default_dtype(dtype)
    likely = jnp.where(jax.random.bernoulli(keys[0]), bias, 1 - bias)
    right = jax.random.bernoulli(keys[1], likely, (cues,))

    period = gap_steps + cue_steps
    steps = cues * period + delay_steps + recall_steps
    time = np.arange(steps)
    cue = np.minimum(time // period, cues - 1)
    on = (time < cues * period) & (time % period >= gap_steps)
    recall = time >= steps - recall_steps
    rates = [
        jnp.where(on & ~right[cue], cue_rate, 0.0),
        jnp.where(on & right[cue], cue_rate, 0.0),
        jnp.where(recall, cue_rate, 0.0),
        jnp.full(steps, noise_rate),
    ]
    rate = jnp.repeat(jnp.stack(rates, axis=1), channels, axis=1)
    spikes = jax.random.bernoulli(keys[2], rate)
    side = jnp.sum(right) > cues // 2
    targets = jnp.full(steps, side.astype(jnp.result_type(int)))
    return Sample(spikes.astype(dtype), targets, jnp.asarray(recall))


def store_recall(
    key: PRNGKeyArray,
    *,
    periods: int = 12,
    period_steps: int = 200,
    channels: int = 10,
    probability: float = 1 / 6,
    rate: float = 0.05,
    dtype: Any = None,
) -> Sample:
    """Keep a bit of a stream from a store command to the next recall command.

    Each period shows a bit. A command comes with the given `probability`: a store if
    nothing is to be recalled, else a recall; nothing but the recall is shown in its
    period. Every sample has at least one pair, and every store its recall: what is
    missing comes in the last two periods. Defaults are for steps of a millisecond:
    T = 2400.

    **Arguments:**

    - `key`: a key for bits, commands and spikes.
    - `periods`: how many there are, at least 2.
    - `period_steps`: how long each is; T = periods period_steps.
    - `channels`: how many inputs each of the four groups has.
    - `probability`: of a command in a period.
    - `rate`: the probability of a spike in a step, of a group that is on.
    - `dtype`: of the inputs; JAX's default float if None.

    **Returns:** a `Sample` with inputs (T, 4 channels), spikes of the groups for a bit
    of 0, one of 1, the store and the recall; targets (T,), the bit that was last
    stored, 0 before the first; a mask that is true in the periods of a recall.

    **Raises:** `ValueError` for another size or a number that is no probability.

    **Source:** after Bellec et al., *Long short-term memory and learning-to-learn in
    networks of spiking neurons*, NeurIPS 2018.

    !!! example

        ```python
        from eqx_etrace import tasks

        inputs, targets, mask = tasks.store_recall(jax.random.key(0), period_steps=20)
        assert inputs.shape == (240, 40)
        ```
    """
    where = "tasks.store_recall"
    check_count(where, 2, periods=periods)
    check_count(where, period_steps=period_steps, channels=channels)
    check_share(where, probability=probability, rate=rate)
    keys = jax.random.split(key, 3)
    bits = jax.random.bernoulli(keys[0], shape=(periods,))
    commands = jax.random.bernoulli(keys[1], probability, (periods,))

    def body(carry: Any, drawn: Any) -> tuple[Any, Any]:
        holds, never, kept = carry
        bit, command, left = drawn
        command = (command & (left > 0)) | (never & (left == 1)) | (holds & (left == 0))
        store, recall = command & ~holds, command & holds
        kept = jnp.where(store, bit, kept)
        return (holds ^ command, never & ~store, kept), (store, recall, kept)

    no, left = jnp.zeros((), bool), jnp.arange(periods)[::-1]
    _, found = jax.lax.scan(body, (no, ~no, no), (bits, commands, left))
    store, recall, kept = found
    groups = jnp.stack([~bits & ~recall, bits & ~recall, store, recall], axis=1)
    on = jnp.repeat(jnp.repeat(groups, channels, axis=1), period_steps, axis=0)
    spikes = jax.random.bernoulli(keys[2], jnp.where(on, rate, 0.0))
    targets, mask = (jnp.repeat(each, period_steps) for each in (kept, recall))
    targets = targets.astype(jnp.result_type(int))
    return Sample(spikes.astype(default_dtype(dtype)), targets, mask)
