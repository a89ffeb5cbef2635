"""Curves between two runs: training, losses along them, resumption, verdict, refusals."""

import json
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from connected import EPS, connected_config, tiny_networks

import boundjax as bj
from boundjax.training import robust_cross_entropy
from experiments import connect as command
from experiments.connectivity.connect import Options, connect
from experiments.connectivity.points import batch_size
from experiments.evaluation import trained
from experiments.plots import connectivity as plots
from experiments.records import connection as records
from experiments.records.connection import LOSSES, PATHS, ConnectionRecords
from experiments.records.folder import Records
from experiments.settings.errors import ExperimentError
from experiments.train.batch_norm import population_statistics
from experiments.train.prepare import prepare
from experiments.train.variables import nothing_selected

# Four steps in an epoch, checkpoints between the ends of epochs.
OPTIONS = Options(
    loss="interval",
    epochs=2,
    lr=5e-3,
    batch_size=128,
    points=3,
    train_count=512,
    count=60,
    checkpoint_every=3,
)
# The finished curve is made once.
one_worker = pytest.mark.xdist_group("connect")


@pytest.fixture(scope="module", autouse=True)
def _tiny_networks():
    with tiny_networks():
        yield


def _run(folder, config, seed, ended=True):
    """Writes the checkpoint that a run leaves at its end, of the initial network of a seed."""
    prepared = prepare(config)
    state = prepared.initial_state(seed)
    step = prepared.total_steps if ended else 1
    state["step"] = jnp.full_like(state["step"], step)
    with Records(folder, config) as files:
        files.create()
        files.save(step, state, nothing_selected(state, len(prepared.splits.validation) > 0), 0.0)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of two runs of one configuration."""
    folder = tmp_path_factory.mktemp("runs")
    return tuple(_run(folder / name, connected_config(), seed) for seed, name in enumerate("ab"))


@pytest.fixture(scope="module")
def finished(runs, tmp_path_factory):
    """Folder and result of a finished curve."""
    out = tmp_path_factory.mktemp("curve") / "curve"
    return out, connect(*runs, OPTIONS._replace(out=out))


def _flags(options):
    return [
        f"--{name.replace('_', '-')}={value}"
        for name, value in options._asdict().items()
        if value is not None
    ]


def _lines(out, name="connectivity.jsonl"):
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


def _without_times(text):
    result = json.loads(text)
    for key in ("train_seconds", "evaluation_seconds", "finished"):
        del result[key]
    return result


# --- whole curves ---------------------------------------------------------------------------------


@one_worker
def test_a_curve_leaves_its_results(finished, runs):
    out, connection = finished
    result = json.loads((out / "connectivity.json").read_text())
    assert {**result, "settings": {}} == {**connection.result, "settings": {}}
    assert result["settings"]["test_images"] == 60
    assert result["settings"]["batch_size"] == batch_size(60) == 30
    assert result["t"] == [0.0, 0.5, 1.0]
    assert result["methods"] == ["ibp", "ibp"]
    assert (result["eps"], result["trained_on"]) == (EPS, "interval")
    assert 5_000 < (out / "connectivity.png").stat().st_size < 200_000
    assert [line["step"] for line in _lines(out, "metrics.jsonl")] == [4, 8]
    assert [(line["path"], line["t"]) for line in _lines(out)] == [
        (path, t) for path in PATHS for t in (0.0, 0.5, 1.0)
    ]
    assert records.read(out).points == connection.points
    curve, segment = (connection.points[path] for path in PATHS)
    for index in (0, 2):  # the same networks
        assert {**curve[index], "path": ""} == {**segment[index], "path": ""}
    assert curve[1]["interval"]["loss"] < segment[1]["interval"]["loss"]  # it was trained


@one_worker
def test_the_ends_are_the_networks_of_the_runs(finished, runs):
    _, connection = finished
    for point, folder in zip((0, 2), runs, strict=True):
        run = trained.load(folder)
        images, labels = (jnp.asarray(part) for part in run.test.take(slice(60)))
        network = lambda x, run=run: run.model.apply(run.variables, x[None])[0]  # noqa: E731
        rows = bj.margin_specification(labels, 10, rows="others")

        def margins(image, row, network=network):
            ball = bj.LpBall(image, EPS, clip=(0.0, 1.0))
            _, aux = bj.linear(network, sides="lower", has_aux=True)(ball, row)
            return bj.interval(network)(ball, row).lower, aux.linear.lower

        measured = connection.points["curve"][point]
        logits = jax.vmap(network)(images)
        wrong = np.argmax(logits, axis=-1) != np.asarray(labels)
        assert measured["standard_error"] == pytest.approx(np.mean(wrong))
        interval, linear = jax.jit(jax.vmap(margins))(images, rows)
        for name, lower in (("interval", interval), ("crown-ibp", linear)):
            losses = np.asarray(robust_cross_entropy(lower), np.float64)
            assert measured[name]["loss"] == pytest.approx(losses.mean(), rel=1e-5)
            batches = losses.reshape(2, 30).mean(axis=1)
            spread = batches.std(ddof=1) / np.sqrt(2)
            assert measured[name]["spread"] == pytest.approx(spread, rel=1e-3)
        verified = np.all(np.maximum(interval, linear) > 0, axis=-1)
        assert measured["crown-ibp"]["verified_error"] == pytest.approx(np.mean(~verified))
        assert measured["verified_error"] <= measured["crown-ibp"]["verified_error"]
        assert measured["one-step"]["loss"] < measured["interval"]["loss"]


@one_worker
def test_barriers_are_those_of_the_losses(finished):
    _, connection = finished
    for path, points in connection.points.items():
        for name in LOSSES:
            losses, spreads = (
                np.array([point[name][key] for point in points]) for key in ("loss", "spread")
            )
            barrier = connection.result["barriers"][path][name]
            height = losses.max() - max(losses[0], losses[-1])
            assert barrier["height"] == pytest.approx(height, abs=1e-5)
            assert barrier["t"] == losses.argmax() / 2
            assert barrier["exists"] is bool(height > 2 * spreads[[0, losses.argmax(), 2]].max())


@pytest.mark.slow
@one_worker
def test_a_curve_that_was_killed_ends_with_the_same_numbers(
    finished, runs, tmp_path, monkeypatch, capsys
):
    complete, _ = finished
    out = tmp_path / "curve"
    options = OPTIONS._replace(out=out)

    def stop_after(patch, owner, name, calls, stop):
        method, counted = getattr(owner, name), []

        def call(self, line):
            method(self, line)
            counted.append(line)
            if len(counted) == calls:
                stop()

        patch.setattr(owner, name, call)

    def interrupt():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        stop_after(patch, Records, "append_metrics", 1, interrupt)  # no checkpoint has this step
        with pytest.raises(KeyboardInterrupt):
            connect(*runs, options)
    with monkeypatch.context() as patch:
        stop_after(
            patch,
            ConnectionRecords,
            "append_point",
            4,
            lambda: os.kill(os.getpid(), signal.SIGTERM),
        )
        with pytest.raises(SystemExit, match="0"):
            command.main([str(run) for run in runs] + _flags(options))
    with (out / "connectivity.jsonl").open("a") as stream:
        stream.write('{"path": "cur')  # as a kill leaves it
    capsys.readouterr()
    connect(*runs, options)
    printed = capsys.readouterr().out
    assert "resumed after step 8 of 8" in printed
    assert "measuring 1 network of the segment on 60 images" in printed
    assert "of the curve on" not in printed
    assert (out / "connectivity.jsonl").read_text() == (complete / "connectivity.jsonl").read_text()
    first, second = (
        _without_times((folder / "connectivity.json").read_text()) for folder in (complete, out)
    )
    assert first == second


@one_worker
def test_fewer_points_are_taken_from_those_that_are_measured(finished, runs, tmp_path, capsys):
    out = shutil.copytree(finished[0], tmp_path / "curve")
    connection = connect(*runs, OPTIONS._replace(out=out, points=2))
    assert _lines(out) == _lines(finished[0])
    assert connection.result["t"] == [0.0, 1.0]
    assert "measuring" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("loss", "norm", "eps"),
    [("crown-ibp", "inf", 0.03), pytest.param("one-step", "2", 0.1, marks=pytest.mark.slow)],
)
@pytest.mark.slow
def test_batch_normalisation_has_the_statistics_of_every_network(tmp_path, loss, norm, eps):
    config = connected_config("test_bn", robust={"norm": norm, "eps_train": eps})
    a, b = (_run(tmp_path / name, config, seed) for seed, name in enumerate("ab"))
    options = OPTIONS._replace(loss=loss, epochs=1, out=tmp_path / "curve")
    connection = connect(a, b, options)
    assert (connection.result["norm"], connection.result["eps"]) == (norm, eps)
    start, end = trained.load(a), trained.load(b)
    middle = jax.tree.map(
        lambda p, q: (p + q) / 2, start.variables["params"], end.variables["params"]
    )
    images = prepare(config).splits.train.images[:512]
    variables = {"params": middle, "batch_stats": start.variables["batch_stats"]}
    variables["batch_stats"] = population_statistics(start.model, variables, images)
    network = lambda x: start.model.apply(variables, x[None])[0]  # noqa: E731
    test, labels = (jnp.asarray(part) for part in start.test.take(slice(60)))
    rows = bj.margin_specification(labels, 10, rows="others")
    threat = bj.Threat(eps, config.robust.order, (0.0, 1.0))

    def of_example(image, row):
        return robust_cross_entropy(bj.interval(network)(threat(image), row).lower)

    expected = np.mean(jax.jit(jax.vmap(of_example))(test, rows))
    assert connection.points["segment"][1]["interval"]["loss"] == pytest.approx(expected, rel=1e-4)


# --- figures --------------------------------------------------------------------------------------


@one_worker
def test_the_figure_of_several_curves(finished, tmp_path, capsys):
    out, figure = finished[0], tmp_path / "figure.png"
    plots.main([str(out), str(out), "--out", str(figure)])
    assert 10_000 < figure.stat().st_size < 200_000
    assert capsys.readouterr().out == f"figure: {figure}\n"


@one_worker
def test_figures_of_nothing(finished, tmp_path, capsys):
    for arguments, message in (
        ([str(tmp_path)], f"{tmp_path} holds no curve"),
        ([str(finished[0]), "--out", "x.pdf"], "--out=x.pdf: must be a PNG file"),
    ):
        with pytest.raises(SystemExit, match="2"):
            plots.main(arguments)
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


# --- refusals -------------------------------------------------------------------------------------


def _refused(capsys, *arguments):
    with pytest.raises(SystemExit, match="2"):
        command.main([str(argument) for argument in arguments])
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


@one_worker
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--loss=pgd"], "--loss must be interval or crown-ibp or one-step, got 'pgd'"),
        (["--loss=interval", "--points=1"], "--points must be >= 2, got 1"),
        (["--loss=interval", "--eps=0"], "--eps must be positive, got 0: a certified loss needs"),
        (["--loss=interval", "--eps=x"], "--eps must be a number like 0.1 or 8/255, got 'x'"),
        (["--loss=interval", "--eps=8"], "in units of 1/255 write 8/255"),
        (["--loss=interval", "--eps=-0.1"], "--eps must be in [0, 0.5)"),
        (["--loss=interval", "--lr=0"], "--lr must be positive, got 0.0"),
        (["--loss=interval", "--lr=nan"], "--lr must be positive, got nan"),
        (["--loss=interval", "--epochs=0"], "--epochs must be >= 1, got 0"),
        (["--loss=interval", "--count=1"], "--count must be >= 2, got 1"),
        (["--loss=interval", "--seed=-1"], "--seed must be in [0, 2**31), got -1"),
        (["--loss=interval", "--train-count=9"], "must be at most the 9 training images, got 128"),
    ],
)
def test_options_out_of_range(runs, tmp_path, capsys, flags, message):
    assert message in _refused(capsys, *runs, *flags, f"--out={tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (connected_config("test_other"), "must agree in model.name, got 'test_mlp' in"),
        (connected_config(model={"std": (0.5,)}), "must agree in model.std, got () in"),
        (connected_config(robust={"norm": "2"}), "must agree in robust.norm, got 'inf' in"),
        (
            connected_config(robust={"method": "adv-train"}, random={"prior_std": 0.1}),
            "other has a random network, which has no certified loss",
        ),
        (connected_config(robust={"clip": False}), "must agree in robust.clip, got True in"),
        (connected_config(robust={"eps_train": 0.04}), "trained at the radii 0.03 ("),
    ],
)
@pytest.mark.sampled(4)
def test_runs_that_cannot_be_connected(runs, tmp_path, capsys, config, message):
    other = _run(tmp_path / "other", config, 0)
    assert message in _refused(capsys, runs[0], other, "--loss=interval", f"--out={tmp_path / 'o'}")


def test_runs_of_different_data(runs, tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name, seed in (("one", 0), ("two", 1)):
        images = rng.integers(0, 17, (140, 8, 8, 1), np.uint8)
        labels = np.arange(140) % 10
        np.savez(
            tmp_path / f"{name}.npz",
            **{f"{part}_images": images for part in ("train", "test")},
            **{f"{part}_labels": labels for part in ("train", "test")},
        )
        _run(tmp_path / name, connected_config(data={"dir": str(tmp_path / f"{name}.npz")}), seed)
    error = _refused(capsys, tmp_path / "one", tmp_path / "two", "--loss=interval")
    assert "must have the same test images of UCI digits (npz file)" in error


def test_runs_that_have_not_ended(runs, tmp_path, capsys):
    begun = _run(tmp_path / "begun", connected_config(), 0, ended=False)
    error = _refused(capsys, runs[0], begun, "--loss=interval")
    assert f"{begun} has no final checkpoint, only step 1 of" in error
    empty = tmp_path / "empty"
    Records(empty, connected_config()).create()
    assert f"{empty} has no checkpoint yet" in _refused(capsys, runs[0], empty, "--loss=interval")
    assert "nowhere holds no run" in _refused(capsys, runs[0], "nowhere", "--loss=interval")
    error = _refused(capsys, runs[0], runs[0], "--loss=interval")
    assert f"a curve needs two runs, got {runs[0]} twice" in error


@one_worker
def test_a_folder_of_something_else_is_refused(finished, runs, tmp_path, capsys):
    out, _ = finished
    flags = _flags(OPTIONS._replace(out=out))
    other = _run(tmp_path / "other", connected_config(), 3)
    for pair, extra, message in (
        (runs, ["--count=40"], "holds another curve, which differs in batch_size, images_sha256"),
        ((runs[0], other), [], "which differs in parameters_sha256; choose another"),
        (runs, ["--epochs=3"], "which differs in train.epochs; choose another run"),
        (runs, [f"--out={runs[0]}"], f"{runs[0]} holds a run that is no curve"),
    ):
        assert message in _refused(capsys, *pair, *flags, *extra)


def test_damaged_files_are_named(finished, tmp_path):
    for name, content, message in (
        ("connectivity.json", '{"settings": 1}', "settings must be an object, got 1"),
        ("connectivity.json", '{"settings": {}}', "trained_on is missing"),
        ("connectivity.json", "{", "cannot be read"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(ExperimentError, match=message):
            records.read(tmp_path)
    result = (finished[0] / "connectivity.json").read_text()
    (tmp_path / "connectivity.json").write_text(result)
    with pytest.raises(ExperimentError, match="lacks points of the curve"):
        records.read(tmp_path)
    (tmp_path / "connectivity.jsonl").write_text('{"path": "road", "t": 0}\n')
    with pytest.raises(ExperimentError, match=r"line 1: path must be curve or segment, got 'road'"):
        records.read(tmp_path)
