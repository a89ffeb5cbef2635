"""Random networks in three arithmetics: as bounds see them, in float64, and in any order of sums.

`experiments.benchmarks.rounding` compares bounds with their values. A network is written once, as a
function of a calculus:

* `Ordinary` computes with JAX's ops in the dtype of its inputs; bounds are of this function;
* `Certified64` computes in float64 and carries a bound on its own rounding;
* `Ordered` adds the terms of every sum one after the other, in an order that it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

Weights = Mapping[str, Any]


class Calculus(Protocol):
    """The layers of a network on single examples; images are `[H, W, C]`."""

    def product(self, x: Any, weights: Array, bias: Array, plus: Any = None) -> Any:
        """`x @ weights + bias + plus` on the last axis."""
        ...

    def convolution(self, x: Any, kernel: Array, bias: Array, stride: int, plus: Any = None) -> Any:
        """A convolution with a kernel `[3, 3, C, F]`, zeros around the image, and `plus`."""
        ...

    def relu(self, x: Any) -> Any:
        """`max(x, 0)`."""
        ...

    def tanh(self, x: Any) -> Any:
        """`tanh(x)`."""
        ...

    def max_pool(self, x: Any) -> Any:
        """The maxima of windows of 3 x 3, two pixels apart."""
        ...

    def avg_pool(self, x: Any) -> Any:
        """The means of windows of 3 x 3, three pixels apart."""
        ...

    def softmax(self, x: Any) -> Any:
        """`exp(x) / sum exp(x)` of a vector."""
        ...

    def normalize(self, x: Any, mean: Array, variance: Array, scale: Array, bias: Array) -> Any:
        """Batch normalisation by stored statistics."""
        ...

    def flat(self, x: Any) -> Any:
        """A vector of all elements."""
        ...


EPSILON = np.float32(1e-5)  # of batch normalisation


class Ordinary:
    """JAX's ops."""

    def product(self, x: Array, weights: Array, bias: Array, plus: Array | None = None) -> Array:
        """See `Calculus`."""
        y = x @ weights + bias
        return y if plus is None else y + plus

    def convolution(
        self, x: Array, kernel: Array, bias: Array, stride: int, plus: Array | None = None
    ) -> Array:
        """See `Calculus`."""
        y = jax.lax.conv_general_dilated(
            x[None], kernel, (stride, stride), [(1, 1), (1, 1)],
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )[0]  # fmt: skip
        y = y + _along(bias, y)
        return y if plus is None else y + plus

    def relu(self, x: Array) -> Array:
        """See `Calculus`."""
        return jax.nn.relu(x)

    def tanh(self, x: Array) -> Array:
        """See `Calculus`."""
        return jnp.tanh(x)

    def max_pool(self, x: Array) -> Array:
        """See `Calculus`."""
        return nn.max_pool(x, (3, 3), strides=(2, 2))

    def avg_pool(self, x: Array) -> Array:
        """See `Calculus`."""
        size = (3, 3, 1)
        return jax.lax.reduce_window(x, 0.0, jax.lax.add, size, size, "VALID") / 9.0

    def softmax(self, x: Array) -> Array:
        """See `Calculus`."""
        return jax.nn.softmax(x)

    def normalize(self, x: Array, mean: Array, variance: Array, scale: Array, bias: Array) -> Array:
        """See `Calculus`; the formula of Flax."""
        factor = jax.lax.rsqrt(variance + EPSILON) * scale
        return (x - _along(mean, x)) * _along(factor, x) + _along(bias, x)

    def flat(self, x: Array) -> Array:
        """See `Calculus`."""
        return x.reshape(-1)


class Certain(NamedTuple):
    """A float64 number and a bound on its distance to the exact one, of one shape."""

    value: Array
    error: Array


# Twice the unit of float64: a sum of n terms in any order is off by less than n of these times the
# sum of their sizes, and the surplus pays for the rounding of error bounds themselves.
_UNIT = 2.0**-52
# Assumed errors of exp and tanh in float64, in units of `_UNIT`: a few times the documented ones.
_FUNCTION = 16.0


