"""Figures of chapter 2 of the thesis: their numbers on small random networks, and their command."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import boundjax as bj
from experiments import models
from experiments.plots import diversity, gradients, records
from experiments.plots import random_gradients as measured
from experiments.run import run as runs
from experiments.settings.checks import from_config_dict

CLASSES = 3


def _sample(noise):
    """A linear network whose weights get Gaussian noise, on 8 images that it classifies."""
    rng = np.random.default_rng(0)
    weights = jnp.asarray(rng.normal(size=(16, CLASSES)), jnp.float32)
    x = jnp.asarray(rng.uniform(size=(8, 4, 4)), jnp.float32)

    def function(x, key=None):
        moved = weights
        if key is not None:
            moved = weights + noise * jax.random.normal(key, weights.shape)
        return x.reshape(len(x), -1) @ moved

    labels = jnp.argmax(function(x), axis=-1)
    threat = bj.Threat(0.2, np.inf, (0.0, 1.0))
    return measured.Sample(function, x, labels, threat, jax.random.key(0))


def test_gradients_without_noise_are_alike_and_with_noise_are_not():
    still, moving = _sample(0.0), _sample(3.0)
    assert np.allclose(measured.cosines(still, 4), 1.0, atol=1e-5)
    assert np.mean(measured.cosines(moving, 4)) < 0.9
    assert np.all(measured.concentrations(moving, 4) < measured.concentrations(still, 4).min())


def test_the_plane_holds_the_means_of_both_networks():
    samples = [_sample(0.5), _sample(3.0)]
    plane = measured.on_the_plane(samples, 12)
    for points, mean, rho in zip(*plane, strict=True):
        np.testing.assert_allclose(np.mean(points, axis=0), mean, atol=1e-6)
        assert np.linalg.norm(mean) == pytest.approx(rho, rel=1e-5)
        assert np.all(np.linalg.norm(points, axis=1) <= 1 + 1e-6)
    assert plane.means[0][1] == pytest.approx(0, abs=1e-6)
    assert plane.rho[1] < plane.rho[0]
    alone = measured.on_the_plane(samples[:1], 12)
    assert np.linalg.norm(alone.means[0]) == pytest.approx(plane.rho[0], rel=1e-5)


def test_rotated_gradients_keep_their_norms_and_have_the_angle():
    gradient = jnp.asarray(np.random.default_rng(1).normal(size=(5, 4, 4)), jnp.float32)
    turned = measured.rotated(gradient, jnp.deg2rad(jnp.float32(60)), jax.random.key(0))
    flat, other = gradient.reshape(5, -1), turned.reshape(5, -1)
    np.testing.assert_allclose(
        np.linalg.norm(other, axis=1), np.linalg.norm(flat, axis=1), rtol=1e-5
    )
    norms = np.linalg.norm(flat, axis=1) ** 2
    np.testing.assert_allclose(np.sum(flat * other, axis=1) / norms, 0.5, atol=1e-4)


@pytest.mark.parametrize("norm", [np.inf, 2])
def test_rotated_gradients_attack_less(norm):
    sample = _sample(0.0)
    sample = sample._replace(threat=bj.Threat(0.3, norm, (0.0, 1.0)))
    proxy = measured.proxy_attacks(sample, [0.0, 90.0], 1, 5)
    assert proxy.increases[0] > proxy.increases[1]
    assert proxy.accuracies[0] <= proxy.accuracies[1]


def test_attacks_increase_the_loss_and_reduce_the_accuracy():
    sample = _sample(0.1)
    assert np.mean(measured.loss_increases(sample, 3, 4)) > 0
    accuracies = measured.accuracies(sample, [0.0, 0.1, 0.4], 3, 4)
    assert accuracies[0] == 1.0
    assert accuracies[0] >= accuracies[1] >= accuracies[2]
    assert accuracies[2] < 1.0


def test_attacks_transfer_between_equal_draws():
    still = measured.transfers(_sample(0.0), 2, 4)
    assert still.shape == (2, 2)
    assert np.ptp(still) == 0
    moving = measured.transfers(_sample(3.0), 3, 4)
    off = moving[~np.eye(3, dtype=bool)]
    assert np.mean(off) > np.mean(np.diag(moving))


DAILY = ("accuracy", "plane")


@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=[] if k in DAILY else pytest.mark.slow) for k in gradients.KINDS],
)
def test_the_command_draws_every_kind(kind, tmp_path, monkeypatch, capsys):
    def of_run(run, count, draws, steps):
        return gradients.Network(run.name, _sample(float(run.name)), draws, steps)

    monkeypatch.setattr(gradients, "of_run", of_run)
    out = tmp_path / "g.png"
    gradients.main(["0.5", "3.0", f"--kind={kind}", "--draws=3", "--steps=2", f"--out={out}"])
    assert capsys.readouterr().out == f"figure: {out}\n"
    assert out.stat().st_size > 3_000


@pytest.mark.slow
def test_the_diversity_of_gradients_is_drawn_while_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(models.MODELS, "test_mlp", {"hidden": (16,)})
    config = from_config_dict(
        {
            "data": {"name": "digits", "train": 256},
            "model": {"name": "test_mlp"},
            "train": {
                "epochs": 1,
                "batch_size": 64,
                "diagnostics": ("gradients",),
                "diagnostics_every": 2,
            },
            "robust": {"method": "adv-bnn", "eps_train": 0.05, "eps_test": 0.05},
            "adversary": {"steps": 1},
            "random": {"prior_std": 0.3, "initial_std": 0.05},
            "diversity": {"weight": 0.1, "measure": "mean"},
            "evaluation": {"pgd_steps": 1, "draws": 1, "attack_draws": (1,), "images": 20},
        }
    )
    runs.run(config, tmp_path, "test")
    run = records.read(tmp_path)
    assert run.name == "Adv-BNN, GradDiv-mean"
    epochs, lengths = records.series(run, "gradients", "rho")
    assert epochs == [0.0, 0.5]
    assert all(0 < length < 1 for length in lengths)
    diversity.main([str(tmp_path)])
    assert f"figure: {tmp_path / 'diversity.png'}" in capsys.readouterr().out
    assert (tmp_path / "diversity.png").stat().st_size > 3_000
