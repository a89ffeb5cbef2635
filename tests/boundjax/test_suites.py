"""The public verification suites: values, counterexamples, reference bounds, verdicts.

By default a sample of each suite; `pytest -m suites` runs all rows of all tables.
"""

import numpy as np
import pytest

pytest.importorskip("onnx")

import suites

from boundjax import verify

if not suites.PUBLIC.is_dir():
    pytest.skip(
        "no suites/public/ in a folder shared/ beside the checkout", allow_module_level=True
    )


def params(keys):
    """One test per key; one worker runs all tests of a benchmark, to compile only once."""
    return [
        pytest.param(*key, marks=pytest.mark.xdist_group(key[0]), id="-".join(map(str, key)))
        for key in dict.fromkeys(keys)
    ]


def each_benchmark(file):
    return params((benchmark,) for benchmark in suites.benchmarks(file))


# --- values ------------------------------------------------------------------------------------


def outputs_at_the_centre_are_those_listed(benchmark, rows):
    for row in rows:
        network = suites.programs(benchmark, row["onnx"])
        case = suites.asked(benchmark, row["vnnlib"]).cases[0]
        centre = 0.5 * case.lower.astype(np.float64) + 0.5 * case.upper.astype(np.float64)
        result = np.asarray(network.forward(centre.astype(np.float32)))
        expected = suites.numbers(row["outputs"])
        slack = 1e-5 * max(1.0, np.abs(expected).max())
        np.testing.assert_allclose(result, expected, rtol=1e-4, atol=slack, err_msg=str(row))


@pytest.mark.parametrize("benchmark", each_benchmark("centre.csv"))
def test_outputs_at_the_centre_of_the_first_box(benchmark):
    outputs_at_the_centre_are_those_listed(benchmark, suites.table(benchmark, "centre.csv")[:1])


@pytest.mark.suites
@pytest.mark.parametrize("benchmark", each_benchmark("centre.csv"))
def test_outputs_at_all_centres(benchmark):
    outputs_at_the_centre_are_those_listed(benchmark, suites.table(benchmark, "centre.csv"))


# --- counterexamples ---------------------------------------------------------------------------


def stored_points_are_counterexamples(benchmark, count):
    points = np.load(suites.PUBLIC / benchmark / "ce.npz")
    instances = suites.table(benchmark, "instances.csv")
    for name in sorted(points, key=lambda name: int(name[1:]))[:count]:
        row, x = instances[int(name[1:])], points[name].reshape(-1)
        assert row["known_result"] == "sat"
        y = np.asarray(suites.programs(benchmark, row["onnx"]).forward(x))
        # onnxruntime, which rounds differently, confirmed them.
        assert suites.unsafe(suites.asked(benchmark, row["vnnlib"]), x, y, slack=1e-5), row


@pytest.mark.parametrize("benchmark", each_benchmark("ce.npz"))
def test_a_stored_counterexample(benchmark):
    stored_points_are_counterexamples(benchmark, 1)


@pytest.mark.suites
@pytest.mark.parametrize("benchmark", each_benchmark("ce.npz"))
def test_all_stored_counterexamples(benchmark):
    stored_points_are_counterexamples(benchmark, None)


# --- bounds ------------------------------------------------------------------------------------

# Tighter pre-activation bounds do not always give tighter bounds with adaptive slopes. Our CROWN
# intersects them with intervals, the reference does not; that mostly helps, but not here.
INCOMPARABLE = {
    ("acasxu", "4_2.onnx"),
    ("cora_mnist", "mnist-point.onnx"),
    ("mnist_fc", "256x2.onnx"),
    ("oval21", "cifar_deep_kw.onnx"),
    ("reach_prob", "robot.onnx"),
    ("sri_resnet_a", "sri_a.onnx"),
}
# Relative tolerances of CROWN for networks with units where `upper = -lower`, so that rounding
# decides between two slopes. Breaking ties the other way in tll showed this; sri has one such row.
TIED = {"tll": 0.1, "sri_resnet_a": 2e-3}

BOUNDED = [(b, row) for b in suites.benchmarks("ref_bounds.csv") for row in suites.bounded(b)]
ALL = params((b, row["onnx"], row["method"]) for b, row in BOUNDED)
# For the other networks CROWN takes many seconds to compile.
QUICK_CROWN = ("acasxu", "mnist_fc", "oval21", "reach_prob", "rl", "safenlp")
SAMPLE = params(
    (b, row["method"]) for b, row in BOUNDED if row["method"] != "CROWN" or b in QUICK_CROWN
)


