"""LLM: "Loss Landscape Matters" (Lee et al. 2021), l-inf, Table 3.4 and Tables C.

All methods of a data set share one schedule. The paper's balls are not clipped to the pixel range;
ours are (`robust.clip`).
"""

from __future__ import annotations

import types
from typing import NamedTuple

from experiments.configs import common
from experiments.configs.recipes import datasets

# `kappa` is the value at radius 0 and ends at 0; `beta` is the value at the end and starts at 1.
KAPPA = {"kappa": ("1", "0")}
LINEAR = {**KAPPA, "beta": ("1", "0")}
MNIST = {"eps": ("0.1", "0.2", "0.3", "0.4"), "eps_train": ("more", "same")}
CIFAR10 = {
    "eps": ("8", "2", "4", "6", "16"),
    "eps_train": ("same", "1.1x"),
    "epochs": ("400", "200", "100"),
}


class _Length(NamedTuple):
    """Adam's rate, natural epochs, epochs of the ramp, and epochs between halvings after it."""

    lr: float
    warmup: float
    ramp: float
    halving: float


# The paper's figures of loss landscapes use 200; 100 is our own, 400 compressed.
_CIFAR10_LENGTHS = {
    "400": _Length(3e-4, 20.0, 240.0, 10.0),
    "200": _Length(1e-3, 10.0, 120.0, 10.0),
    "100": _Length(3e-4, 5.0, 60.0, 2.5),
}
# CAP stores so many rows per unit that the paper trains smaller networks with it.
_CAP_MODELS = {"mnist": "large_star", "cifar10": "medium", "svhn": "small_star"}
_CERTIFICATES = {"ibp": "interval", "cap": "fast-lin", "crown-ibp": "crown-ibp"}


def method(config: common.ConfigDict, name: str, options: types.SimpleNamespace) -> None:
    """Sets the method and its weights, evaluated by the bounds that it trains on, as in the paper.

    CAP's certificates are too expensive for every epoch, so nothing is held out for selection.
    """
    config.robust.method = name
    config.robust.kappa = (float(getattr(options, "kappa", "0")), 0.0)
    certificate = _CERTIFICATES.get(name, "one-step")
    config.evaluation.methods = tuple(dict.fromkeys(("interval", "crown-ibp", certificate)))
    if name == "cap":
        config.data.validation = 0
        config.model.name = _CAP_MODELS[config.data.name]
        config.train.batch_size = 32
        config.relaxation.projections = 50
    elif name != "ibp":
        config.robust.beta = (1.0, float(options.beta))
        config.evaluation.selection_method = certificate if options.beta == "1" else "interval"


def one_step(config: common.ConfigDict, options: types.SimpleNamespace) -> None:
    """Optimises slopes in one of the authors' two ways: one long step, or seven short ones."""
    if options.steps == "7":
        config.relaxation.steps, config.relaxation.step_size = 7, 0.1


def mnist(config: common.ConfigDict, name: str, options: types.SimpleNamespace) -> None:
    """Configures Large, trained at `min(0.4, eps + 0.1)` or eps; the ramp is in epochs 10 to 59."""
    datasets.prepare(config, "mnist")
    common.published_size(config)
    config.model.name = "large"
    config.train.epochs, config.train.batch_size = 200, 100
    config.optim.lr, config.optim.milestones = 5e-4, (130.0, 190.0)
    config.robust.warmup_epochs, config.robust.ramp_epochs = 10.0, 49.0
    _mnist_radius(config, options.eps, more=0.1 if options.eps_train == "more" else 0.0)
    method(config, name, options)


def cifar10(config: common.ConfigDict, name: str, options: types.SimpleNamespace) -> None:
    """Configures Medium, with eps in 255ths."""
    datasets.prepare(config, "cifar10")
    common.published_size(config)
    config.model.name = "medium"
    config.train.epochs, config.train.batch_size = int(options.epochs), 128
    _halved(config, _CIFAR10_LENGTHS[options.epochs])
    config.robust.eps_test = float(options.eps) / 255
    config.robust.eps_train = config.robust.eps_test * (1.1 if options.eps_train == "1.1x" else 1.0)
    method(config, name, options)


