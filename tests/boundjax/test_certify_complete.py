"""`certify(method="complete")`: exact answers, counterexamples, what stays open, refusals."""

import contextlib
import functools
from fractions import Fraction

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import boundjax as bj
from boundjax.search import network, tree
from boundjax.search.domains import DomainPrograms
from boundjax.search.milp import Encoding
from boundjax.search.programs import Programs

CLASSES, WIDTH = 4, 12
CLIP = (0.0, 1.0)
# One worker compiles the programs of the two networks once.
pytestmark = pytest.mark.xdist_group("complete")


class Wide(nn.Module):
    """Of more inputs than a box is cut along, so that units are split."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(WIDTH)(x.reshape(len(x), -1)))
        return nn.Dense(CLASSES)(nn.relu(nn.Dense(WIDTH)(x)))


class Convolution(nn.Module):
    """Of few inputs, along which the box is cut."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(3, (2, 2), strides=2)(x))
        return nn.Dense(CLASSES)(nn.relu(nn.Dense(8)(x.reshape(len(x), -1))))


CASES = {"units": (Wide(), (5, 6, 1), 0.03, 1), "box": (Convolution(), (3, 3, 1), 0.12, 3)}


@functools.cache
def case(name, seed=None, examples=10):
    """The model, random images and a radius at which CROWN leaves some of them open."""
    module, shape, eps, usual = CASES[name]
    seed = usual if seed is None else seed
    x = jnp.asarray(np.random.default_rng(seed).uniform(size=(examples, *shape)), jnp.float32)
    return (module, jax.jit(module.init)(jax.random.key(seed), x)), x, eps


@functools.cache
def certificate(name, method="complete"):
    model, x, eps = case(name)
    return bj.certify(model, x, eps, clip=CLIP, method=method)


@functools.cache
def optima(name):
    """The exact minima of all margins, `[B, C]`; 0 at the label."""
    model, x, eps = case(name)
    single = bj.PureModel.of(model).of_one_example(model[1])
    bounded = jax.jit(lambda ball: bj.relax(single, intermediate="linear")(ball).pre_activations)
    exact = np.zeros((len(x), CLASSES))
    for k, label in enumerate(certificate(name).labels):
        others = [m for m in range(CLASSES) if m != label]
        ball = bj.LpBall(x[k], eps, clip=CLIP)
        encoding = Encoding(single, ball, bounded(ball))
        for m in others:
            optimum = encoding.minimum(np.eye(CLASSES)[label] - np.eye(CLASSES)[m])
            assert optimum.status == "optimal"
            exact[k, m] = optimum.lower
    return exact


@pytest.mark.parametrize("name", CASES)
@pytest.mark.sampled(3)
def test_answers_are_those_of_a_milp(name):
    answer, exact = certificate(name), optima(name)
    others = np.arange(CLASSES)[None] != answer.labels[:, None]
    robust = np.where(others, exact, np.inf).min(axis=1)
    np.testing.assert_array_equal(answer.verified, robust > 0)
    np.testing.assert_array_equal(answer.falsified, robust <= 0)
    assert not answer.undecided.any()
    assert answer.verified.any()
    assert answer.falsified.any()
    assert answer.method == "complete"
    assert answer.arithmetic == "real"
    # Margins are lower bounds, also where nothing is verified; the solver's tolerance is 1e-6.
    assert (answer.margins <= exact + 1e-5).all()
    assert (answer.margins[~others] == 0).all()
    assert (answer.margins[answer.verified] > 0).sum() == (CLASSES - 1) * answer.verified.sum()
    assert str(answer).startswith(
        f"{answer.verified.sum()} of 10 examples verified, {answer.falsified.sum()} falsified "
    )


@pytest.mark.parametrize("name", CASES)
def test_no_less_is_verified_than_by_crown(name):
    answer, crown = certificate(name), certificate(name, "crown")
    assert (answer.verified >= crown.verified).all()
    assert answer.verified.sum() > crown.verified.sum()
    # CROWN is not asked about what cheaper bounds verify.
    asked = ~certificate(name, "crown-ibp").verified
    assert (answer.margins >= crown.margins - 1e-6)[asked].all()
    assert not crown.falsified.any()  # nothing was looked for
    assert (crown.undecided == ~crown.verified).all()


@pytest.mark.parametrize("name", CASES)
def test_counterexamples_lie_in_the_exact_set_and_are_misclassified(name):
    (module, variables), x, eps = case(name)
    answer = certificate(name)
    assert set(answer.counterexamples) == set(np.flatnonzero(answer.falsified))
    for k, point in answer.counterexamples.items():
        assert point.shape == x.shape[1:]
        assert module.apply(variables, point[None]).argmax() != answer.labels[k]
        pairs = zip(point.ravel().tolist(), np.ravel(x[k]).tolist(), strict=True)
        for value, middle in pairs:
            assert abs(Fraction(value) - Fraction(middle)) <= Fraction(eps)
            assert CLIP[0] <= value <= CLIP[1]


def test_a_misclassified_example_is_its_own_counterexample():
    model, x, eps = case("units")
    right = certificate("units").labels
    labels = np.where(np.arange(len(x)) % 2 == 0, (right + 1) % CLASSES, right)
    answer = bj.certify(model, x, eps, labels=labels, clip=CLIP, method="complete")
    assert not answer.verified[::2].any()
    for k in range(0, len(x), 2):
        np.testing.assert_array_equal(answer.counterexamples[k], x[k])
    np.testing.assert_array_equal(answer.verified[1::2], certificate("units").verified[1::2])


def test_a_radius_of_0():
    model, x, _ = case("units")
    answer = bj.certify(model, x, 0.0, method="complete")
    assert answer.verified.all()
    wrong = (answer.labels + 1) % CLASSES
    answer = bj.certify(model, x, 0.0, labels=wrong, method="complete")
    assert answer.falsified.all()


