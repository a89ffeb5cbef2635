"""Standard, PGD and verified error, example by example, and the check that they are consistent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import boundjax as bj
from boundjax.attacks import pgd
from experiments.config import EvaluationConfig
from experiments.data import Images
from experiments.errors import ExperimentError


class Evaluation(NamedTuple):
    """What was found for each example (bool `[N]`); the errors are fractions in `[0, 1]`."""

    correct: np.ndarray
    resisted: np.ndarray  # still correct at the strongest attack point
    verified_by: dict[str, np.ndarray]  # per method of `boundjax.certify`

    @property
    def verified(self) -> np.ndarray:
        """Verified by at least one of the methods, which are all sound."""
        return np.logical_or.reduce(list(self.verified_by.values()))

    def errors(self) -> dict[str, Any]:
        """The errors, as `summary.json` holds them."""
        return {
            "standard_error": _error(self.correct),
            "pgd_error": _error(self.resisted),
            "verified_error": _error(self.verified),
            "verified_error_by": {name: _error(flags) for name, flags in self.verified_by.items()},
        }


def evaluate(
    model: nn.Module,
    variables: Any,
    data: Images,
    eps: float,
    *,
    norm: float = jnp.inf,
    clip: tuple[float, float] | None,
    config: EvaluationConfig,
    seed: int = 0,
) -> Evaluation:
    """Evaluates the eval-mode `model` on all of `data` in the ball of radius `eps` in `norm`.

    Raises:
      ExperimentError: for an empty data set or an unknown method.
      RuntimeError: if standard error <= PGD error <= verified error fails for an example, which
        means that a bound is wrong.
    """
    if len(data) == 0:
        raise ExperimentError("cannot evaluate on no images; set data.validation > 0")
    size = min(config.batch_size, len(data))

    # Compiled once: the variables and the images are arguments, the last batch is padded to full
    # size.
    @jax.jit
    def predict_and_attack(variables, images, labels, key):
        def logits_of(x):
            return model.apply(variables, x)

        attacked = pgd(
            logits_of,
            images,
            labels,
            eps,
            key=key,
            norm=norm,
            clip=clip,
            steps=config.pgd_steps,
            restarts=config.pgd_restarts,
            loss=config.pgd_loss,
        )
        return logits_of(images), logits_of(attacked)

    key = jax.random.key(seed)
    correct, resisted = [], []
    for index, start in enumerate(range(0, len(data), size)):
        chunk = data.take(np.arange(start, start + size) % len(data))
        clean, attacked = predict_and_attack(variables, *chunk, jax.random.fold_in(key, index))
        correct.append(_strictly_correct(clean, chunk.labels))
        # The centre is a point of the ball as well: what is wrong there does not resist.
        resisted.append(correct[-1] & _strictly_correct(attacked, chunk.labels))
    evaluation = Evaluation(
        correct=np.concatenate(correct)[: len(data)],
        resisted=np.concatenate(resisted)[: len(data)],
        verified_by={
            name: verified(
                model, variables, data, eps, norm=norm, clip=clip, method=name, batch_size=size
            )
            for name in config.methods
        },
    )
    check_consistency(evaluation)
    return evaluation


def verified(
    model: nn.Module,
    variables: Any,
    data: Images,
    eps: float,
    *,
    norm: float = jnp.inf,
    clip: tuple[float, float] | None,
    method: str,
    batch_size: int,
) -> np.ndarray:
    """Which examples `boundjax.certify` verifies for their true label, bool `[N]`."""
    certificate = bj.certify(
        (model, variables),
        jnp.asarray(data.images),
        eps,
        labels=jnp.asarray(data.labels),
        norm=norm,
        clip=clip,
        method=method,
        batch_size=batch_size,
    )
    return np.asarray(certificate.verified)


def check_consistency(evaluation: Evaluation) -> None:
    """Standard <= PGD <= verified error by example: what is verified is correct and resists.

    Raises:
      RuntimeError: naming the first example and the method that break it.
    """
    _require(~evaluation.resisted | evaluation.correct, "resists PGD but is misclassified")
    for name, flags in evaluation.verified_by.items():
        _require(~flags | evaluation.correct, f"is verified by {name} but misclassified")
        _require(~flags | evaluation.resisted, f"is verified by {name} but PGD breaks it")


def table_rows(results: dict[str, dict[str, Any]]) -> tuple[Sequence[str], list[list[str]]]:
    """Header and rows, in percent, of the closing table: one row per entry of `results`."""
    methods = list(next(iter(results.values()))["verified_error_by"])
    header = ["model", "standard", "PGD", "verified", *(f"by {name}" for name in methods)]
    rows = []
    for name, errors in results.items():
        values = [errors["standard_error"], errors["pgd_error"], errors["verified_error"]]
        values += [errors["verified_error_by"][method] for method in methods]
        rows.append([name, *(f"{100 * value:.2f} %" for value in values)])
    return header, rows


def _strictly_correct(logits: jax.Array, labels: np.ndarray) -> np.ndarray:
    """The true logit exceeds every other; a tie or a NaN is an error, as for a certificate."""
    logits = np.asarray(logits)
    own = np.take_along_axis(logits, labels[:, None], axis=-1)
    others = np.arange(logits.shape[-1])[None] != labels[:, None]
    return np.all((own > logits) | ~others, axis=-1)


def _error(good: np.ndarray) -> float:
    return float(1.0 - np.mean(good))


def _require(holds: np.ndarray, what: str) -> None:
    broken = np.flatnonzero(~holds)
    if broken.size:
        raise RuntimeError(
            f"example {broken[0]} ({broken.size} in all) {what}: "
            "a bound or the attack is wrong, please report it"
        )
