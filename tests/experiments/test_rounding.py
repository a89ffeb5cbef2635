import sys
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest
from rationals import exact

import boundjax as bj
from experiments.benchmarks import rounding
from experiments.benchmarks.rounding_networks import (
    ARCHITECTURES,
    Order,
    Ordered,
    draw,
)

MLP = ARCHITECTURES["mlp"]


@pytest.fixture
def few(monkeypatch):
    """Few networks and radii, and the quickest bounds."""
    monkeypatch.setattr(rounding, "BATCH", 8)
    monkeypatch.setattr(rounding, "RADII", (0.0, 1e-6))
    methods = {name: rounding.METHODS[name] for name in ("interval", "crown-ibp")}
    monkeypatch.setattr(rounding, "METHODS", methods)


class Rational:
    """Fractions instead of floating-point numbers."""

    def product(self, x, weights, bias, plus=None):
        y = x @ exact(weights) + exact(bias)
        return y if plus is None else y + plus

    def relu(self, x):
        return x * (x > 0)


def test_float64_encloses_the_exact_value_and_programs_do_not():
    weights, x = draw(MLP, 4, np.random.default_rng(0))
    points = x[:, None]
    value, error = rounding.Programs(MLP).exact(weights, points.astype(np.float64))
    run = rounding.Programs(MLP).run(weights, points)
    assert run.shape == (rounding.EXECUTIONS, 4, 1, len(rounding.ROWS))
    assert rounding.EXECUTIONS == 20
    assert (error < 1e-10).all()
    for k in range(4):
        network = {name: array[k] for name, array in weights.items()}
        outputs = exact(rounding.ROWS) @ MLP.apply(Rational(), network, exact(x[k]))
        for row, output in enumerate(outputs):
            assert abs(output - Fraction(value[k, 0, row])) <= Fraction(error[k, 0, row])
            assert abs(output - Fraction(run[0, k, 0, row])) > Fraction(error[k, 0, row])
    # Orders differ, but not by more than rounding explains.
    assert len(np.unique(run[:, 1, 0, 0])) > 8
    np.testing.assert_allclose(run, np.broadcast_to(value, run.shape), atol=1e-4)


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
@pytest.mark.sampled(4)
def test_all_programs_compute_one_network(name):
    architecture = ARCHITECTURES[name]
    programs = rounding.Programs(architecture)
    weights, x = draw(architecture, 2, np.random.default_rng(0))
    value, error = programs.exact(weights, x[:, None].astype(np.float64))
    run = programs.run(weights, x[:, None])
    assert run.shape == (rounding.EXECUTIONS, 2, 1, len(rounding.ROWS))
    assert (error < 1e-10).all()
    np.testing.assert_allclose(run, np.broadcast_to(value, run.shape), atol=1e-3)
    assert (np.ptp(run, axis=0) > 0).any()


E = 2.0**-24  # lost where it is added to 1


@pytest.mark.parametrize(
    ("order", "terms", "total"),
    [
        (Order(0, 0, 99), [1, E, E, -1], 0),
        (Order(1, 0, 99), [1, -1, E, E], 2 * E),
        (Order(1, 0, 99), [-1, E, E, 1], 0),
        (Order(0, 1, 99), [1, -1, E, E], 0),
        (Order(0, 2, 99), [1, E, E, -1], 2 * E),
        (Order(0, 3, 99), [1, E, E, -1], 2 * E),
        (Order(0, 4, 99), [1, E, -1, E], 2 * E),
        (Order(0, 0, 2), [1, E, E, -1], E),
    ],
)
def test_orders_of_summation(order, terms, total):
    bias, *x = jnp.float32(jnp.array(terms)).reshape(4, 1)
    weights = jnp.ones((3, 1), jnp.float32)
    (computed,) = Ordered(order).product(jnp.concatenate(x), weights, bias)
    assert float(computed) == total


@pytest.mark.parametrize("name", rounding.BALLS)
@pytest.mark.parametrize("radius", [0.0, 1e-7, 1e-3, 0.3])
def test_points_lie_exactly_in_their_ball(name, radius):
    ball, random = rounding.BALLS[name], np.random.default_rng(0)
    x = random.uniform(size=(5, 7)).astype(np.float32)
    slopes, eps = random.normal(size=(5, 3, 7)), np.float32(radius)
    points = rounding.members(ball, x, eps, slopes, random)
    assert points.shape == (5, 5, 7)
    np.testing.assert_array_equal(points[:, 0], x)
    single = rounding.towards(points, x)
    assert single.dtype == np.float32
    for array in (points, single):
        for center, of_center in zip(x, array, strict=True):
            for point in of_center:
                offset = exact(point) - exact(center)
                if ball.norm == np.inf:
                    assert (abs(offset) <= Fraction(float(eps))).all()
                else:
                    assert sum(offset * offset) <= Fraction(float(eps)) ** 2
                if ball.clip is not None:
                    assert (point >= 0).all()
                    assert (point <= 1).all()
    if radius == 0.3:  # the points reach the ball's end
        farthest = np.abs(points[:, 1] - x).max(1)
        assert (farthest > 0.1).all()


@pytest.mark.parametrize("ball", rounding.BALLS)
@pytest.mark.sampled(3)
def test_the_campaign_sees_what_is_not_rounded(ball, few):
    tallies = rounding.compare(MLP, rounding.BALLS[ball], 12, 0, radii=rounding.RADII)
    nearest, real, programs = (tallies[mode] for mode in rounding.ROUNDINGS)
    count = 12 * 2 * 2 * len(rounding.ROWS)
    assert nearest.bounds == real.bounds == programs.bounds == count
    assert nearest.above_real > count / 10
    assert nearest.above_programs > count / 5
    assert nearest.excess > 1e-8
    assert real.above_real == programs.above_real == programs.above_programs == 0
    assert nearest.missing == real.missing == programs.missing == 0
    # The slack is no more than a few hundred times what is attained.
    assert 2e-3 < programs.used < real.used < 1.0
    assert not any(tally.broken(mode) for mode, tally in tallies.items())


def run(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["rounding", *flags])
    rounding.main()


@pytest.mark.slow
def test_a_broken_promise_ends_the_command(few, monkeypatch, capsys):
    monkeypatch.setattr(
        rounding, "METHODS", {"interval": lambda function, rounding: bj.interval(function)}
    )
    with pytest.raises(
        SystemExit, match=r"promises are broken: mlp, linf, real; mlp, linf, float32"
    ):
        run(monkeypatch, "--networks", "8", "--architectures", "mlp")
    printed = capsys.readouterr().out
    assert "8 networks, 4 of each kind" in printed
    assert printed.count("mlp ") == 6


@pytest.mark.parametrize("flag", [("--networks", "0"), ("--seed", "-1")])
def test_numbers_out_of_range_are_an_error(flag, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, *flag)
    assert f"{flag[0]} must be >= " in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("ball", rounding.BALLS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_ten_thousand_networks(name, ball):
    architecture = ARCHITECTURES[name]
    tallies = rounding.compare(architecture, rounding.BALLS[ball], 625, 1)
    if name != "tanh":  # its lines leave room for the function's error in any case
        assert tallies["nearest"].above_real > 1e-3 * tallies["nearest"].bounds
    for mode, tally in tallies.items():
        assert not tally.broken(mode), tally
