"""The examples on streams and episodes reach what they state."""

import pytest
from scripts import numbers, run


# Of five parts of the stream the first and the last.
FORECAST = r"D-RTRL: NMSE (\S+) \S+ \S+ \S+ (\S+)"


@pytest.mark.slow
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
