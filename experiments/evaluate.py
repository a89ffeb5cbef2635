"""Measures standard, PGD and verified error of a trained network, example by example.

    python -m experiments.evaluate --workdir=runs/digits
    python -m experiments.evaluate --workdir=runs/X --methods=interval,crown,alpha-crown --cascade
    python -m experiments.evaluate --workdir=runs/X --eps=8/255 --which=selected --count=1000

Flags that are left out take the run's own settings. The results of every example are written to
`runs/X/evaluations/<split>-<which>-<norm>-eps<eps>.npz` after each batch
(`experiments.evaluation.certificates` reads and describes the file). The same command resumes after
the last batch, and a command with a further method computes that method only. PGD attacks the
cross-entropy and the margin; an example resists if it resists both. The local devices divide every
batch.

At the end `runs/X/certificates/NAME/` has certificates, the network and the points of the attack as
files by which `python -m boundjax.check` proves the results again (`docs/certificates.md`).

Several processes (`experiments.cluster.process_group`) share the images: each writes a file of its
own beside that one, and `experiments.evaluation.shards` merges them at the end. After a kill the
same command resumes, with any number of processes.
"""

from __future__ import annotations

import argparse
import typing
from collections.abc import Sequence
from pathlib import Path

from experiments.cluster import distributed, process_group
from experiments.evaluation.evaluate import Options, evaluate_run, print_evaluated
from experiments.records.versions import versions
from experiments.settings import radius
from experiments.settings.config import Rounding
from experiments.settings.errors import ExperimentError, fail


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the flags, evaluates, prints the table; exits with status 2 after a mistake."""
    default = Options._field_defaults
    parser = argparse.ArgumentParser(
        prog="python -m experiments.evaluate", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--workdir", type=Path, required=True, help="the run folder")
    parser.add_argument("--methods", help="of boundjax.certify, separated by commas")
    parser.add_argument("--eps", help="0.1 or 8/255")
    parser.add_argument("--norm", help="inf or 2")
    parser.add_argument("--clip", action=argparse.BooleanOptionalAction, help="to the pixel range")
    parser.add_argument(
        "--which", default=default["which"], help="last (default) or selected epoch"
    )
    parser.add_argument(
        "--split", default=default["split"], help="test (default) or validation images"
    )
    parser.add_argument("--count", type=int, help="the first images only")
    parser.add_argument("--pgd-steps", type=int, default=default["pgd_steps"])
    restarts = default["pgd_restarts"]
    parser.add_argument("--pgd-restarts", type=int, default=restarts, help="of each loss")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument(
        "--rounding",
        choices=typing.get_args(Rounding),
        help="what certificates are to hold for (default: the run's own setting)",
    )
    parser.add_argument("--seed", type=int, help="of the random starts")
    parser.add_argument(
        "--cascade",
        action="store_true",
        help="after the cheapest method, run the others only on what is still open",
    )
    parser.add_argument("--name", help="of the file, instead of <split>-<which>-<norm>-eps<eps>")
    parser.add_argument("--data-dir", help="where the data set lies now")
    process_group.add_arguments(parser)
    flags = vars(parser.parse_args(arguments))
    workdir = flags.pop("workdir")
    processes = process_group.take_flags(flags)
    try:
        if flags["eps"] is not None:
            flags["eps"] = radius.parse(flags["eps"])
        if flags["methods"] is not None:
            flags["methods"] = tuple(flags["methods"].split(","))
        with distributed.joined(process_group.from_flags(**processes)):
            compared = {key: value for key, value in flags.items() if key != "data_dir"}
            command = {"options": compared, "versions": versions(), "workdir": str(workdir)}
            distributed.agree(command)
            print_evaluated(evaluate_run(workdir, Options(**flags)))
    except ExperimentError as error:
        fail(error)


if __name__ == "__main__":
    main()
