"""l2 training by BCP and LMT: the state they own, whole runs, and the figure of their tightness."""

import contextlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import boundjax as bj
from experiments import methods, models
from experiments.benchmarks import train_step as benchmark
from experiments.data import Images
from experiments.evaluation import trained
from experiments.evaluation.evaluate import parameters_sha256
from experiments.methods import Setting
from experiments.methods.method import Batch, Coefficients
from experiments.plots import tightness
from experiments.records.printing import Report
from experiments.run import run as runs
from experiments.settings.checks import from_config_dict
from experiments.settings.config import Config, OptimConfig, RobustConfig
from experiments.settings.errors import ExperimentError
from experiments.train.step import (
    create_optimizer,
    create_schedule,
    create_state,
    create_train_step,
)

NETWORK = {"convolutions": (models.Convolution(3, 4, 2, 1),), "hidden": (12,)}
IMAGE = (8, 8, 1)


@contextlib.contextmanager
def _patched():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "test_conv", NETWORK)
        yield


@pytest.fixture(autouse=True)
def _networks():
    with _patched():
        yield


# ------------------------------------------------------------------ steps


def _batch(seed=0):
    rng = np.random.default_rng(seed)
    images = rng.uniform(size=(5, *IMAGE)).astype(np.float32)
    return Batch(jnp.asarray(images), jnp.asarray(rng.integers(0, 10, 5).astype(np.int32)))


def _steps(name, batch_norm=False):
    """The model, the state and the steps (one per phase) of a method at l2 radius 0.5."""
    model = models.ConvolutionalClassifier(**NETWORK, batch_norm=batch_norm)
    robust = RobustConfig(method=name, norm="2", eps_train=0.5, warmup_epochs=0.2, ramp_epochs=0.3)
    method = methods.create(model, Config(robust=robust))
    optimizer = create_optimizer(OptimConfig(), 10)
    schedule = create_schedule(robust, 10)
    key = jax.random.key(0)
    state = create_state(method, model, optimizer, IMAGE, key)
    steps = [
        jax.jit(create_train_step(model, objective, optimizer, schedule, 10, key))
        for objective in method.objectives
    ]
    return model, state, steps


def _objective(model, name):
    """Its own objective, over balls that no clip range cuts."""
    robust = RobustConfig(method=name, norm="2", clip=False)
    return methods.create(model, Config(robust=robust)).objectives[-1]


def _same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_methods_that_own_nothing_have_the_state_they_had():
    _, state, _ = _steps("ibp")
    assert sorted(state) == ["batch_stats", "metrics", "opt_state", "params", "step"]
    _, other, _ = _steps("bcp")
    assert sorted(set(other) - set(state)) == ["spectral"]
    # What a method owns is drawn apart: the networks start alike.
    _same(state["params"], other["params"])


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("name", ["bcp", "lmt"])
@pytest.mark.sampled(4)
def test_only_robust_steps_iterate_the_vectors(name, batch_norm):
    _, state, (natural, robust) = _steps(name, batch_norm)
    vectors = state["spectral"]
    assert len(vectors) > 0
    for vector in jax.tree.leaves(vectors):
        assert float(jnp.sum(vector**2)) == pytest.approx(1.0, abs=1e-5)
    batch = _batch()
    state, _ = natural(state, *batch)
    _same(state["spectral"], vectors)
    for _ in range(4):
        state, _ = robust(state, *batch)
    assert jax.tree.structure(state["spectral"]) == jax.tree.structure(vectors)
    for new, old in zip(jax.tree.leaves(state["spectral"]), jax.tree.leaves(vectors), strict=True):
        assert float(jnp.sum(new**2)) == pytest.approx(1.0, abs=1e-5)
        assert np.any(new != old)
    assert int(state["step"]) == 5
    # At a radius the robust loss exceeds the natural one.
    assert float(state["metrics"]["robust_loss"]) > float(state["metrics"]["natural_loss"])
    assert (len(jax.tree.leaves(state["batch_stats"])) > 0) == batch_norm


