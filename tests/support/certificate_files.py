"""Models, and certificate files of them, for the tests of certificates as files."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import boundjax as bj
from boundjax import check
from boundjax.certification import export

BIAS = nn.initializers.normal(0.1)


class Mlp(nn.Module):
    activation: object = nn.relu

    @nn.compact
    def __call__(self, x):
        x = x.reshape(x.shape[0], -1)
        x = self.activation(nn.Dense(12, bias_init=BIAS)(x))
        x = self.activation(nn.Dense(12, bias_init=BIAS)(x))
        return nn.Dense(3, bias_init=BIAS)(x)


class Cnn(nn.Module):
    """Strides, groups, dilation, BatchNorm, a residual sum, max and average pooling."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), strides=2, bias_init=BIAS)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        y = nn.Conv(4, (3, 3), feature_group_count=2, kernel_dilation=2, bias_init=BIAS)(x)
        x = nn.relu(x + y)
        x = nn.max_pool(x, (2, 2), (1, 1), padding="SAME")
        x = jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 2, 2, 1), (1, 1, 1, 1), "VALID") / 4.0
        x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(3)(x)


class Piecewise(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.leaky_relu(nn.Dense(8)(x)) / 3.0
        x = 0.5 - jnp.abs(nn.Dense(8)(x))
        x = jnp.clip(nn.Dense(8)(x), -0.5, 0.3)
        x = nn.relu6(jnp.maximum(jnp.concatenate([x, 2.0 * x], axis=-1), -0.1))
        return nn.Dense(3)(jnp.pad(x, ((0, 0), (1, 1)), constant_values=0.5)[:, ::-1])


NETWORKS = {
    "mlp": (Mlp(), (2, 4)),
    "cnn": (Cnn(), (6, 6, 2)),
    "piecewise": (Piecewise(), (6,)),
    "tanh": (Mlp(nn.tanh), (8,)),
    "sigmoid": (Mlp(nn.sigmoid), (8,)),
    "exp": (Mlp(jnp.exp), (8,)),
}


def model_of(name, seed=0):
    module, shape = NETWORKS[name]
    variables = module.init(jax.random.key(seed), jnp.zeros((1, *shape)))
    if "batch_stats" in variables:
        variables = jax.tree.map(
            lambda v: v + 0.3 * jnp.cos(jnp.arange(1.0 * v.size)).reshape(v.shape), variables
        )
    return (module, variables), shape


def inputs_of(shape, count=6):
    return np.random.default_rng(0).uniform(size=(count, *shape)).astype(np.float32)


def run(capsys, *arguments):
    """The exit status and the printed lines of the checker."""
    status = check.main([str(a) for a in arguments])
    printed = capsys.readouterr()
    return status, printed.out.splitlines() + printed.err.splitlines()


def save_true_certificate(folder):
    """Saves a certificate that is true, and its network; the certificate, model and inputs."""
    model, shape = model_of("mlp")
    x = inputs_of(shape)
    certificate = bj.certify(model, x, 0.1, clip=(0.0, 1.0), method="crown-ibp")
    assert 0 < certificate.verified.sum() < len(x)
    bj.export_weights(model, x, folder / "weights.npz")
    certificate.save(folder / "certificate.npz", model, x)
    return certificate, model, x


def contents(path):
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    return arrays, json.loads(arrays.pop("json").tobytes())


def rewritten(path, arrays, claims):
    export.write(path, {**arrays, "json": export.encoded(claims)})
    return path


def nodes_of(arrays):
    """The checker's nodes of an exported network."""
    nodes = []
    for k, (op, *inputs) in enumerate(json.loads(arrays["json"].tobytes())["nodes"]):
        names = [name for name in arrays if name.startswith(f"{k}.")]
        weights = {name.partition(".")[2]: arrays[name] for name in names}
        check.append(nodes, op, inputs, **weights)
    return nodes


def evaluated(nodes, x):
    """The outputs `[B, C]` of the checker's nodes."""
    values = [x.reshape(len(x), -1).astype(np.float64)]
    for node in nodes[1:]:
        operands = [values[i] for i in node.inputs]
        if node.op in check.LINEAR:
            values.append(node.forward(operands))
        elif node.op == "max":
            entries = check.windows(operands[0], node.index)[..., 0]
            values.append(np.where(node.index < 0, -np.inf, entries).max(axis=-1))
        else:
            with np.errstate(all="ignore"):
                values.append(node.value(operands[0]))
    return values[-1]
