"""`train.diagnostics`: what runs write to `landscape.jsonl`, when, and that it changes nothing."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from experiments import models
from experiments.cluster import distributed
from experiments.methods import Batch
from experiments.records.folder import Records
from experiments.run import run as runs
from experiments.settings.checks import from_config_dict
from experiments.settings.errors import ExperimentError
from experiments.train.feed import Feed
from experiments.train.mesh import batch_sharding
from experiments.train.prepare import prepare

ALL = ("landscape", "relaxation", "relus")
# The finished runs are made once.
one_worker = pytest.mark.xdist_group("landscape")


@pytest.fixture(scope="module", autouse=True)
def _tiny_network():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "test_mlp", {"hidden": (8,)})
        patch.setitem(models.MODELS, "test_bn", {"hidden": (8,), "batch_norm": True})
        yield


def _config(diagnostics=ALL, method="one-step", every=4, **groups):
    settings = {
        "data": {"name": "digits", "validation": 144},
        "model": {"name": "test_mlp"},
        "train": {
            "epochs": 2,
            "batch_size": 256,
            "diagnostics": diagnostics,
            "diagnostics_every": every,
        },
        "optim": {"lr": 5e-3},
        "robust": {
            "method": method,
            "eps_train": 0.03,
            "eps_test": 0.02,
            "warmup_epochs": 0.2,
            "ramp_epochs": 1.0,
            "kappa": (1.0, 0.5),
            "beta": (1.0, 1.0),
        },
        "evaluation": {"pgd_steps": 1, "methods": ("interval",), "batch_size": 500},
        "checkpoint": {"every": 3},
    }
    for group, values in groups.items():
        settings[group] = settings.get(group, {}) | values
    return from_config_dict(settings)


def _lines(workdir):
    return [json.loads(line) for line in (workdir / "landscape.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("landscape") / "run"
    return _config(), workdir, runs.run(_config(), workdir, "test")


@one_worker
def test_a_run_writes_its_measures(finished):
    config, workdir, _ = finished
    lines = _lines(workdir)
    assert Records(workdir, config).landscape() == lines
    assert [line["step"] for line in lines] == [0, 4, 8]
    assert [line["epoch"] for line in lines] == [0, 0, 1]
    # The first step is natural: it has no bounds, but a loss at the final radius.
    assert set(lines[0]) == {"step", "epoch", "rate", "coefficients", "landscape", "target"}
    for line in lines:
        for name in ("landscape", "target"):
            group = line[name]
            assert len(group["losses"]) == len(group["multiples"]) == 12
            assert group["multiples"][0] == 0
            losses = group["losses"]
            assert group["variation"] == pytest.approx(max(losses) - min(losses), rel=1e-5)
            assert group["gradient_difference"] > 0
        assert line["target"]["losses"][0] > line["landscape"]["losses"][0]
    for line in lines[1:]:
        assert sum(line["relaxation"]["slopes"].values()) == pytest.approx(1, abs=1e-5)
        assert 0 <= line["relaxation"]["flipped"] < 0.5
        assert line["relaxation"]["distance"] > 0
        relus = line["relus"]
        assert set(relus["states"]) == set(relus["slopes"]) == set(relus["widths"])
        for label, states in relus["states"].items():
            assert sum(states.values()) == pytest.approx(1, abs=1e-5)
            unstable = states["unstable"] * 256 * 8
            assert sum(relus["slopes"][label]) == pytest.approx(unstable, abs=1)
        assert 0 < relus["tightness"] <= 1
        assert relus["relu_balance"] >= 0


@one_worker
def test_measures_change_nothing(finished, tmp_path):
    _, _, summary = finished
    without = runs.run(_config(diagnostics=()), tmp_path / "run", "test")
    assert without["parameters_sha256"] == summary["parameters_sha256"]
    assert not (tmp_path / "run" / "landscape.jsonl").exists()


@pytest.mark.slow
@one_worker
@pytest.mark.parametrize("stop", [1, 2])
def test_a_run_that_was_stopped_measures_every_step_once(finished, tmp_path, monkeypatch, stop):
    config, complete, summary = finished
    workdir = tmp_path / "run"
    append, calls = Records.append_landscape, []

    def killed(self, line):
        append(self, line)
        calls.append(line)
        if len(calls) == stop + 1:
            raise KeyboardInterrupt  # after the line, before the step and its checkpoint

    with monkeypatch.context() as patch:
        patch.setattr(Records, "append_landscape", killed)
        with pytest.raises(KeyboardInterrupt):
            runs.run(config, workdir, "test")
    assert len(_lines(workdir)) == stop + 1
    with (workdir / "landscape.jsonl").open("a") as stream:
        stream.write('{"step": 8, "ep')  # as a kill leaves it
    resumed = runs.run(config, workdir, "test")
    assert resumed["parameters_sha256"] == summary["parameters_sha256"]
    assert _lines(workdir) == _lines(complete)


@pytest.mark.parametrize("model", ["test_mlp", "test_bn"])
@pytest.mark.sampled(3)
def test_the_first_loss_is_that_of_the_step(model):
    config = _config(("landscape",), augment={"crop": 1}, model={"name": model})
    prepared = prepare(config)
    feed = Feed(prepared.splits.train, 256, (0,), batch_sharding(prepared.mesh))
    state = prepared.initial_state(0)
    steps = prepared.train_steps((0,))
    for step in range(3):
        images, labels = feed(step)
        line = prepared.diagnostics.measure(step, 0, state, images, labels)
        state, metrics = steps[prepared.phases[step]](state, images, labels)
        loss = float(metrics["loss"])
        assert line["landscape"]["losses"][0] == pytest.approx(loss, rel=1e-5)
    assert prepared.phases[2] != prepared.phases[0]


@pytest.mark.slow
def test_the_target_is_the_final_radius_along_the_scheduled_update():
    prepared = prepare(_config(("landscape",), method="ibp"))
    feed = Feed(prepared.splits.train, 256, (0,), batch_sharding(prepared.mesh))
    images, labels = feed(3)
    state = prepared.initial_state(0)
    line = prepared.diagnostics.measure(3, 0, state, images, labels)
    objective = prepared.method.objectives[prepared.phases[-1]]
    coefficients = prepared.schedule(3)
    target = coefficients._replace(eps=np.float32(0.03), kappa=np.float32(0.0))

    def loss(params, at):
        batch = Batch(images, labels)
        return objective(params, {"batch_stats": {}}, batch, at, jax.random.key(0))[0]

    gradient = jax.grad(loss)(state["params"], coefficients)
    moved = jax.tree.map(lambda p, g: p - np.float32(5e-3) * g, state["params"], gradient)
    before, after = loss(state["params"], target), loss(moved, target)
    measured = line["target"]
    one = measured["multiples"].index(1.0)
    assert measured["losses"][0] == pytest.approx(float(before), rel=1e-5)
    assert measured["losses"][one] == pytest.approx(float(after), rel=1e-5)


@pytest.mark.slow
def test_devices_that_divide_the_rows_measure_the_same():
    lines = []
    for mesh in ({"data": 1, "spec": 1}, {"data": 1, "spec": 2}):
        prepared = prepare(_config(method="crown-ibp", mesh=mesh))
        feed = Feed(prepared.splits.train, 256, (0,), batch_sharding(prepared.mesh))
        state = prepared.initial_state(0)
        lines.append(prepared.diagnostics.measure(4, 0, state, *feed(4)))
    one, two = (line["relaxation"] for line in lines)
    assert one["slopes"]["one"] > 0.05
    assert two["slopes"] == pytest.approx(one["slopes"], rel=1e-5)
    assert two["flipped"] == pytest.approx(one["flipped"], rel=1e-2)
    assert two["distance"] == pytest.approx(one["distance"], rel=1e-4)
    losses = [line["landscape"]["losses"] for line in lines]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"data": 2}, {"data": 1, "fsdp": 2}])
def test_devices_that_divide_the_batch_measure_the_same(mesh):
    lines = []
    for devices in ({"data": 1}, mesh):
        prepared = prepare(_config(("landscape", "relus"), method="ibp", mesh=devices))
        feed = Feed(prepared.splits.train, 256, (0,), batch_sharding(prepared.mesh))
        state = prepared.initial_state(0)
        lines.append(prepared.diagnostics.measure(4, 0, state, *feed(4)))
    one, two = lines
    for group in ("landscape", "target"):
        np.testing.assert_allclose(one[group]["losses"], two[group]["losses"], rtol=1e-4)
        difference = pytest.approx(one[group]["gradient_difference"], rel=1e-2)
        assert two[group]["gradient_difference"] == difference
    for label, width in one["relus"]["widths"].items():
        assert two["relus"]["widths"][label] == pytest.approx(width, rel=1e-5)


@pytest.mark.slow
def test_several_seeds_are_measured_as_each_alone(tmp_path):
    together, alone = tmp_path / "together", tmp_path / "alone"
    config = _config(("landscape",), method="ibp")
    runs.run(dataclasses.replace(config, seeds=2), together, "test")
    runs.run(dataclasses.replace(config, seed=1), alone, "test")
    ours, theirs = _lines(together / "seed-1"), _lines(alone)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for first, second in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(
            first["landscape"]["losses"], second["landscape"]["losses"], rtol=1e-4
        )


@pytest.mark.slow
def test_norms_are_measured_for_lipschitz_methods(tmp_path):
    config = _config(("norms",), method="bcp", robust={"norm": "2"})
    runs.run(config, tmp_path, "test")
    *_, last = _lines(tmp_path)
    norms = last["norms"]
    product = sum(math.log(norm) for label, norm in norms.items() if label != "log_product")
    assert norms["log_product"] == pytest.approx(product, abs=1e-4)


def test_norms_of_other_methods_are_those_of_their_weights():
    prepared = prepare(_config(("norms",), method="natural"))
    feed = Feed(prepared.splits.train, 256, (0,), batch_sharding(prepared.mesh))
    state = prepared.initial_state(0)
    norms = prepared.diagnostics.measure(4, 0, state, *feed(4))["norms"]
    product = norms.pop("log_product")
    kernels = [leaf for leaf in jax.tree.leaves(state["params"]) if leaf.ndim == 2]
    assert len(kernels) == len(norms)
    exact = sorted(np.linalg.norm(np.asarray(kernel), 2) for kernel in kernels)
    np.testing.assert_allclose(sorted(norms.values()), exact, rtol=1e-2)
    assert product == pytest.approx(np.sum(np.log(exact)), abs=2e-2)


@pytest.mark.parametrize(
    ("method", "name", "message"),
    [
        ("ibp", "relaxation", "has no linear bounds with free slopes; leave it out"),
        ("natural", "relus", "has no bounds on the inputs of ReLUs; leave it out"),
    ],
)
def test_measures_that_a_method_does_not_have(method, name, message):
    with pytest.raises(ExperimentError, match=f"diagnostics has '{name}', .*'{method}' {message}"):
        prepare(_config(("landscape", name), method=method))


def test_several_processes_are_refused(monkeypatch):
    prepared = prepare(_config(("landscape",), method="ibp"))
    monkeypatch.setattr(distributed, "processes", lambda: 2)
    message = (
        r"diagnostics are measured in one process, got 2; start one, or set .*diagnostics=\(\)"
    )
    with pytest.raises(ExperimentError, match=message):
        prepared.diagnostics.check([0], prepared.initial_state(0), None, None)


def test_measures_that_do_not_exist():
    with pytest.raises(ExperimentError, match=r"train.diagnostics must be some of landscape, rel"):
        _config(("landscapes",))
    with pytest.raises(ExperimentError, match=r"train.diagnostics_every must be >= 1, got 0"):
        _config(every=0)


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "landscape.jsonl").write_text('{"step": -1}\n')
    with pytest.raises(ExperimentError, match=r"landscape.jsonl, line 1: .*; delete that line"):
        Records(tmp_path, _config()).landscape()
