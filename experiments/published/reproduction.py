"""Reproduces a published row, compares it with the paper, and records a line of the results."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np

from experiments.published.rows import ROWS, Budget, Numbers, Row
from experiments.records.files import replace_text
from experiments.records.printing import print_table
from experiments.settings.checks import from_config_dict
from experiments.settings.config import NORMS, Config
from experiments.settings.errors import ExperimentError

SECTION = "## Reproduced rows"
_HEADER = (
    "row",
    "published: standard / PGD / verified",
    "obtained (%)",
    "within",
    "seeds",
    "wall clock",
    "device",
    "bounds",
    "ball",
    "data",
    "weights (SHA-256)",
    "versions",
    "command",
)
_WEIGHTS = _HEADER.index("weights (SHA-256)")
BUDGETS: tuple[Budget, ...] = get_args(Budget)


class Seed(NamedTuple):
    """The results of one seed.

    Attributes:
      errors: in percent, per network (`"selected"`, `"last"`).
      weights: the SHA-256 of the network that counts.
      seconds: time of training and evaluation.
      summary, settings: the run's summary, and the evaluation settings of the network that counts.
      attack_errors: of a random network, its errors in percent by attack.
    """

    errors: dict[str, Numbers]
    weights: str
    seconds: float
    summary: Mapping[str, Any]
    settings: Mapping[str, Any]
    attack_errors: Mapping[str, float] = {}


class Reproduction(NamedTuple):
    """The results of a row; its `seeds` differ in nothing but the seed."""

    row: Row
    seeds: tuple[Seed, ...]

    def values(self, which: str) -> np.ndarray:
        """Standard, PGD and verified error in percent: `[seeds, 3]`."""
        return np.array([seed.errors[which] for seed in self.seeds])

    @property
    def which(self) -> tuple[str, ...]:
        """The names of every seed's networks; the first one counts."""
        return tuple(self.seeds[0].errors)

    @property
    def within(self) -> bool:
        """Whether verified and standard error exceed the anchor by at most the tolerance.

        Where the paper verifies nothing, the PGD error takes the place of the verified error.
        """
        standard, pgd, verified = self.values(self.which[0]).mean(axis=0)
        anchor = self.row.anchor
        compared = [(standard, anchor.standard), (verified, anchor.verified)]
        if anchor.verified is None:
            compared.append((pgd, anchor.pgd))
        return all(
            bound is None or value <= bound + self.row.tolerance + 1e-9 for value, bound in compared
        )

    def obtained(self) -> str:
        """Formats the mean per network, with the standard deviation over several seeds."""
        texts = []
        for which in self.which:
            values = self.values(which)
            means = [f"{mean:.2f}" for mean in values.mean(axis=0)]
            if len(values) > 1:
                deviations = values.std(axis=0, ddof=1)
                means = [f"{m} ± {d:.2f}" for m, d in zip(means, deviations, strict=True)]
            texts.append(f"{' / '.join(means)} ({which})")
        return "; ".join(texts)


def find(name: str) -> Row:
    """Returns the row of that name.

    Raises:
      ExperimentError: if there is none; suggests the closest name.
    """
    if name in ROWS:
        return ROWS[name]
    close = difflib.get_close_matches(name, ROWS, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]}? " if close else ""
    raise ExperimentError(f"unknown row {name!r}: {hint}--list shows all")


def configuration(row: Row, data_dir: str | None = None) -> Config:
    """Returns the validated configuration of a row, for seed 0.

    Raises:
      ExperimentError: if its file does not exist, or for a bad argument or setting.
    """
    path, _, variant = row.config.partition(".py")
    module_name = path.replace("/", ".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name != module_name:
            raise
        raise ExperimentError(f"row {row.name}: there is no {path}.py") from error
    settings = module.get_config(variant.removeprefix(":"))
    settings.update_from_flattened_dict(dict(row.overrides))
    settings.seed, settings.seeds = 0, 1
    config = from_config_dict(settings)
    if data_dir is not None:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, dir=data_dir))
    return config


def reproduce(row: Row, seeds: int, workdir: Path, data_dir: str | None = None) -> Reproduction:
    """Trains and evaluates every seed of a row; resumes what is not finished.

    Raises:
      ExperimentError: for any mistake that the user can correct.
      RuntimeError: if a certificate contradicts an attack.
    """
    from experiments.run.seeds import run_seeds

    config = dataclasses.replace(configuration(row, data_dir), seeds=seeds)
    summaries = run_seeds(config, workdir, row.name, _options(row, data_dir))
    return Reproduction(
        row,
        tuple(
            _evaluate_seed(row, config, workdir / f"seed-{summary['seed']}", summary, data_dir)
            for summary in summaries
        ),
    )


def _options(row: Row, data_dir: str | None) -> Any:
    from experiments.evaluation.evaluate import Options

    return Options(methods=row.methods, data_dir=data_dir)


