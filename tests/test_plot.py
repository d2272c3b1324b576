"""Figures hold the numbers they were given; see `test_plot_graph.py` for graphs and
`test_plot_page.py` for the page about them."""

import inspect
import math
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from scripts import run_code
from windows import of_models, squares

import eqx_etrace as etrace
from eqx_etrace import nn, plot as typed_plot


# Matplotlib's types do not let a test look inside.
plot: Any = typed_plot
BLUE, ORANGE = "#0072b2", "#d55e00"
NAN = math.nan


@pytest.fixture(autouse=True)
def no_figure_stays():
    yield
    plt.close("all")


def _axes(count=1) -> Any:
    return Figure(layout="constrained").subplots(1, count, squeeze=False)[0]


def _texts(axis):
    return [text.get_text() for text in axis.texts]


def _names(legend):
    return [text.get_text() for text in legend.get_texts()]


# -- raster ----------------------------------------------------------------------------


def _spikes(steps=17, units=5):
    drawn = np.random.default_rng(0).integers(-3, 3, (steps, units))
    return np.sign(drawn) * (abs(drawn) > 1)


@pytest.mark.parametrize("dt", [None, 0.5])
def test_ticks_are_the_spikes(dt):
    spikes = _spikes()
    (axis,) = _axes()
    assert plot.raster(spikes, dt=dt, ax=axis) is axis
    (ticks,) = axis.collections
    (at, unit), length = np.nonzero(spikes), dt or 1.0
    segments = np.asarray(ticks.get_segments())
    np.testing.assert_allclose(segments[:, :, 0], np.stack([at, at], 1) * length)
    np.testing.assert_allclose(segments[:, :, 1].mean(1), unit)
    assert np.ptp(segments[:, :, 1], axis=1) == pytest.approx(0.8)
    colours = [to_hex(colour) for colour in ticks.get_colors()]
    assert colours == [BLUE if n > 0 else ORANGE for n in spikes[at, unit]]
    assert {BLUE, ORANGE} == set(colours)
    assert axis.get_xlim() == pytest.approx((-length / 2, 16.5 * length))
    assert axis.get_ylim() == (-0.5, 4.5)
    assert axis.get_xlabel() == ("step" if dt is None else "time (ms)")
    assert axis.get_ylabel() == "unit"


def test_membrane_and_trace_are_below_on_the_same_time_axis():
    rng = np.random.default_rng(1)
    spikes, v, trace = _spikes(), rng.normal(size=(17, 2)), rng.normal(size=17)
    given = _axes(3)
    axes = plot.raster(
        spikes, membrane=v, trace=trace, threshold=0.5, dt=2.0, unit="s", ax=given
    )
    assert axes == tuple(given)
    assert [axis.get_ylabel() for axis in axes] == ["unit", "membrane", "trace"]
    *curves, threshold = axes[1].lines
    for line, column in zip((*curves, *axes[2].lines), (*v.T, trace), strict=True):
        np.testing.assert_array_equal(line.get_xdata(), 2.0 * np.arange(17))
        np.testing.assert_array_equal(line.get_ydata(), column)
    assert list(threshold.get_ydata()) == [0.5, 0.5]
    assert len({axis.get_xlim() for axis in axes}) == 1
    assert [axis.get_xlabel() for axis in axes] == ["", "", "time (s)"]


@pytest.mark.parametrize("dtype", [bool, jnp.int8, jnp.bfloat16])
def test_spikes_of_any_dtype(dtype):
    axis = plot.raster(jnp.asarray(_spikes() > 0, dtype))
    assert len(axis.collections[0].get_segments()) == (_spikes() > 0).sum()


def test_few_and_many():
    silent = plot.raster(np.zeros((4, 2)))
    assert _texts(silent) == ["no spikes"] and not silent.collections
    one, below = plot.raster(np.ones((1, 1)), membrane=np.ones(1))
    one.figure.draw_without_rendering()
    assert one.get_xlim() == (-0.5, 0.5)
    for ticks in (one.get_yticks(), below.get_xticks()):
        assert 0 in ticks and all(tick == round(tick) for tick in ticks)
    assert below.lines[0].get_marker() == "."  # A line of one point shows nothing.
    many = plot.raster(np.eye(600))
    ends = many.transData.transform(many.collections[0].get_segments()[300])
    assert ends[1, 1] - ends[0, 1] >= 0.9


