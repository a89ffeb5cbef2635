"""How a model is called: options, outputs, per-example constants, positions, and its errors."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import boundjax as bj
from boundjax.certification.independence import other_constants
from experiments.models.zoo.registry import weights

pytestmark = [pytest.mark.quick, pytest.mark.sampled(3)]
X = np.random.default_rng(0).uniform(size=(3, 5)).astype(np.float32)
W = weights(5, 3)
LENGTHS = np.array([1, 3, 5])
certify = functools.partial(bj.certify, method="interval", rounding="nearest")


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train)(x)
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(x))

    def shifted(self, x):
        return x[:, :3] + np.float32(1.0) * np.arange(3, dtype=np.float32)[None]


class Undecided(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic=None):
        return nn.Dropout(0.5)(x, deterministic=deterministic)[:, :3]


class NetNNX(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(5, rngs=rngs)
        self.last = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x, scale=1.0):
        return scale * self.last(self.norm(x))


VARIABLES = Net().init(jax.random.key(0), X, train=False)
DROPPING = nn.Dropout(0.5, deterministic=False)


def test_every_way_to_give_options_is_the_same_model():
    reference = certify(lambda x: Net().apply(VARIABLES, x, train=False), X, 0.01).margins
    apply, call = functools.partial(Net().apply, VARIABLES), {"train": False}
    rngs = {"dropout": jax.random.key(0)}
    for model, options in (
        ((Net(), VARIABLES), call),
        (Net().bind(VARIABLES), call),
        (functools.partial(Net().bind(VARIABLES), train=False), None),
        (apply, call),
        (functools.partial(apply, train=True), call),
        (functools.partial(apply, train=False, mutable=False, rngs=rngs), None),
        (bj.PureModel.of(apply, call=call), None),
        (lambda x, train: Net().apply(VARIABLES, x, train=train), call),
    ):
        np.testing.assert_allclose(certify(model, X, 0.01, call=options).margins, reference)
    radius = bj.certified_radius(apply, X, call=call, method="interval", steps=2)
    assert certify(apply, X, radius, call=call).verified[radius > 0].all()
    assert bj.memory_estimate(apply, X, call=call, method="interval").peak > 0
    method = functools.partial(Net().apply, VARIABLES, method="shifted")
    np.testing.assert_allclose(
        certify(method, X, 0.0).margins, certify(lambda x: Net().shifted(x), X, 0.0).margins
    )
    module = NetNNX(nnx.Rngs(0))
    assert not np.allclose(
        *(certify(module, X, 0.01, call={"scale": s}).margins for s in (1.0, 2.0))
    )


class Distribution:
    """Like those of a library of distributions: no pytree."""

    def __init__(self, logits):
        self.logits = logits


OUTPUTS = {
    "tuple": (lambda z: (z, z[:, 0]), lambda y: y[0], r"got tuple of 2; .*output=lambda y: y\[0\]"),
    "dict": (
        lambda z: {"logits": z, "value": z[:, 0]},
        lambda y: y["logits"],
        r"got dict of \['logits', 'value'\]; .*output=lambda y: y\['logits'\]",
    ),
    "distribution": (Distribution, lambda y: y.logits, "got Distribution; .*output=lambda y"),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_an_output_is_picked(kind):
    wrap, pick, message = OUTPUTS[kind]
    model = jax.tree_util.Partial(lambda w, x: wrap(x @ w), W)
    expected = certify(lambda x: x @ W, X, 0.01).margins
    np.testing.assert_allclose(certify(model, X, 0.01, output=pick).margins, expected, rtol=1e-6)
    pure = bj.PureModel.of(model, output=pick)
    np.testing.assert_allclose(certify(pure, X, 0.01).margins, expected, rtol=1e-6)
    with pytest.raises(ValueError, match=message):
        certify(model, X, 0.01)
    with pytest.raises(TypeError, match="output must be a function"):
        certify(model, X, 0.01, output=0)
    if kind != "distribution":
        with pytest.raises(ValueError, match=r"pgd expects f to return .*lambda x: f\(x\)\[0\]"):
            bj.attacks.pgd(model, jnp.asarray(X), jnp.zeros(3, int), 0.1, key=jax.random.key(0))


def test_draws_are_fixed_whichever_output_is_meant():
    module = bj.stochastic.GaussianNoise(0.1)
    pure = bj.PureModel.of((module, {}), output=lambda z: z[:, :3])
    key = jax.random.key(0)
    expected = np.asarray(pure.apply({}, jnp.asarray(X), key))
    fixed = pure.fixed_draw(key, X)
    logits = np.asarray(fixed.apply(fixed.variables, jnp.asarray(X)))
    np.testing.assert_allclose(logits, expected, rtol=1e-6)
    mean = pure.mean_softmax(key, X, 2)
    assert np.asarray(mean.apply(mean.variables, jnp.asarray(X))).shape == (3, 3)


# --- per-example constants ------------------------------------------------------------------------


def of_lengths(x, lengths):
    """Sees only the first features of each example."""
    kept = jnp.where(jnp.arange(5)[None] < lengths[:, None], x, 0.0)
    return jax.nn.relu(kept @ W) @ W[:3]


def each_alone(ask):
    """What is answered for every example with its constants in the model."""

    def alone(k):
        length = LENGTHS[k]
        return ask(lambda x: of_lengths(x, jnp.full(len(x), length)), X[k : k + 1])

    return np.concatenate([alone(k) for k in range(3)])


def test_constants_belong_to_their_examples():
    expected = each_alone(lambda f, x: certify(f, x, 0.05).margins)
    for options in ({}, {"batch_size": 2}, {"devices": jax.local_devices()}):
        certificate = certify(of_lengths, X, 0.05, constants=LENGTHS, **options)
        np.testing.assert_allclose(certificate.margins, expected, atol=1e-6)
    named = certify(
        lambda x, c: of_lengths(x, c["lengths"]), X, 0.05, constants={"lengths": LENGTHS}
    )
    np.testing.assert_allclose(named.margins, expected, atol=1e-6)
    with pytest.raises(ValueError, match="a file holds one network"):
        certificate.save("never-written.npz", of_lengths, X)
    radius = functools.partial(bj.certified_radius, method="interval", rounding="nearest", steps=4)
    np.testing.assert_array_equal(radius(of_lengths, X, constants=LENGTHS), each_alone(radius))


@pytest.mark.slow
def test_complete_searches_with_the_constants_of_an_example():
    ask = functools.partial(bj.certify, eps=0.3, method="complete")
    told = []
    answer = ask(of_lengths, X, constants=LENGTHS, progress=lambda *counts: told.append(counts))
    alone = each_alone(lambda f, x: [[(a := ask(f, x)).verified[0], a.falsified[0]]])
    np.testing.assert_array_equal(np.stack([answer.verified, answer.falsified], axis=1), alone)
    logits = np.asarray(of_lengths(jnp.asarray(X), jnp.asarray(LENGTHS)))
    np.testing.assert_array_equal(answer.labels, logits.argmax(1))
    for k, point in answer.counterexamples.items():
        assert np.abs(point - X[k]).max() <= 0.3 * (1 + 1e-6)
        outputs = np.asarray(of_lengths(jnp.asarray(point)[None], jnp.asarray(LENGTHS[k : k + 1])))
        assert outputs.argmax(1)[0] != answer.labels[k]
    done, total, undecided = told[-1]
    assert done == total
    assert undecided == answer.undecided.sum()


MIXING = {
    "sum": (lambda c: c.sum(), [3.0, 3.0, 3.0]),
    "largest": (lambda c: c.max(), [3, 3, 3]),
    "smallest": (lambda c: c.min(), [3, 3, 3]),
    "neighbour": (lambda c: jnp.roll(c, 1)[:, None], [1, 2, 3]),
    "some": (lambda c: c.any(), [False, False, False]),
    "all": (lambda c: c.all(), [True, True, True]),
}


@pytest.mark.parametrize("kind", MIXING)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.sampled(6)
def test_a_model_that_mixes_constants_is_refused(kind, count):
    mix, values = MIXING[kind]

    def model(x, c):
        return x @ W * (np.float32(1.0) + mix(c).astype(np.float32))

    constants, labels = np.array(values[:count]), np.zeros(count, int)
    with pytest.raises(ValueError, match="examples of a batch independently"):
        certify(model, X[:count], 0.01, constants=constants, labels=labels)


def test_other_constants_differ_and_stay_valid():
    ways = {
        "flags": np.array([True, False]),
        "lengths": np.array([0, 4]),
        "same": np.array([7, 7], np.uint8),
        "none": np.zeros(2, int),
        "signed": np.array([-1, 2]),
        "numbers": np.array([0.5, 0.25], np.float32),
        "empty": np.zeros((2, 0), int),
    }
    above, below = (other_constants(ways, sign) for sign in (1, -1))
    assert above["flags"].tolist() == [False, True]
    assert (above["lengths"].tolist(), below["lengths"].tolist()) == ([4, 8], [0, 0])
    assert (above["same"].tolist(), below["same"].tolist()) == ([8, 8], [6, 6])
    assert (above["none"].tolist(), below["none"].tolist()) == ([1, 1], [0, 0])
    assert (above["signed"].tolist(), below["signed"].tolist()) == ([2, 5], [-4, -1])
    assert (above["numbers"].tolist(), below["numbers"].tolist()) == ([0.75, 0.5], [0.25, 0.0])
    assert all(above[name].dtype == ways[name].dtype for name in ways)


@pytest.mark.parametrize(
    ("constants", "error", "message"),
    [
        (LENGTHS[:2], ValueError, r"one entry for each of the 3 examples .* got shape \(2,\)"),
        (np.float32(1.0), ValueError, "one entry for each of the 3 examples"),
        ({}, ValueError, "constants must have arrays"),
        ([1, 2, 3], ValueError, r"constants\[0\] must have one entry for each"),
        ({"a": np.array(["a"] * 3)}, TypeError, r"constants\['a'\] must be numbers"),
        (np.array([1, 2, 2**40]), TypeError, "must be integers of int32, got larger ones"),
    ],
)
def test_constants_that_are_no_constants(constants, error, message):
    with pytest.raises(error, match=message):
        certify(of_lengths, X, 0.1, constants=constants)


# --- several positions ----------------------------------------------------------------------------


def of_positions(x):
    """Logits `[B, 2, 2, 3]`: every position sees the whole example."""
    return jnp.tanh(x @ weights(5, 12)).reshape(-1, 2, 2, 3)


@pytest.mark.parametrize(
    ("method", "norm"), [("crown-ibp", np.inf), pytest.param("interval", 2, marks=pytest.mark.slow)]
)
def test_every_position_is_certified_like_a_model_of_its_own(method, norm):
    ask = functools.partial(bj.certify, eps=0.05, norm=norm, method=method, rounding="nearest")
    told = []
    whole = ask(of_positions, X, batch_size=2, progress=lambda *counts: told.append(counts))
    assert whole.margins.shape == (3, 2, 2, 3)
    assert whole.verified.shape == whole.labels.shape == whole.undecided.shape == (3, 2, 2)
    assert f"{whole.verified.sum()} of 12 positions verified" in str(whole)
    for i, j in ((0, 1), (1, 0)):
        one = ask(of_positions, X, output=lambda z, i=i, j=j: z[:, i, j])
        np.testing.assert_allclose(whole.margins[:, i, j], one.margins, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(whole.labels[:, i, j], one.labels)
    undecided = int((~whole.verified).any(axis=(1, 2)).sum())
    assert [counts[:2] for counts in told] == [(2, 3), (3, 3)]
    assert told[-1][2] == undecided
    # A wrong label is wrong at its position only.
    labels = whole.labels.copy()
    labels[0, 1, 0] = (labels[0, 1, 0] + 1) % 3
    at_positions = ask(of_positions, X, labels=labels)
    assert not at_positions.verified[0, 1, 0]
    np.testing.assert_array_equal(at_positions.verified[1:], whole.verified[1:])


def test_questions_about_several_positions():
    radius = bj.certified_radius(of_positions, X, method="interval", steps=4)
    assert radius.shape == (3,)
    assert bj.certify(of_positions, X, radius, method="interval").verified[radius > 0].all()
    for ask, message in (
        (lambda: bj.certify(of_positions, X, 0.1, method="complete"), "pick a position with"),
        (lambda: certify(of_positions, X, 0.1, labels=[0, 0, 0]), r"of shape \(3, 2, 2\)"),
        (lambda: certify(of_positions, X, 0.1).save("never.npz", of_positions, X), "one decision"),
    ):
        with pytest.raises(ValueError, match=message):
            ask()


# --- errors ---------------------------------------------------------------------------------------


def one_of(x):
    return W.T @ x


ERRORS = {
    "train is missing": ((Net(), VARIABLES), {}, TypeError, r"\(train\); give .*'train': False"),
    "missing in a function": (
        lambda x: Net().apply(VARIABLES, x),
        {},
        TypeError,
        r"\(train\); give .*'train': False",
    ),
    "batch statistics": (
        (Net(), VARIABLES),
        {"call": {"train": True}},
        ValueError,
        'updates its variables.*call={"train": False}',
    ),
    "dropout": (
        (DROPPING, {}),
        {},
        ValueError,
        'draws random numbers .*call={"deterministic": True}',
    ),
    "dropout in a function": (
        lambda x: DROPPING.apply({}, x),
        {},
        ValueError,
        r'got no PRNG key; certify it in eval mode: call={"train": False}',
    ),
    "a mode that nobody chose": (
        (Undecided(), {}),
        {},
        ValueError,
        "does not know whether it runs in eval mode; give call={'deterministic': True}",
    ),
    "an nnx module in a function": (
        lambda x: NetNNX(nnx.Rngs(0))(x) if isinstance(x, np.ndarray) else TRAINED(x),
        {},
        ValueError,
        r"updates its own state .*give the nnx module itself",
    ),
    "a second argument": (of_lengths, {}, ValueError, "second argument 'lengths'.*constants="),
    "another name": (NetNNX(nnx.Rngs(0)), {"call": {"size": 2}}, TypeError, "no argument 'size'"),
    "a place taken": (
        functools.partial(lambda params, rng, x: x @ params, W, rng=None),
        {},
        TypeError,
        r"given as 'rng', .*partial\(transformed.apply, params, None\)",
    ),
    "one example": (one_of, {}, ValueError, r"one example \(shape \(5,\) gives \(3,\)\); give jax"),
    "values of weights": (
        jax.tree_util.Partial(lambda w, x: x @ (w if w.sum() > 0 else -w), jnp.asarray(W)),
        {},
        bj.UnsupportedOpError,
        r"Python's if.* value of the model's weights, .* lambda x: model\(x\)",
    ),
    "one logit": (lambda x: x[:, :1], {}, ValueError, "at least two logits per example, got 1"),
    "integers": (lambda x: x.astype(int), {}, ValueError, "floating-point logits, got int32"),
    "a fixed batch": (lambda x: x[:1] @ W, {}, ValueError, "must return logits"),
}
TRAINED = NetNNX(nnx.Rngs(0))


@pytest.mark.sampled(6)
@pytest.mark.parametrize("kind", ERRORS)
def test_errors_of_models_say_what_to_do(kind):
    model, options, error, message = ERRORS[kind]
    with pytest.raises(error, match=message) as raised:
        certify(model, X, 0.1, **options)
    assert "\n" not in str(raised.value)


def test_numbers_in_a_partial_may_decide_what_is_traced():
    def model(scale, x, *, negative):
        return (scale if scale > 0 else -scale) * (-x if negative else x) @ W

    options = {"negative": np.bool_(True)}
    for scale in (np.float32(2.0), -2.0):
        partial = functools.partial(model, scale, **options)
        expected = certify(lambda x: np.float32(-2.0) * x @ W, X, 0.0).margins
        np.testing.assert_allclose(certify(partial, X, 0.0).margins, expected, atol=1e-5)


def test_a_function_of_one_example_is_seen_whatever_the_batch():
    # Five examples of five features multiply without an error.
    with pytest.raises(ValueError, match=r"give jax.vmap\(model\)"):
        certify(one_of, np.tile(X[:1], (5, 1)), 0.1)
    mapped = certify(jax.vmap(one_of), X, 0.1).margins
    np.testing.assert_allclose(mapped, certify(lambda x: x @ W, X, 0.1).margins, atol=1e-6)


def test_inputs_that_would_be_rounded_are_refused():
    doubles = X.astype(np.float64)
    np.testing.assert_array_equal(
        certify(lambda x: x @ W, doubles, 0.1).margins, certify(lambda x: x @ W, X, 0.1).margins
    )
    for ask in (bj.certify, lambda f, x, eps: bj.certified_radius(f, x)):
        with pytest.raises(TypeError, match=r"x is float64 .* give x.astype\('float32'\)"):
            ask(lambda x: x @ W, doubles + 1e-12, 0.1)


@pytest.mark.parametrize(
    "given", [bj.Box(X, X), bj.LpBall(X, 0.1), bj.Interval(X, X)], ids=lambda s: type(s).__name__
)
def test_a_set_is_no_input(given):
    with pytest.raises(TypeError, match=rf"got a {type(given).__name__}; for a set of your own"):
        certify(lambda x: x @ W, given, 0.1)


@pytest.mark.slow
def test_progress_of_several_methods_and_radii():
    told = []
    options = {"rounding": "nearest", "progress": lambda *counts: told.append(counts)}
    verified = bj.certify(lambda x: x @ W, X, 0.3, method="best", batch_size=2, **options).verified
    assert [done for done, _, _ in told] == [2, 3, 5, 6, 8, 9, 11, 12, 14, 15]
    assert {total for _, total, _ in told} == {15}
    counts = [undecided for _, _, undecided in told]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == (~verified).sum()
    told.clear()
    bj.certified_radius(lambda x: x @ W, X, method="interval", steps=2, **options)
    assert [(done, total) for done, total, _ in told] == [(3, 9), (6, 9), (9, 9)]

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        certify(lambda x: x @ W, X, 0.3, progress=stop)


def test_a_bar_is_drawn_on_a_terminal_alone(monkeypatch, capsys):
    silent = certify(lambda x: x @ W, X, 0.1, batch_size=2, progress=True)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TERM", "xterm")
    shown = certify(lambda x: x @ W, X, 0.1, batch_size=2, progress=True)
    output = capsys.readouterr()
    assert not output.out
    assert f"{len(X)}/{len(X)}" in output.err
    assert f"{np.sum(~shown.verified)} open" in output.err
    np.testing.assert_array_equal(shown.margins, silent.margins)
