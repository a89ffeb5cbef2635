import argparse
import importlib
import json
import subprocess

import jax
import numpy as np
import pytest

from experiments.benchmarks import auto_lirpa, cases, process, search, side_by_side, train_step
from experiments.settings.errors import ExperimentError


def test_compared_methods_exist_on_both_sides():
    for net, methods in side_by_side.COMPARED.items():
        assert set(methods) - {"forward"} <= set(cases.METHODS) & set(auto_lirpa.METHODS)
        assert max(methods.values()) <= cases.NETS[net].examples


def test_random_methods_are_compared_with_their_passes(capsys):
    names = [name for name in train_step.CASES["small_star"].methods if name in train_step.PASSES]
    assert set(names) == set(train_step.PASSES)
    seconds = {name: 0.5 * passes for name, passes in train_step.PASSES.items()}
    train_step.report_passes(seconds | {"adv-bnn": 2 * seconds["adv-bnn"]})
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "  adv-train: 6 passes, 1.00x the time of so many"
    assert printed[2] == "  adv-bnn: 6 passes, 2.00x the time of so many"
    assert printed[-1].endswith("weights as well: 0.50x")


def test_a_case_survives_its_file(tmp_path):
    case = cases.case("mlp_2x100", 0.1)
    case.first(3).save(tmp_path / "case.npz")
    read = process.Case.load(tmp_path / "case.npz")
    assert (read.net, read.eps, read.steps) == ("mlp_2x100", 0.1, 20)
    assert read.architecture["hidden"] == [100, 100]
    for name in ("images", "rows", "logits"):
        np.testing.assert_array_equal(getattr(read, name), getattr(case, name)[:3])
    jax.tree.map(np.testing.assert_array_equal, read.variables, case.variables)


def test_our_side_bounds_the_clean_margins():
    case = cases.case("mlp_2x100", 0.01).first(2)
    clean = cases.prepare(case, "forward").run()
    np.testing.assert_allclose(clean, np.einsum("bmc,bc->bm", case.rows, case.logits), atol=1e-5)
    assert (cases.prepare(case, "interval").run() < clean).all()


def test_dense_layers_behind_images_are_reordered():
    rng = np.random.default_rng(0)
    images = rng.normal(size=(2, 3, 4, 5)).astype(np.float32)
    kernel = rng.normal(size=(60, 7)).astype(np.float32)
    matrix = auto_lirpa.rows_first(kernel, (3, 4, 5))
    np.testing.assert_allclose(
        auto_lirpa.channels_first(images).reshape(2, -1) @ matrix.T,
        images.reshape(2, -1) @ kernel,
        atol=1e-5,
    )


def test_a_missing_peer_is_one_line(monkeypatch):
    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ExperimentError, match=r"No module named 'torch'.*source checkout") as error:
        auto_lirpa.library()
    assert "\n" not in str(error.value)


def test_methods_that_are_not_compared_are_errors():
    flags = argparse.Namespace(
        peer="auto_LiRPA", nets=["mlp_2x100"], methods=["random"],
        eps=0.1, repeats=1, limit=1.0, max_gib=1.0,
    )  # fmt: skip
    with pytest.raises(
        ExperimentError, match=r"compared by \['interval', .*\], got --methods \['random'\]"
    ):
        side_by_side.compare(flags)


def test_a_measurement_warms_up_and_repeats():
    calls = []

    def run():
        calls.append(None)
        return np.array([[1.0, 3.0]])

    row = process.measure(process.Prepared(run, 2.5, "this"), repeats=3)
    assert len(calls) == 4
    assert (row.first, row.margins) == (2.5, [1.0, 3.0])
    assert side_by_side.difference(row, row) == 0.0


def measured(devices, processor):
    return search.Measured(devices, 2.0, 10.0, processor, 8000, "timeout", 20, 12.0)


def test_virtual_devices_are_measured_beside_one(monkeypatch, capsys):
    """Each in a process of its own, with so many devices of the CPU."""
    asked = []

    def run(command, env, **options):
        asked.append((command[2:], int(env["JAX_NUM_CPU_DEVICES"])))
        assert env["XLA_FLAGS"].endswith(f"device_count={asked[-1][1]}")
        line = json.dumps(measured(asked[-1][1], 8.0 * asked[-1][1] ** 0.5))
        return subprocess.CompletedProcess(command, 0, f"a warning\n{line}\n", "")

    monkeypatch.setattr(subprocess, "run", run)
    search.main(["n.onnx", "p.vnnlib", "--seconds=3", "--devices=4"])
    rest = ["n.onnx", "p.vnnlib", "--seconds", "3.0", "--rounding", "float32", "--json"]
    assert asked == [(["experiments.benchmarks.search", *rest], n) for n in (1, 4)]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "1 device: timeout after 12.0 s and 20 rounds"
    assert lines[3] == "4 devices: timeout after 12.0 s and 20 rounds"
    assert lines[-1] == "domains in a second of processor time, beside one device: 0.50"


FAILURES = {
    "a process": (1, "", "Traceback\nerror: no such file", "devices = 1: no such file"),
    "other devices": (0, json.dumps(measured(3, 1.0)), "", "expected 1 virtual devices, got 3"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_process_that_fails_is_one_line(name, monkeypatch, capsys):
    *process, message = FAILURES[name]
    monkeypatch.setattr(
        subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, *process)
    )
    with pytest.raises(SystemExit):
        search.main(["n.onnx", "p.vnnlib", "--devices=4"])
    assert capsys.readouterr().err == f"error: {message}\n"


def test_one_virtual_device_is_nothing_to_compare(capsys):
    with pytest.raises(SystemExit):
        search.main(["n.onnx", "p.vnnlib", "--devices=1"])
    assert capsys.readouterr().err == "error: --devices must be at least 2, got 1\n"
