"""Certifies two published CAP models on all MNIST test images, and compares every margin.

    python -m experiments.benchmarks.certified_models ../shared/suites/public/certified_models

The models are those of Wong et al. 2018 ("Scaling provable adversarial defenses"): `mnist_0_1`, one
network, l-infinity 0.1; `mnist_0_3`, a cascade of three, l-infinity 0.3, pixels clipped to [0, 1].
An image is settled by the first stage that certifies its own prediction; the last stage counts only
where it certifies the true label. Published errors: 5.82 % and 33.64 %. `--count 200` takes the
first images only; `--output margins.npz` keeps the margins, and a second call goes on from there.
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
    """One stage as a function from images `[B, 28, 28]` to logits `[B, 10]`."""

    def get(name: str) -> tuple[jax.Array, jax.Array]:
        return tuple(jnp.asarray(weights[f"s{stage}_{name}_{kind}"]) for kind in ("w", "b"))

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
    """The least margin of every image to another class, `[N]`, by Fast-Lin (exact CAP)."""
    method = {"method": "fast-lin", "clip": clip, "batch_size": 16}
    margins = bj.certify(model, images, eps, labels=labels, **method).margins
    others = np.arange(margins.shape[1])[None] != labels[:, None]
    return np.where(others, margins, np.inf).min(axis=1)


def in_chunks(
    name: str, kept: dict[str, np.ndarray], save: Callable[[], None], call: Callable, *arrays
) -> np.ndarray:
    """`call` on chunks of the arrays; what an earlier run kept is not computed again."""
    done = list(kept.get(name, ()))
    start = time.perf_counter()
    for k in range(len(done), len(arrays[0]), CHUNK):
        done.extend(call(*(a[k : k + CHUNK] for a in arrays)))
        kept[name] = np.asarray(done, np.float32)
        save()
        rate = len(done) / len(arrays[0])
        print(f"{name}: {rate:6.1%}  {time.perf_counter() - start:7.0f} s", flush=True)
    return np.asarray(done, np.float32)


def compare(name: str, ours: np.ndarray, stored: np.ndarray) -> None:
    """Prints the largest difference to the stored margins."""
    print(f"{name}: largest difference to the stored margins {np.abs(ours - stored).max():.2e}")


def main() -> None:
    """Runs both models."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--output", type=pathlib.Path)
    arguments = parser.parse_args()
    folder = arguments.folder
    if not (folder / "info.json").is_file():
        parser.error(f"no info.json in {folder}: expected the folder with the models' weights")
    info = json.loads((folder / "info.json").read_text())
    kept: dict[str, np.ndarray] = {}
    if arguments.output is not None and arguments.output.exists():
        kept = dict(np.load(arguments.output))

    def save() -> None:
        if arguments.output is not None:
            np.savez(arguments.output, **kept)

    test = np.load(folder / "mnist_t10k.npz")
    images = test["images"][: arguments.count].astype(np.float32) / 255.0
    labels = test["labels"][: arguments.count].astype(np.int32)
    count = len(labels)
    stored = np.load(folder / "mnist_0_1_margins10k.npz")
    weights, eps = np.load(folder / "mnist_0_1_weights.npz"), info["mnist_0_1"]["eps"]
    model = network(weights, 0)
    margins = in_chunks(
        "mnist_0_1", kept, save, lambda x, y: smallest_margins(model, x, y, eps, None),
        images, labels,
    )  # fmt: skip
    compare("mnist_0_1", margins, stored["margin"][:count])
    print(f"mnist_0_1: robust error {np.mean(~(margins > 0)):.2%} of {count}")

    stored = np.load(folder / "mnist_0_3_margins10k.npz")
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
            f"mnist_0_3 stage {stage}", kept, save,
            lambda x, y, model=model: smallest_margins(model, x, y, record["eps"], clip),
            x, target,
        )  # fmt: skip
        known = stored[f"s{stage}_idx"]
        position = np.searchsorted(known, reached)
        assert (known[position] == reached).all(), "other images reach this stage than stored"
        compare(
            f"mnist_0_3 stage {stage}",
            margins,
            stored[f"s{stage}_{'mtrue' if last else 'mpred'}"][position],
        )
        certified = margins > 0
        wrong += np.sum(~certified) if last else np.sum(certified & (predicted != y))
        reached = reached[~certified]
    print(f"mnist_0_3: robust error {wrong / count:.2%} ({wrong} of {count})")


if __name__ == "__main__":
    main()
