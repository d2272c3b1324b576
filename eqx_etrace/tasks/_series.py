"""Recorded time series, from the files that packages for time series come with.

Only their files are read: the packages are not imported, and nothing is downloaded.
"""

import importlib.util
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from ._common import Dataset, default_dtype


Split = Literal["train", "test"]
PACKAGES = ("aeon", "sktime")
"""Both keep the archive's files in `datasets/data`."""


class _File(NamedTuple):
    series: list[np.ndarray]
    """Each (T, channels)."""
    labels: list[str]
    classes: list[str]


def _find(where: str, name: str, split: str) -> Path:
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        for folder in (spec and spec.submodule_search_locations) or ():
            path = Path(folder, "datasets", "data", name, f"{name}_{split.upper()}.ts")
            if path.is_file():
                return path
    raise ImportError(
        f"{where}: got no file of {name}, expected one of the packages "
        f"{' or '.join(PACKAGES)}, which come with it. Install the extra `timeseries`: "
        "pip install 'eqx-etrace[timeseries]'."
    )


def _read(path: Path) -> _File:
    """The format `.ts`: channels between colons, values between commas, the class."""
    header, _, body = path.read_text(encoding="utf-8").partition("@data")
    lines = [line.split() for line in header.splitlines()]
    (classes,) = [line[2:] for line in lines if line and line[0] == "@classLabel"]
    series, labels = [], []
    for line in body.split():
        *channels, label = line.split(":")
        series.append(np.array([c.split(",") for c in channels], float).T)
        labels.append(label)
    return _File(series, labels, classes)


def _load(name: str, loader: str, length: int, split: str, dtype: Any) -> Dataset:
    where = f"tasks.{loader}"
    if split not in ("train", "test"):
        raise ValueError(
            f"{where}: got split={split!r}, expected 'train' or 'test'. The archive "
            "has these two."
        )
    file = _read(_find(where, name, split))
    count, channels = len(file.series), file.series[0].shape[1]
    inputs, mask = np.zeros((count, length, channels)), np.zeros((count, length), bool)
    for i, one in enumerate(file.series):
        inputs[i, : len(one)] = one
        mask[i, : len(one)] = True
    targets = [file.classes.index(label) for label in file.labels]
    return Dataset(
        jnp.asarray(inputs, default_dtype(dtype)),
        jnp.asarray(targets, jnp.result_type(int)),
        jnp.asarray(mask),
    )


def japanese_vowels(split: Split, *, dtype: Any = None) -> Dataset:
    """Nine speakers say /ae/: who is it?

    12 cepstral coefficients per step, 7 to 29 steps; shorter sequences are padded with
    zeros, and the mask ends with them.

    **Arguments:**

    - `split`: "train" (270 samples) or "test" (370 samples).
    - `dtype`: of the inputs; JAX's default float if None.

    **Returns:** a `Dataset` with inputs (N, 29, 12) and nine classes.

    **Raises:** `ImportError` where neither aeon nor sktime is installed, `ValueError`
    for another split.

    **Source:** Kudo, Toyama and Shimbo, *Multidimensional curve classification using
    passing-through regions*, Pattern Recognition Letters 20, 1999; in the archive of
    Bagnall et al., *The UEA multivariate time series classification archive*, 2018
    (arXiv:1811.00075).

    !!! example

        ```python
        from eqx_etrace import tasks

        try:
            inputs, targets, mask = tasks.japanese_vowels("train")
        except ImportError as error:
            print(error)  # ... pip install 'eqx-etrace[timeseries]'.
        ```
    """
    return _load("JapaneseVowels", "japanese_vowels", 29, split, dtype)


def gun_point(split: Split, *, dtype: Any = None) -> Dataset:
    """Two actors draw a gun or point a finger: which is it?

    The horizontal position of the hand in 150 steps, each sequence with mean 0 and
    variance 1.

    **Arguments:**

    - `split`: "train" (50 samples) or "test" (150 samples).
    - `dtype`: of the inputs; JAX's default float if None.

    **Returns:** a `Dataset` with inputs (N, 150, 1) and two classes, gun and point.

    **Raises:** as `eqx_etrace.tasks.japanese_vowels`.

    **Source:** Ratanamahatana and Keogh, *Everything you know about dynamic time
    warping is wrong*, 2004; in the archive of Dau et al., *The UCR time series
    archive*, IEEE/CAA Journal of Automatica Sinica 6, 2019.

    !!! example

        ```python
        from eqx_etrace import tasks

        try:
            inputs, targets, mask = tasks.gun_point("train")
        except ImportError as error:
            print(error)  # ... pip install 'eqx-etrace[timeseries]'.
        ```
    """
    return _load("GunPoint", "gun_point", 150, split, dtype)


def basic_motions(split: Split, *, dtype: Any = None) -> Dataset:
    """Standing, running, walking or playing badminton, with a watch on the wrist.

    Three axes of an accelerometer and three of a gyroscope, ten times a second for ten
    seconds.

    **Arguments:**

    - `split`: "train" or "test", 40 samples each.
    - `dtype`: of the inputs; JAX's default float if None.

    **Returns:** a `Dataset` with inputs (40, 100, 6) and four classes, in the order
    standing, running, walking, badminton.

    **Raises:** as `eqx_etrace.tasks.japanese_vowels`.

    **Source:** the archive of Bagnall et al., *The UEA multivariate time series
    classification archive*, 2018 (arXiv:1811.00075).

    !!! example

        ```python
        from eqx_etrace import tasks

        try:
            inputs, targets, mask = tasks.basic_motions("train")
        except ImportError as error:
            print(error)  # ... pip install 'eqx-etrace[timeseries]'.
        ```
    """
    return _load("BasicMotions", "basic_motions", 100, split, dtype)