def _evaluate_seed(
    row: Row, config: Config, folder: Path, summary: dict[str, Any], data_dir: str | None
) -> Seed:
    from experiments.evaluation import evaluate

    if config.random.draws:
        return _of_random_network(folder, summary, data_dir)
    errors: dict[str, Numbers] = {}
    settings, seconds = {}, summary["train_seconds"]
    for which in ("selected", "last") if config.data.validation else ("last",):
        if settings.get("which") == f"selected epoch ({config.train.epochs})":
            errors[which] = errors["selected"]  # the last epoch was selected
            continue
        evaluated = evaluate.evaluate_run(folder, _options(row, data_dir)._replace(which=which))
        evaluate.print_evaluated(evaluated)
        results = evaluated.certificates
        values = results.errors()
        keys = ("standard_error", "pgd_error", "verified_error")
        errors[which] = Numbers(*(100 * values[key] for key in keys))
        settings = settings or results.metadata["settings"]
        seconds += results.seconds
    return Seed(errors, settings["parameters_sha256"], seconds, summary, settings)


def _of_random_network(folder: Path, summary: dict[str, Any], data_dir: str | None) -> Seed:
    """The run has evaluated its network by attacks already: with the same settings, this reads it.

    The PGD error is the largest at `robust.eps_test`, as in the run's summary.
    """
    from experiments.evaluation.random_evaluate import (
        RandomOptions,
        evaluate_random_run,
        print_random,
    )

    evaluated = evaluate_random_run(folder, RandomOptions(data_dir=data_dir, name="summary-last"))
    print_random(evaluated)
    errors = evaluated.results.errors()["attack_errors"]
    (reported,) = summary["results"].values()
    numbers = Numbers(100 * reported["standard_error"], 100 * reported["pgd_error"], 100.0)
    return Seed(
        {"last": numbers},
        evaluated.results.settings["parameters_sha256"],
        summary["train_seconds"] + evaluated.results.seconds,
        summary,
        {**evaluated.results.settings, "eps": summary["eps_test"]},
        {name: 100 * error for name, error in errors.items()},
    )


# --------------------------------------------------------------------------- reports


def print_reproduction(reproduction: Reproduction) -> None:
    """Prints published beside obtained numbers, and everything that the numbers depend on."""
    row, first = reproduction.row, reproduction.seeds[0]
    rows = [["published", *_cells(row.published)]]
    if row.prototype is not None:
        rows.append(["prototype", *_cells(row.prototype)])
    for which in reproduction.which:
        for number, seed in enumerate(reproduction.seeds):
            rows.append([f"seed {number}, {which} epoch", *_cells(seed.errors[which])])
    print_table(f"{row.name}: {row.source}", ("error in %", "standard", "PGD", "verified"), rows)
    for name, published in row.attacks.items():
        values = [seed.attack_errors[name] for seed in reproduction.seeds]
        print(f"{name}: published {published:.2f}, obtained {np.mean(values):.2f}")
    verdict = "within" if reproduction.within else "NOT within"
    kind = "published" if row.prototype is None else "prototype"
    print(f"obtained: {reproduction.obtained()}")
    print(f"{verdict} {row.tolerance:g} points of the {kind} {row.anchor}: {row.note}")
    print(
        f"bounds {' or '.join(row.methods) or 'none'}, {_ball(first)}, {first.summary['data']}, "
        f"{_hours(reproduction)} on {first.summary['device']}"
    )
    weights = ", ".join(seed.weights[:16] for seed in reproduction.seeds)
    print(f"weights sha256 {weights}; {_versions(first)}", flush=True)


def line_of(reproduction: Reproduction) -> str:
    """Formats the row of the Markdown table."""
    row, first = reproduction.row, reproduction.seeds[0]
    published = f"{row.published}, {row.source}"
    if row.prototype is not None:
        published += f"; prototype {row.prototype}"
    cells = (
        row.name,
        published,
        reproduction.obtained(),
        f"{'yes' if reproduction.within else 'no'} ({row.tolerance:g})",
        f"{len(reproduction.seeds)}",
        _hours(reproduction),
        first.summary["device"],
        " or ".join(row.methods) or "none: a random network",
        _ball(first),
        first.summary["data"],
        " ".join(seed.weights[:16] for seed in reproduction.seeds),
        _versions(first),
        f"`python -m experiments.reproduce {row.name} --seeds={len(reproduction.seeds)}`",
    )
    return _markdown(cells)


