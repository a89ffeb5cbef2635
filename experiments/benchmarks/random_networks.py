"""Measures how diverse the gradients of trained random networks are, and how attacks transfer.

    python -m experiments.benchmarks.random_networks runs/adv-bnn runs/adv-bnn-graddiv --eps=0.4

For each run folder it prints, as means over the first test images, the measures of GradDiv on the
gradients of `--draws` draws: the mean resultant length rho, the mean cosine R_mean, R_DPP and
R_kappa (`boundjax.training.gradient_diversity_loss`). They depend on the number of draws: rho of n
independent directions is about 1 / sqrt(n). Then it attacks each of `--transfer` draws by PGD of 20
steps and prints the accuracy of every other draw on the points: the mean, the least and the largest
off the diagonal, and the mean on it (Figure 2.8 of the thesis behind Lee et al. 2022). A last table
has the accuracy under attacks from the runs' evaluation files, and what a run gains over the first.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from boundjax import cache, training
from boundjax.sets.threat import Threat
from experiments.benchmarks import timing
from experiments.data import Images
from experiments.evaluation import random_files, trained
from experiments.evaluation.random_network import RandomNetwork
from experiments.settings import radius
from experiments.settings.config import NORMS
from experiments.settings.errors import ExperimentError, fail

PGD_STEPS = 20


class Diversity(NamedTuple):
    """Means over images of measures of their gradients, and the transfer accuracies `[n, n]`.

    `images` is the number of those whose gradients all have a direction; others are left out of the
    means, as in the regularizer.
    """

    images: int
    rho: float
    mean: float
    dpp: float
    kappa: float
    transfer: np.ndarray

    @property
    def off_diagonal(self) -> np.ndarray:
        """The accuracies of draws on the points of other draws."""
        return self.transfer[~np.eye(len(self.transfer), dtype=bool)]


def measure(
    network: RandomNetwork, data: Images, eps: float, key: jax.Array, draws: int, transfer: int
) -> Diversity:
    """Measures the gradients of a random network at images, and the transfer of attacks.

    Args:
      network: the network.
      data: the images.
      eps: radius of the attacks.
      key: decides all draws.
      draws: number of draws for the measures, at least 2.
      transfer: number of draws that are attacked, at least 2.
    """
    gradient_key, transfer_key = jax.random.split(key)
    blocks = [
        data.take(slice(start, start + network.size)) for start in range(0, len(data), network.size)
    ]
    keys = jax.random.split(gradient_key, draws)
    values = []
    for block in blocks:
        gradients = jnp.asarray(network.gradients(block, list(keys)))
        directions = training.gradient_directions(gradients)
        kept = np.asarray(directions.kept)
        rho = np.asarray(training.mean_resultant_length(directions.cosines))[kept].sum()
        means = [training.gradient_diversity_loss(gradients, m) for m in ("mean", "dpp", "kappa")]
        values.append([kept.sum(), rho, *(float(mean) * kept.sum() for mean in means)])
    count, *sums = np.sum(values, axis=0)
    drawn = list(jax.random.split(transfer_key, transfer))
    accuracy = np.zeros((transfer, transfer))
    for row, draw in enumerate(drawn):
        for block in blocks:
            points = network.attacked(block, eps, eps / 4, [draw[None]] * PGD_STEPS)
            attacked = Images(points, block.labels)
            right = [int(network.correct(attacked, [other]).sum()) for other in drawn]
            accuracy[row] += right
    rho, mean, dpp, kappa = (float(total / max(count, 1)) for total in sums)
    return Diversity(int(count), rho, mean, dpp, kappa, accuracy / len(data))


def measure_run(
    workdir: Path, eps: float, count: int, draws: int, transfer: int, data_dir: str | None
) -> Diversity:
    """Measures the random network of a run folder on its first test images.

    Raises:
      ExperimentError: for a folder without a network, a deterministic one, or a bad argument.
    """
    for flag, value, least in (("--count", count, 1), ("--draws", draws, 2)):
        if value < least:
            raise ExperimentError(f"{flag} must be >= {least}, got {value}")
    if transfer < 2:
        raise ExperimentError(f"--transfer must be >= 2, got {transfer}")
    run = trained.load(workdir, data_dir=data_dir)
    config = run.config
    if not config.random.draws:
        raise ExperimentError(f"{workdir} has a deterministic network: its gradients are all alike")
    data = run.test.take(slice(count))
    radius.check("--eps", eps, config.robust.norm, data.images.shape[1:], run.title)
    threat = Threat(
        eps, NORMS[config.robust.norm].order, (0.0, 1.0) if config.robust.clip else None
    )
    network = RandomNetwork(run.pure, threat, min(config.evaluation.batch_size, len(data)))
    return measure(network, data, eps, jax.random.key(config.seed), draws, transfer)


def report(name: str, diversity: Diversity, first: Diversity) -> str:
    """One line: the measures, rho as a share of the first run's, and the transfer accuracies."""
    off = 100 * diversity.off_diagonal
    return (
        f"{name}, {diversity.images} images: "
        f"rho {diversity.rho:.4f} ({diversity.rho / first.rho:.2f} of the first), "
        f"R_mean {diversity.mean:.4f}, R_DPP {diversity.dpp:.4f}, R_kappa {diversity.kappa:.4f}; "
        f"accuracy on points of other draws {off.mean():.2f} % "
        f"[{off.min():.2f}, {off.max():.2f}], of the same draw "
        f"{100 * np.diag(diversity.transfer).mean():.2f} %"
    )


