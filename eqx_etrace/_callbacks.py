"""Callbacks of `fit`: a bar, and logs that a run may go on with.

A log knows the step of each row. A run that goes on from an older checkpoint makes some
steps again, and what the log has of them is cut off first; so is a last line that a
crash has left unfinished.
"""

import csv
import importlib
import io
import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any


Callback = Callable[[int, dict[str, float]], Any]


def _package(name: str, extra: str, where: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"{where}: got no {name}, expected it to be installed. Install the extra "
            f"`{extra}`: pip install 'eqx-etrace[{extra}]'."
        ) from error


class _Log:
    """A file that a line is added to at each report."""

    def __init__(self, path: str | os.PathLike[str]):
        self._path = pathlib.Path(path)
        self._started = False

    def _start(self, begin: bytes, step: int, step_of: Callable[[bytes], int]) -> int:
        """Leave the whole lines of earlier steps; how many bytes that is."""
        text = self._path.read_bytes() if self._path.exists() else b""
        if not begin.startswith(text[: len(begin)]):
            raise ValueError(
                f"{self._path}: got a file that begins with {text[: len(begin)]!r}, "
                f"expected {begin!r}, as this log would. Log to another file, or the "
                "same metrics."
            )
        kept = 0
        for line in text.splitlines(keepends=True):
            if not line.endswith(b"\n") or step_of(line) >= step:
                break
            kept += len(line)
        with self._path.open("ab") as file:
            file.truncate(kept)
        self._started = True
        return kept

    def _append(self, line: str) -> None:
        with self._path.open("ab") as file:
            file.write(line.encode())


def _csv_line(values: list[Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue()


class CSVLogger(_Log):
    """Writes metrics to a CSV file, a row for each report of `fit`.

    The first row has the names, `step` before them. Each row is on disk when the call
    returns, with all digits of its numbers. A run that goes on with the same file
    appends to it: rows of the steps that are made again are replaced, and so is a row
    that a crash cut short. A run that starts anew thus replaces them all.

    **Arguments:**

    - `path`: of the file; its folder is there.

    **Raises:** `ValueError` where the metrics have other names than in the first row,
    or the file is another one; it is left as it was.

    !!! example

        ```python
        import pathlib
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "run.csv"
            log = eqx_etrace.CSVLogger(path)
            log(10, {"loss": 0.5})
            log(20, {"loss": 0.25})
            rows = path.read_text()
        assert rows == "step,loss\\n10,0.5\\n20,0.25\\n"
        ```
    """

    _names: Sequence[str] = ()

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        if not self._started:
            self._start_table(step, list(metrics))
        names = self._names
        if set(names) != set(metrics):
            raise ValueError(
                f"{self._path}: got the metrics {sorted(metrics)} at step {step}, "
                f"expected {sorted(names)} as before. Give the same ones at every "
                "report, or log with `JSONLLogger`."
            )
        self._append(_csv_line([step, *(float(metrics[n]) for n in names)]))

    def _start_table(self, step: int, names: list[str]) -> None:
        header = _csv_line(["step", *names])
        first = header.encode()

        def step_of(line: bytes) -> int:
            return -1 if line == first else int(line.split(b",")[0])

        if not self._start(first, step, step_of):
            self._append(header)
        self._names = names


class JSONLLogger(_Log):
    """Writes metrics to a file of JSON lines, one object for each report of `fit`.

    Names may change from line to line. A number that is not finite becomes `null`,
    which any reader takes. Each line is on disk when the call returns; a run that goes
    on with the same file replaces the lines of the steps that it makes again, as with
    `eqx_etrace.CSVLogger`.

    **Arguments:**

    - `path`: of the file; its folder is there.

    **Raises:** `ValueError` where the file is another one; it is left as it was.

    !!! example

        ```python
        import pathlib
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "run.jsonl"
            log = eqx_etrace.JSONLLogger(path)
            log(10, {"loss": 0.5})
            line = path.read_text()
        assert line == '{"step": 10, "loss": 0.5}\\n'
        ```
    """

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        if not self._started:
            self._start(b'{"step": ', step, lambda line: json.loads(line)["step"])
        values = {name: float(value) for name, value in metrics.items()}
        finite = {n: v if math.isfinite(v) else None for n, v in values.items()}
        self._append(json.dumps({"step": step, **finite}) + "\n")


class TensorBoardLogger:
    """Writes metrics as scalars for TensorBoard; needs the extra `tensorboard`.

    They are on disk about a second later. A run that goes on with the same folder adds
    a file to it, which hides what TensorBoard knows of the steps that are made again.

    **Arguments:**

    - `folder`: where TensorBoard is told to look; it is made if need be.

    **Raises:** `ImportError` without tensorboardX.

    !!! example

        ```python
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            log = eqx_etrace.TensorBoardLogger(folder)
            log(10, {"loss": 0.5})
            log.close()
        ```
    """

    def __init__(self, folder: str | os.PathLike[str]):
        package = _package("tensorboardX", "tensorboard", "TensorBoardLogger")
        self._make = package.SummaryWriter
        self._folder = os.fspath(folder)
        self._writer: Any = None

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._writer is None:
            self._writer = self._make(
                self._folder,
                purge_step=step,
                flush_secs=1,  # Its own `flush` does not wait for what is queued.
                # The time in its name has seconds only, and a restart may be quick.
                filename_suffix=f".{step}",
            )
        for name, value in metrics.items():
            self._writer.add_scalar(name, float(value), step)

    def close(self) -> None:
        """Close the file, which otherwise stays open until the program ends.

        !!! example

            ```python
            import tempfile

            with tempfile.TemporaryDirectory() as folder:
                log = eqx_etrace.TensorBoardLogger(folder)
                log(10, {"loss": 0.5})
                log.close()
            ```
        """
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def progress(total: int | None = None) -> Callback:
    """A bar that shows how far `fit` is, how fast, and the last metrics.

    It needs the extra `progress`. It comes up at the first report and takes the speed
    from there on, so that compiling does not count.

    **Arguments:**

    - `total`: the step at which the data end, if that is known.

    **Returns:** a callback for `fit`.

    **Raises:** `ImportError` without tqdm.

    !!! example

        ```python
        show = eqx_etrace.progress(total=2)
        show(1, {"loss": 0.5})
        show(2, {"loss": 0.25})
        ```
    """
    make = _package("tqdm", "progress", "progress").tqdm
    bar: Any = None

    def show(step: int, metrics: dict[str, float]) -> None:
        nonlocal bar
        if bar is None:
            bar = make(total=total, initial=step, unit="batch")
        values = {name: f"{value:.4g}" for name, value in metrics.items()}
        bar.set_postfix(values, refresh=bar.n == step)
        bar.update(step - bar.n)
        if step == total:
            bar.close()

    return show
