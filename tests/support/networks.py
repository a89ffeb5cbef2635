"""Small networks over the whole op table and the list of methods drive every soundness test.

A network is a function of one example and of a pytree of random weights, so one compiled transform
serves all weights, inputs and radii that a test draws. `test_soundness.py` checks that every entry
of the op table occurs in one of them: whoever registers an op adds it to a network here.
"""

import dataclasses
import itertools
from collections.abc import Callable

import control_networks
import flax.linen as nn
import jax
import jax.numpy as jnp
import joint_networks
import numpy as np
import ordered_networks
import smooth_networks
from flax import nnx
from network import Network, affine, dense, normal

import boundjax as bj


def _mlp(*widths: int):
    def draw(rng):
        pairs = itertools.pairwise(widths)
        return [dense(rng, inputs, outputs) for inputs, outputs in pairs]

    def apply(layers, x):
        for layer in layers[:-1]:
            x = jax.nn.relu(affine(layer, x))
        return affine(layers[-1], x)

    return draw, apply


def _conv(x: jax.Array, kernel: jax.Array, **options) -> jax.Array:
    """A convolution of one image `[H, W, C]`."""
    options.setdefault("window_strides", (1, 1))
    options.setdefault("padding", "SAME")
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x[None], kernel, dimension_numbers=numbers, **options)[0]


def _cnn_draw(rng):
    return {
        "strided": normal(rng, 3, 3, 2, 4, fan_in=18),
        "bias": 0.3 * rng.normal(size=4),
        "grouped": normal(rng, 3, 3, 2, 4, fan_in=18),
        "dilated": normal(rng, 2, 2, 4, 2, fan_in=16),
        "head": dense(rng, 8, 3),
    }


def _cnn(weights, x):
    x = _conv(x, weights["strided"], window_strides=(2, 1), padding=((1, 0), (2, 1)))
    x = jax.nn.relu(x + weights["bias"][None, None, :])
    x = jax.nn.relu(_conv(x, weights["grouped"], feature_group_count=2))
    x = _conv(x, weights["dilated"], rhs_dilation=(1, 2), padding="VALID")
    return affine(weights["head"], jax.nn.relu(x).reshape(-1))


def _transposed_draw(rng):
    return {"up": normal(rng, 3, 3, 2, 2, fan_in=9), "mix": normal(rng, 2, 2, fan_in=2)}


def _transposed(weights, x):
    x = jax.lax.conv_transpose(x[None], weights["up"], (2, 2), "SAME")[0]
    x = jax.nn.relu(x)
    return jnp.einsum("hwc,cd->hd", x, weights["mix"])


def _residual_draw(rng):
    return {
        "first": normal(rng, 3, 3, 2, 2, fan_in=18),
        "second": normal(rng, 3, 3, 2, 2, fan_in=18),
        "shortcut": normal(rng, 1, 1, 2, 2, fan_in=2),
        "head": dense(rng, 2, 3),
    }


def _residual(weights, x):
    branch = jax.nn.relu(_conv(x, weights["first"], window_strides=(2, 2)))
    branch = _conv(branch, weights["second"])
    x = jax.nn.relu(branch + _conv(x, weights["shortcut"], window_strides=(2, 2)))
    x = jax.nn.relu(x - 0.5 * x[::-1])
    return affine(weights["head"], x.mean((0, 1)))