def attack_accuracies(workdir: Path, name: str) -> dict[str, float]:
    """The accuracies in percent, by attack, in an evaluation file of a run; `"none"` without one.

    Attacks that are not done are left out.

    Raises:
      ExperimentError: for a file that is missing, damaged or without a clean pass.
    """
    errors = random_files.read(workdir / "evaluations" / f"{name}.npz").errors()
    accuracies = {"none": 100 * (1 - errors["standard_error"])}
    done = {k: e for k, e in errors["attack_errors"].items() if e is not None}
    return accuracies | {k: 100 * (1 - e) for k, e in done.items()}


def gains(workdirs: Sequence[Path], name: str) -> list[str]:
    """Lines with the accuracy of every run under each attack, and the gain over the first run."""
    baseline, *defended = (attack_accuracies(workdir, name) for workdir in workdirs)
    lines = []
    for attack, accuracy in baseline.items():
        if not all(attack in accuracies for accuracies in defended):
            continue
        cells = [f"{accuracy:6.2f}", *(f"{accuracies[attack]:6.2f}" for accuracies in defended)]
        cells += [f"{accuracies[attack] - accuracy:+6.2f}" for accuracies in defended]
        kind, draws, eps = ("none", 0, 0) if attack == "none" else random_files.parsed(attack)
        label = kind if kind == "none" else f"{kind} n {draws} eps {eps:g}"
        lines.append("  ".join([f"{label:<24}", *cells]))
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the flags and prints the measures of every run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="run folders; the first is the baseline")
    parser.add_argument("--eps", default="0.4", help="radius of the attacks on draws (default 0.4)")
    parser.add_argument("--count", type=int, default=1000, help="first test images (default 1000)")
    parser.add_argument("--draws", type=int, default=100, help="of the measures (default 100)")
    parser.add_argument("--transfer", type=int, default=10, help="attacked draws (default 10)")
    parser.add_argument("--data-dir", help="where the data set lies now")
    parser.add_argument(
        "--evaluation", default="summary-last", help="file of accuracies (default: summary-last)"
    )
    flags = parser.parse_args(arguments)
    try:
        eps = radius.parse(flags.eps)
        cache.enable_if_possible()
        print(timing.machine())
        first = None
        for workdir in flags.runs:
            diversity = measure_run(
                workdir, eps, flags.count, flags.draws, flags.transfer, flags.data_dir
            )
            first = diversity if first is None else first
            print(report(workdir.name, diversity, first), flush=True)
        print(f"accuracy in %: {', '.join(run.name for run in flags.runs)}, gains over the first")
        print("\n".join(gains(flags.runs, flags.evaluation)), flush=True)
    except ExperimentError as error:
        fail(error)


if __name__ == "__main__":
    main()