class Certified64:
    """float64 with bounds on its own rounding; weights are exact numbers of any dtype."""

    def product(
        self, x: Certain, weights: Array, bias: Array, plus: Certain | None = None
    ) -> Certain:
        """See `Calculus`."""
        weights, bias = (jnp.asarray(array, jnp.float64) for array in (weights, bias))
        value, size = x.value @ weights, jnp.abs(x.value) @ jnp.abs(weights)
        value, size = value + _along(bias, value), size + _along(jnp.abs(bias), value)
        error = x.error @ jnp.abs(weights)
        if plus is not None:
            value, size = value + plus.value, size + jnp.abs(plus.value)
            error = error + plus.error
        return Certain(value, error * (1.0 + 1e-12) + (len(weights) + 4) * _UNIT * size)

    def convolution(
        self,
        x: Certain,
        kernel: Array,
        bias: Array,
        stride: int,
        plus: Certain | None = None,
    ) -> Certain:
        """See `Calculus`."""
        patches = Certain(*(_patches(array, stride) for array in x))
        return self.product(patches, kernel.reshape(-1, kernel.shape[-1]), bias, plus)

    def relu(self, x: Certain) -> Certain:
        """See `Calculus`."""
        return Certain(jnp.maximum(x.value, 0.0), x.error)

    def tanh(self, x: Certain) -> Certain:
        """See `Calculus`; slopes are at most 1."""
        value = jnp.tanh(x.value)
        return Certain(value, x.error + _FUNCTION * _UNIT * jnp.abs(value))

    def max_pool(self, x: Certain) -> Certain:
        """See `Calculus`."""
        return Certain(*(_windows(array, 3, 2).max(0) for array in x))

    def avg_pool(self, x: Certain) -> Certain:
        """See `Calculus`."""
        terms = _windows(x.value, 3, 3)
        error = _windows(x.error, 3, 3).sum(0) * (1.0 + 1e-12) / 9.0
        return Certain(terms.sum(0) / 9.0, error + 12 * _UNIT * jnp.abs(terms).sum(0) / 9.0)

    def softmax(self, x: Certain) -> Certain:
        """See `Calculus`."""
        largest = x.value.max()  # may be any number: softmax is invariant
        shifted = x.value - largest
        power = jnp.exp(shifted)
        relative = jnp.expm1(x.error + _UNIT * jnp.abs(shifted)) * (1.0 + 1e-12)
        error = power * (relative + _FUNCTION * _UNIT)
        total = power.sum()
        off = error.sum() * (1.0 + 1e-12) + len(power) * _UNIT * total
        value = power / total
        # |p / t - P / T| <= (|p - P| + (p / t) |t - T|) / T
        return Certain(
            value, (error + value * off) * (1.0 + 1e-12) / (total - off) + 2.0 * _UNIT * value
        )

    def normalize(
        self, x: Certain, mean: Array, variance: Array, scale: Array, bias: Array
    ) -> Certain:
        """See `Calculus`."""
        mean, variance, scale, bias, epsilon = (
            jnp.asarray(array, jnp.float64) for array in (mean, variance, scale, bias, EPSILON)
        )
        factor = scale / jnp.sqrt(variance + epsilon)
        mean, factor, bias = (_along(array, x.value) for array in (mean, factor, bias))
        size = (jnp.abs(x.value) + jnp.abs(mean)) * jnp.abs(factor) + jnp.abs(bias)
        error = x.error * jnp.abs(factor) * (1.0 + 1e-12) + 12 * _UNIT * size
        return Certain((x.value - mean) * factor + bias, error)

    def flat(self, x: Certain) -> Certain:
        """See `Calculus`."""
        return Certain(*(array.reshape(-1) for array in x))


