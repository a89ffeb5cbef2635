"""Errors on the validation images, which select the epoch."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import ArrayLike

import boundjax as bj
from boundjax.certification.presets import Method
from experiments.cluster import distributed
from experiments.data import Images
from experiments.train.prepare import Prepared, is_certify_method
from experiments.train.step import State
from experiments.train.variables import deployed


def validate(prepared: Prepared, state: State) -> dict[str, float]:
    """Returns the errors on the validation images, which process 0 computes.

    They are the standard error and the verified error at `robust.eps_test`.
    """
    config, validation = prepared.config, prepared.splits.validation
    method = config.evaluation.selection_method
    assert is_certify_method(method)  # `prepare` rejects any other name
    variables = jax.device_put(deployed(config, prepared.model, state, prepared.splits))
    size = min(config.evaluation.batch_size, len(validation))

    def errors() -> dict[str, float]:
        flags = {
            key: verified(
                prepared.model,
                variables,
                validation,
                eps,
                norm=prepared.threat.norm,
                clip=prepared.threat.clip,
                method=method,
                batch_size=size,
            )
            for key, eps in (("standard_error", 0.0), ("verified_error", config.robust.eps_test))
        }
        return {key: float(1.0 - np.mean(value)) for key, value in flags.items()}

    return distributed.from_main(errors)


def verified(
    model: nn.Module,
    variables: Any,
    data: Images,
    eps: float,
    *,
    norm: float = jnp.inf,
    clip: tuple[ArrayLike, ArrayLike] | None,
    method: Method,
    batch_size: int,
) -> np.ndarray:
    """Returns which examples `boundjax.certify` verifies for their true label, bool `[N]`."""
    certificate = bj.certify(
        (model, variables),
        data.images,
        eps,
        labels=data.labels,
        norm=norm,
        clip=clip,
        method=method,
        batch_size=batch_size,
        devices=jax.local_devices(),
    )
    return np.asarray(certificate.verified)
