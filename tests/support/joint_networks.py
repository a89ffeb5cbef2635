"""Networks over products of perturbed values, attention, normalisation, selections."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from network import Network, affine, dense, normal


def _gated_draw(rng):
    return [dense(rng, 3, 4), dense(rng, 3, 4), dense(rng, 4, 3)]


def _gated(layers, x):
    """Products of elements, of a value by itself, by a scalar."""
    gate, value = jax.nn.sigmoid(affine(layers[0], x)), jnp.tanh(affine(layers[1], x))
    gated = gate * affine(layers[1], x)
    powers = value * value + jax.lax.mul(gate, value.sum())
    return affine(layers[2], 0.3 * gated - 0.1 * powers)


def _tokens(layer, x):
    """The same dense layer for every row of `[T, D]`."""
    return x @ layer["kernel"] + layer["bias"][None, :]


def _attention_draw(rng):
    query, key, value = (normal(rng, 3, 2, 2) for _ in range(3))
    head = dense(rng, 3, 3)
    return {"query": query, "key": key, "value": value, "out": normal(rng, 2, 2, 3), "head": head}


def _attention(weights, x):
    """A block of two heads over tokens `[3, 3]`, its logits normalised."""
    query = jnp.tanh(jnp.einsum("td,dhk->thk", x, weights["query"]))
    key = jnp.tanh(jnp.einsum("td,dhk->thk", x, weights["key"]))
    value = jnp.einsum("td,dhk->thk", x, weights["value"])
    shares = jax.nn.softmax(jnp.einsum("qhd,khd->hqk", query, key))
    mixed = jnp.einsum("hqk,khd->qhd", shares, value)
    x = x + jnp.einsum("thk,hkd->td", mixed, 0.2 * weights["out"])
    return jax.nn.log_softmax(affine(weights["head"], x.mean(0)))


def _masked(weights, x):
    """Attention behind masks: of -inf by a selection, an addend, JAX's `where`; and of numbers."""
    query, key = (jnp.einsum("td,dhk->thk", x, weights[name]) for name in ("query", "key"))
    scores = jnp.einsum("qhd,khd->hqk", query, key)
    causal = jnp.tril(jnp.ones((1, 3, 3), bool))
    least = jnp.asarray(-jnp.inf, x.dtype)
    fill = jnp.finfo(x.dtype).min
    some = jnp.asarray([True, False, True])[None, :, None]
    mixed = jnp.zeros((3, 2), x.dtype)
    for shares in (
        jax.nn.softmax(jnp.where(causal, scores, least)),
        jax.nn.softmax(scores + jnp.where(causal, jnp.zeros((), x.dtype), least)),
        jax.nn.softmax(scores, where=causal),
        jnp.exp(jax.nn.log_softmax(scores, where=causal)),
        jax.nn.softmax(jnp.where(causal, scores, -1e9)),
        jax.nn.softmax(jnp.where(some, jnp.where(causal, scores, fill), fill)),
    ):
        mixed = mixed + jnp.einsum("hqk,kd->qd", shares, x[:, :2])
    total = jax.nn.logsumexp(scores, axis=(0, 2), where=causal)
    return affine(weights["head"], 0.1 * mixed[:, 0] * mixed[:, 1] + total)


def _cosine_draw(rng):
    return {"left": dense(rng, 3, 4), "right": dense(rng, 3, 4), "norm": rng.normal(size=(2, 4))}


def _cosine(weights, x):
    """Layer and root-mean-square norms, and the log-sum-exp of the tokens' similarities."""
    left, right = _tokens(weights["left"], x), _tokens(weights["right"], x)
    scale, bias = weights["norm"]
    # Flax takes the larger type of float64 and float32 here, which strict promotion refuses.
    with jax.numpy_dtype_promotion("standard"):
        left = nn.LayerNorm().apply({"params": {"scale": scale, "bias": bias}}, left)
        right = nn.RMSNorm(epsilon=1e-3).apply({"params": {"scale": scale}}, right)
    return jax.nn.logsumexp(left @ right.T, axis=1) - 0.1 * left[:, 0]


def _decisions(layers, x):
    """Predicates on perturbed values, and what is chosen by them."""
    first, second = affine(layers[0], x), affine(layers[1], x)
    large = (first > 0.5) | (second <= first) & ~(first < -1.0)
    odd = jnp.logical_xor(large, second >= 0.25) & (first != 0.75) & jnp.isfinite(first)
    either = jnp.where(first == -0.25, odd, large)
    chosen = (
        jnp.where(large, second, first) + jnp.where(odd, first, 0.5) - jnp.where(either, 1, second)
    )
    common = jnp.where(jnp.any(odd) & jnp.all(first > -9.0), chosen, 0.5 * chosen)
    return affine(layers[2], common)


def _polar(layers, x):
    """Lengths, angles right of the origin and unit vectors."""
    left, right = affine(layers[0], x), affine(layers[1], x)
    unit = left / (jnp.linalg.norm(left) + 0.1)
    angle = jnp.arctan2(right, jax.nn.softplus(left) + 0.5)
    return affine(layers[2], unit + 0.3 * jnp.hypot(left, right) + angle)


NETWORKS: tuple[Network, ...] = (
    Network("polar", (3,), _gated_draw, _polar),
    Network("gated", (3,), _gated_draw, _gated),
    Network("attention", (3, 3), _attention_draw, _attention),
    Network("masked", (3, 3), _attention_draw, _masked),
    Network("cosine", (3, 3), _cosine_draw, _cosine),
    Network("decisions", (3,), _gated_draw, _decisions),
)