def record(results: Path, reproduction: Reproduction) -> None:
    """Writes the line into its section of the results file, replacing one of the same weights.

    Creates the section, and the header of its table, if they are missing.

    Raises:
      ExperimentError: if the file cannot be written.
    """
    lines = results.read_text(encoding="utf-8").splitlines() if results.exists() else []
    if SECTION not in lines:
        rule = "|" + "---|" * len(_HEADER)
        lines += [*([""] if lines else []), SECTION, "", _markdown(_HEADER), rule]
    start = lines.index(SECTION) + 1
    end = next((i for i in range(start, len(lines)) if lines[i].startswith("## ")), len(lines))
    new = line_of(reproduction)
    table = [i for i in range(start, end) if lines[i].startswith("|")]
    same = [i for i in table if _identity(lines[i]) == _identity(new)]
    if same:
        lines[same[0]] = new
    else:
        lines.insert((table[-1] if table else start) + 1, new)
    try:
        replace_text(results, "\n".join(lines) + "\n")
    except OSError as error:
        raise ExperimentError(f"--results={results}: cannot write it ({error.strerror})") from error


def _identity(line: str) -> tuple[str, ...]:
    cells = [cell.strip() for cell in line.strip("|").split(" | ")]
    return (cells[0], cells[_WEIGHTS]) if len(cells) == len(_HEADER) else ()


def _markdown(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def _cells(numbers: Numbers) -> list[str]:
    return ["-" if value is None else f"{value:.2f}" for value in numbers]


def _ball(seed: Seed) -> str:
    settings = seed.settings
    clipped = "clipped to [0, 1]" if settings["clip"] else "not clipped"
    if "attack" not in settings:
        attacks = f"EOT-FGSM and EOT-PGD-{settings['pgd_steps']}"
    else:
        attack = settings["attack"]
        attacks = f"PGD-{attack['steps']} with {attack['restarts']} starts for each of 2 losses"
    return f"{NORMS[settings['norm']].label} eps {settings['eps']:.6g}, {clipped}, {attacks}"


def _hours(reproduction: Reproduction) -> str:
    seconds = round(sum(seed.seconds for seed in reproduction.seeds))
    hours, minutes = divmod(seconds // 60, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds % 60} s"


def _versions(seed: Seed) -> str:
    versions = seed.summary["versions"]
    return ", ".join(f"{name} {versions[name]}" for name in ("python", "jax", "flax", "numpy"))


# --------------------------------------------------------------------------- commands


def print_rows(budget: Budget, part: str = "") -> None:
    """Prints the rows that a budget allows and whose names contain `part`.

    Raises:
      ExperimentError: if there is none.
    """
    shown = [
        row
        for row in ROWS.values()
        if BUDGETS.index(row.budget) <= BUDGETS.index(budget) and part in row.name
    ]
    if not shown:
        raise ExperimentError(f"no row for --budget={budget} has {part!r} in its name")
    print_table(
        "error in %, standard / PGD / verified",
        ("row", "budget", "seeds", "within", "published", "source", "config"),
        [
            [
                row.name,
                row.budget,
                f"{row.seeds}",
                f"{row.tolerance:g}",
                str(row.published),
                row.source,
                row.config.removeprefix("experiments/configs/"),
            ]
            for row in shown
        ],
    )


def print_plan(row: Row, seeds: int, workdir: Path, results: Path, data_dir: str | None) -> None:
    """Prints what a run would do, without training.

    Raises:
      ExperimentError: for a configuration that is missing or wrong.
    """
    config = configuration(row, data_dir)
    robust = config.robust
    print(f"{row.name}: {row.source}, {row.published} (standard / PGD / verified error in %)")
    print(
        f"{row.config}: {robust.method} training of {config.model.name} on {config.data.name}, "
        f"{config.train.epochs} epochs, {robust.norm_label} eps {robust.eps_train:.6g} in training "
        f"and {robust.eps_test:.6g} in tests, {'' if robust.clip else 'not '}clipped to [0, 1]"
    )
    bounds = " or ".join(row.methods) or "none, the network is random"
    print(f"bounds: {bounds}; budget: {row.budget}")
    print(f"within: {row.tolerance:g} points of {row.anchor}: {row.note}")
    for seed in range(seeds):
        folder = workdir / f"seed-{seed}"
        begun = "goes on" if folder.exists() else "is new"
        print(f"{folder} {'is trained' if (folder / 'summary.json').exists() else begun}")
    print(f"one line in {results}", flush=True)


def check_budget(row: Row, budget: Budget | None) -> None:
    """Refuses rows beyond the budget; the default budget depends on the machine.

    Raises:
      ExperimentError: for a row that needs an accelerator, without one or with `--budget=cpu`.
    """
    if row.budget != "gpu" or budget == "gpu":
        return
    if budget is None:
        import jax

        if jax.default_backend() != "cpu":
            return
        raise ExperimentError(
            f"row {row.name} is for an accelerator and JAX finds none here; "
            "--budget=gpu runs it anyway, perhaps for days"
        )
    raise ExperimentError(f"row {row.name} is for an accelerator, but --budget=cpu was given")


def check_results(results: Path) -> None:
    """Refuses a results file that cannot be written, before the training rather than after it.

    Raises:
      ExperimentError: for a folder, or a file in a folder that does not exist.
    """
    if not results.parent.is_dir() or results.is_dir():
        raise ExperimentError(f"--results={results}: must be a file in an existing folder")