class Order(NamedTuple):
    """An order of summation in integers, which may be traced: one program serves all orders.

    Attributes:
      arrangement: 0 bias and other branch first, 1 last, otherwise the seed of a random order.
      early: the terms that come first: 0 all, 1 positive ones, 2 negative ones, 3 those that are
        larger than their mean size, 4 smaller ones.
      chunk: so many terms are added up before they are added to the rest.
    """

    arrangement: ArrayLike
    early: ArrayLike
    chunk: ArrayLike


_ALL = 2**30
ORDERS = (
    Order(0, 0, _ALL),
    Order(1, 0, _ALL),
    *(Order(seed, 0, _ALL) for seed in (2, 3, 4)),
    *(Order(a, early, _ALL) for a in (0, 1) for early in (1, 2)),
    *(Order(5, early, _ALL) for early in (3, 4)),
    *(Order(seed, 0, chunk) for seed, chunk in ((6, 2), (7, 4), (8, 8), (9, 16))),
    Order(10, 1, 8),
)


class Ordered:
    """Sums term after term; every product is rounded before it is added."""

    def __init__(self, order: Order):
        self.order = order

    def _total(self, terms: Array) -> Array:
        """The sum over the first axis, `[n, ...]` to `[...]`."""
        arrangement, early, chunk = self.order
        count = len(terms)
        forth = jnp.arange(count)
        random = jax.random.permutation(jax.random.key(arrangement), count)
        places = jnp.where(
            arrangement == 0, forth, jnp.where(arrangement == 1, forth[::-1], random)
        )
        terms = terms[places]
        size, mean = jnp.abs(terms), jnp.abs(terms).mean(0, keepdims=True)
        choices = [terms == terms, terms > 0, terms < 0, size >= mean, size < mean]
        first = jnp.select([early == k for k in range(len(choices))], choices, True)
        # Zeros in between change no sum.
        terms = jnp.concatenate([jnp.where(first, terms, 0.0), jnp.where(first, 0.0, terms)])
        ends = (jnp.arange(2 * count) + 1) % chunk == 0

        def add(sums: tuple[Array, Array], step: tuple[Array, Array]) -> Any:
            part, whole = sums
            term, ended = step
            part = part + term
            return (jnp.where(ended, 0.0, part), jnp.where(ended, whole + part, whole)), None

        zero = jnp.zeros_like(terms[0])
        (part, whole), _ = jax.lax.scan(add, (zero, zero), (terms, ends))
        return whole + part

    def product(self, x: Array, weights: Array, bias: Array, plus: Array | None = None) -> Array:
        """See `Calculus`."""
        factors = x[..., None]
        terms = jnp.moveaxis(factors * _along(weights, factors), -2, 0)
        added = [bias] if plus is None else [bias, plus]
        added = [jnp.broadcast_to(array, terms.shape[1:]) for array in added]
        return self._total(jnp.concatenate([jnp.stack(added), terms]))

    def convolution(
        self, x: Array, kernel: Array, bias: Array, stride: int, plus: Array | None = None
    ) -> Array:
        """See `Calculus`."""
        weights = kernel.reshape(-1, kernel.shape[-1])
        return self.product(_patches(x, stride), weights, bias, plus)

    def relu(self, x: Array) -> Array:
        """See `Calculus`."""
        return jax.nn.relu(x)

    def tanh(self, x: Array) -> Array:
        """See `Calculus`."""
        return jnp.tanh(x)

    def max_pool(self, x: Array) -> Array:
        """See `Calculus`."""
        return _windows(x, 3, 2).max(0)

    def avg_pool(self, x: Array) -> Array:
        """See `Calculus`."""
        return self._total(_windows(x, 3, 3)) / 9.0

    def softmax(self, x: Array) -> Array:
        """See `Calculus`."""
        powers = jnp.exp(x - x.max())
        return powers / self._total(powers)

    def normalize(self, x: Array, mean: Array, variance: Array, scale: Array, bias: Array) -> Array:
        """See `Calculus`."""
        return Ordinary().normalize(x, mean, variance, scale, bias)

    def flat(self, x: Array) -> Array:
        """See `Calculus`."""
        return x.reshape(-1)


