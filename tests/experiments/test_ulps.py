import dataclasses
import json
import sys

import numpy as np
import pytest

from boundjax.ops.accuracy_cases import CASES, random_inputs, special_inputs
from experiments.benchmarks import ulps
from experiments.settings.errors import ExperimentError


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(ulps, "CHUNK", 2**16)
    monkeypatch.setattr(ulps, "SCALARS", 2**8)


def test_every_float32_number_is_an_input():
    stride = 10_007
    special, *chunks = ulps.inputs(stride)
    assert all(chunk.size == ulps.CHUNK for chunk in (special, *chunks))
    assert set(special_inputs().view(np.uint32)) <= set(special.view(np.uint32))
    bits = np.arange(0, 0x7F800001, stride, dtype=np.uint32)
    expected = {*bits, *(bits | np.uint32(2**31))}
    assert set(np.concatenate(chunks).view(np.uint32)) == expected


@pytest.mark.slow
def test_inputs_may_be_of_some_magnitudes_only():
    _, *chunks = ulps.inputs(1, 1.0, 1.25)
    x = np.concatenate(chunks)
    below = np.nextafter(np.float32(1.25), np.float32(0))
    assert {1.0, -1.0, 1.25, -1.25, below, -below} <= set(x)
    assert len(set(x)) == 2 * (2**21 + 1) + 1  # zeros fill the last array of each sign
    assert set(np.abs(x)) - {0.0} == set(np.abs(x[np.abs(x) >= 1.0]))
    _, *chunks = ulps.inputs(1, 2.0, 2.0)
    assert set(np.concatenate(chunks)) == {2.0, -2.0, 0.0}


def test_a_row_holds_the_largest_errors():
    case, row = CASES["tanh"], ulps.Row()
    x = np.float32([0.5, 2.0, 1e-40, np.inf])
    exact = case.reference(x.astype(np.float64))
    computed = exact.astype(np.float32)
    computed[0] += np.float32(16 * 2.0**-24)
    computed[1] = np.nextafter(computed[1], np.float32(2))
    computed[2] = 0.0  # a loss by underflow
    row.update(case, x, computed, exact)
    row.update(case, np.zeros(1, np.float32), np.zeros(1, np.float32), np.zeros(1))
    assert row.absolute.value == pytest.approx(16, abs=1)
    assert row.absolute.at == row.ulp.at == row.share.at == 0.5
    assert row.ulp.value == pytest.approx(8 / exact[0], rel=0.1)
    assert row.share.value == pytest.approx(row.ulp.value / case.stated.ulp)
    assert row.inputs == 5


def test_xla_is_measured_in_three_ways():
    rows = ulps.measure("tanh", ["xla"], 2**26)
    assert set(rows) == {"xla", "xla-fused", "xla-scalar"}
    for row in rows.values():
        assert 0.5 < row.ulp.value < 0.5 * CASES["tanh"].stated.ulp
        assert 0.05 < row.share.value <= 0.5
    assert rows["xla"].inputs == rows["xla-fused"].inputs > 200 * rows["xla-scalar"].inputs > 0


@pytest.mark.parametrize("name", sorted(ulps._OPERATORS))
def test_onnxruntime_stays_below_half_of_what_is_stated(name):
    pytest.importorskip("onnxruntime")
    (row,) = ulps.measure(name, ["onnxruntime"], 2**15).values()
    assert row.share.value <= 0.5
    assert row.inputs > 2**14


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("log", "ulp"),
        ("logistic", "absolute"),
        ("silu", "operand"),
        ("gelu", "operand"),
        ("elu", "absolute"),
        ("celu(1.7)", "absolute"),
        ("selu", "absolute"),
        ("hard_silu", "absolute"),
    ],
)
def test_onnxruntime_needs_each_part_of_a_stated_error(name, field):
    pytest.importorskip("onnxruntime")
    case = CASES[name]
    lowered = case.stated._replace(**{field: 0.1 * getattr(case.stated, field)})
    x = random_inputs(ulps.CHUNK)
    computed = ulps.onnxruntime(name)["onnxruntime"](x)
    assert case.shares(x, computed).max() <= 0.5
    assert dataclasses.replace(case, stated=lowered).shares(x, computed).max() > 0.5


def test_functions_that_onnx_lacks_have_no_row():
    assert ulps.onnxruntime("expm1") == {}
    assert ulps.measure("expm1", ["onnxruntime"], 2**26) == {}


def test_a_missing_runtime_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ExperimentError, match=r"the extra 'onnx' .*xla") as error:
        ulps.onnxruntime("exp")
    assert "\n" not in str(error.value)


def run(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["ulps", *flags])
    ulps.main()


def test_the_command_writes_a_report(tmp_path, monkeypatch, capsys):
    path = tmp_path / "report.json"
    run(
        monkeypatch, "--functions", "exp", "relu", "--runtime", "xla", "--stride", str(2**26),
        "--report", str(path),
    )  # fmt: skip
    report = json.loads(path.read_text())
    assert report["stride"] == 2**26
    assert report["versions"]["jax"]
    assert set(report["functions"]) == {"exp", "relu"}
    assert report["functions"]["exp"]["xla"]["share"]["value"] > 0.05
    printed = capsys.readouterr().out
    assert f"every {2**26}-th of the inputs of magnitudes 0 to inf" in printed
    assert "instruction set:" in printed
    assert "ABOVE HALF" not in printed


def test_errors_above_half_of_what_is_stated_end_the_command(monkeypatch, capsys):
    case = CASES["exp"]
    narrow = dataclasses.replace(case, stated=case.stated._replace(ulp=0.5))
    monkeypatch.setattr(ulps, "CASES", {"exp": narrow})
    with pytest.raises(SystemExit, match=r"error: above half of the stated error: exp \(xla\)"):
        run(monkeypatch, "--functions", "exp", "--runtime", "xla", "--stride", str(2**26))
    assert "ABOVE HALF" in capsys.readouterr().out


@pytest.mark.parametrize("pair", [("2", "1"), ("-1", "1"), ("nan", "1")])
def test_magnitudes_out_of_order_are_an_error(pair, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, "--magnitudes", *pair)
    assert "--magnitudes must be two numbers >= 0 in order, got" in capsys.readouterr().err


def test_a_stride_below_one_is_an_error(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, "--stride", "0")
    assert "--stride must be >= 1, got 0" in capsys.readouterr().err
