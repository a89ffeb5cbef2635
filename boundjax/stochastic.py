"""Random networks: layers that draw noise or weights, and predictions over several draws.

Every pass of a random network is one draw: the noise and the weights that it draws serve the whole
batch, so a draw is a function of one example. The draws depend on the PRNG key alone, the stream
`"noise"` of a Flax module: `model.apply(variables, x, rngs={"noise": key})`.

What a layer draws can be recorded, as the collection `"draws"` of the variables
(`mutable=["draws"]`). A module that is given this collection uses it and needs no key: it is a
deterministic network, whose drawn values are plain variables. `boundjax.PureModel.fixed_draw` makes
such a network, which `boundjax.certify` bounds like any other.

Random networks are empirical defences: attacks that know of the draws (`boundjax.attacks.pgd` with
`draws`), transfer between draws and larger numbers of draws belong to every evaluation.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jaxtyping import Float

from boundjax.typing import PyTree

COLLECTION = "draws"
STREAM = "noise"


def drawn(module: nn.Module, name: str, draw: Callable[[Array], PyTree]) -> PyTree:
    """A value that a layer draws in each pass, unless the draw is fixed; for layers of one's own.

    Args:
      module: the layer, which calls this at most once per pass with this name.
      name: of the value, among the variables of the layer.
      draw: makes the value from a key. It must not depend on the layer's input but for its shape
        without the batch axis.

    Returns:
      The value of the collection `"draws"` if the variables hold it. Otherwise a new one, which is
      recorded there if the collection is mutable.

    Raises:
      ValueError: if the value is recorded twice: a layer that is called twice draws twice.
    """
    recording = module.is_mutable_collection(COLLECTION) and not module.is_initializing()
    if module.has_variable(COLLECTION, name):
        if recording:
            raise ValueError(
                f"the layer {type(module).__name__} would record the draw {name!r} twice; give "
                "every call a layer of its own, and record draws from variables without draws"
            )
        return module.get_variable(COLLECTION, name)
    value = draw(module.make_rng(STREAM))
    if recording:
        module.put_variable(COLLECTION, name, value)
    return value


class GaussianNoise(nn.Module):
    """Adds Gaussian noise to its input, one draw for the whole batch (RSE, Liu et al. 2018).

    RSE puts it before every convolution, in training and in tests: standard deviation 0.2 before
    the first and 0.1 before the others.

    Attributes:
      std: standard deviation, `>= 0`, in the units of the input. With 0 the input is unchanged.
    """

    std: float

    @nn.compact
    def __call__(self, x: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
        """Returns `x + std * xi` with one standard normal `xi` `[...]` for all examples.

        Raises:
          ValueError: for a standard deviation that is negative or not finite.
        """
        _require_std("std", self.std, least=0.0)
        if self.is_initializing():
            return x

        def draw(key: Array) -> Array:
            shape = (1, *x.shape[1:])
            return jnp.asarray(self.std, x.dtype) * jax.random.normal(key, shape, x.dtype)

        return x + drawn(self, "noise", draw)


class GaussianWeights(nn.Module):
    """A network whose every parameter is Gaussian (Adv-BNN, Liu et al. 2019).

    Each pass draws all parameters of `network`, `w = mean + exp(log_std) * xi`: weights, biases,
    and scales and shifts of batch normalisation; in eval mode as well. Running statistics are not
    drawn. The parameters are two trees of the network's own shape, `mean` and `log_std`, under
    `params/network`; all other collections are those of the network. Where `log_std` is `-inf`, a
    parameter is its mean.

    Attributes:
      network: any Linen module. Inside of another module, make it with `parent=None`.
      prior_std: standard deviation of the prior of every parameter, `> 0`. Adv-BNN's is 0.05 on
        MNIST, 0.1 on CIFAR-10 and 0.15 on STL-10.
      initial_std: standard deviation of every parameter at first, `>= 0`; by default `prior_std`.
      initial_mean: `(key, params) -> params`, the means at first; by default the parameters that
        the network itself creates. `adv_bnn_means` gives Adv-BNN's.
    """

    network: nn.Module
    prior_std: float
    initial_std: float | None = None
    initial_mean: Callable[[Array, PyTree], PyTree] | None = None

    @nn.compact
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Applies the network with parameters drawn for this pass; arguments as the network's.

        Raises:
          ValueError: for standard deviations out of range, and a network of another module.
        """
        if self.network.parent is not self:
            raise ValueError(
                f"the network {type(self.network).__name__} belongs to another module; make it "
                "with parent=None"
            )
        _require_std("prior_std", self.prior_std, above=0.0)
        first_std = self.prior_std if self.initial_std is None else self.initial_std
        _require_std("initial_std", first_std, least=0.0)
        initializing = self.is_initializing()
        weights = None if initializing else self.weights()

        def to_network(stored: PyTree) -> PyTree:
            # While variables are created, the network runs with its means.
            return {"params": stored["params"]["mean"] if initializing else weights}

        def to_stored(created: PyTree) -> PyTree:
            mean = created["params"]
            if self.initial_mean is not None:
                mean = self.initial_mean(self.make_rng("params"), mean)
            return {"params": {"mean": mean, "log_std": _filled(mean, _log(first_std))}}

        def call(network: Any, *args: Any, **kwargs: Any) -> Any:
            return network(*args, **kwargs)

        mapped: Any = nn.map_variables(call, "params", to_network, to_stored, init=initializing)
        return mapped(self.network, *args, **kwargs)

    def weights(self) -> PyTree:
        """The parameters of the network that this pass draws."""
        return drawn(self, "weights", lambda key: gaussian_draw(*self._distribution(), key))

    def kl(self) -> Float[Array, ""]:
        """`gaussian_kl` of all parameters: `model.apply(variables, method="kl")`."""
        _require_std("prior_std", self.prior_std, above=0.0)
        return gaussian_kl(*self._distribution(), self.prior_std)

    def _distribution(self) -> tuple[PyTree, PyTree]:
        stored = self.variables["params"]["network"]
        return stored["mean"], stored["log_std"]