@pytest.mark.parametrize(
    "change, message",
    [
        ({"spikes": np.ones(9)}, r"spikes: got float64\[9\], .* \(T, units\)"),
        ({"spikes": np.ones((9, 4, 2))}, r"spikes: .* spikes\[:, sample\]"),
        ({"spikes": np.ones((9, 0))}, "spikes: .* not empty"),
        ({"spikes": np.full((9, 2), NAN)}, r"spikes: got nan at \[0, 0\]"),
        ({"spikes": np.ones((9, 2), complex)}, "spikes: got complex128"),
        ({"membrane": np.ones(8)}, "membrane: got 8 steps, expected 9"),
        ({"membrane": np.ones((9, 2, 2))}, r"membrane: .*\(T,\) or \(T, few\)"),
        ({"trace": np.r_[np.ones(8), np.inf]}, r"trace: got inf at \[8\]"),
        ({"threshold": 1.0}, "threshold: got 1.0 without a membrane"),
        ({"threshold": NAN, "membrane": np.ones(9)}, "threshold: got nan"),
        ({"dt": 0.0}, "dt: got 0.0, expected a finite number above 0"),
        ({"dt": NAN}, "dt: got nan"),
        ({"ax": _axes(2)}, r"ax: got 2 \(Axes\), expected one Axes"),
        ({"trace": np.ones(9), "ax": _axes(1)}, "ax: got 1 .* expected 2 Axes"),
        ({"ax": 3}, r"ax: got 1 \(int\)"),
    ],
)
def test_raster_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        plot.raster(**({"spikes": np.ones((9, 2))} | change))
    assert plt.get_fignums() == []


# -- alignment -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reports():
    found = {}
    for rule in (etrace.DRTRL(), etrace.SnAp(2)):
        graph, params, state, xs, ts = of_models("rnn", rule, 6, None)
        found[type(rule).__name__] = etrace.compare_gradients(
            graph, params, state, xs, ts, squares
        )
    return found


def _check_bars(axis, named, value):
    paths = list(next(iter(named.values())).leaves)
    assert [t.get_text() for t in axis.get_yticklabels()] == [*paths, "total"]
    assert [bars.get_label() for bars in axis.containers] == list(named)
    texts = []
    for bars, report in zip(axis.containers, named.values(), strict=True):
        rows = *report.leaves.values(), report.total
        wanted = [getattr(row, value) for row in rows]
        np.testing.assert_allclose([bar.get_width() for bar in bars], wanted)
        middles = [bar.get_y() + bar.get_height() / 2 for bar in bars]
        assert [round(middle) for middle in middles] == list(range(len(rows)))
        texts += [f"{number:.3g}" for number in wanted]
    assert _texts(axis) == texts
    assert axis.yaxis_inverted()


def test_bars_are_the_numbers_of_the_reports(reports):
    given = _axes(2)
    axes = plot.alignment(reports, given)
    assert axes == tuple(given)
    _check_bars(axes[0], reports, "cosine")
    _check_bars(axes[1], reports, "norm_ratio")
    assert axes[0].get_xlabel() == "cosine with BPTT"
    assert axes[1].get_xlabel() == "norm ratio to BPTT"
    assert _names(axes[0].get_legend()) == list(reports)
    values = "sign_agreement", "relative_error"
    axes = plot.alignment(reports, _axes(2), values=values)
    for axis, value, exact in zip(axes, values, (1.0, 0.0), strict=True):
        _check_bars(axis, reports, value)
        assert list(axis.lines[0].get_xdata()) == [exact, exact]


