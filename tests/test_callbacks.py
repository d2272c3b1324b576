"""Logs and the bar: what they write, read back; what a crash leaves, gone on with."""

import csv
import json
import struct
import sys
import time
from typing import Any

import numpy as np
import pytest

import eqx_etrace as etrace


RUN = [(step, {"loss": 1 / step, "rate": 0.1 * step}) for step in (2, 4, 6, 8)]


def _log(log, run):
    for step, metrics in run:
        log(step, metrics)


# Both kinds of text file, and what they give read back.


def _csv(path):
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return [
        (int(row.pop("step")), {k: float(v) for k, v in row.items()}) for row in rows
    ]


def _jsonl(path):
    with open(path) as file:
        rows = [json.loads(line) for line in file]
    return [(row.pop("step"), row) for row in rows]


FILES = {"csv": (etrace.CSVLogger, _csv), "jsonl": (etrace.JSONLLogger, _jsonl)}


@pytest.fixture(params=FILES)
def kind(request, tmp_path):
    return *FILES[request.param], tmp_path / f"run.{request.param}"


def test_a_log_has_every_digit(kind):
    make, read, path = kind
    log = make(path)
    for i, (step, metrics) in enumerate(RUN):
        log(step, metrics)
        assert read(path) == RUN[: i + 1]  # At once.


def test_a_log_goes_on(kind):
    make, read, path = kind
    _log(make(str(path)), RUN[:2])
    _log(make(path), RUN[2:])
    assert read(path) == RUN


def test_steps_that_are_made_again_replace_their_rows(kind):
    """As after a crash between the last checkpoint and the last report."""
    make, read, path = kind
    _log(make(path), [*RUN[:2], (6, {"loss": 7.0, "rate": 7.0}), (7, RUN[3][1])])
    _log(make(path), RUN[2:])
    assert read(path) == RUN
    _log(make(path), RUN[:1])
    assert read(path) == RUN[:1]


def test_a_line_that_was_cut_is_dropped(kind):
    """Wherever the crash came, also within the first line."""
    make, read, path = kind
    _log(make(path), RUN[:3])
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        _log(make(path), RUN[3:])
        lines = whole[:length].count(b"\n")
        kept = max(0, lines - 1) if make is etrace.CSVLogger else lines
        assert read(path) == [*RUN[:kept], RUN[3]]


@pytest.mark.parametrize("text", ["a,b\n1,2\n", "a note", "step,loss,rates\n1,2,3\n"])
def test_another_file_is_left_alone(kind, text):
    make, _, path = kind
    path.write_text(text)
    with pytest.raises(ValueError, match="got a file that begins with .*expected"):
        make(path)(*RUN[0])
    assert path.read_text() == text


def test_metrics_of_other_names(tmp_path):
    path = tmp_path / "run.csv"
    log = etrace.CSVLogger(path)
    _log(log, RUN[:1])
    log(4, dict(reversed(RUN[1][1].items())))  # In another order they are the same.
    for metrics in ({"loss": 1.0}, {"loss": 1.0, "rates": 1.0}):
        with pytest.raises(ValueError, match="got the metrics .*expected.*'rate'"):
            log(6, metrics)
    assert _csv(path) == RUN[:2]
    # The next run notices, too.
    with pytest.raises(ValueError, match="expected b'step,loss\\\\n'"):
        etrace.CSVLogger(path)(8, {"loss": 1.0})
    assert _csv(path) == RUN[:2]

    path = tmp_path / "run.jsonl"
    log = etrace.JSONLLogger(path)
    rows = [(1, {"loss": 1.0}), (2, {"rate": 2.0})]
    _log(log, rows)
    assert _jsonl(path) == rows


def test_a_name_with_a_comma(tmp_path):
    path = tmp_path / "run.csv"
    run = [(step, {"loss, mean": 0.5}) for step in (1, 2)]
    _log(etrace.CSVLogger(path), run[:1])
    _log(etrace.CSVLogger(path), run[1:])
    assert _csv(path) == run


def test_numbers_that_are_none_can_be_read(tmp_path):
    path = tmp_path / "run.jsonl"
    etrace.JSONLLogger(path)(1, {"a": np.nan, "b": -np.inf, "c": 1.5})

    def refuse(name):
        raise AssertionError(name)

    found = json.loads(path.read_text(), parse_constant=refuse)
    assert found == {"step": 1, "a": None, "b": None, "c": 1.5}
    path = tmp_path / "run.csv"
    etrace.CSVLogger(path)(1, {"a": np.nan, "b": -np.inf})
    assert path.read_text() == "step,a,b\n1,nan,-inf\n"


# TensorBoard.


def _events(folder):
    """(step, name, value), and (step, None, None) where older ones are purged."""
    from tensorboardX.proto import event_pb2

    protos: Any = event_pb2  # Made at run time.
    found = []
    for file in sorted(folder.iterdir(), key=lambda f: (f.stat().st_mtime_ns, f.name)):
        data = file.read_bytes()
        while len(data) > 12:
            (length,) = struct.unpack("<Q", data[:8])
            if len(data) < 16 + length:
                break  # It is being written.
            event = protos.Event.FromString(data[12 : 12 + length])
            data = data[12 + length + 4 :]
            if event.session_log.status == protos.SessionLog.START:
                found.append((event.step, None, None))
            for value in event.summary.value:
                found.append((event.step, value.tag, value.simple_value))
    return found


def _expected(run):
    return [
        (step, name, pytest.approx(value))
        for step, metrics in run
        for name, value in metrics.items()
    ]


def test_scalars_are_on_disk_while_learning_goes_on(tmp_path):
    folder = tmp_path / "new" / "board"
    log = etrace.TensorBoardLogger(folder)
    _log(log, RUN)
    end = time.monotonic() + 20
    while _events(folder) != [(2, None, None), *_expected(RUN)]:
        assert time.monotonic() < end
        time.sleep(0.1)
    log.close()


def test_scalars_of_a_run_that_goes_on(tmp_path):
    """At once: within a second, all that tensorboardX tells its files apart by."""
    expected = []
    for run in (RUN[:2], RUN[1:]):
        log = etrace.TensorBoardLogger(str(tmp_path))
        _log(log, run)
        log.close()
        log.close()
        expected += [(run[0][0], None, None), *_expected(run)]
    assert _events(tmp_path) == expected


# The bar.


def test_the_bar_shows_step_and_metrics(capsys):
    show = etrace.progress(total=8)
    assert capsys.readouterr() == ("", "")
    _log(show, RUN)
    out, err = capsys.readouterr()
    assert not out
    last = err.split("\r")[-1]
    assert "100%" in last and "8/8" in last and "loss=0.125, rate=0.8" in last
    assert last.endswith("\n")  # It is closed.


def test_the_bar_without_an_end(capsys):
    _log(etrace.progress(), [(1000, {"loss": 0.25}), (1001, {"loss": 0.123456})])
    err = capsys.readouterr().err
    assert "1000batch" in err and "loss=0.25" in err


# Packages that are not there.

OPTIONAL = {
    "progress": ("tqdm", etrace.progress),
    "tensorboard": ("tensorboardX", lambda: etrace.TensorBoardLogger("folder")),
}


@pytest.mark.parametrize("extra", OPTIONAL)
def test_a_missing_package_is_named_with_its_extra(monkeypatch, extra):
    package, make = OPTIONAL[extra]
    monkeypatch.setitem(sys.modules, package, None)
    message = rf"got no {package}, .* pip install 'eqx-etrace\[{extra}\]'"
    with pytest.raises(ImportError, match=message):
        make()
