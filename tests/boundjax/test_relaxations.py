"""The two lines of every elementwise op, alone and inside `f(x) - c x`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import on_host
from networks import METHODS
from scalar_functions import EVERYWHERE, SCALARS, SMOOTH, scalar_intervals

import boundjax as bj

KINKED = [name for name in SCALARS if name not in ("sigmoid", "tanh", "softplus")]


def cases():
    """Function, domain, methods, dtype, and whether to check gradients."""
    for name in KINKED:
        every = ("interval", "crown-ibp", "fast-lin", "zero", "one", "constant")
        yield name, SCALARS[name], EVERYWHERE, every, np.float64, True
        yield name, SCALARS[name], EVERYWHERE, ("interval", "crown-ibp"), np.float32, True
    # No policy moves the lines of the other functions. Their derivatives make up most of the
    # program, so only float32, which overflows first, checks that they are finite.
    # `test_smooth.py` compares their values in float64 with finite differences.
    smooth = {name: (f, EVERYWHERE) for name, f in SCALARS.items() if name not in KINKED} | SMOOTH
    for name, (function, domain) in smooth.items():
        yield name, function, domain, ("interval", "crown-ibp", "constant"), np.float64, False
        yield name, function, domain, ("interval", "crown-ibp"), np.float32, True


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "domain", "methods", "dtype", "differentiate"),
    [
        pytest.param(*rest, dtype, differentiate, id=f"{name}-{dtype.__name__}")
        for name, *rest, dtype, differentiate in cases()
    ],
)
def test_scalar_relaxations_contain_a_dense_grid(function, domain, methods, dtype, differentiate):
    # f(x) - c x: for c != 0 interval bounds are loose, which exposes the lines themselves.
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
            # Gradients must be finite, even at kinks.
            of = jax.grad(total, has_aux=True) if differentiate else total
            return {m: of((lower, upper), m) for m in methods}, jax.vmap(shifted)(grid)

        result, values = run(lower, upper, grid)

    relative = 1e-14 if dtype == np.float64 else 5e-6
    size = (1 + np.abs(slopes)) * np.maximum(np.abs(lower), np.abs(upper))
    slack = relative * (1 + np.maximum(size, np.abs(values).max(0)))
    degenerate = lower == upper
    for method, (gradient, bounds) in result.items():
        for gap in (values.min(0) - bounds.lower, bounds.upper - values.max(0)):
            worst = np.argmin(gap / slack)
            case = f"{method}: [{lower[worst]}, {upper[worst]}], c = {slopes[worst]}: {gap[worst]}"
            assert (gap >= -slack).all(), case
        assert (bounds.width[degenerate] <= 4 * slack[degenerate]).all(), method
        if differentiate:
            assert all(np.isfinite(end).all() for end in gradient), method
