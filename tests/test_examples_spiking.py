"""The examples with spiking networks reach what they state."""

import pytest
from scripts import numbers, run


# script, what it prints: what the short form of the online rule and of BPTT have to
# pass, and the goal that the full form of the online rule has to reach.
EXAMPLES = [
    # Short: 0.85 to 0.90 and 0.86 to 0.91 (three seeds), 0.53 untrained.
    ("delayed_match.py", "ES-D-RTRL: accuracy", (0.75, 0.75), 0.95),
    # Short: 0.92 to 0.98 and 0.80 to 0.91, 0.50 untrained.
    ("evidence.py", "D-RTRL: accuracy", (0.8, 0.7), 0.9),
    # Short: 0.98 to 0.99 and 0.99 to 1.00, 0.50 untrained.
    ("store_recall.py", "e-prop: accuracy", (0.9, 0.9), 0.95),
    # Short: 0.91 and 0.91 to 0.92, 0.11 untrained.
    ("conv_digits.py", "ES-D-RTRL: accuracy", (0.8, 0.8), 0.95),
]
EACH = pytest.mark.parametrize("script, online, short, goal", EXAMPLES)
BPTT = r"BPTT: accuracy (\S+)"


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, online, short, goal",
    [
        EXAMPLES[0],
        *(pytest.param(*case, marks=pytest.mark.long) for case in EXAMPLES[1:]),
    ],
)
def test_short_form(script, online, short, goal):
    del goal
    text = run(script, "--quick")
    (reached,) = numbers(rf"{online} (\S+)", text)
    (exact,) = numbers(BPTT, text)
    assert reached > short[0] and exact > short[1]


@pytest.mark.long
@EACH
def test_full_form(script, online, short, goal):
    del short
    text = run(script)
    (reached,) = numbers(rf"{online} (\S+)", text)
    numbers(BPTT, text)
    assert reached >= goal
