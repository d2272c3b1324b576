"""The examples on streams and episodes reach what they state."""

import pytest
from scripts import numbers, run


# Of five parts of the stream the first and the last.
FORECAST = r"D-RTRL: NMSE (\S+) \S+ \S+ \S+ (\S+)"


@pytest.mark.long
def test_forecast():
    # 0.008 to 0.022 at last (three seeds), about 1 without learning.
    text = run("forecast.py", "--quick")
    first, last = numbers(FORECAST, text)
    (frozen,) = numbers(r"weights frozen, .* NMSE (\S+)", text)
    (bptt,) = numbers(r"BPTT, 10 steps: NMSE .* (\S+)", text)
    assert last < first / 4
    assert max(last, frozen) < 0.06
    assert last < 3 * bptt


@pytest.mark.long
@pytest.mark.parametrize("cell", ["lru", "rtu"])
def test_forecast_in_full(cell):
    text = run("forecast.py", "--cell", cell)
    (persistence,) = numbers(r"persistence: NMSE .* (\S+)", text)
    _, last = numbers(FORECAST, text)
    (frozen,) = numbers(r"weights frozen, .* NMSE (\S+)", text)
    assert max(last, frozen) <= 0.02 < persistence / 50


@pytest.mark.long
def test_copy_task():
    # Two of four symbols: 0.25 is chance.
    text = run("copy_task.py", "--quick")
    (windows,) = numbers(r"D-RTRL, windows of 8: (\S+) of symbols", text)
    (bptt,) = numbers(r"BPTT: (\S+) of symbols", text)
    assert min(windows, bptt) > 0.95


@pytest.mark.long
def test_copy_task_in_full():
    text = run("copy_task.py")
    (symbols,) = numbers(r"D-RTRL, windows of 8: (\S+) of symbols", text)
    (truncated,) = numbers(r"BPTT, windows of 8: (\S+) of symbols", text)
    assert symbols >= 0.99
    assert truncated < 0.8


# Before the change, right after, and after adaptation.
ERRORS = r" +(\S+) +(\S+) +(\S+)"


def drift(*arguments):
    text = run("drift.py", *arguments)
    names = "D-RTRL", "D-RTRL, held", "Immediate", "BPTT, 10 steps"
    return [numbers(rf"\n{name}{ERRORS}", text) for name in names]


@pytest.mark.slow
def test_drift():
    # Without learning the errors are about 1.
    learned, held, immediate, _ = drift("--quick")
    assert learned[0] < min(0.1, 0.7 * immediate[0])
    assert learned[2] < min(0.1, 0.4 * immediate[2])
    assert learned[1] > 3 * learned[0]
    assert held[2] > 10 * learned[2]


@pytest.mark.long
def test_drift_in_full():
    learned, held, immediate, _ = drift()
    assert learned[0] < 0.05
    assert learned[2] < 0.05
    assert learned[0] < immediate[0] / 2
    assert learned[2] < immediate[2] / 4
    assert held[2] > 10 * learned[2]


@pytest.mark.long
def test_t_maze():
    # Who does not remember the sign is right in every second episode.
    text = run("t_maze.py", "--quick")
    (learned,) = numbers(r"D-RTRL, .*: (\S+)", text)
    (immediate,) = numbers(r"Immediate, .*: (\S+)", text)
    assert learned > 0.9
    assert immediate < 0.75


@pytest.mark.long
def test_t_maze_in_full():
    text = run("t_maze.py")
    (corridor,) = numbers(r"corridor (\d+),", text)
    (learned,) = numbers(r"D-RTRL, .*: (\S+)", text)
    assert corridor >= 10
    assert learned >= 0.95