@pytest.mark.parametrize(("name", "box"), [("bcp", True), ("lmt", False)])
@pytest.mark.sampled(3)
def test_one_power_iteration_per_step_serves_all_images(monkeypatch, name, box):
    model, state, _ = _steps(name)
    iterate, transform, calls = bj.power_iteration, bj.lipschitz, []

    def power_iteration(function, example, vectors):
        assert example.shape == IMAGE
        _same(jax.tree.map(jnp.shape, vectors), jax.tree.map(jnp.shape, state["spectral"]))
        calls.append("iteration")
        return iterate(function, example, vectors)

    def lipschitz(function, **options):
        calls.append((options["box"], options["norms"] is not None))
        return transform(function, **options)

    monkeypatch.setattr(bj, "power_iteration", power_iteration)
    monkeypatch.setattr(bj, "lipschitz", lipschitz)
    weights = Coefficients(*(jnp.float32(value) for value in (0.3, 0.25, 0.0, 0.5)))
    collections = {"batch_stats": {}, "spectral": state["spectral"]}
    loss, outcome = _objective(model, name)(
        state["params"], collections, _batch(), weights, jax.random.key(0)
    )
    assert calls == ["iteration", (box, True)]
    mixed = 0.25 * outcome.metrics["natural_loss"] + 0.75 * outcome.metrics["robust_loss"]
    assert float(loss) == pytest.approx(float(mixed), rel=1e-5)


@pytest.mark.parametrize("name", ["bcp", "lmt"])
@pytest.mark.sampled(3)
def test_the_gradient_passes_through_the_norms(name):
    model, state, _ = _steps(name)
    objective = _objective(model, name)
    collections = {"batch_stats": {}, "spectral": state["spectral"]}
    weights = Coefficients(*(jnp.float32(value) for value in (0.3, 0.0, 0.0, 0.5)))

    def loss(params):
        return objective(params, collections, _batch(), weights, jax.random.key(0))[0]

    # Against the difference along the gradient, of the first convolution's kernel alone.
    gradient = jax.grad(loss)(state["params"])
    only = jax.tree.map(jnp.zeros_like, gradient)
    only["Conv_0"]["kernel"] = gradient["Conv_0"]["kernel"]
    length = float(jnp.sum(only["Conv_0"]["kernel"] ** 2))
    assert length > 0
    ends = [
        float(loss(jax.tree.map(lambda p, g, s=s: p + s * g, state["params"], only)))
        for s in (0.01, -0.01)
    ]
    assert (ends[0] - ends[1]) / 0.02 == pytest.approx(length, rel=0.05)


def test_the_phases_follow_the_radius():
    schedule = create_schedule(RobustConfig(warmup_epochs=1.0, ramp_epochs=2.0), 10)
    for name in ("bcp", "lmt"):
        method = methods.create(None, Config(robust=RobustConfig(method=name, norm="2")))
        phases = [int(method.phase(schedule(step))) for step in (0, 10, 11, 30, 99)]
        assert phases == [0, 0, 1, 1, 1]


def test_the_norm_of_the_ball_is_that_of_the_config():
    config = Config(robust=RobustConfig(norm="2", eps_test=0.1))
    ball = Setting(models.create("test_conv"), config).threat(jnp.zeros(3))
    assert (ball.p, ball.eps, ball.clip) == (2.0, 0.1, (0.0, 1.0))
    config = Config(robust=RobustConfig(clip=False))
    ball = Setting(models.create("test_conv"), config).threat(jnp.zeros(3))
    assert ball.is_box
    assert ball.clip is None


# ------------------------------------------------------------------ runs


def _config(name="bcp"):
    return from_config_dict(
        {
            "data": {"name": "digits", "validation": 144},
            "model": {"name": "test_conv"},
            "train": {"epochs": 3, "batch_size": 128},
            "augment": {"flip": True, "crop": 2},
            "optim": {"lr": 5e-3},
            "robust": {
                "method": name,
                "norm": "2",
                "eps_train": 0.3,
                "eps_test": 0.2,
                "warmup_epochs": 0.5,
                "ramp_epochs": 1.0,
            },
            "evaluation": {
                "methods": ("bcp", "lmt"),
                "selection_method": name,
                "pgd_steps": 3,
                "batch_size": 200,
            },
            "checkpoint": {"every": 7},
        }
    )


