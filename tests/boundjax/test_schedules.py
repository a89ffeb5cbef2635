import jax
import jax.numpy as jnp
import numpy as np
import pytest

from boundjax.training import eps_dependent, linear_schedule, smoothed_schedule, stairs_schedule

pytestmark = pytest.mark.quick

SCHEDULES = [linear_schedule, smoothed_schedule]

# Shi et al. 2021, start 0, end 100, eps_max 1: checked against the authors' code.
SMOOTHED_VALUES = {
    5: 0.000123,
    10: 0.001969,
    20: 0.031508,
    24: 0.065334,
    25: 0.076923,
    26: 0.089231,
    50: 0.384615,
    75: 0.692308,
    99: 0.987692,
}


@pytest.mark.parametrize(("step", "expected"), SMOOTHED_VALUES.items())
def test_smoothed_schedule_has_the_published_values(step, expected):
    assert float(smoothed_schedule(step, 0, 100, 1.0)) == pytest.approx(expected, abs=6e-7)


def test_smoothed_schedule_is_the_literal_formula():
    start, end, eps_max, exponent = 13, 421, 0.3, 4
    middle = start + int(0.25 * (end - start))
    q = float(middle - start) ** (exponent - 1)
    a = eps_max / ((end - middle) * exponent * q + (middle - start) * q)
    eps_middle = a * (middle - start) ** exponent
    for step in range(start, end):
        if step < middle:
            expected = a * (step - start) ** exponent
        else:
            expected = eps_middle + (eps_max - eps_middle) * (step - middle) / (end - middle)
        got = float(smoothed_schedule(step, start, end, eps_max))
        assert got == pytest.approx(expected, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 0.0), (10, 0.0), (15, 0.15), (20, 0.3), (21, 0.3), (10**8, 0.3)]
)
def test_linear_schedule(step, expected):
    assert float(linear_schedule(step, 10, 20, 0.3)) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ends_are_exact(schedule):
    # The training loop compares with 0 and eps_max to decide which bounds a step needs.
    for eps_max in (0.1, 0.2, 0.3, 8 / 255, 0.0348):
        for start, end in [(0, 7), (5, 1000), (468, 468 * 4), (3, 3), (2, 4)]:
            assert float(schedule(start - 1, start, end, eps_max)) == 0.0
            assert schedule(end, start, end, eps_max) == jnp.float32(eps_max)
            assert schedule(end + 12345, start, end, eps_max) == jnp.float32(eps_max)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_never_falls_and_never_overshoots(schedule):
    values = np.array(jax.vmap(lambda t: schedule(t, 20, 777, 0.3))(jnp.arange(900)))
    assert np.all(np.diff(values) >= 0)
    assert values.min() == 0
    assert values.max() == np.float32(0.3)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_empty_ramp_jumps(schedule):
    assert [float(schedule(step, 4, 4, 1.0)) for step in (3, 4, 5)] == [0.0, 1.0, 1.0]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_traced_steps_agree(schedule):
    compiled = jax.jit(lambda step: schedule(step, 3, 30, 0.4))
    for step in range(0, 40, 3):
        assert float(compiled(step)) == pytest.approx(float(schedule(step, 3, 30, 0.4)), abs=1e-7)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("start", "end", "eps_max"), [(5, 4, 0.1), (-1, 4, 0.1), (0, 4, -0.1)])
def test_malformed_ramps_are_errors(schedule, start, end, eps_max):
    with pytest.raises(ValueError, match=r"got"):
        schedule(0, start, end, eps_max)
    with pytest.raises(ValueError, match=r"eps_max must be >= 0, got nan"):
        schedule(0, 0, 1, float("nan"))


@pytest.mark.parametrize(("mid", "exponent"), [(1.0, 4), (-0.1, 4), (0.25, 0)])
def test_malformed_smoothing_is_an_error(mid, exponent):
    with pytest.raises(ValueError, match=r"must"):
        smoothed_schedule(0, 0, 10, 0.1, mid=mid, exponent=exponent)


def test_weights_follow_the_radius():
    for eps, expected in [(0.0, 1.0), (0.05, 0.75), (0.1, 0.5), (0.2, 0.0)]:
        assert float(eps_dependent(eps, 0.2, 1.0, 0.0)) == pytest.approx(expected, abs=1e-6)
    assert float(eps_dependent(0.1, 0.2, 0.0, 0.0)) == 0.0
    assert float(eps_dependent(0.0, 0.0, 1.0, 0.5)) == 1.0


def test_weights_end_exactly():
    # beta must be 0, not 1e-8, for the linear walk to be left out after the ramp.
    for eps_max in (0.1, 0.2, 0.3, 8 / 255):
        for schedule in SCHEDULES:
            end = schedule(50, 10, 50, eps_max)
            assert float(eps_dependent(end, eps_max, 1.0, 0.0)) == 0.0
            assert float(eps_dependent(end, eps_max, 1.0, 0.5)) == 0.5


def test_weights_of_regularizers_follow_the_radius():
    # lambda_0 (1 - eps / eps_max), and 0 from the end of the ramp on; or from 0 to the target.
    for step in (0, 15, 30, 49, 50, 51, 10**6):
        eps = smoothed_schedule(step, 10, 50, 0.4)
        falling, rising = eps_dependent(eps, 0.4, 0.5, 0.0), eps_dependent(eps, 0.4, 0.0, 0.5)
        assert float(falling) == pytest.approx(0.5 * (1 - float(eps) / 0.4), abs=1e-7)
        assert float(rising) == pytest.approx(0.5 - float(falling), abs=1e-7)
        assert (float(falling) == 0.0) == (step >= 50)


# --- stairs ---------------------------------------------------------------------------------------


def test_stairs_are_one_radius_per_epoch():
    radii = np.linspace(0.01, 0.1, 20, dtype=np.float32)  # CAP on MNIST
    assert radii[[0, 1, 19]] == pytest.approx([0.01, 0.014737, 0.1], abs=1e-6)
    result = np.array(jax.vmap(lambda t: stairs_schedule(t, 7, 20, 0.01, 0.1))(jnp.arange(7 * 25)))
    expected = np.repeat(np.append(radii, np.full(5, np.float32(0.1))), 7)
    np.testing.assert_array_equal(result, expected)
    assert stairs_schedule(10**9, 1200, 20, 0.001, 0.0348) == jnp.float32(0.0348)
    assert stairs_schedule(-1, 7, 20, 0.01, 0.1) == jnp.float32(0.01)


def test_short_stairs():
    assert [float(stairs_schedule(t, 2, 1, 0.5, 1.0)) for t in range(4)] == [0.5, 0.5, 1.0, 1.0]
    assert float(stairs_schedule(0, 2, 0, 0.5, 1.0)) == 1.0


@pytest.mark.parametrize(
    "arguments", [(0, 20, 0.0, 0.1), (7, -1, 0.0, 0.1), (7, 20, 0.2, 0.1), (7, 20, -0.1, 0.1)]
)
def test_malformed_stairs_are_errors(arguments):
    with pytest.raises(ValueError, match=r"got"):
        stairs_schedule(0, *arguments)
    with pytest.raises(ValueError, match=r"needs 0 <= eps_start <= eps_max, got 0\.0 and nan"):
        stairs_schedule(0, 7, 20, 0.0, float("nan"))
