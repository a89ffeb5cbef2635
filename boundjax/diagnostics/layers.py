"""How much each layer widens bounds: difference gains, widths, and norms of layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from boundjax.sets.interval import Interval


def difference_gain(kernel: Float[Array, "... n m"]) -> Float[Array, ""]:
    """The difference gain `n E|w| / 2` of a layer behind ReLUs, from its weights alone.

    It is the factor by which the layer widens interval bounds on average, if half of the width of
    its operands was lost at the ReLUs before it. 1 is stable. At initialisation it is 1 for
    `boundjax.training.ibp_normal`, `sqrt(n) / 4` for weights uniform in `+-1 / sqrt(n)` (PyTorch's
    default), `sqrt(n / pi)` for Kaiming normal weights and `sqrt(n / (2 pi))` for orthogonal ones.

    Args:
      kernel: `[..., n_in, out]`, whose axes but the last are the `n` inputs of a unit.

    Returns:
      A scalar; NaN where a weight is NaN.

    Raises:
      ValueError: for fewer than two axes, or no weights.

    Source: Shi et al. 2021, "Fast Certified Robust Training with Short Warmup", eq. 6 and Table 5.
    """
    if kernel.ndim < 2 or not kernel.size:
        raise ValueError(f"a kernel needs a shape [..., in, out], got {kernel.shape}")
    return 0.5 * math.prod(kernel.shape[:-1]) * jnp.mean(jnp.abs(kernel))


def mean_widths(pre_activations: Mapping[str, Interval]) -> dict[str, Float[Array, ""]]:
    """The mean width `u - l` of the bounds before each nonlinear op, over batch and units.

    Args:
      pre_activations: label -> bounds of any shape, of one example or of a batch.

    Returns:
      label -> scalar, in the order of the entries; Figure 1 of the source shows their logarithms.

    Raises:
      ValueError: for no bounds.

    Source: Shi et al. 2021, "Fast Certified Robust Training with Short Warmup", section 3.2.1.
    """
    if not pre_activations:
        raise ValueError("pre_activations must hold the bounds of at least one layer, got none")
    return {label: jnp.mean(b.upper - b.lower) for label, b in pre_activations.items()}


def width_gains(
    input_interval: Interval,
    pre_activations: Mapping[str, Interval],
    labels: Sequence[str] | None = None,
) -> dict[str, Float[Array, ""]]:
    """The factor by which the mean width of bounds grows from each layer to the next.

    `difference_gain` predicts it from the weights of a layer behind ReLUs.

    Args:
      input_interval: the input box, of any shape, in the units that the first layer reads.
      pre_activations: label -> bounds of any shape, of one example or of a batch.
      labels: the labels in the order of the layers of a chain; by default that of the entries.
        (`jit` and `vmap` sort the entries of the dicts that they return: `relu_10` before
        `relu_2`.)

    Returns:
      label -> scalar: the mean width before this op divided by that before the op in front of it
      (of the input, for the first). NaN or infinite where bounds were points.

    Raises:
      ValueError: for no bounds, or labels that are not those of the bounds.

    Source: Shi et al. 2021, "Fast Certified Robust Training with Short Warmup", eq. 6.
    """
    order = list(pre_activations) if labels is None else list(labels)
    if sorted(order) != sorted(pre_activations):
        raise ValueError(
            f"labels must be those of pre_activations ({', '.join(sorted(pre_activations))}), got "
            f"{', '.join(order) or 'none'}"
        )
    widths = mean_widths({label: pre_activations[label] for label in order})
    before = [jnp.mean(input_interval.upper - input_interval.lower), *widths.values()]
    return {label: width / before[i] for i, (label, width) in enumerate(widths.items())}


def log_norm_product(norms: Mapping[str, Float[Array, ""]]) -> Float[Array, ""]:
    """The logarithm of the product of the spectral norms of all layers: `sum_k log sigma_k`.

    Without branches its exponential is a Lipschitz constant of the network (with activations that
    have Lipschitz constant 1). BCP and LMT keep it small without a penalty.

    Args:
      norms: label -> scalar: `boundjax.spectral_norms`, provable upper bounds, or the estimates
        of `boundjax.power_iteration` in training.

    Returns:
      A scalar; minus infinity where a layer is 0, NaN where a norm is NaN.

    Raises:
      ValueError: for no norms.

    Source: Lee, Lee and Park 2020, "Lipschitz-Certifiable Training with a Tight Outer Bound",
    Figures B.1 and B.2 of Lee's thesis.
    """
    if not norms:
        raise ValueError("norms must hold the norm of at least one layer, got none")
    return jnp.sum(jnp.log(jnp.stack(list(norms.values()))))
