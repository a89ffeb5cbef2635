"""Elementwise functions with domains, and intervals on which their bounds are tested."""

import jax
import jax.numpy as jnp
import numpy as np

SCALARS = {
    "relu": jax.nn.relu,
    "leaky_relu": lambda x: jax.nn.leaky_relu(x, 0.1),
    "leaky_relu_convex_falling": lambda x: jax.nn.leaky_relu(x, -0.5),
    "leaky_relu_concave": lambda x: jax.nn.leaky_relu(x, 1.5),
    "relu6": jax.nn.relu6,
    "clip": lambda x: jnp.clip(x, -0.5, 0.7),
    "clip_to_a_point": lambda x: jnp.clip(x, 0.25, 0.25),
    "abs": jnp.abs,
    "maximum": lambda x: jnp.maximum(x, -0.3),
    "minimum": lambda x: jnp.minimum(0.4, x),
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
    "softplus": jax.nn.softplus,
}

# Functions that no slope policy moves, with arguments for which their values fit float32.
EVERYWHERE = (-2e3, 2e3)
# Places and values of an interpolated function with a jump.
KNOTS = ((-1.0, -0.5, 0.1, 0.1, 2.2), (0.3, 1.0, -0.5, 0.7, 2.0))
SMOOTH = {
    "exp": (jnp.exp, (-2e3, 80.0)),
    "exp2": (jnp.exp2, (-2e3, 20.0)),
    "expm1": (jnp.expm1, (-2e3, 80.0)),
    "log": (jnp.log, (1e-6, 2e3)),
    "log1p": (jnp.log1p, (-1 + 1e-6, 2e3)),
    "sqrt": (jnp.sqrt, (0.0, 2e3)),
    "rsqrt": (jax.lax.rsqrt, (1e-6, 2e3)),
    "square": (jnp.square, EVERYWHERE),
    "cube": (lambda x: x**3, EVERYWHERE),
    "fourth_power": (lambda x: x**4, EVERYWHERE),
    "reciprocal": (lambda x: 1.0 / x, (1e-3, 2e3)),
    "reciprocal_of_negative": (jnp.reciprocal, (-2e3, -1e-3)),
    "inverse_square_of_negative": (lambda x: x**-2, (-2e3, -1e-2)),
    "inverse_cube_of_negative": (lambda x: x**-3, (-2e3, -1e-1)),
    "power_convex": (lambda x: x**2.5, (0.0, 2e3)),
    "power_concave": (lambda x: x**0.3, (0.0, 2e3)),
    "power_falling": (lambda x: x**-1.5, (1e-3, 2e3)),
    "power_of_a_base": (lambda x: 0.3**x, (-70.0, 2e3)),
    "sin": (jnp.sin, EVERYWHERE),
    "cos": (jnp.cos, EVERYWHERE),
    "erf": (jax.lax.erf, EVERYWHERE),
    "erfc": (jax.lax.erfc, EVERYWHERE),
    "atan": (jnp.arctan, EVERYWHERE),
    "asinh": (jnp.arcsinh, EVERYWHERE),
    "sinh": (jnp.sinh, (-20.0, 20.0)),
    "cosh": (jnp.cosh, (-20.0, 20.0)),
    "silu": (jax.nn.silu, EVERYWHERE),
    "gelu": (jax.nn.gelu, EVERYWHERE),
    "gelu_exact": (lambda x: jax.nn.gelu(x, approximate=False), EVERYWHERE),
    "mish": (jax.nn.mish, EVERYWHERE),
    "elu": (jax.nn.elu, EVERYWHERE),
    "elu_concave_kink": (lambda x: jax.nn.elu(x, 3.0), EVERYWHERE),
    "elu_falling": (lambda x: jax.nn.elu(x, -0.7), EVERYWHERE),
    "selu": (jax.nn.selu, EVERYWHERE),
    "celu": (lambda x: jax.nn.celu(x, 1.3), EVERYWHERE),
    "celu_concave": (lambda x: jax.nn.celu(x, -2.0), (-100.0, 2e3)),
    "soft_sign": (jax.nn.soft_sign, EVERYWHERE),
    "log_sigmoid": (jax.nn.log_sigmoid, EVERYWHERE),
    "hard_sigmoid": (jax.nn.hard_sigmoid, EVERYWHERE),
    "hard_silu": (jax.nn.hard_silu, EVERYWHERE),
    "squareplus": (lambda x: jax.nn.squareplus(x, 2.0), EVERYWHERE),
    "sparse_plus": (jax.nn.sparse_plus, EVERYWHERE),
    "tan": (jnp.tan, (-1.5, 1.5)),
    "asin": (jnp.arcsin, (-1.0, 1.0)),
    "acos": (jnp.arccos, (-1.0, 1.0)),
    "atanh": (jnp.arctanh, (-1.0 + 1e-6, 1.0 - 1e-6)),
    "acosh": (jnp.arccosh, (1.0, 2e3)),
    "x_log_x": (lambda x: jax.scipy.special.xlogy(x, x), (0.0, 2e3)),
    "sinc": (jnp.sinc, (-30.0, 30.0)),  # beyond it bounds have a width at a point, too
    "mod": (lambda x: jnp.mod(x, 0.75), EVERYWHERE),
    "mod_negative": (lambda x: jnp.mod(x, -2.5), EVERYWHERE),
    "fmod": (lambda x: jnp.fmod(x, 0.75), EVERYWHERE),
    "floor_divide": (lambda x: x // 0.75, EVERYWHERE),
    "jump": (lambda x: jnp.where(x > 0.4, x, 0.1), EVERYWHERE),
    "shrink": (lambda x: jnp.where(jnp.abs(x) > 0.5, x - 0.2, 0.0), EVERYWHERE),
    "huber": (lambda x: jnp.where(jnp.abs(x) <= 1.0, 0.5 * x * x, jnp.abs(x) - 0.5), EVERYWHERE),
    "sign": (jnp.sign, EVERYWHERE),
    "floor": (jnp.floor, EVERYWHERE),
    "ceil": (jnp.ceil, EVERYWHERE),
    "round": (jnp.round, EVERYWHERE),
    "cast": (lambda x: x.astype(jnp.int32).astype(x.dtype), EVERYWHERE),
    "interp": (lambda x: jnp.interp(x, *jnp.array(KNOTS, x.dtype)), EVERYWHERE),
    "predicate": (lambda x: (x > 0.1).astype(x.dtype), EVERYWHERE),
}


def scalar_intervals() -> tuple[np.ndarray, np.ndarray]:
    """Intervals of all magnitudes, with and without a kink inside, at an end, and without width."""
    shapes = np.array(
        [
            *[(-1, 1), (0, 1), (-1, 0), (1, 1), (-1, -1), (1, 2), (-2, -1)],
            *[(-1, 1e-3), (-1e-3, 1), (-1, 2), (-2, 1), (0.5, 0.5 + 1e-7)],
        ]
    )
    scaled = [10.0**k * shapes for k in (-6, -3, -1, 0, 1, 3)]
    # The kinks of relu6 and clip, and the far tails of sigmoid.
    kinks = [[(5, 7), (6, 7), (6, 6), (-0.5, 0.7), (-0.5, -0.5), (0.2, 0.7), (-9, 0.7), (0.6, 9)]]
    # Inflections of gelu, silu and mish; several periods of the sine.
    bends = [[(-3, 2), (-2.5, -1.3), (1.3, 2.5), (-8, 8), (-2.4, 9), (0.3, 6), (1.5, 4), (-7, 14)]]
    thin = [[(c, c + w) for c in (-90, -30, -3, 0.7, 3, 30) for w in (1e-9, 1e-6, 1e-3)]]
    return np.concatenate([*scaled, *kinks, *bends, *thin]).astype(np.float64).T
