"""The two lines of every elementwise op, alone and inside `f(x) - c x`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import on_host
from networks import METHODS

import boundjax as bj

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
    "sign": (jnp.sign, EVERYWHERE),
    "floor": (jnp.floor, EVERYWHERE),
    "ceil": (jnp.ceil, EVERYWHERE),
    "round": (jnp.round, EVERYWHERE),
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


KINKED = [name for name in SCALARS if name not in ("sigmoid", "tanh", "softplus")]


def cases():
    """Function, domain, its methods, dtype, and whether gradients are looked at."""
    for name in KINKED:
        every = ("interval", "crown-ibp", "fast-lin", "zero", "one", "constant")
        yield name, SCALARS[name], EVERYWHERE, every, np.float64, True
        yield name, SCALARS[name], EVERYWHERE, ("interval", "crown-ibp"), np.float32, True
    # No policy moves the lines of the others. Their derivatives are the larger part of the program:
    # whether those exist is asked in float32, which overflows first. Their values in float64 are
    # compared with finite differences in `test_smooth.py`.
    smooth = {name: (f, EVERYWHERE) for name, f in SCALARS.items() if name not in KINKED} | SMOOTH
    for name, (function, domain) in smooth.items():
        yield name, function, domain, ("interval", "crown-ibp", "constant"), np.float64, False
        yield name, function, domain, ("interval", "crown-ibp"), np.float32, True


@pytest.mark.parametrize(
    ("function", "domain", "methods", "dtype", "differentiate"),
    [
        pytest.param(*rest, dtype, differentiate, id=f"{name}-{dtype.__name__}")
        for name, *rest, dtype, differentiate in cases()
    ],
)
def test_scalar_relaxations_contain_a_dense_grid(function, domain, methods, dtype, differentiate):
    # f(x) - c x: for c != 0 the interval bounds are loose and the lines themselves are seen.
    ends = np.clip(scalar_intervals(), *domain)
    lower, upper = (np.repeat(end[:, None], 5, 1).ravel().astype(dtype) for end in ends)
    slopes = np.tile(np.array([-1.0, -0.3, 0.0, 0.5, 2.0], dtype), lower.size // 5)
    share = np.linspace(0, 1, 401)[:, None]
    grid = np.clip(lower + share * (upper - lower), lower, upper).astype(dtype)

    with jax.enable_x64(dtype == np.float64):
        c = jnp.asarray(slopes)

        def shifted(x):
            return function(x) - c * x

        def total(ends, method):
            bounds = METHODS[method](shifted)(bj.Box(*ends))
            return sum(end.sum() for end in bounds), bounds

        @on_host
        def run(lower, upper, grid):
            # A gradient must exist, at kinks too.
            of = jax.grad(total, has_aux=True) if differentiate else total
            return {m: of((lower, upper), m) for m in methods}, jax.vmap(shifted)(grid)

        found, values = run(lower, upper, grid)

    relative = 1e-14 if dtype == np.float64 else 5e-6
    size = (1 + np.abs(slopes)) * np.maximum(np.abs(lower), np.abs(upper))
    slack = relative * (1 + np.maximum(size, np.abs(values).max(0)))
    degenerate = lower == upper
    for method, (gradient, bounds) in found.items():
        for gap in (values.min(0) - bounds.lower, bounds.upper - values.max(0)):
            worst = np.argmin(gap / slack)
            case = f"{method}: [{lower[worst]}, {upper[worst]}], c = {slopes[worst]}: {gap[worst]}"
            assert (gap >= -slack).all(), case
        assert (bounds.width[degenerate] <= 4 * slack[degenerate]).all(), method
        if differentiate:
            assert all(np.isfinite(end).all() for end in gradient), method
