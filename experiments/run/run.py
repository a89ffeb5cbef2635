"""Runs a configuration to its `summary.json`.

Everything that depends on chance or time is a pure function of (seed, step): the initial
parameters, the order of the images, the random numbers of a step, the radius and the coefficients
of the loss. The state holds everything else. A killed run therefore continues from its latest
checkpoint to bit-identical parameters.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.records.folder import Records
from experiments.run.seeds import configured, run_members, run_seeds
from experiments.run.summary import of_seeds, print_seeds, print_summary
from experiments.settings.config import Config
from experiments.train.loop import Member


def run(config: Config, workdir: Path, name: str) -> dict[str, Any]:
    """Trains and evaluates, resumes an interrupted run or repeats the summary of a finished one.

    With `config.seeds` above 1 there is a run in `workdir/seed-K` for every seed, and a summary of
    all of them.

    Args:
      config: the validated configuration.
      workdir: the run folder, created if necessary.
      name: name of the experiment for the records.

    Returns:
      The content of `summary.json`.

    Raises:
      ExperimentError: for anything that the user can correct.
    """
    records = Records(workdir, config)
    summary = records.summary()
    if summary is not None:
        print(f"{workdir} holds a finished run ({summary['finished']}); nothing to do.")
        (print_summary if config.seeds == 1 else print_seeds)(summary, workdir)
        return summary
    if config.seeds == 1:
        return run_members(config, [Member(config.seed, records)], name, configured(config))[0]

    summaries = run_seeds(config, workdir, name)
    records.create()
    summary = of_seeds(summaries, config, name)
    records.write_summary(summary)
    print_seeds(summary, workdir)
    return summary