def test_one_report_has_a_title_and_a_figure_that_fits(reports):
    axes = plot.alignment(reports["DRTRL"])
    _check_bars(axes[0], {"DRTRL": reports["DRTRL"]}, "cosine")
    assert axes[0].get_title("left") == "DRTRL against BPTT, 6 steps"
    assert axes[0].get_legend() is None
    named = {f"a rule with a rather long name {i}": reports["DRTRL"] for i in range(9)}
    axes = plot.alignment(named)
    figure = axes[0].figure
    assert _names(figure.legends[0]) == list(named)
    hatches = [bars[0].get_hatch() for bars in axes[0].containers]
    assert hatches == [None] * 7 + ["///"] * 2  # There are seven colours.
    figure.draw_without_rendering()
    page = figure.bbox
    for part in (figure.legends[0], *axes[0].get_yticklabels(), axes[1].xaxis.label):
        box = part.get_window_extent()
        assert box.x0 >= page.x0 and box.x1 <= page.x1
        assert box.y0 >= page.y0 and box.y1 <= page.y1
    right = axes[0].transData.transform(
        [[bar.get_width(), 0] for bar in named_bars(axes)]
    )
    column = min(text.get_window_extent().x0 for text in axes[0].texts)
    assert right[:, 0].max() < column


def named_bars(axes):
    return [bar for bars in axes[0].containers for bar in bars]


def _report(leaves, **changes):
    total = etrace.Alignment(9, 0.5, 0.7, 0.8, 0.6, False, False)
    named: Any = dict(rule="DRTRL", against="bptt", window=None, steps=4) | changes
    return etrace.GradientReport(leaves, total, **named)


def test_what_has_no_number_says_so():
    row = etrace.Alignment
    leaves = {
        "missing": row(4, NAN, 0.0, 0.0, 1.0, True, True),
        "zero": row(4, NAN, NAN, NAN, NAN, True, False),
        "exact is zero": row(4, NAN, NAN, NAN, NAN, False, False),
        "not finite": row(4, NAN, NAN, 0.3, NAN, False, False),
        "too large": row(4, NAN, math.inf, 0.3, math.inf, False, False),
    }
    axes = plot.alignment({"one": _report(leaves), "two": _report({})})
    notes = ["missing", "zero", "exact is zero", "not finite", "not finite"]
    absent = ["not in it"] * 5
    assert _texts(axes[0]) == [*notes, "0.5", *absent, "0.5"]
    assert _texts(axes[1]) == ["0", *notes[1:], "0.7", *absent, "0.7"]
    assert [bar.get_width() for bar in axes[0].containers[0]] == [0] * 5 + [0.5]


def test_long_names_are_shortened_as_long_as_they_differ():
    long = [f"encoder.layers[{i}]." + "deep." * 10 + "weight" for i in range(2)]
    number = etrace.Alignment(4, 0.5, 0.5, 0.5, 0.5, False, False)
    (axis,) = plot.alignment(_report(dict.fromkeys(long, number)), values=("cosine",))
    names = [text.get_text() for text in axis.get_yticklabels()]
    assert len(set(names)) == 3 and max(map(len, names)) <= 40
    assert names[0].startswith("encoder.layers[0]") and names[0].endswith(".weight")
    alike = ["a" * 30 + middle + "b" * 30 for middle in "xy"]
    (axis,) = plot.alignment(_report(dict.fromkeys(alike, number)), values=("cosine",))
    assert [t.get_text() for t in axis.get_yticklabels()] == [*alike, "total"]


@pytest.mark.parametrize(
    "given, options, message",
    [
        ({}, {}, "report: got no report"),
        (
            {"a": _report({}), "b": _report({}, against="rtrl")},
            {},
            "report: got reports against bptt and rtrl",
        ),
        (
            _report({}),
            {"values": ("cosin",)},
            r"values: got \('cosin',\), .*norm_ratio",
        ),
        (_report({}), {"values": "cosine"}, r'values: got .*values=\("cosine",\)'),
        (_report({}), {"values": ()}, r"values: got \(\)"),
        (_report({}), {"ax": _axes(1)}, "ax: got 1 .*expected 2 Axes"),
    ],
)
def test_alignment_refuses(given, options, message):
    with pytest.raises(ValueError, match=message):
        plot.alignment(given, **options)
    assert plt.get_fignums() == []


@pytest.mark.parametrize("given", [3, {"a": _report({}), "b": 3}])
def test_alignment_takes_reports_alone(given):
    with pytest.raises(TypeError, match="report '.*': got .*, expected a `GradientRep"):
        inspect.unwrap(plot.alignment)(given)


# -- scaling ---------------------------------------------------------------------------