def test_one_example_and_radii_of_examples_and_features():
    model, x, eps = case("units")
    every = certificate("units")
    alone = bj.certify(model, x[3:4], eps, clip=CLIP, method="complete")
    np.testing.assert_array_equal(alone.verified, every.verified[3:4])
    radii = np.where(np.arange(len(x)) < 5, eps, 0.0)
    some = bj.certify(model, x, radii, clip=CLIP, method="complete")
    np.testing.assert_array_equal(some.verified[:5], every.verified[:5])
    assert some.verified[5:].all()
    features = np.full((1, *x.shape[1:]), eps)
    same = bj.certify(model, x, features, clip=CLIP, method="complete")
    np.testing.assert_array_equal(same.verified, every.verified)


@pytest.fixture
def without_compilation(monkeypatch):
    """Counts how often a program is called with new shapes."""
    calls = []

    @contextlib.contextmanager
    def counted(self):
        calls.append(self)
        yield

    monkeypatch.setattr(network.FlatNetwork, "stopped_clock", counted)
    return calls


def test_other_weights_use_the_compiled_programs(without_compilation):
    certificate("units")
    before = len(without_compilation)
    model, x, eps = case("units", seed=2)
    answer = bj.certify(model, x, eps, clip=CLIP, method="complete")
    assert (~bj.certify(model, x, eps, clip=CLIP, method="crown").verified).any()
    assert answer.verified.any()
    # Large batches of domains may come for the first time.
    assert len(without_compilation) - before <= 3


def test_what_time_does_not_suffice_for_is_undecided(monkeypatch):
    model, x, eps = case("units")
    monkeypatch.setattr(tree.Tree, "refutes", _wait_for_the_end)
    answer = bj.certify(model, x, eps, clip=CLIP, method="complete", timeout=0.05)
    exact = certificate("units")
    assert answer.undecided.any()
    assert not (answer.verified & ~exact.verified).any()
    assert not (answer.falsified & ~exact.falsified).any()
    # CROWN has verified the others before any search.
    np.testing.assert_array_equal(answer.verified, certificate("units", "crown").verified)
    assert (answer.margins <= optima("units") + 1e-5).all()


def _wait_for_the_end(self):
    while True:
        self._attacker.check_time()


@pytest.mark.slow
def test_float32_executions():
    model, x, eps = case("box")
    answer = bj.certify(model, x, eps, clip=CLIP, method="complete", rounding="float32")
    assert answer.arithmetic == "float32"
    np.testing.assert_array_equal(answer.verified, certificate("box").verified)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_devices_share_bounds_and_domains(name, monkeypatch):
    """Also around a single example, whose cheap bounds one of them computes."""
    model, x, eps = case(name)
    expected = certificate(name).verified
    first = int(np.flatnonzero(~certificate(name, "crown").verified)[0])
    devices = jax.local_devices()[::-1]
    assert len(devices) > 1
    divides = Programs if name == "box" else DomainPrograms
    place, used = divides.parts, set()

    def parts(self, array):
        placed = place(self, array)
        used.add(frozenset(placed.sharding.device_set))
        return placed

    monkeypatch.setattr(divides, "parts", parts)
    options = {"clip": CLIP, "method": "complete", "devices": devices}
    for chosen in (slice(None), slice(first, first + 1)):
        used.clear()
        answer = bj.certify(model, x[chosen], eps, **options)
        np.testing.assert_array_equal(answer.verified, expected[chosen])
        assert used == {frozenset(devices)}


def test_saved_only_with_the_rules_of_other_methods(tmp_path):
    model, x, _ = case("units")
    answer, path = certificate("units"), tmp_path / "certificate.npz"
    with pytest.raises(ValueError, match=r"bounds of method 'complete' again; give witness="):
        answer.save(path, model, x)
    answer.save(path, model, x, witness=["crown-ibp", "crown"], margins=False)
    loaded = bj.load_certificate(path)
    assert loaded.method == "complete"
    np.testing.assert_array_equal(loaded.verified, answer.verified)


REFUSALS = {
    "norm": ({"norm": 2}, ValueError, "'complete' needs the norm inf, got 2; take 'best'"),
    "timeout": ({"timeout": 0.0}, ValueError, "timeout must be positive, in seconds, got 0"),
    "timeout of crown": (
        {"method": "crown", "timeout": 5.0},
        ValueError,
        "timeout is for method='complete', got method='crown'",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_refused_in_one_line(name):
    options, error, message = REFUSALS[name]
    model, x, eps = case("units")
    with pytest.raises(error, match=message):
        bj.certify(model, x, eps, **{"method": "complete", **options})


def test_float64_is_refused():
    with jax.enable_x64(True):
        x = np.zeros((2, 3))
        with pytest.raises(TypeError, match="computes in float32, got x of float64"):
            bj.certify(lambda x: x @ jnp.ones((3, 2)), x, 0.1, method="complete")


@pytest.mark.parametrize("ask", ["certified_radius", "memory_estimate"])
def test_questions_that_a_search_does_not_answer(ask):
    model, x, _ = case("units")
    with pytest.raises(ValueError, match=f"{ask} takes every method but 'complete'.*use 'crown'"):
        getattr(bj, ask)(model, x, method="complete")


def test_a_proof_must_hold_on_the_device(monkeypatch):
    monkeypatch.setattr("boundjax.search.programs._platform", lambda: "gpu")
    with pytest.raises(bj.NoProofError, match="nothing is proved about rounding on 'gpu' devices"):
        Programs(lambda x: x, (2,))
    assert Programs(lambda x: x, (2,), rounding="nearest").output_size == 2