def svhn(config: common.ConfigDict, name: str, options: types.SimpleNamespace) -> None:
    """Configures Large at 0.01."""
    datasets.prepare(config, "svhn")
    common.published_size(config)
    config.model.name = "large"
    config.train.epochs = 200
    config.train.batch_size = 80 if name == "one-step" else 128
    _halved(config, _Length(3e-4, 10.0, 120.0, 10.0))
    config.robust.eps_train = config.robust.eps_test = 0.01
    method(config, name, options)


def slopes(config: common.ConfigDict, name: str) -> None:
    """Replaces CROWN's slopes by `cap-ibp`, `random`, or `p-q` for `pq-slopes`."""
    config.robust.method = {"cap-ibp": "cap-ibp", "random": "random-slopes"}.get(name, "pq-slopes")
    if config.robust.method == "pq-slopes":
        p, q = name.split("-")
        config.relaxation.p, config.relaxation.q = float(p), float(q)


def mnist_two_cores(
    config: common.ConfigDict,
    name: str,
    eps: str,
    *,
    epochs: int,
    ramp: float,
    falls: tuple[float, float],
    more: float = 0.05,
) -> None:
    """Configures Small* for 2 CPU cores, trained at `eps + more`; the rate drops to 1/5 at `falls`.

    In so few epochs the training radius 0.15 has a lower standard error than 0.2, at about the same
    verified error on the last 5 000 training images (docs/results.md).
    """
    datasets.prepare(config, "mnist")
    common.two_cores(config)
    config.model.name = "small_star"
    config.train.epochs, config.train.batch_size = epochs, 128
    config.optim.lr, config.optim.factor, config.optim.milestones = 1e-3, 0.2, falls
    config.robust.method = name
    config.robust.warmup_epochs, config.robust.ramp_epochs = 1.0, ramp
    config.robust.kappa = (1.0, 0.5)
    _mnist_radius(config, eps, more)


def mnist_measured(config: common.ConfigDict, every: int) -> None:
    """Configures family A on 3 000 images at 0.3, measured every so many steps, without kappa.

    With batches of 128 there are so few steps that IBP ends as a constant function.
    """
    datasets.prepare(config, "mnist")
    config.data.validation = 57_000
    config.model.name = "family_a"
    config.train.epochs, config.train.batch_size = 12, 32
    config.train.diagnostics = ("landscape", "relaxation", "relus")
    config.train.diagnostics_every = every
    config.optim.lr = 1e-3
    config.robust.warmup_epochs, config.robust.ramp_epochs = 1.0, 7.0
    config.robust.kappa, config.robust.beta = (0.0, 0.0), (1.0, 1.0)
    _mnist_radius(config, "0.3", more=0.0)
    config.evaluation.methods = ("interval", "crown-ibp")
    config.evaluation.every = 12
    config.evaluation.pgd_steps, config.evaluation.pgd_restarts = 10, 1
    config.checkpoint.every = 93


def _mnist_radius(config: common.ConfigDict, eps: str, more: float) -> None:
    """Trains at a larger radius: below 0.4, IBP overfits if it trains at the test radius."""
    config.robust.eps_test = float(eps)
    config.robust.eps_train = min(0.4, round(float(eps) + more, 2))


def _halved(config: common.ConfigDict, length: _Length) -> None:
    config.optim.lr, config.optim.factor = length.lr, 0.5
    config.robust.warmup_epochs, config.robust.ramp_epochs = length.warmup, length.ramp
    config.optim.milestones = common.every(
        length.halving, length.warmup + length.ramp + length.halving, config.train.epochs
    )