def _rows():
    return [
        {"method": name, "steps": steps, "memory": memory(steps), "time": time}
        for name, memory, time in (
            ("BPTT", lambda steps: 5e4 * steps, 4e-5),
            ("online", lambda steps: 1.9e6, 6e-5),
        )
        for steps in (1600, 100, 400)
    ]


def test_lines_are_the_rows():
    rows, given = _rows(), _axes(2)
    axes = plot.scaling(rows, given)
    assert axes == tuple(given)
    for axis, value in zip(axes, ("memory", "time"), strict=True):
        assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log")
        assert [line.get_label() for line in axis.lines] == ["BPTT", "online"]
        for line in axis.lines:
            wanted = {
                row["steps"]: row[value]
                for row in rows
                if row["method"] == line.get_label()
            }
            assert list(line.get_xdata()) == [100, 400, 1600]
            assert [wanted[steps] for steps in line.get_xdata()] == list(
                line.get_ydata()
            )
        assert [t.get_text() for t in axis.get_xticklabels()] == ["100", "400", "1600"]
        low, high = axis.get_ylim()
        assert high / low >= 10 - 1e-9
        assert all(
            low < number < high for line in axis.lines for number in line.get_ydata()
        )
    assert [axis.get_ylabel() for axis in axes] == ["memory", "time per step"]
    assert _names(axes[0].get_legend()) == ["BPTT", "online"]
    axes[0].figure.draw_without_rendering()
    assert "10 MB" in [t.get_text() for t in axes[0].get_yticklabels()]
    assert "50 µs" in [t.get_text() for t in axes[1].get_yticklabels()]


def test_only_what_there_is():
    rows = [row | {"time": None, "note": "?"} for row in _rows()]
    (axis,) = plot.scaling(rows)
    assert axis.get_ylabel() == "memory" and len(axis.lines) == 2
    rows = [{"method": "a", "steps": 8, "time": 1.0}, *_rows()]
    memory, time = plot.scaling(rows)
    assert [line.get_label() for line in memory.lines] == ["BPTT", "online"]
    assert [line.get_label() for line in time.lines] == ["a", "BPTT", "online"]
    colours = {line.get_label(): line.get_color() for line in time.lines}
    assert all(line.get_color() == colours[line.get_label()] for line in memory.lines)
    assert len(set(colours.values())) == 3


def _plan(steps, rule="DRTRL", bptt=None):
    sizes: Any = dict(params=1, gradient=1, state=1, trace=300, temporaries=700)
    run: Any = dict(batch=None, steps=steps, window=1, rule=rule)
    return etrace.MemoryPlan((), **sizes, bptt=bptt or 10 * steps, **run)


def test_plans_are_rows_of_their_rule_and_bptt():
    plans = [_plan(10), _plan(100), _plan(10, "ESDRTRL"), _plan(100, "ESDRTRL")]
    (axis,) = plot.scaling(plans)
    lines = {line.get_label(): list(line.get_ydata()) for line in axis.lines}
    assert lines == {
        "DRTRL": [1000, 1000],
        "BPTT": [100, 1000],
        "ESDRTRL": [1000, 1000],
    }


@pytest.mark.parametrize(
    "rows, message",
    [
        ([], "rows: got nothing to draw"),
        ([{}], r"rows\[0\]: got the keys \(none\)"),
        ([*_rows(), {"method": "a", "steps": 3}], r"rows\[6\]: got the keys 'method'"),
        ([{"steps": 3, "time": 1.0}], "expected 'method', 'steps'"),
        ([{"method": "a", "steps": 3, "time": 0.0}], "got time = 0.0, expected a fin"),
        ([{"method": "a", "steps": 3, "memory": NAN}], "got memory = nan"),
        ([{"method": "a", "steps": 3, "memory": "1 MB"}], "got memory = '1 MB'"),
        ([{"method": "a", "steps": -1, "memory": 1}], "got steps = -1"),
        ([*_rows(), _rows()[0] | {"time": 1.0}], "got time = 1 for 'BPTT' at 1600 ste"),
        ([_plan(10), _plan(10, bptt=7)], r"rows\[1\], BPTT: got memory = 7"),
    ],
)
def test_scaling_refuses(rows, message):
    with pytest.raises(ValueError, match=message):
        plot.scaling(rows)
    assert plt.get_fignums() == []


