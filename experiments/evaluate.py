"""Measures standard, PGD and verified error of a trained network, example by example.

    python -m experiments.evaluate --workdir=runs/digits
    python -m experiments.evaluate --workdir=runs/X --methods=interval,crown,alpha-crown --cascade
    python -m experiments.evaluate --workdir=runs/X --eps=8/255 --which=selected --count=1000
    python -m experiments.evaluate --workdir=runs/X --methods=crown,complete --cascade --timeout=30

Flags that are left out take the run's own settings. The results of every example are written to
`runs/X/evaluations/<split>-<which>-<norm>-eps<eps>.npz` after each batch
(`experiments.evaluation.certificates` reads and describes the file). The same command resumes after
the last batch, and a command with a further method computes that method only. With a longer
`--timeout` the method `complete` searches again what it left undecided. PGD attacks the
cross-entropy and the margin; an example resists if it resists both. The local devices divide every
batch.

At the end `runs/X/certificates/NAME/` has certificates, the network and the points of the attack as
files by which `python -m boundjax.check` proves the results again (`docs/certificates.md`).

A random network (`config.random`) has no certificates. It predicts by the mean softmax of `--draws`
draws, and EOT-FGSM and EOT-PGD attack it with each of `--attack-draws` per gradient at each radius:

    python -m experiments.evaluate --workdir=runs/Y --eps=0.3,0.36 --attack-draws=5,20 --count=1000

Its results are written to `runs/Y/evaluations/<split>-<which>-<norm>-eot.npz`
(`experiments.evaluation.random_files`), and the same command resumes or adds attacks.

Several processes (`experiments.cluster.process_group`) share the images: each writes a file of its
own beside that one, and `experiments.evaluation.shards` merges them at the end. After a kill the
same command resumes, with any number of processes.
"""

from __future__ import annotations

import argparse
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from boundjax import cache
from experiments.cluster import distributed, process_group
from experiments.evaluation import trained
from experiments.evaluation.evaluate import Options, evaluate_run, print_evaluated
from experiments.evaluation.random_evaluate import (
    RandomOptions,
    evaluate_random_run,
    print_random,
)
from experiments.records.versions import versions
from experiments.settings import radius
from experiments.settings.config import Rounding
from experiments.settings.errors import ExperimentError, fail


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the flags, evaluates, prints the table; exits with status 2 after a mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.evaluate", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--workdir", type=Path, required=True, help="the run folder")
    parser.add_argument("--methods", help="of boundjax.certify, separated by commas")
    parser.add_argument("--eps", help="0.1 or 8/255; for a random network several, with commas")
    parser.add_argument("--norm", help="inf or 2")
    parser.add_argument("--clip", action=argparse.BooleanOptionalAction, help="to the pixel range")
    parser.add_argument("--which", help="last (default) or selected epoch")
    parser.add_argument("--split", help="test (default) or validation images")
    parser.add_argument("--count", type=int, help="the first images only")
    default = Options._field_defaults
    parser.add_argument(
        "--pgd-steps",
        type=int,
        help=f"default: {default['pgd_steps']}; of a random network, as the run",
    )
    restarts = default["pgd_restarts"]
    parser.add_argument("--pgd-restarts", type=int, help=f"of each loss (default: {restarts})")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument(
        "--rounding",
        choices=typing.get_args(Rounding),
        help="what certificates are to hold for (default: the run's own setting)",
    )
    parser.add_argument(
        "--timeout", type=float, help="seconds for one image with the method complete"
    )
    parser.add_argument("--seed", type=int, help="of the random starts")
    parser.add_argument(
        "--cascade",
        action="store_true",
        default=None,
        help="after the cheapest method, run the others only on what is still open",
    )
    parser.add_argument("--name", help="of the file, instead of <split>-<which>-<norm>-eps<eps>")
    parser.add_argument("--data-dir", help="where the data set lies now")
    parser.add_argument("--draws", type=int, help="of a random network's prediction")
    parser.add_argument(
        "--attack-draws", help="per gradient of the attacks on a random network, with commas"
    )
    process_group.add_arguments(parser)
    arguments_by_name = vars(parser.parse_args(arguments))
    workdir = arguments_by_name.pop("workdir")
    processes = process_group.take_flags(arguments_by_name)
    flags = {name: value for name, value in arguments_by_name.items() if value is not None}
    try:
        options = _random_options(flags) if _is_random(workdir) else _options(flags)
        with distributed.joined(process_group.from_flags(**processes)):
            cache.enable_if_possible()
            compared = {**flags, "data_dir": None}
            command = {"options": compared, "versions": versions(), "workdir": str(workdir)}
            distributed.agree(command)
            if isinstance(options, RandomOptions):
                print_random(evaluate_random_run(workdir, options))
            else:
                print_evaluated(evaluate_run(workdir, options))
    except ExperimentError as error:
        fail(error)


def _is_random(workdir: Path) -> bool:
    """Whether the run's network is random; a folder without a run is reported later."""
    if not (workdir / "config.json").exists():
        return False
    return trained.read_run_config(workdir).random.draws


def _options(flags: dict[str, Any]) -> Options:
    """Reads the flags for a network with bounds.

    Raises:
      ExperimentError: for a bad value, or a flag of random networks.
    """
    _refuse(flags, ("draws", "attack_draws"), "is for random networks; leave it out")
    parsed = dict(flags)
    if "eps" in flags:
        parsed["eps"] = radius.parse(flags["eps"])
    if "methods" in flags:
        parsed["methods"] = tuple(flags["methods"].split(","))
    return Options(**parsed)


def _random_options(flags: dict[str, Any]) -> RandomOptions:
    """Reads the flags for a random network.

    Raises:
      ExperimentError: for a bad value, or a flag of certificates.
    """
    _refuse(
        flags,
        ("methods", "rounding", "timeout", "cascade", "pgd_restarts"),
        "is not for a random network: fresh draws for every query cannot be certified, attacks "
        "alone are measured; leave it out",
    )
    parsed = {key: value for key, value in flags.items() if key != "eps"}
    if "eps" in flags:
        parsed["radii"] = tuple(map(radius.parse, flags["eps"].split(",")))
    if "attack_draws" in flags:
        texts = flags["attack_draws"].split(",")
        if not all(text.isdecimal() for text in texts):
            raise ExperimentError(
                f"--attack-draws must be numbers like 5,20, got {flags['attack_draws']!r}"
            )
        parsed["attack_draws"] = tuple(map(int, texts))
    return RandomOptions(**parsed)


def _refuse(flags: dict[str, Any], names: Sequence[str], reason: str) -> None:
    for name in names:
        if name in flags:
            raise ExperimentError(f"--{name.replace('_', '-')} {reason}")


if __name__ == "__main__":
    main()
