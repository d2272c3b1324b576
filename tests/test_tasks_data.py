"""Data sets: digits, and series from the files of installed packages."""

import importlib.util
import sys
from typing import Any

import jax
import numpy as np
import pytest

from eqx_etrace import tasks


def _sklearn():
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    return data.images / 16, data.target


def test_digits():
    images, digits = _sklearn()
    rows, pixels = tasks.sequential_digits(by="row"), tasks.sequential_digits()
    np.testing.assert_array_equal(rows.inputs, images)
    np.testing.assert_array_equal(pixels.inputs, images.reshape(-1, 64, 1))
    for data in (rows, pixels):
        np.testing.assert_array_equal(data.targets, digits)
        assert data.mask.shape == data.inputs.shape[:2] and np.all(data.mask)
    assert tasks.sequential_digits(dtype="float32").inputs.dtype == "float32"


def test_permuted_digits():
    images, digits = _sklearn()
    one, again, other = (
        tasks.permuted_digits(jax.random.key(seed)) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one.inputs, again.inputs)
    assert np.any(one.inputs != other.inputs)
    pixels = images.reshape(-1, 64)
    columns = {tuple(column) for column in pixels.T}
    assert {tuple(column) for column in np.asarray(one.inputs)[..., 0].T} == columns
    assert np.any(one.inputs[..., 0] != pixels)
    np.testing.assert_array_equal(one.targets, digits)


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"eqx-etrace\[examples\]"):
        tasks.sequential_digits()
    with pytest.raises(ImportError, match="tasks.permuted_digits: got no scikit-learn"):
        tasks.permuted_digits(jax.random.key(0))


TS = """#A comment, with a : in it
@problemName JapaneseVowels
@dimensions 2
@classLabel true late early
@data
1.0,2.0,-3.5:4.0,5.0,6.0:early
7.0,8.0:9.0,1e1:late
"""


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """A package that is called as one of those that hold the archive."""
    folder = tmp_path / "sktime" / "datasets" / "data" / "JapaneseVowels"
    folder.mkdir(parents=True)
    (tmp_path / "sktime" / "__init__.py").write_text("raise ImportError('imported')")
    (folder / "JapaneseVowels_TRAIN.ts").write_text(TS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("eqx_etrace.tasks._series.PACKAGES", ("sktime",))


def test_series_of_different_lengths(archive):
    inputs, targets, mask = tasks.japanese_vowels("train", dtype="float32")
    assert inputs.shape == (2, 29, 2) and inputs.dtype == "float32"
    np.testing.assert_array_equal(inputs[0, :3], [[1, 4], [2, 5], [-3.5, 6]])
    np.testing.assert_array_equal(inputs[1, :2], [[7, 9], [8, 10]])
    assert not np.any(inputs[0, 3:]) and not np.any(inputs[1, 2:])
    np.testing.assert_array_equal(targets, [1, 0])
    np.testing.assert_array_equal(mask, np.arange(29) < np.array([[3], [2]]))


def test_series_that_are_not_there(archive):
    for load in (tasks.gun_point, tasks.basic_motions):
        with pytest.raises(ImportError, match=r"eqx-etrace\[timeseries\]"):
            load("train")
    with pytest.raises(ImportError, match="tasks.japanese_vowels: got no file of Jap"):
        tasks.japanese_vowels("test")


def test_series_without_a_package(monkeypatch):
    monkeypatch.setattr("eqx_etrace.tasks._series.PACKAGES", ("not_a_package",))
    with pytest.raises(ImportError, match="tasks.gun_point: got no file"):
        tasks.gun_point("test")


# name: (shapes of both splits, how many of each class in the training split)
SERIES = {
    "japanese_vowels": ((270, 370), (29, 12), [30] * 9),
    "gun_point": ((50, 150), (150, 1), [24, 26]),
    "basic_motions": ((40, 40), (100, 6), [10] * 4),
}


@pytest.mark.skipif(
    not any(importlib.util.find_spec(p) for p in ("aeon", "sktime")),
    reason="needs the extra timeseries",
)
@pytest.mark.parametrize("name", SERIES)
def test_series_of_the_archive(name):
    counts, shape, classes = SERIES[name]
    train, test = (getattr(tasks, name)(split) for split in ("train", "test"))
    assert train.inputs.shape == (counts[0], *shape)
    assert test.inputs.shape == (counts[1], *shape)
    assert list(np.bincount(train.targets)) == classes
    assert np.isfinite(train.inputs).all() and np.isfinite(test.inputs).all()
    lengths = np.concatenate([train.mask.sum(1), test.mask.sum(1)])
    expected = (7, 29) if name == "japanese_vowels" else (shape[0], shape[0])
    assert (lengths.min(), lengths.max()) == expected
    if name == "gun_point":
        np.testing.assert_allclose(np.mean(train.inputs, 1), 0, atol=1e-4)
        np.testing.assert_allclose(np.std(train.inputs, 1, ddof=1), 1, atol=1e-4)


def test_orders_and_splits_that_are_refused():
    # The checks of annotations come first where they are on.
    with pytest.raises((ValueError, TypeError)):
        tasks.sequential_digits(by="column")  # pyright: ignore[reportArgumentType]
    with pytest.raises((ValueError, TypeError)):
        tasks.gun_point("all")  # pyright: ignore[reportArgumentType] no such split
