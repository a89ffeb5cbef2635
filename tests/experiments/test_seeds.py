"""Several seeds as one program, how batches reach the devices, and population statistics."""

import itertools
import json
import re
import types

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from experiments import models
from experiments.data import Images
from experiments.evaluation import trained
from experiments.methods.method import clean_pass
from experiments.records import folder
from experiments.run import run as runs
from experiments.run import seeds
from experiments.settings.checks import from_config_dict
from experiments.settings.errors import ExperimentError
from experiments.train import feed, loop
from experiments.train.batch_norm import population_statistics
from experiments.train.prepare import prepare

NETWORKS = {
    "test_mlp": {"hidden": (16,)},
    "test_bn": {"convolutions": (models.Convolution(4, 4, 2, 1),), "batch_norm": True},
}


@pytest.fixture(autouse=True)
def _tiny_networks(monkeypatch):
    for name, fields in NETWORKS.items():
        monkeypatch.setitem(models.MODELS, name, fields)


def _config(seed=0, seeds=1, **groups):
    settings = {
        "seed": seed,
        "seeds": seeds,
        "data": {"name": "digits", "validation": 144},
        "model": {"name": "test_mlp"},
        "train": {"epochs": 3, "batch_size": 128},
        "optim": {"lr": 5e-3},
        "robust": {"method": "ibp", "eps_train": 0.03, "eps_test": 0.02, "ramp_epochs": 2.0},
        "evaluation": {"methods": ("interval",), "pgd_steps": 3, "batch_size": 200, "every": 2},
        "checkpoint": {"every": 7},
    }
    for group, values in groups.items():
        settings[group] = settings.get(group, {}) | values
    return from_config_dict(settings)


def _records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_seeds_are_trained_as_one_program_and_as_if_alone(tmp_path, capsys, monkeypatch):
    together = runs.run(_config(seed=4, seeds=2), tmp_path / "both", "test")
    assert together["seeds"] == [4, 5]
    printed = capsys.readouterr().out
    assert "mean +- standard deviation" in printed
    assert re.search(r"test: error on 360 test images of UCI digits, .*; 2 seeds\n", printed)
    assert (together["data"], together["bounds"]) == ("UCI digits", ["interval"])
    alone = runs.run(_config(seed=5), tmp_path / "alone", "test")
    stored = json.loads((tmp_path / "both" / "seed-5" / "summary.json").read_text())
    # Not to the last bit: one program for both rounds otherwise.
    for one, other in zip(
        _records(tmp_path / "both" / "seed-5"), _records(tmp_path / "alone"), strict=True
    ):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["seconds"] > 0
    label = next(iter(alone["results"]))
    for key in ("standard_error", "pgd_error", "verified_error"):
        assert stored["results"][label][key] == pytest.approx(
            alone["results"][label][key], abs=0.01
        )
        values = together["errors"][key]
        assert together["mean"][key] == pytest.approx(np.mean(values))
        assert together["std"][key] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    # Finished: said again, not trained again.
    monkeypatch.setattr(seeds, "train", None)
    assert runs.run(_config(seed=4, seeds=2), tmp_path / "both", "test") == together