def test_scaling_takes_a_list():
    with pytest.raises(TypeError, match=r"rows\[0\]: got 'method', .* list of rows"):
        inspect.unwrap(plot.scaling)(_rows()[0])


# -- surrogates ------------------------------------------------------------------------

SURROGATES = {
    "triangle()": nn.triangle(),
    "sigmoid(slope=4)": nn.sigmoid(4.0),
    "superspike(scale=0.5, slope=10)": nn.superspike(10.0, 0.5),
    "bump(width=0.5)": None,  # Made below.
    "own": None,
}


def bump(x, width):
    return jnp.exp(-jnp.abs(x) / width)


@jax.custom_jvp
def own(x):
    return (x > 0).astype(x.dtype)


@own.defjvp
def _(primals, tangents):
    return own(primals[0]), bump(primals[0], 3.0) * tangents[0]


def test_curves_are_the_derivatives():
    spikes = SURROGATES | {"bump(width=0.5)": nn.surrogate(bump, width=0.5), "own": own}
    (given,) = _axes()
    axis = plot.surrogates(*spikes.values(), ax=given, span=1.5)
    assert axis is given
    step, *curves = axis.lines
    x = np.linspace(-1.5, 1.5, 801)
    np.testing.assert_allclose(step.get_ydata(), x > 0)
    assert [curve.get_label() for curve in curves] == list(spikes)
    for curve, spike in zip(curves, spikes.values(), strict=True):
        np.testing.assert_allclose(curve.get_xdata(), x)
        slope = bump(x, 3.0) if spike is own else spike.slope(jnp.asarray(x))
        np.testing.assert_allclose(curve.get_ydata(), slope)
    assert _names(axis.get_legend()) == ["spike", *spikes]
    assert "surrogate derivative" in axis.get_ylabel()


def test_one_surrogate_has_its_name_as_title():
    axis = plot.surrogates(nn.gaussian(sigma=0.4))
    assert axis.get_title() == "gaussian(sigma=0.4)"
    assert axis.get_legend() is None


@pytest.mark.parametrize(
    "error, spikes, options, message",
    [
        (ValueError, [], {}, "surrogates: got none"),
        (TypeError, [nn.triangle(), 3], {}, r"surrogates\[1\]: got 3"),
        (ValueError, [nn.triangle()], {"span": -1.0}, "span: got -1.0"),
        (
            ValueError,
            [nn.surrogate(lambda x: 1 / jnp.maximum(x, 0.0))],
            {},
            "got a derivative inf of <lambda>.. at -2",
        ),
    ],
)
def test_surrogates_refuses(error, spikes, options, message):
    with pytest.raises(error, match=message):
        # Without the check of annotations, which says less.
        inspect.unwrap(plot.surrogates)(*spikes, **options)
    assert plt.get_fignums() == []


# -- all of them -----------------------------------------------------------------------

DRAW = {
    "raster": lambda **ax: plot.raster(_spikes(), **ax),
    "alignment": lambda **ax: plot.alignment(_report({}), values=("cosine",), **ax),
    "scaling": lambda **ax: plot.scaling([_plan(10)], **ax),
    "surrogates": lambda **ax: plot.surrogates(nn.triangle(), **ax),
}


@pytest.mark.parametrize("name", DRAW)
def test_pyplot_has_no_part_in_given_axes(name):
    before = matplotlib.rcParams.copy()
    (axis,) = _axes()
    drawn = DRAW[name](ax=axis)
    assert drawn in (axis, (axis,)) and axis.has_data()
    assert plt.get_fignums() == []
    DRAW[name]()
    assert len(plt.get_fignums()) == 1
    assert matplotlib.rcParams == before


def test_without_matplotlib_the_extra_is_named():
    code = """
    import sys
    import eqx_etrace
    print("matplotlib" in sys.modules)
    sys.modules["matplotlib"] = None
    try:
        import eqx_etrace.plot
    except ImportError as error:
        print(error)
    """
    loaded, message = run_code(code).strip().splitlines()
    assert loaded == "False"
    assert "no package matplotlib" in message
    assert "pip install 'eqx-etrace[plot]'" in message
