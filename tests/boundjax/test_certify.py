"""certify: models, methods, labels, batches, and what must never certify."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from networks import ball_points
from small_cnn import CLASSES, EXAMPLES, LinenNet, images_of, model_of, variables_of

import boundjax as bj
from boundjax.attacks import pgd

NAMES = (
    "interval",
    "crown-ibp",
    "one-step",
    "crown",
    "fast-lin",
    "alpha-crown",
    "best",
    "complete",
)
# One worker compiles each method once for all tests.
pytestmark = pytest.mark.xdist_group("certify")


class NnxNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(1, 3, (2, 2), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(12, CLASSES, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x))).reshape(x.shape[0], -1)
        return self.head(self.dropout(x))


@pytest.fixture(scope="module")
def images():
    return images_of()


@pytest.fixture(scope="module")
def variables(images):
    return variables_of(images)


@pytest.fixture(scope="module")
def model(variables):
    return model_of(variables)


@pytest.fixture(scope="module")
def reference(model, images):
    return bj.certify(model, images, 0.02, clip=(0.0, 1.0))


def models(variables):
    apply = functools.partial(LinenNet().apply, variables)
    return {
        "bound": LinenNet().bind(variables),
        "pair": (LinenNet(), variables),
        "partial": apply,
        "function": lambda x: apply(x),
        "jitted": jax.jit(apply),
    }


@pytest.mark.parametrize("kind", ["bound", "pair", "partial", "function", "jitted"])
@pytest.mark.sampled(3)
def test_every_kind_of_model_gives_the_same_certificate(kind, variables, images, reference):
    certificate = bj.certify(models(variables)[kind], images, 0.02, clip=(0.0, 1.0))
    np.testing.assert_allclose(certificate.margins, reference.margins, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(certificate.verified, reference.verified)


def test_shapes_labels_and_method(reference, model, images):
    assert reference.verified.shape == (EXAMPLES,)
    assert reference.verified.dtype == bool
    assert reference.verified.any()
    assert reference.margins.shape == (EXAMPLES, CLASSES)
    assert reference.method == "crown-ibp"
    # Without labels the certificate is about the model's own prediction.
    np.testing.assert_array_equal(reference.labels, model(images).argmax(1))


def test_verified_means_that_all_other_margins_are_positive(reference):
    others = np.arange(CLASSES) != np.asarray(reference.labels)[:, None]
    margins = np.asarray(reference.margins)
    np.testing.assert_array_equal(reference.verified, np.all((margins > 0) | ~others, axis=1))
    # The margin of a class to itself is 0.
    assert (margins[~others] == 0).all()


def test_nnx_module_in_train_mode_is_bounded_in_eval_mode_and_left_alone(images):
    module = NnxNet(nnx.Rngs(0))
    module.train()
    for _ in range(3):
        module(images)
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(module, nnx.Not(nnx.RngState))))
    counts = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(module, nnx.RngCount)))
    certificate = bj.certify(module, images, 0.01)
    after = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(module, nnx.Not(nnx.RngState))))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    jax.tree.map(
        np.testing.assert_array_equal,
        counts,
        jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(module, nnx.RngCount))),
    )
    assert not module.norm.use_running_average
    assert not module.dropout.deterministic

    module.eval()
    expected = bj.certify(lambda x: module(x), images, 0.01)
    np.testing.assert_allclose(certificate.margins, expected.margins, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(certificate.labels, module(images).argmax(1))


@pytest.mark.parametrize("method", NAMES)
@given(seed=st.integers(0, 2**32 - 1))
@pytest.mark.sampled(3)
def test_margins_are_below_those_of_samples_and_attacks(method, seed):
    rng = np.random.default_rng(seed)
    certificate, x, eps, variables = random_certificate(rng, method)
    apply = functools.partial(two_layers, variables)
    labels = np.asarray(certificate.labels)
    margins = np.asarray(certificate.margins)
    for i in range(EXAMPLES):
        inputs = ball_points(rng, np.asarray(x[i]), eps, np.inf, (0.0, 1.0), count=1000)
        logits = np.asarray(apply(jnp.asarray(inputs, jnp.float32)))
        worst = (logits[:, labels[i], None] - logits).min(0)
        assert (margins[i] <= worst + 1e-5).all()
    attacked = attack(variables, x, certificate.labels, eps)
    fooled = apply(attacked).argmax(1) != certificate.labels
    assert not (fooled & certificate.verified).any()


class TwoLayers(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(CLASSES)(nn.relu(nn.Dense(12)(x)))


@jax.jit
def two_layers(variables, x):
    return TwoLayers().apply(variables, x)


def random_certificate(rng, method):
    x = jnp.asarray(rng.uniform(size=(EXAMPLES, 5)), jnp.float32)
    shapes = jax.eval_shape(TwoLayers().init, jax.random.key(0), x)
    variables = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype), shapes)
    eps = float(rng.choice([0.0, 0.003, 0.03, 0.3]))
    certificate = bj.certify((TwoLayers(), variables), x, eps, clip=(0.0, 1.0), method=method)
    return certificate, x, eps, variables


@jax.jit
def attack(variables, x, labels, eps):
    apply = functools.partial(TwoLayers().apply, variables)
    options = {"key": jax.random.key(0), "clip": (0.0, 1.0), "steps": 20}
    return pgd(apply, x, labels, eps, **options)


@pytest.mark.slow
def test_best_is_the_union_of_the_sound_methods(model, images):
    # All methods but alpha-CROWN, which costs more than the others together, and the search.
    names = [name for name in NAMES if name not in ("alpha-crown", "complete")]
    certificates = {m: bj.certify(model, images, 0.05, method=m) for m in names}
    union = np.any([certificates[m].verified for m in names if m != "best"], axis=0)
    # "best" takes the best bound for each margin, so it may verify more than any single method.
    assert (certificates["best"].verified >= union).all()
    for method in names:
        assert (certificates["best"].margins >= certificates[method].margins - 1e-5).all()
        assert certificates[method].method == method


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_result_does_not_depend_on_batch_size(batch_size, model, images, reference):
    certificate = bj.certify(model, images, 0.02, clip=(0.0, 1.0), batch_size=batch_size)
    np.testing.assert_allclose(certificate.margins, reference.margins, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(certificate.verified, reference.verified)


def test_given_labels_decide_which_class_is_certified(model, images, reference):
    wrong = (reference.labels + 1) % CLASSES
    certificate = bj.certify(model, images, 0.0, labels=wrong)
    np.testing.assert_array_equal(certificate.labels, wrong)
    assert not certificate.verified.any()
    right = bj.certify(model, images, 0.0, labels=reference.labels)
    assert right.verified.all()
    logits = model(images)
    chosen = jnp.take_along_axis(logits, reference.labels[:, None], 1)
    np.testing.assert_allclose(right.margins, chosen - logits, rtol=1e-4, atol=1e-5)


def test_margins_fall_with_eps(model, images):
    margins = [bj.certify(model, images, eps).margins for eps in (0.0, 0.01, 0.02, 0.1)]
    for wider, narrower in zip(margins[1:], margins, strict=False):
        assert (wider <= narrower + 1e-6).all()


def test_eps_per_feature(model, images):
    eps = jnp.zeros((1, 4, 4, 1)).at[:, 0].set(0.02)
    some = bj.certify(model, images, eps)
    every = bj.certify(model, images, 0.02)
    assert (some.margins >= every.margins - 1e-6).all()
    assert (some.margins > every.margins + 1e-4).any()


@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.sampled(3)
def test_other_norms_are_sound_and_smaller_than_the_box(norm, model, images):
    ball = bj.certify(model, images, 0.1, norm=norm)
    box = bj.certify(model, images, 0.1)
    assert (ball.margins >= box.margins - 1e-5).all()
    rng = np.random.default_rng(0)
    for i, image in enumerate(images):
        inputs = ball_points(rng, np.asarray(image).ravel(), np.float64(0.1), norm)
        logits = np.asarray(model(jnp.asarray(inputs.reshape(-1, 4, 4, 1), jnp.float32)))
        label = int(ball.labels[i])
        assert (ball.margins[i] <= (logits[:, label, None] - logits).min(0) + 1e-5).all()


def test_one_example(model, images, reference):
    alone = bj.certify(model, images[:1], 0.02, clip=(0.0, 1.0))
    np.testing.assert_allclose(alone.margins, reference.margins[:1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ask", ["certify", "certified_radius", "memory_estimate"])
def test_one_logit_is_refused_with_the_way_out(ask, images):
    """With one logit there is no margin: every example would be verified at every radius."""
    x = images.reshape(len(images), -1)

    def score(x):
        return x[:, :1] - 0.5

    options = {"eps": 0.5} if ask == "certify" else {}
    with pytest.raises(ValueError, match=r"at least two logits.*got 1.*concatenate.*bj?.*linear"):
        getattr(bj, ask)(score, x, **options)

    # The way out: a threshold as a second logit, whose certificate is the sign's.
    def two(x):
        z = score(x)
        return jnp.concatenate([jnp.zeros_like(z), z], axis=1)

    radius = bj.certified_radius(two, x, steps=16)
    np.testing.assert_allclose(radius, np.abs(x[:, 0] - 0.5), atol=1e-4)


def test_a_tie_is_not_verified(images):
    # Strict: a margin of exactly 0 is not certified.
    certificate = bj.certify(lambda x: jnp.zeros((len(x), 3)) * x.sum(), images, 0.0)
    assert not certificate.verified.any()


@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize("where", ["conv", "dense", "bias", "statistics"])
@pytest.mark.sampled(7)
def test_a_model_with_nan_is_never_verified(method, where, variables, images):
    path = {
        "conv": ("params", "Conv_0", "kernel"),
        "dense": ("params", "Dense_0", "kernel"),
        "bias": ("params", "Dense_1", "bias"),
        "statistics": ("batch_stats", "BatchNorm_0", "mean"),
    }[where]
    broken = jax.tree.map(lambda leaf: leaf, variables)
    parent = broken
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = jnp.full_like(parent[path[-1]], jnp.nan)
    labels = jnp.zeros(EXAMPLES, jnp.int32)
    for given_labels in (labels, None):
        certificate = bj.certify(
            (LinenNet(), broken), images, 0.01, labels=given_labels, method=method
        )
        assert not certificate.verified.any()


@pytest.mark.parametrize("method", NAMES)
@pytest.mark.sampled(4)
def test_one_nan_weight_is_never_verified(method, images):
    # A single NaN unit, which a comparison could mistake for a dead one.
    rng = np.random.default_rng(0)
    first = jnp.asarray(rng.normal(size=(16, 6)), jnp.float32).at[3, 2].set(jnp.nan)
    second = jnp.asarray(rng.normal(size=(6, 3)), jnp.float32)

    def apply(x):
        return jax.nn.relu(x.reshape(len(x), -1) @ first) @ second

    certificate = bj.certify(apply, images, 0.01, labels=jnp.zeros(EXAMPLES, int), method=method)
    assert not certificate.verified.any()


OVERFLOWING = {
    "within the ball": lambda x: 10 + jnp.exp(100 * x) - jnp.exp(100 * x),
    "everywhere": lambda x: 1e30 * (1 + x) * 1e30,
    "through a relu": lambda x: 10 + 0 * jax.nn.relu(1e30 * x * 1e30),
}


# Methods that build on other methods' bounds run every night.
DAILY = [
    pytest.param(n, marks=pytest.mark.slow if n in ("best", "one-step", "alpha-crown") else [])
    for n in NAMES
]


@pytest.mark.parametrize("method", DAILY)
@pytest.mark.parametrize("kind", OVERFLOWING)
@pytest.mark.sampled(7)
def test_logits_that_overflow_are_never_verified(kind, method):
    x = jnp.full((2, 1), 0.7)

    def apply(x):
        return jnp.concatenate([OVERFLOWING[kind](x), x], axis=1)

    # The network itself gives inf or NaN within the ball.
    assert not jnp.isfinite(apply(x + 0.3)).all()
    labels = jnp.zeros(2, jnp.int32)
    certificate = bj.certify(apply, x, 0.3, labels=labels, method=method)
    assert not certificate.verified.any()


def test_eps_per_example(model, images, reference):
    eps = np.full(EXAMPLES, 0.02, np.float32)
    eps[0] = 0.0
    mixed = bj.certify(model, images, eps, clip=(0.0, 1.0))
    exact = bj.certify(model, images[:1], 0.0, clip=(0.0, 1.0))
    np.testing.assert_allclose(mixed.margins[1:], reference.margins[1:], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(mixed.margins[:1], exact.margins, rtol=1e-5, atol=1e-6)


def test_changed_weights_change_the_certificate(images):
    # A plain function may hide its weights, so its compiled code must not be reused.
    kernel = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)

    def apply(x):
        return x.reshape(len(x), -1) @ jnp.asarray(kernel)

    before = bj.certify(apply, images, 0.01).margins
    kernel *= 2.0
    np.testing.assert_allclose(bj.certify(apply, images, 0.01).margins, 2 * before, rtol=1e-5)


# --- user-defined methods -------------------------------------------------------------------------


def test_a_transform_may_be_the_method(model, images, reference):
    transform = functools.partial(bj.linear, intermediate="interval")
    certificate = bj.certify(model, images, 0.05, method=transform)
    expected = bj.certify(model, images, 0.05, method="crown-ibp", rounding="nearest")
    np.testing.assert_allclose(certificate.margins, expected.margins, rtol=1e-5, atol=1e-6)
    assert certificate.method == "linear(intermediate='interval')"
    assert certificate.arithmetic == "nearest"
    rounded = functools.partial(transform, rounding="float32")
    assert bj.certify(model, images, 0.05, method=rounded).arithmetic == "float32"
    with pytest.raises(ValueError, match=r"rounding belongs to the transform; pass"):
        bj.certify(model, images, 0.05, method=transform, rounding="real")
    radius = bj.certified_radius(model, images, method=transform, steps=3)
    assert bj.certify(model, images, radius, method=transform).verified[radius > 0].all()


def test_a_transform_with_other_options_is_not_mistaken_for_a_former_one(model, images):
    margins = [
        bj.certify(model, images, 0.1, method=functools.partial(bj.linear, slopes=s)).margins
        for s in ("zero", "one")
    ]
    assert (margins[0] != margins[1]).any()


def test_alpha_crown_is_tighter_than_crown(model, images):
    crown = bj.certify(model, images, 0.1, method="crown").margins
    alpha = bj.certify(model, images, 0.1, method="alpha-crown").margins
    assert (alpha >= crown - 1e-5).all()
    assert alpha.sum() > crown.sum() + 1e-3


@pytest.mark.parametrize("returned", ["aux", "array"])
def test_a_transform_that_gives_no_bounds_certifies_nothing(returned, model, images):
    def transform(function):
        if returned == "aux":
            return bj.linear(function, has_aux=True)
        return lambda ball, rows: jnp.ones(rows.shape[0], rows.dtype)

    with pytest.raises(TypeError, match="must give bounds, an Interval, but transform returned"):
        bj.certify(model, images, 0.1, method=transform)


def test_a_certificate_prints_what_it_certifies():
    x = jnp.asarray([[1.0, 0.0], [0.5, 0.5]])
    certificate = bj.certify(lambda x: x, x, 0.1, labels=jnp.array([0, 1]))
    line = "1 of 2 examples verified within eps 0.1 (linf, not clipped) by crown-ibp, real"
    assert str(certificate) == line
    assert repr(certificate) == f"<Certificate: {line}>"
    assert (certificate.threat.eps, certificate.threat.norm) == (0.1, jnp.inf)
    radii = np.array([0.1, 0.25])
    certificate = bj.certify(lambda x: x, x, radii, norm=2, clip=(0.0, 1.0), method="interval")
    assert "within eps 0.1 to 0.25 (l2, clipped to [0, 1]) by interval" in str(certificate)