@pytest.mark.slow
def test_seconds_of_seeds_trained_together_add_up_to_the_time_it_took(tmp_path, monkeypatch):
    clock = itertools.chain([100.0], itertools.repeat(110.0))
    monkeypatch.setattr(loop, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    assert runs.run(_config(seeds=2), tmp_path, "test")["train_seconds"] == 10.0


def test_the_folder_of_seeds_is_no_run(tmp_path):
    runs.run(_config(seeds=2), tmp_path, "test")
    with pytest.raises(ExperimentError, match=r"holds the runs of 2 seeds; choose one .*seed-0"):
        trained.load(tmp_path)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.slow
def test_seeds_that_are_unequally_far_go_on_alone(tmp_path, monkeypatch):
    config = _config(seeds=2)
    train, groups = seeds.train, []

    def noted(prepared, members, report):
        groups.append([member.seed for member in members])
        train(prepared, members, report)

    monkeypatch.setattr(seeds, "train", noted)
    runs.run(_config(seed=1), tmp_path / "seed-1", "test")  # as after a kill
    (tmp_path / "seed-1" / "summary.json").unlink()
    result = runs.run(config, tmp_path, "test")
    assert groups == [[1], [0], [1]]
    assert result["seeds"] == [0, 1]


def test_networks_with_convolutions_are_not_trained_together_on_cpu(tmp_path, monkeypatch):
    groups = []
    monkeypatch.setattr(
        seeds, "train", lambda prepared, members, report: groups.append(len(members))
    )
    summary = {"method": "ibp"}
    monkeypatch.setattr(
        seeds, "_conclude", lambda prepared, member, *rest: summary | {"seed": member.seed}
    )
    # Neither summary is one that could be read again.
    monkeypatch.setattr(folder, "check_summary", lambda summary, several: None)
    monkeypatch.setattr(runs, "of_seeds", lambda summaries, config, name: {})
    monkeypatch.setattr(runs, "print_seeds", lambda summary, workdir: None)
    runs.run(_config(seeds=2, model={"name": "test_bn"}), tmp_path, "test")
    assert groups == [1, 1]


def test_batches_are_the_same_from_the_device_and_from_the_host(monkeypatch):
    rng = np.random.default_rng(0)
    data = Images(rng.uniform(size=(23, 4, 4, 1)).astype(np.float32), np.arange(23, dtype=np.int32))
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    alone = NamedSharding(mesh, PartitionSpec("data"))
    both = NamedSharding(mesh, PartitionSpec(None, "data"))
    resident, of_two = feed.Feed(data, 4, (3,), alone), feed.Feed(data, 4, (3, 8), both)
    monkeypatch.setattr(feed, "_fits", lambda size, device: False)
    from_host, two_from_host = feed.Feed(data, 4, (3,), alone), feed.Feed(data, 4, (3, 8), both)
    for step in (0, 4, 5, 11):
        expected = data.take(feed.batch_indices(3, step, 23, 4))
        for source in (resident, from_host):
            batch = source(step)
            np.testing.assert_array_equal(batch[0], expected.images)
            np.testing.assert_array_equal(batch[1], expected.labels)
            assert batch[0].sharding.is_equivalent_to(alone, 4)
        for source in (of_two, two_from_host):
            images, labels = source(step)
            np.testing.assert_array_equal(labels[0], expected.labels)
            np.testing.assert_array_equal(labels[1], feed.batch_indices(8, step, 23, 4))
            assert images.shape == (2, 4, 4, 4, 1)


def test_population_statistics_are_those_of_all_images():
    model = models.create("test_bn")
    images = np.random.default_rng(1).uniform(size=(12, 8, 8, 1)).astype(np.float32)
    variables = model.init(jax.random.key(0), images)
    result = population_statistics(model, variables, images, batch_size=4)
    # One layer of statistics: batches make no difference to its inputs.
    _, expected = clean_pass(model, variables["params"], variables["batch_stats"], images)
    jax.tree.map(lambda f, e: np.testing.assert_allclose(f, e, rtol=1e-4), result, expected)
    assert jax.tree.structure(result) == jax.tree.structure(variables["batch_stats"])


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (
            {"robust": {"norm": "2", "method": "lmt", "eps_train": 36.0, "eps_test": 36.0}},
            r"eps_train must be in \[0, 4\), below half the l2 diameter of images of UCI digits "
            r"with pixels in \[0, 1\], got 36; in units of 1/255 write 36/255$",
        ),
        (
            {"robust": {"eps_test": 0.6}},
            r"eps_test must be in \[0, 0\.5\), below half the l-inf diameter .* got 0\.6$",
        ),
        (
            {"model": {"std": (0.2, 0.2)}},
            r"model\.std must have one number per channel of UCI digits \(1\) or none, got",
        ),
        ({"model": {"name": "cnn7_tiny"}}, r"has 200 classes, but UCI digits has 10"),
        (
            {"robust": {"method": "taps"}, "adversary": {"split": 99}},
            r"robust\.method='taps' cannot train model 'test_mlp': of 5 layers, .*stop=99$",
        ),
    ],
)
def test_what_does_not_go_together_is_said_before_the_training(groups, message):
    with pytest.raises(ExperimentError, match=message):
        prepare(_config(**groups))