def without_distributions(variables: dict[str, PyTree]) -> dict[str, PyTree]:
    """Variables with recorded draws, without the distributions of weights that are drawn.

    What is left of a `GaussianWeights` are the drawn weights: it can run, but not draw again.
    """

    def kept(params: PyTree, draws: PyTree) -> PyTree:
        if not isinstance(params, Mapping) or not isinstance(draws, Mapping):
            return params
        gaussian = set(params) == {"network"} and "weights" in draws
        if gaussian and set(params["network"]) == {"mean", "log_std"}:
            return {}
        return {name: kept(value, draws.get(name)) for name, value in params.items()}

    params = kept(variables.get("params", {}), variables.get(COLLECTION, {}))
    return {**variables, "params": params} if "params" in variables else variables


def gaussian_draw(mean: PyTree, log_std: PyTree, key: Array) -> PyTree:
    """`mean + exp(log_std) * xi` with independent standard normal `xi`, leaf by leaf.

    Args:
      mean, log_std: trees of one structure, with leaves of equal shapes.
      key: of the draw; every leaf gets a key of its own.

    Returns:
      A tree of the same structure.
    """
    leaves, structure = jax.tree.flatten(mean)
    keys = jax.tree.unflatten(structure, list(jax.random.split(key, len(leaves))))

    def draw(mean: Array, log_std: Array, key: Array) -> Array:
        return mean + jnp.exp(log_std) * jax.random.normal(key, mean.shape, mean.dtype)

    return jax.tree.map(draw, mean, log_std, keys)


def gaussian_kl(mean: PyTree, log_std: PyTree, prior_std: float) -> Float[Array, ""]:
    """Kullback-Leibler divergence of independent Gaussians from the prior `N(0, prior_std^2)`.

    Per parameter `log(sigma_0) - s + (exp(2 s) + mu^2) / (2 sigma_0^2) - 1 / 2`, with
    `s = log_std` (Adv-BNN, Liu et al. 2019); summed over all. It is computed as
    `(expm1(2 d) - 2 d + (mu / sigma_0)^2) / 2` with `d = s - log(sigma_0)`, which does not cancel
    near the prior and is 0 at it. The divergence of a parameter that is not random is infinite.

    Args:
      mean, log_std: trees of one structure.
      prior_std: `sigma_0 > 0`.

    Raises:
      ValueError: for a `prior_std` that is not positive and finite, or trees without parameters.
    """
    _require_std("prior_std", prior_std, above=0.0)

    def summed(mean: Array, log_std: Array) -> Array:
        d = log_std - jnp.asarray(math.log(prior_std), log_std.dtype)
        return 0.5 * jnp.sum(jnp.expm1(2.0 * d) - 2.0 * d + jnp.square(mean / prior_std))

    sums = jax.tree.leaves(jax.tree.map(summed, mean, log_std))
    if not sums:
        raise ValueError("gaussian_kl expects at least one parameter, got empty trees")
    return jnp.sum(jnp.stack(sums))


