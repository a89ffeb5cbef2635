"""Certifies two published CAP models on all MNIST test images, and compares every margin.

    python -m experiments.benchmarks.certified_models ../shared/suites/public/certified_models

The models are those of Wong et al. 2018 ("Scaling provable adversarial defenses"): `mnist_0_1`, one
network, l-infinity 0.1; `mnist_0_3`, a cascade of three, l-infinity 0.3, pixels clipped to [0, 1].
The first stage that certifies its own prediction decides an image; the last stage counts only where
it certifies the true label. Published errors: 5.82 % and 33.64 %. `--count 200` takes the first
images only; `--output margins.npz` stores the margins, and a second call resumes from them.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import boundjax as bj

CHUNK = 512


def network(weights: np.lib.npyio.NpzFile, stage: int) -> Callable[[jax.Array], jax.Array]:
    """Returns one stage as a function from images `[B, 28, 28]` to logits `[B, 10]`."""

    def get(name: str) -> tuple[jax.Array, jax.Array]:
        kernel, bias = (weights[f"s{stage}_{name}_{kind}"] for kind in ("w", "b"))
        return jnp.asarray(kernel), jnp.asarray(bias)

    convolutions = [get("conv1"), get("conv2")]
    dense = [get("fc1"), get("fc2")]

    def apply(x: jax.Array) -> jax.Array:
        x = x[:, None]
        for kernel, bias in convolutions:
            x = jax.lax.conv_general_dilated(
                x, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NCHW", "OIHW", "NCHW")
            )
            x = jax.nn.relu(x + bias[None, :, None, None])
        x = x.reshape(x.shape[0], -1)
        x = jax.nn.relu(x @ dense[0][0].T + dense[0][1][None])
        return x @ dense[1][0].T + dense[1][1][None]

    return apply


def smallest_margins(
    model: Callable[[jax.Array], jax.Array],
    images: np.ndarray,
    labels: np.ndarray,
    eps: float,
    clip: tuple[float, float] | None,
) -> np.ndarray:
    """Computes the least margin of every image to another class, `[N]`, by Fast-Lin (exact CAP)."""
    certificate = bj.certify(
        model, images, eps, labels=labels, method="fast-lin", clip=clip, batch_size=16
    )
    margins = certificate.margins
    is_label = np.arange(margins.shape[1])[None] == labels[:, None]
    return np.where(is_label, np.inf, margins).min(axis=1)


def in_chunks(
    name: str,
    stored: dict[str, np.ndarray],
    save: Callable[[], None],
    call: Callable[..., np.ndarray],
    *arrays: np.ndarray,
) -> np.ndarray:
    """Calls `call` on chunks of the arrays, except on those that an earlier run stored."""
    done = list(stored.get(name, ()))
    start = time.perf_counter()
    for k in range(len(done), len(arrays[0]), CHUNK):
        done.extend(call(*(a[k : k + CHUNK] for a in arrays)))
        stored[name] = np.asarray(done, np.float32)
        save()
        rate = len(done) / len(arrays[0])
        print(f"{name}: {rate:6.1%}  {time.perf_counter() - start:7.0f} s", flush=True)
    return np.asarray(done, np.float32)


def compare(name: str, ours: np.ndarray, published: np.ndarray) -> None:
    """Prints the largest difference to the stored margins."""
    print(f"{name}: largest difference to the stored margins {np.abs(ours - published).max():.2e}")


def main() -> None:
    """Certifies both models."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--output", type=pathlib.Path)
    arguments = parser.parse_args()
    folder = arguments.folder
    if not (folder / "info.json").is_file():
        parser.error(f"no info.json in {folder}: expected the folder with the models' weights")
    info = json.loads((folder / "info.json").read_text())
    stored: dict[str, np.ndarray] = {}
    if arguments.output is not None and arguments.output.exists():
        stored = dict(np.load(arguments.output))

    def save() -> None:
        if arguments.output is not None:
            # NumPy's stub checks the arrays against `allow_pickle` as well.
            np.savez(arguments.output, **stored)  # pyright: ignore[reportArgumentType]

    test = np.load(folder / "mnist_t10k.npz")
    images = test["images"][: arguments.count].astype(np.float32) / 255.0
    labels = test["labels"][: arguments.count].astype(np.int32)
    count = len(labels)
    published = np.load(folder / "mnist_0_1_margins10k.npz")
    weights, eps = np.load(folder / "mnist_0_1_weights.npz"), info["mnist_0_1"]["eps"]
    model = network(weights, 0)
    margins = in_chunks(
        "mnist_0_1", stored, save, lambda x, y: smallest_margins(model, x, y, eps, None),
        images, labels,
    )  # fmt: skip
    compare("mnist_0_1", margins, published["margin"][:count])
    print(f"mnist_0_1: robust error {np.mean(~(margins > 0)):.2%} of {count}")

    published = np.load(folder / "mnist_0_3_margins10k.npz")
    weights = np.load(folder / "mnist_0_3_cascade_weights.npz")
    record = info["mnist_0_3_cascade"]
    clip = (0.0, 1.0) if record["box_clipped_to_0_1"] else None
    reached, wrong = np.arange(count), 0
    for stage in range(record["stages"]):
        model = network(weights, stage)
        x, y, last = images[reached], labels[reached], stage == record["stages"] - 1
        predicted = np.asarray(jnp.argmax(jax.jit(model)(x), axis=-1)).astype(np.int32)
        target = y if last else predicted
        margins = in_chunks(
            f"mnist_0_3 stage {stage}", stored, save,
            lambda x, y, model=model: smallest_margins(model, x, y, record["eps"], clip),
            x, target,
        )  # fmt: skip
        indices = published[f"s{stage}_idx"]
        position = np.searchsorted(indices, reached)
        assert (indices[position] == reached).all(), "other images reach this stage than stored"
        compare(
            f"mnist_0_3 stage {stage}",
            margins,
            published[f"s{stage}_{'mtrue' if last else 'mpred'}"][position],
        )
        certified = margins > 0
        wrong += np.sum(~certified) if last else np.sum(certified & (predicted != y))
        reached = reached[~certified]
    print(f"mnist_0_3: robust error {wrong / count:.2%} ({wrong} of {count})")


if __name__ == "__main__":
    main()