def compared(benchmark, row, preset):
    """Our bounds, the reference's and how far apart they may be."""
    reference = suites.numbers(row["lower_bounds"])
    bounds = suites.lower_bounds(benchmark, row, preset)
    assert bounds.shape == reference.shape
    return bounds, reference, suites.tolerance(reference)


def bounds_equal_the_reference(benchmark, row):
    result, reference, tolerance = compared(benchmark, row, preset=False)
    if benchmark in TIED and row["method"] == "CROWN":
        tolerance = TIED[benchmark] * np.abs(reference)
    assert (np.abs(result - reference) <= tolerance).all(), (row, result)


def preset_is_no_looser(benchmark, row):
    """The preset is no looser, so it proves what the reference proves."""
    result, reference, tolerance = compared(benchmark, row, preset=True)
    if row["method"] != "CROWN" or (benchmark, row["onnx"]) not in INCOMPARABLE:
        assert (result >= reference - tolerance).all(), (row, result)
    if row["certified"] == "1":
        assert suites.refutes(suites.asked(benchmark, row["vnnlib"]), result), (row, result)


def rows_of(benchmark, **wanted):
    return [r for r in suites.bounded(benchmark) if wanted.items() <= r.items()]


@pytest.mark.parametrize(("benchmark", "method"), SAMPLE)
@pytest.mark.sampled(4)
def test_bounds_are_those_of_auto_lirpa(benchmark, method):
    bounds_equal_the_reference(benchmark, rows_of(benchmark, method=method)[0])


@pytest.mark.parametrize(("benchmark", "method"), SAMPLE)
@pytest.mark.sampled(4)
def test_presets_are_no_looser_than_auto_lirpa(benchmark, method):
    preset_is_no_looser(benchmark, rows_of(benchmark, method=method)[0])


@pytest.mark.suites
@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize(("benchmark", "onnx", "method"), ALL)
def test_all_bounds_are_those_of_auto_lirpa(benchmark, onnx, method):
    for row in rows_of(benchmark, onnx=onnx, method=method):
        bounds_equal_the_reference(benchmark, row)


@pytest.mark.suites
@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize(("benchmark", "onnx", "method"), ALL)
def test_all_presets_are_no_looser_than_auto_lirpa(benchmark, onnx, method):
    for row in rows_of(benchmark, onnx=onnx, method=method):
        preset_is_no_looser(benchmark, row)


# --- answers -----------------------------------------------------------------------------------

QUICK = [
    ("rl", "cartpole_case_safe_99"),
    ("rl", "cartpole_case_safe_52"),
    ("safenlp", "hyperrectangle_1150"),
    ("safenlp", "hyperrectangle_2338"),
    ("cora_mnist", "mnist-img11"),
    ("mnist_fc", "prop_12_0.05"),
    ("mnist_fc", "prop_7_0.03"),
    ("lindex", "lindex_1"),
    ("reach_prob", "vdp_6"),
    ("tll", "property_N=8_0"),
    ("collins_rul", "if_then_7levels_w20"),
    ("marabou_cifar10", "p00"),
]


def answer(benchmark, row, timeout, method):
    """The verdict; a counterexample must be one."""
    compiled = suites.programs(benchmark, row["onnx"])
    property = suites.asked(benchmark, row["vnnlib"])
    result = verify.verify(
        compiled.network, property, method=method, timeout=timeout, programs=compiled
    )
    if result.verdict == "sat":
        x = result.counterexample.inputs
        y = np.asarray(compiled.forward(x))
        assert suites.unsafe(property, x, y, slack=0.0), row
    return result.verdict


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize(("benchmark", "file"), params(QUICK))
@pytest.mark.sampled(3)
def test_known_answer(benchmark, file):
    row = suites.instance(benchmark, file)
    assert answer(benchmark, row, 60.0, "alpha-crown") == row["known_result"]


def test_the_quick_ones_have_both_answers():
    known = [suites.instance(*names)["known_result"] for names in QUICK]
    assert min(known.count("sat"), known.count("unsat")) >= 3


INSTANCES = [
    (benchmark, number)
    for benchmark in suites.benchmarks("instances.csv")
    for number in range(len(suites.table(benchmark, "instances.csv")))
]


@pytest.mark.suites
@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize(("benchmark", "number"), params(INSTANCES))
def test_no_answer_contradicts_a_known_one(benchmark, number):
    row = suites.table(benchmark, "instances.csv")[number]
    # One compiled call of alpha-CROWN on a transformer takes minutes, whatever the limit is.
    method = "crown" if benchmark == "vit" else "alpha-crown"
    assert answer(benchmark, row, 10.0, method) in (row["known_result"], "unknown", "timeout")
