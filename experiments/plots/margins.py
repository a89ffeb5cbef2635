"""Margins of the papers' bounds, image by image, for figures of trained networks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import boundjax as bj
from boundjax.training import robust_cross_entropy
from experiments.data import Images
from experiments.evaluation import trained
from experiments.methods import Setting
from experiments.settings.config import Config
from experiments.settings.errors import ExperimentError

BATCH_SIZE = 100
# (function of one image, its ball, its label, a PRNG key) -> an array.
Measure = Callable[[Callable, bj.InputSet, jax.Array, jax.Array], Any]


class Network(NamedTuple):
    """A trained network and what to measure it on.

    Attributes:
      config: the configuration of its run.
      pure: the network.
      data: test images and their labels.
      threat: radius, norm and clipping of the run's test.
      title: data set, network, method and radius.
    """

    config: Config
    pure: bj.PureModel
    data: Images
    threat: bj.Threat
    title: str


def load(run: Path, count: int | None) -> Network:
    """Loads the network of a run and its first `count` test images (None: all).

    Raises:
      ExperimentError: if the folder holds no network or its data is missing.
    """
    network = trained.load(run)
    robust = network.config.robust
    title = f"{network.title}, {network.config.model.name},\n{robust.method}, "
    title += f"{robust.norm_label} eps {robust.eps_test:.4g}"
    return Network(
        config=network.config,
        pure=network.pure,
        data=network.test.take(slice(count)),
        threat=Setting(network.model, network.config).threat,
        title=title,
    )


def interval_margins(function, ball, label, key) -> jax.Array:
    """Lower bounds `[C - 1]` on `z_y - z_m` by interval bounds."""
    rows = bj.margin_specification(label, len(function(ball.center)), rows="others")
    return bj.interval(function)(ball, rows).lower


def linear_margins(slopes_of: Callable[[jax.Array], Any]) -> Measure:
    """Lower bounds `[C - 1]` by linear bounds on interval pre-activations.

    They are those of the relaxation itself: intersected with intervals, all would look alike.
    """

    def measure(function, ball, label, key) -> jax.Array:
        rows = bj.margin_specification(label, len(function(ball.center)), rows="others")
        bounds = bj.linear(function, slopes=slopes_of(key), sides="lower", has_aux=True)
        return bounds(ball, rows)[1].linear.lower

    return measure


MARGINS: Mapping[str, Measure] = {
    "IBP": interval_margins,
    "random slopes": linear_margins(bj.slopes.uniform),
    "CAP-IBP": linear_margins(lambda key: "parallel"),
    "CROWN-IBP": linear_margins(lambda key: "adaptive"),
    "one step": linear_margins(
        lambda key: bj.optimized(start=bj.slopes.uniform(key), objective=robust_cross_entropy)
    ),
}
# The losses of `experiments.connect` by their names there.
LOSSES: Mapping[str, Measure] = {
    "interval": MARGINS["IBP"],
    "crown-ibp": MARGINS["CROWN-IBP"],
    "one-step": MARGINS["one step"],
}


def over_images(
    network: bj.PureModel,
    threat: bj.Threat,
    measure: Measure,
    size: int,
) -> Callable[[Any, Images], Any]:
    """Compiles a measure for `(variables, data)`; the result has a leading axis of the images.

    Args:
      network: the network; its variables are an argument, which XLA cannot fold for minutes.
      threat: the set around every image.
      measure: what to compute for each image.
      size: images in one compiled call.
    """

    @jax.jit
    def of_batch(variables, images, labels, keys):
        function = network.of_one_example(variables)

        return jax.vmap(lambda image, label, key: measure(function, threat(image), label, key))(
            images, labels, keys
        )

    def of_images(variables: Any, data: Images) -> Any:
        step = min(size, len(data))
        keys = jax.random.split(jax.random.key(0), len(data))
        parts = []
        for start in range(0, len(data), step):
            # Fill the last batch from the first image on, so that all have one shape.
            rows = np.arange(start, start + step) % len(data)
            parts.append(jax.device_get(of_batch(variables, *data.take(rows), keys[rows])))
        return jax.tree.map(lambda *leaves: np.concatenate(leaves)[: len(data)], *parts)

    return of_images


def common_norm(networks: Sequence[Network]) -> str:
    """Returns the printed name of the norm that networks are tested in.

    Raises:
      ExperimentError: if it is not one norm.
    """
    labels = sorted({network.config.robust.norm_label for network in networks})
    if len(labels) > 1:
        raise ExperimentError(
            f"the runs of a figure must be in one norm, got {' and '.join(labels)}"
        )
    return labels[0]