# The run is made once.
one_worker = pytest.mark.xdist_group("lipschitz")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A BCP run: (config, workdir, summary)."""
    workdir = tmp_path_factory.mktemp("runs") / "bcp"
    with _patched():
        return _config(), workdir, runs.run(_config(), workdir, "test")


@one_worker
@pytest.mark.slow
def test_a_run_in_l2_says_so(finished, capsys):
    config, workdir, summary = finished
    assert (summary["norm"], summary["eps_test"], summary["data"]) == ("2", 0.2, "UCI digits")
    assert runs.run(config, workdir, "test") == summary
    assert "360 test images of UCI digits, l2 eps 0.2, clipped" in capsys.readouterr().out
    for errors in summary["results"].values():
        assert list(errors["verified_error_by"]) == ["bcp", "lmt"]
        assert errors["standard_error"] <= errors["pgd_error"] <= errors["verified_error"] <= 1
    assert 5_000 < (workdir / "curves.png").stat().st_size < 200_000


@pytest.mark.slow
@one_worker
def test_an_interrupted_run_ends_bit_identically(finished, tmp_path, monkeypatch):
    config, whole_workdir, whole = finished
    update = Report.update

    # In the natural phase, and between two robust steps where the vectors have moved.
    for stop in (3, 17):

        def interrupt(self, step, stop=stop):
            if step == stop:
                raise InterruptedError
            update(self, step)

        with monkeypatch.context() as patch:
            patch.setattr(Report, "update", interrupt)
            with pytest.raises(InterruptedError):
                runs.run(config, tmp_path, "test")
    parts = runs.run(config, tmp_path, "test")
    assert parts["parameters_sha256"] == whole["parameters_sha256"]
    assert parts["results"] == whole["results"]
    lines = [(folder / "metrics.jsonl").read_text() for folder in (tmp_path, whole_workdir)]
    records = [[json.loads(line) for line in text.splitlines()] for text in lines]
    for record in (*records[0], *records[1]):
        del record["seconds"]
    assert records[0] == records[1]


@one_worker
@pytest.mark.slow
def test_the_network_of_a_run_can_be_read_again(finished):
    result = trained.load(finished[1])
    assert parameters_sha256(result.variables) == finished[2]["parameters_sha256"]
    assert (result.title, sorted(result.variables)) == ("UCI digits", ["params"])


# ------------------------------------------------------------------ the benchmark


def test_the_benchmark_times_what_exists(monkeypatch):
    for net, case in benchmark.CASES.items():
        assert net in models.MODELS
        assert set(case.methods) <= set(benchmark.METHODS)
        assert case.methods[0] == "natural"
    assert benchmark.CASES["medium"].methods == ("natural", "bcp", "lmt")
    case = benchmark.Case(IMAGE, 4, ("natural", "bcp"), norm="2", eps=0.5)
    monkeypatch.setitem(benchmark.CASES, "test_conv", case)
    state, metrics = benchmark.measure("test_conv", "bcp").run()
    assert int(state["step"]) == benchmark.STEPS_PER_EPOCH // 2 + 1
    assert np.isfinite(float(metrics["loss"]))


# ------------------------------------------------------------------ the tightness of the bounds


def test_tau_of_images_does_not_depend_on_the_batches():
    model = models.create("test_conv")
    images = np.random.default_rng(0).uniform(size=(5, *IMAGE)).astype(np.float32)
    network = bj.PureModel.of((model, model.init(jax.random.key(0), images)))
    data = Images(images, np.arange(5, dtype=np.int32))
    result = [
        tightness.measure(network, data, bj.Threat(0.3, 2.0, (0.0, 1.0)), "", batch_size).values
        for batch_size in (2, 100)
    ]
    for name in ("LMT", "BCP"):
        np.testing.assert_allclose(result[0][name], result[1][name], rtol=1e-4)
    assert result[0]["BCP"].shape == (5,)
    assert np.all(result[0]["BCP"] <= result[0]["LMT"] * (1 + 1e-5))
    assert np.all(result[0]["BCP"] > 0)


@pytest.mark.slow
def test_bounds_over_boxes_are_ordered_on_average():
    model = models.create("test_conv")
    images = np.random.default_rng(0).uniform(size=(8, *IMAGE)).astype(np.float32)
    network = bj.PureModel.of((model, model.init(jax.random.key(0), images)))
    data = Images(images, np.arange(8, dtype=np.int32))
    measured = tightness.measure(network, data, bj.Threat(0.05, np.inf, (0.0, 1.0)))
    result = measured.values
    mean = {name: float(np.mean(value)) for name, value in result.items()}
    assert mean["one step"] < mean["random slopes"] < mean["IBP"]
    assert mean["CROWN-IBP"] < mean["CAP-IBP"] < mean["IBP"]
    # Upper bounds: never below what the clean images have.
    logits = np.asarray(network.apply(network.variables, images))
    clean = np.sum(logits - logits[np.arange(8), data.labels][:, None], axis=1)
    assert all(np.all(value >= clean) for value in result.values())
    losses = {name: float(np.mean(value)) for name, value in measured.losses.items()}
    assert losses["one step"] < losses["random slopes"] < losses["IBP"]
    assert set(measured.errors) == set(result)
    assert all(0 <= error <= 1 for error in measured.errors.values())


def test_the_figure_is_small_and_says_what_went_wrong(tmp_path):
    rng = np.random.default_rng(0)
    lmt = np.full(1000, 3.0, np.float32)  # the Lipschitz constant is the same for every image
    bcp = (lmt * rng.uniform(0.3, 0.6, 1000)).astype(np.float32)
    values = {"LMT": lmt, "BCP": bcp}
    assert tightness.reduction(values) == pytest.approx(0.55, abs=0.02)
    path = tmp_path / "tightness.png"
    mnist = tightness.Measured("MNIST", values)
    tightness.plot_tightness([mnist, mnist._replace(title="CIFAR-10 (JPEG copies)")], path)
    assert 5_000 < path.stat().st_size < 200_000
    with pytest.raises(ExperimentError, match=r"MNIST: values by BCP must be finite, got nan"):
        tightness.plot_tightness([mnist._replace(values=values | {"BCP": np.nan * bcp})], path)
    with pytest.raises(ExperimentError, match=r"runs of a figure must be in one norm"):
        tightness.plot_tightness([mnist, mnist._replace(values={"IBP": lmt})], path)
    with pytest.raises(ExperimentError, match=r"--loss needs runs in l-inf, got l2; leave it out"):
        tightness.plot_tightness([mnist], path, with_loss=True)
    dead = {"LMT": 0 * lmt, "BCP": 0 * lmt}
    assert tightness.reduction(dead) == 0.0
    tightness.plot_tightness([tightness.Measured("constant", dead)], path)


@one_worker
def test_the_figure_of_a_run(finished, tmp_path, capsys):
    tightness.main([str(finished[1]), "--out", str(tmp_path / "figure.png"), "--count=30"])
    printed = capsys.readouterr().out
    assert "UCI digits, test_conv, bcp, l2 eps 0.2: 30 test images, mean tau" in printed
    assert (tmp_path / "figure.png").stat().st_size > 5_000
    with pytest.raises(SystemExit):
        tightness.main([str(tmp_path), "--out", "x.png"])
    assert "holds no run" in capsys.readouterr().err


@pytest.mark.parametrize("out", ["nowhere/t.png", "t.xyz"])
def test_a_figure_that_cannot_be_written_is_refused_first(out, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        tightness.main([str(tmp_path), f"--out={out}"])
    assert caught.value.code == 2
    expected = f"error: --out={out}: must be a PNG file in an existing folder\n"
    assert capsys.readouterr().err == expected
