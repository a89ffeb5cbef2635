"""Runs, from a configuration to `summary.json`.

Everything that depends on chance or time is a pure function of (seed, step): the initial
parameters, the order of the batches, what is random in a step, the radius and the weights. The
state holds everything else. A run that was killed therefore continues from its latest checkpoint to
bit-identical parameters.
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
    """Trains and evaluates; resumes an interrupted run; of a finished one, repeats the summary.

    With `config.seeds` above 1 there is a run in `workdir/seed-K` for every seed, and a summary of
    them all.

    Args:
      config: the validated configuration.
      workdir: the run folder, created if need be.
      name: of the experiment, for the records.

    Returns:
      What `summary.json` holds.

    Raises:
      ExperimentError: for whatever the user can correct.
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