def adv_bnn_means(key: Array, params: PyTree) -> PyTree:
    """Adv-BNN's first means, for `GaussianWeights.initial_mean`.

    Kernels and their biases are uniform in `+-1 / sqrt(fan_in)`, scales of normalisations in
    `[0, 1]`, and their shifts are 0 (Liu et al. 2019, the authors' code). Other parameters stay.

    Args:
      key: of the draws.
      params: parameters of Flax layers: a `kernel` `[..., in, out]` and its `bias`, or a `scale`
        and its `bias`.
    """
    if not isinstance(params, dict):
        return params
    means = dict(params)
    for index, (name, value) in enumerate(sorted(params.items())):
        subkey = jax.random.fold_in(key, index)
        if isinstance(value, dict):
            means[name] = adv_bnn_means(subkey, value)
        elif name in ("kernel", "bias") and "kernel" in params:
            limit = 1.0 / math.sqrt(max(1, math.prod(params["kernel"].shape[:-1])))
            means[name] = jax.random.uniform(subkey, value.shape, value.dtype, -limit, limit)
        elif name == "scale":
            means[name] = jax.random.uniform(subkey, value.shape, value.dtype)
        elif name == "bias" and "scale" in params:
            means[name] = jnp.zeros_like(value)
    return means


def mean_softmax(
    f: Callable[[Array, Array], Float[Array, "B C"]],
    x: Float[Array, "B ..."],
    key: Array,
    draws: int,
) -> Float[Array, "B C"]:
    """The prediction of a random network: class probabilities, averaged over `draws` draws.

    The papers predict the largest of the mean of 20 draws. As every draw serves the whole batch,
    the draws are the same for all examples.

    Args:
      f: `(x, key) -> logits [B, C]`; `functools.partial(pure.apply, pure.variables)` of a
        `boundjax.PureModel`, say.
      x: `[B, ...]`.
      key: split into one key per draw.
      draws: number of draws, at least 1.

    Returns:
      `[B, C]`, rows that sum to 1.

    Raises:
      ValueError: for `draws < 1`.
    """
    require_draws(draws)
    keys = jax.random.split(key, draws)
    return jnp.mean(each_draw(lambda key: jax.nn.softmax(f(x, key)), keys), axis=0)


def each_draw(f: Callable[[Array], PyTree], keys: Array) -> PyTree:
    """The results of a function of a key for `keys` `[n]`, stacked: `[n, ...]`.

    One draw after the other, in the memory of one: on CPU, `vmap` over the weights of convolutions
    took twice as long, because they become convolutions in groups. A single draw is not a loop,
    in which XLA's CPU backend runs gradients of convolutions three times slower.
    """
    if len(keys) == 1:
        return jax.tree.map(lambda leaf: leaf[None], f(keys[0]))
    return jax.lax.map(f, keys)


def require_draws(draws: int) -> None:
    """Checks a number of draws.

    Raises:
      ValueError: unless it is an integer of at least 1.
    """
    if not isinstance(draws, int) or isinstance(draws, bool) or draws < 1:
        raise ValueError(f"draws must be an integer >= 1, got {draws!r}")


def use_of_key(function: Callable[..., Any]) -> Literal["none", "optional", "required"]:
    """What a function of a batch does with a second argument, by its signature.

    Returns:
      `"required"` if there is one without a default; `"optional"` if it is called `key` and has a
      default, or if the signature does not tell; else `"none"`.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return "optional"
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(positional) < 2:
        variadic = any(p.kind is p.VAR_POSITIONAL for p in parameters)
        return "optional" if variadic else "none"
    if positional[1].default is inspect.Parameter.empty:
        return "required"
    return "optional" if positional[1].name == "key" else "none"


def second_argument(function: Callable[..., Any]) -> str | None:
    """The name of the second positional argument of a function, as far as its signature tells."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return None
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return positional[1].name if len(positional) > 1 else None


def _filled(tree: PyTree, value: float) -> PyTree:
    return jax.tree.map(lambda leaf: jnp.full_like(leaf, value), tree)


def _log(std: float) -> float:
    return math.log(std) if std > 0 else -math.inf


def _require_std(
    name: str, std: float, *, least: float | None = None, above: float | None = None
) -> None:
    finite = math.isfinite(std)
    if not finite or (least is not None and std < least) or (above is not None and std <= above):
        expected = f">= {least:g}" if above is None else f"> {above:g}"
        raise ValueError(f"{name} must be a finite standard deviation {expected}, got {std}")
