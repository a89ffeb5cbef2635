"""Reproduces a published row and reports how close it came.

    python -m experiments.reproduce --list
    python -m experiments.reproduce --list family-a
    python -m experiments.reproduce mnist-ibp-0.1 --data-dir=FOLDER
    python -m experiments.reproduce cifar10-short-warmup-160 --seeds=5 --budget=gpu --dry-run

Every seed of the row, from `experiments/published/rows.py`, is trained in `WORKDIR/seed-K` and
evaluated by PGD-100 and the row's bounds (`experiments.evaluate`). Finished seeds are not repeated,
and killed ones resume. The means are printed beside the published numbers and become a line of the
results file, in the section "Reproduced rows"; a row with the same weights replaces its old line.
`--budget` limits the cost: without an accelerator, rows for one are refused unless `--budget=gpu`
forces them. Several processes (`experiments.cluster.process_group`) can run a row together.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from boundjax import cache
from experiments.cluster import process_group
from experiments.published.reproduction import (
    BUDGETS,
    SECTION,
    check_budget,
    check_results,
    find,
    print_plan,
    print_reproduction,
    print_rows,
    record,
    reproduce,
)
from experiments.settings.errors import ExperimentError, fail


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the flags and runs the row; exits with status 2 after a mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.reproduce", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("row", nargs="?", metavar="ROW", help="of --list")
    parser.add_argument(
        "--list",
        action="store_true",
        help="show all rows, or those of --budget, or with ROW in their names",
    )
    parser.add_argument("--budget", choices=BUDGETS, help="default: by the machine")
    parser.add_argument("--seeds", type=int, help="0, 1, ...; how many (default: the row's)")
    parser.add_argument("--data-dir", help="where the data set lies")
    parser.add_argument("--workdir", type=Path, help="default: runs/reproduce/ROW")
    parser.add_argument("--results", type=Path, default=Path("docs/results.md"))
    parser.add_argument("--dry-run", action="store_true", help="only say what would be done")
    process_group.add_arguments(parser)
    flags = parser.parse_args(arguments)
    try:
        if flags.list:
            print_rows(flags.budget or "gpu", flags.row or "")
            return
        if flags.row is None:
            raise ExperimentError("which row? --list shows all")
        row = find(flags.row)
        seeds = row.seeds if flags.seeds is None else flags.seeds
        if seeds < 1:
            raise ExperimentError(f"--seeds must be >= 1, got {seeds}")
        workdir = flags.workdir or Path("runs") / "reproduce" / row.name
        if flags.dry_run:
            print_plan(row, seeds, workdir, flags.results, flags.data_dir)
            return
        group = process_group.from_flags(**process_group.take_flags(vars(flags)))

        # Import late, so that mistakes on the command line are reported without waiting for JAX.
        from experiments.cluster import distributed
        from experiments.records.versions import versions

        with distributed.joined(group):
            distributed.agree(
                {"row": row.name, "seeds": seeds, "versions": versions(), "workdir": str(workdir)}
            )
            cache.enable_if_possible()
            # Check now rather than after the training.
            check_budget(row, flags.budget)
            distributed.from_main(lambda: check_results(flags.results))
            reproduction = reproduce(row, seeds, workdir, flags.data_dir)
            print_reproduction(reproduction)
            distributed.from_main(lambda: record(flags.results, reproduction))
            print(f"results: {flags.results}, section {SECTION.removeprefix('## ')!r}")
    except ExperimentError as error:
        fail(error)


if __name__ == "__main__":
    main()