def _along(values: Array, x: Array) -> Array:
    """Values of the last axes with axes of length 1 in front, as many as `x` has more."""
    return values.reshape((1,) * (x.ndim - values.ndim) + values.shape)


def _windows(x: Array, size: int, stride: int) -> Array:
    """The pixels of windows, `[H, W, C]` to `[size^2, H', W', C]`."""
    height, width, _ = x.shape
    rows, columns = height - size + 1, width - size + 1
    places = [(i, j) for i in range(size) for j in range(size)]
    return jnp.stack([x[i : i + rows : stride, j : j + columns : stride] for i, j in places])


def _patches(x: Array, stride: int) -> Array:
    """What 3 x 3 kernels see of an image with zeros around it, `[H', W', 9 C]`."""
    windows = _windows(jnp.pad(x, ((1, 1), (1, 1), (0, 0))), 3, stride)
    return jnp.concatenate(list(windows), axis=-1)


class Architecture(NamedTuple):
    """A kind of network.

    Attributes:
      apply: `(calculus, weights, x) -> logits [4]`.
      shapes: of the weights, by name. Names begin with `w` (weights of a product or a convolution,
        the last axis is that of the outputs), `b` (biases), `m`, `v` or `s` (mean, variance and
        scale of a batch normalisation).
      input_shape: of one example.
      lipschitz: whether there are Lipschitz bounds.
    """

    apply: Callable[[Calculus, Weights, Any], Any]
    shapes: Mapping[str, tuple[int, ...]]
    input_shape: tuple[int, ...]
    lipschitz: bool = False


def _mlp(c: Calculus, w: Weights, x: Any) -> Any:
    hidden = c.relu(c.product(x, w["w1"], w["b1"]))
    return c.product(c.relu(c.product(hidden, w["w2"], w["b2"])), w["w3"], w["b3"])


def _conv(c: Calculus, w: Weights, x: Any) -> Any:
    x = c.relu(c.convolution(x, w["w1"], w["b1"], 1))
    x = c.relu(c.convolution(x, w["w2"], w["b2"], 2))
    return c.product(c.flat(x), w["w3"], w["b3"])


def _residual(c: Calculus, w: Weights, x: Any) -> Any:
    x = c.relu(c.convolution(x, w["w1"], w["b1"], 2))
    y = c.relu(c.convolution(x, w["w2"], w["b2"], 1))
    x = c.relu(c.convolution(y, w["w3"], w["b3"], 1, x))
    return c.product(c.flat(x), w["w4"], w["b4"])


def _max_pool(c: Calculus, w: Weights, x: Any) -> Any:
    x = c.max_pool(c.relu(c.convolution(x, w["w1"], w["b1"], 1)))
    return c.product(c.flat(x), w["w2"], w["b2"])


def _avg_pool(c: Calculus, w: Weights, x: Any) -> Any:
    x = c.avg_pool(c.relu(c.convolution(x, w["w1"], w["b1"], 1)))
    return c.product(c.flat(x), w["w2"], w["b2"])


def _softmax(c: Calculus, w: Weights, x: Any) -> Any:
    hidden = c.relu(c.product(x, w["w1"], w["b1"]))
    return c.product(c.softmax(c.product(hidden, w["w2"], w["b2"])), w["w3"], w["b3"])


def _tanh(c: Calculus, w: Weights, x: Any) -> Any:
    hidden = c.tanh(c.product(x, w["w1"], w["b1"]))
    return c.product(c.tanh(c.product(hidden, w["w2"], w["b2"])), w["w3"], w["b3"])


def _batch_norm(c: Calculus, w: Weights, x: Any) -> Any:
    x = c.convolution(x, w["w1"], w["b1"], 2)
    x = c.relu(c.normalize(x, w["m1"], w["v1"], w["s1"], w["b2"]))
    return c.product(c.flat(x), w["w2"], w["b3"])