class _LinenBatchNorm(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(3, (3, 3), strides=2, name="conv")(x)
        x = nn.BatchNorm(use_running_average=True, name="norm")(x)
        x = nn.relu(x)
        return nn.Dense(3, name="head")(x.reshape(x.shape[0], -1))


def _randomised(rng, tree):
    """Random leaves of the same shapes; variances are positive."""

    def leaf(path, value):
        noise = rng.normal(size=value.shape)
        return np.exp(noise) if "var" in jax.tree_util.keystr(path) else 0.7 * noise

    return jax.tree_util.tree_map_with_path(leaf, tree)


def _linen_draw(rng):
    image = jax.ShapeDtypeStruct((1, 4, 4, 2), jnp.float32)
    shapes = jax.eval_shape(_LinenBatchNorm().init, jax.random.key(0), image)
    return _randomised(rng, shapes)


def _linen_apply(variables, x):
    return _LinenBatchNorm().apply(variables, x[None])[0]


class _NnxBatchNorm(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(2, 3, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(3, use_running_average=True, rngs=rngs)
        self.head = nnx.Linear(12, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x)))
        return self.head(x.reshape(x.shape[0], -1))


def _nnx_split():
    return nnx.split(_NnxBatchNorm(nnx.Rngs(0)), nnx.RngState, ...)


def _nnx_draw(rng):
    *_, state = _nnx_split()
    return _randomised(rng, nnx.to_pure_dict(state))


def _nnx_apply(weights, x):
    graph, rng_state, state = _nnx_split()
    nnx.replace_by_pure_dict(state, weights)
    return nnx.merge(graph, rng_state, state)(x[None])[0]


def _pooling(weights, x):
    batch = (x * weights["scale"])[None]
    overlapping = nn.max_pool(batch, (3, 3), strides=(2, 2), padding="SAME")
    exact = nn.max_pool(nn.relu(batch), (2, 2), strides=(2, 2))
    smallest = nn.pooling.min_pool(batch, (2, 2), strides=(2, 2))
    # Flax divides by an integer here, which strict promotion refuses.
    with jax.numpy_dtype_promotion("standard"):
        mean = nn.avg_pool(nn.relu(batch), (2, 2), strides=(2, 2))
        padded = nn.avg_pool(exact, (2, 2), padding="SAME", count_include_pad=False)
    total = overlapping + exact - smallest + 0.5 * mean - padded
    return {
        "largest": total[0].max((0, 1)),
        "smallest": (-total[0]).min(0).sum(0),
        "mean": total[0].mean(),
    }


def _leaky(weights, x):
    x = nn.leaky_relu(affine(weights[0], x), 0.1)
    x = nn.leaky_relu(affine(weights[1], x), 1.5)
    x = nn.leaky_relu(affine(weights[2], x), -0.5)
    return affine(weights[3], x)


def _clipped(weights, x):
    x = nn.relu6(4.0 * affine(weights[0], x))
    x = jnp.clip(affine(weights[1], x), -0.5, 0.7)
    x = jnp.abs(affine(weights[2], x))
    return affine(weights[3], x)


def _thresholds(weights, x):
    x = jnp.maximum(affine(weights[0], x), weights[0]["bias"])
    x = jnp.minimum(0.2, affine(weights[1], x))
    x = jnp.maximum(-0.1, affine(weights[2], x))
    x = jnp.minimum(affine(weights[3], x), weights[3]["bias"])
    return jax.lax.clamp(-0.3, x, 0.9)


def _repeated(weights, x):
    """Elementwise functions that repeat their operand along axes of a larger constant."""
    level = weights[1]["kernel"]  # [3, 4]
    x = jnp.maximum(affine(weights[0], x)[:, None], level).mean(1, keepdims=True)
    x = jnp.minimum(x, 0.3 * level) - nn.leaky_relu(x, jnp.abs(level))
    return jnp.maximum(x.sum(0, keepdims=True), level).sum(1)


def _smooth(weights, x):
    x = jax.nn.sigmoid(2.0 * affine(weights[0], x))
    x = jnp.tanh(affine(weights[1], x))
    x = jax.nn.softplus(affine(weights[2], x))
    return affine(weights[3], x)


def _layers(*widths: int):
    return _mlp(*widths)[0]


def _structure_draw(rng):
    return {"shift": rng.normal(size=(3, 4)), "head": normal(rng, 4, 3, fan_in=4)}


def _structure(weights, x):
    shift = weights["shift"]
    x = jax.nn.relu(x - shift) + (shift - x) / 2.0 - x / (1.0 + jnp.square(shift))
    x = jnp.concatenate([x, -x[:, ::-1]], axis=0)
    x = jnp.pad(x, ((1, 0), (0, 2)), constant_values=0.5)[::2, 1:5]
    x = jnp.transpose(x).reshape(2, 8)[:, jnp.array([0, 3, 3, 7])]
    x = jnp.where(jnp.arange(4) % 2 == 0, x.T.reshape(2, 4), shift[:2])
    x = jax.nn.relu(jnp.cumsum(x, axis=1))
    first, second = jnp.split(jnp.stack([x[0], jnp.roll(x[1], 1)]), 2)
    x = jnp.squeeze(first, 0) + jnp.tile(second[0, :2], 2)
    x = jnp.broadcast_to(x[None, :], (2, 4)) * shift[:2]
    x = jax.lax.dynamic_slice(x, (0, 1), (2, 3)) - jnp.mean(x)
    return jnp.sum(x, axis=0) @ weights["head"][:3]


def _rare_draw(rng):
    return {"shift": rng.normal(size=(4, 3)), "mix": normal(rng, 3, 3)}


def _rare(weights, x):
    """Ops that occur seldom: updates, copies, the gradient of a linear function, larger of two."""
    shift = weights["shift"]
    x = jax.nn.hard_tanh(x @ weights["mix"]) - jax.lax.stop_gradient(shift - x)
    x = jax.lax.dynamic_update_slice(x, jnp.array(x[:2, 1:], copy=True), (1, 0))
    x = jax.lax.dynamic_update_slice(shift, x[:, ::-1], (0, 0)) + x
    x = jax.linear_transpose(lambda v: 2.0 * v + v[::-1], x)(x)[0]
    first, second, third, fourth = jnp.unstack(x)
    larger = jnp.maximum(first, jnp.minimum(second, 0.5 * third))
    x = jnp.stack([larger, -fourth, jax.lax.cumsum(larger, reverse=True)])
    return jax.lax.convert_element_type(x.min(1), x.dtype) - jnp.negative(x).max(0)


def _tree_draw(rng):
    return {"hidden": dense(rng, 3, 5), "head": dense(rng, 5, 2), "scale": rng.normal(size=5)}


def _tree(weights, x):
    hidden = jax.nn.relu(affine(weights["hidden"], x))
    return {
        "logits": affine(weights["head"], hidden),
        "features": (hidden * weights["scale"], hidden.sum()),
        "input": 2.0 * x.reshape(3, 1),
    }


NETWORKS = (
    Network("mlp", (3,), *_mlp(3, 8, 6, 3), sequential=True),
    Network("cnn", (5, 5, 2), _cnn_draw, _cnn, sequential=True),
    Network("transposed", (2, 2, 2), _transposed_draw, _transposed, sequential=True),
    Network("residual", (4, 4, 2), _residual_draw, _residual),
    Network("linen", (4, 4, 2), _linen_draw, _linen_apply, sequential=True),
    Network("nnx", (4, 4, 2), _nnx_draw, _nnx_apply, sequential=True),
    Network("pooling", (3, 4, 1), lambda rng: {"scale": rng.normal(size=(3, 4, 1))}, _pooling),
    Network("leaky", (3,), _layers(3, 5, 5, 5, 2), _leaky, sequential=True),
    Network("clipped", (3,), _layers(3, 5, 5, 5, 2), _clipped, sequential=True),
    Network("thresholds", (3,), _layers(3, 5, 5, 5, 2), _thresholds, sequential=True),
    Network("repeated", (2,), _layers(2, 3, 4), _repeated),
    Network("smooth", (3,), _layers(3, 5, 5, 5, 2), _smooth, sequential=True),
    Network("structure", (3, 4), _structure_draw, _structure),
    Network("rare", (4, 3), _rare_draw, _rare),
    Network("tree", (3,), _tree_draw, _tree, sequential=True),
    *(
        # Compiling is what costs, and the policies of the other methods only differ at kinks.
        dataclasses.replace(network, methods=("interval", "crown"))
        for module in (smooth_networks, joint_networks, control_networks, ordered_networks)
        for network in module.NETWORKS
    ),
)

# Every preset of the transforms: name -> (function of one example -> function of an input set).
METHODS: dict[str, Callable[[Callable], Callable]] = {
    "interval": bj.interval,
    "crown-ibp": lambda f: bj.linear(f, slopes="adaptive", intermediate="interval"),
    "crown": lambda f: bj.linear(f, slopes="adaptive", intermediate="linear"),
    "fast-lin": lambda f: bj.linear(f, slopes="parallel", intermediate="linear"),
    "zero": lambda f: bj.linear(f, slopes="zero", intermediate="interval"),
    "one": lambda f: bj.linear(f, slopes="one", intermediate="interval"),
    "constant": lambda f: bj.linear(f, slopes="constant", intermediate="interval"),
    "lower": lambda f: bj.linear(f, slopes="adaptive", intermediate="interval", sides="lower"),
    "bcp": lambda f: (
        lambda *given: jax.tree.map(
            lambda leaf: leaf.interval() if isinstance(leaf, bj.BallBox) else leaf,
            bj.lipschitz(f)(*given),
            is_leaf=lambda leaf: isinstance(leaf, bj.BallBox),
        )
    ),
}

# Methods share their rules for ops, which `interval` and `crown` meet on every network. What one of
# the others adds is met on a few: its lines at kinks of every form, its walk over branches, windows
# and trees. A method that is not named here runs on all networks; the mlp has all of them.
ONLY_ON = {
    # Also what `test_tightness.py` shares.
    "crown-ibp": (
        *("mlp", "cnn", "residual", "linen", "pooling", "leaky", "clipped", "smooth", "repeated"),
    ),
    "fast-lin": (
        *("mlp", "cnn", "residual", "linen", "pooling", "leaky", "clipped", "thresholds"),
    ),
    "zero": ("mlp", "pooling", "clipped", "repeated"),
    "one": ("mlp", "leaky", "thresholds", "rare"),
    # `test_tightness.py` compares the sequential networks with interval bounds.
    "constant": ("mlp", "residual", "rare"),
    "lower": ("mlp", "cnn", "pooling", "tree"),
    # `test_lipschitz.py` has all networks, over balls; here are boxes.
    "bcp": ("mlp", "transposed", "pooling", "structure"),
}


def pairs(*methods: str) -> list[tuple[Network, str]]:
    """Networks with those of the methods (all, if none are named) that they are bounded with."""
    return [
        (network, method)
        for network in NETWORKS
        for method in methods or METHODS
        if (network.methods is None or method in network.methods)
        and network.name in ONLY_ON.get(method, (network.name,))
    ]


def points(
    rng: np.random.Generator, lower: np.ndarray, upper: np.ndarray, count: int = 1000
) -> np.ndarray:
    """Points of a box `[count, *shape]`: corners, points on faces, uniform ones, the two ends."""
    shape = (count, *lower.shape)
    third = rng.integers(0, 3, size=(count,) + (1,) * lower.ndim)
    uniform = rng.uniform(size=shape)
    corner = rng.integers(0, 2, size=shape).astype(uniform.dtype)
    face = np.where(rng.uniform(size=shape) < 0.5, uniform, corner)
    share = np.where(third == 0, uniform, np.where(third == 1, corner, face))
    share[0], share[1], share[2] = 0.0, 1.0, 0.5
    # Rounding may leave the box by an ulp, and outside nothing is promised.
    inside = lower + share * (upper - lower)
    return np.clip(inside, lower, upper).astype(lower.dtype)


def ball_points(
    rng: np.random.Generator,
    center: np.ndarray,
    eps: np.ndarray,
    p: float,
    clip: tuple[float, float] | None = None,
    count: int = 2000,
) -> np.ndarray:
    """Points of a scaled p-norm ball around `center` `[d]`, those inside the clip range."""
    rays = rng.normal(size=(count, center.size))
    # Sparse directions reach the vertices of the 1-norm ball.
    rays *= rng.uniform(size=rays.shape) < rng.uniform(size=(count, 1))
    rays[: 2 * center.size] = np.concatenate([np.eye(center.size), -np.eye(center.size)])
    if p == np.inf:
        rays[count // 2 :] = np.sign(rays[count // 2 :])
    norm = np.linalg.norm(rays, p, axis=1, keepdims=True)
    rays = rays / np.where(norm > 0, norm, 1.0)
    radius = np.where(rng.uniform(size=(count, 1)) < 0.5, 1.0, rng.uniform(size=(count, 1)))
    inside = center + radius * rays * eps
    if clip is not None:
        inside = inside[np.all((inside >= clip[0]) & (inside <= clip[1]), axis=1)]
    return inside


def ascend(network: Network, steps: int = 12) -> Callable:
    """Projected sign-gradient ascent on every output and on its negative, from the centre.

    Returns a function `(weights, lower, upper) -> points [2 m, *input_shape]`.
    """

    def attack(weights, lower, upper):
        radius = 0.5 * (upper - lower)
        centre = lower + radius
        outputs = network.flat(weights, centre).size
        directions = jnp.concatenate([jnp.eye(outputs), -jnp.eye(outputs)]).astype(lower.dtype)

        def climb(direction):
            def step(x, k):
                gradient = jax.grad(lambda x: direction @ network.flat(weights, x))(x)
                x = x + radius * jnp.sign(gradient) / k
                return jnp.clip(x, lower, upper), None

            # Off the centre: at a kink the gradient there may vanish.
            start = centre + 0.1 * radius
            return jax.lax.scan(step, start, 1 + jnp.arange(steps, dtype=start.dtype))[0]

        return jax.vmap(climb)(directions)

    return attack