OUTPUTS = 4
_IMAGE = (6, 6, 2)
_VECTOR = {
    "w1": (40, 32), "b1": (32,), "w2": (32, 32), "b2": (32,), "w3": (32, OUTPUTS), "b3": (OUTPUTS,),
}  # fmt: skip
_POOLED = {"w1": (3, 3, 2, 6), "b1": (6,), "w2": (24, OUTPUTS), "b2": (OUTPUTS,)}
ARCHITECTURES: Mapping[str, Architecture] = {
    "mlp": Architecture(_mlp, _VECTOR, (40,), lipschitz=True),
    "convolution": Architecture(
        _conv,
        {
            "w1": (3, 3, 2, 4), "b1": (4,), "w2": (3, 3, 4, 6), "b2": (6,),
            "w3": (54, OUTPUTS), "b3": (OUTPUTS,),
        },
        _IMAGE,
    ),
    "residual": Architecture(
        _residual,
        {
            "w1": (3, 3, 2, 4), "b1": (4,), "w2": (3, 3, 4, 4), "b2": (4,), "w3": (3, 3, 4, 4),
            "b3": (4,), "w4": (36, OUTPUTS), "b4": (OUTPUTS,),
        },
        _IMAGE,
    ),
    "max pool": Architecture(_max_pool, _POOLED, _IMAGE),
    "average pool": Architecture(_avg_pool, _POOLED, _IMAGE),
    "softmax": Architecture(
        _softmax,
        {
            "w1": (24, 24), "b1": (24,), "w2": (24, 6), "b2": (6,),
            "w3": (6, OUTPUTS), "b3": (OUTPUTS,),
        },
        (24,),
    ),
    "tanh": Architecture(
        _tanh,
        {
            "w1": (24, 24), "b1": (24,), "w2": (24, 24), "b2": (24,),
            "w3": (24, OUTPUTS), "b3": (OUTPUTS,),
        },
        (24,),
    ),
    "batch norm": Architecture(
        _batch_norm,
        {
            "w1": (3, 3, 2, 4), "b1": (4,), "m1": (4,), "v1": (4,), "s1": (4,), "b2": (4,),
            "w2": (36, OUTPUTS), "b3": (OUTPUTS,),
        },
        _IMAGE,
    ),
}  # fmt: skip


def draw(
    architecture: Architecture, count: int, random: np.random.Generator
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Draws networks and inputs, float32, stacked along the first axis.

    Every other network is an ordinary one with the variances of He et al. 2015. In the rest the
    terms of every sum cancel and biases are large, so that little is left of what is rounded.

    Args:
      architecture: the kind of network.
      count: number of networks.
      random: generator.

    Returns:
      The weights by name and the inputs in `[0, 1]`.
    """
    cancels = np.arange(count) % 2 == 1
    weights = {}
    for name, shape in architecture.shapes.items():
        value = random.normal(size=(count, *shape))
        each = cancels.reshape(-1, *(1 for _ in shape))
        if name.startswith("w"):
            value *= np.sqrt(2.0 / np.prod(shape[:-1]))
            flat = value.reshape(count, -1, shape[-1])
            total = flat.sum(1)
            flat[cancels, -1] -= total[cancels]
            value = flat.reshape(value.shape)
        elif name.startswith("v"):
            value = 10.0 ** (value - 2.0 * each)
        elif name.startswith("s"):
            value = 1.0 + 0.3 * value
        else:
            value *= np.where(each, 3.0, 0.1)
        weights[name] = value.astype(np.float32)
    x = random.uniform(size=(count, *architecture.input_shape))
    # Equal pixels let weights cancel.
    mean = x.mean(axis=tuple(range(1, x.ndim)), keepdims=True)
    x = np.where(cancels.reshape(-1, *(1 for _ in architecture.input_shape)), mean + 0 * x, x)
    return weights, x.astype(np.float32)
