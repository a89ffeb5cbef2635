"""Runs of one or several seeds, trained together where that pays and evaluated one by one."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from experiments.cluster import distributed
from experiments.evaluation import evaluate
from experiments.evaluation.random_evaluate import RandomOptions, attacks_of, evaluate_random
from experiments.evaluation.trained import Trained, Which
from experiments.plots.curves import plot_curves
from experiments.records.folder import Records
from experiments.records.printing import Report
from experiments.run.summary import (
    Measured,
    describe_attack,
    describe_random_attacks,
    of_run,
    print_summary,
)
from experiments.settings.config import Config
from experiments.train.loop import Member, open_members, train
from experiments.train.prepare import Prepared, prepare
from experiments.train.variables import deployed

# Seeds share an accelerator as one program if their states take at most this fraction of its
# memory, because a step needs several times as much besides.
_SHARE = 0.02


def run_seeds(
    config: Config, workdir: Path, name: str, options: evaluate.Options | None = None
) -> list[dict[str, Any]]:
    """Runs the seeds of `config` in `workdir/seed-K` and returns their summaries.

    There are `config.seeds` seeds from `config.seed` on. Every run ends with an evaluation by
    `options`; None: as configured.

    Raises:
      ExperimentError: for anything that the user can correct.
    """
    members = []
    for seed in range(config.seed, config.seed + config.seeds):
        alone = dataclasses.replace(config, seed=seed, seeds=1)
        members.append(Member(seed, Records(workdir / f"seed-{seed}", alone)))
    return run_members(config, members, name, options or configured(config))


def run_members(
    config: Config, members: Sequence[Member], name: str, options: evaluate.Options
) -> list[dict[str, Any]]:
    """Finishes the runs that are not finished, and returns the summaries of all."""
    for member in members:
        summary = member.records.summary()
        if summary is not None:
            finished = f"{member.records.path} holds a finished run ({summary['finished']})"
            print(f"{finished}; nothing to do.")
    unfinished = [member for member in members if member.records.summary() is None]
    if not unfinished:
        return [member.records.finished_summary() for member in members]
    # Report everything that is wrong with the configuration before writing the first file.
    prepared = prepare(dataclasses.replace(config, seeds=1))
    folders = ", ".join(str(member.records.path) for member in unfinished)
    print(
        f"{name}: {config.robust.method} training of {config.model.name} "
        f"({prepared.parameters:,} parameters) "
        f"on {len(prepared.splits.train):,} images of {prepared.splits.title}, "
        f"{prepared.total_steps:,} steps of {config.train.batch_size}, "
        f"on {prepared.devices}; run folder {folders}",
        flush=True,
    )
    for member in unfinished:
        member.records.create()
    with contextlib.ExitStack() as stack:
        for member in unfinished:
            stack.enter_context(member.records)
        report = stack.enter_context(Report(prepared.total_steps))
        open_members(prepared, unfinished)
        for member in unfinished:
            if member.step:
                report.line(f"resumed after step {member.step:,} of {prepared.total_steps:,}")
        for group in _groups(unfinished):
            train(prepared, group, report)
    for member in unfinished:
        member.records.write_summary(_conclude(prepared, member, name, options))
    return [member.records.finished_summary() for member in members]


def _groups(members: Sequence[Member]) -> list[list[Member]]:
    """Groups the runs that are trained as one program.

    All runs are one group if they are at the same step and their states are small for the device.
    On a CPU only networks without convolutions are trained together: `vmap` over seeds gives every
    example its own kernels, and XLA's CPU backend is slow at such convolutions.
    """
    leaves = jax.tree.leaves(members[0].state["params"])
    if jax.default_backend() == "cpu":
        fit = all(leaf.ndim < 3 for leaf in leaves)
    else:
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(members[0].state))
        limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)
        fit = len(members) * size <= _SHARE * limit
    if distributed.decided(fit, all) and len({member.step for member in members}) == 1:
        return [list(members)]
    return [[member] for member in members]


def configured(config: Config) -> evaluate.Options:
    """Returns the options of the evaluation at the end of a run."""
    return evaluate.Options(
        losses=(config.evaluation.pgd_loss,),
        pgd_steps=None,
        pgd_restarts=None,
        name="summary",
        replace=True,
    )


def _conclude(
    prepared: Prepared, member: Member, name: str, options: evaluate.Options
) -> dict[str, Any]:
    """Evaluates a trained run on the test images, draws its curves and prints its summary."""
    config, splits = member.records.config, prepared.splits
    print(
        f"evaluating on {config.evaluation.images or len(splits.test):,} test images of "
        f"{splits.title} "
        f"at {config.robust.norm_label} eps {config.robust.eps_test:.6g}"
    )
    began = time.monotonic()
    methods: Sequence[str] = ()
    if config.random.draws:
        results, settings = _random_errors(prepared, member, options)
        attack = describe_random_attacks(settings)
    else:
        methods = options.applied(config).evaluation.methods
        results, settings = _test_errors(prepared, member, options, methods)
        attack = describe_attack(settings["attack"])
    title = f"{name}: {config.robust.method}, {config.model.name}, {splits.title}"
    member.records.draw_curves(
        lambda metrics, path: plot_curves(metrics, title, path, config.robust.norm_label)
    )
    weights = settings["parameters_sha256"]
    measured = Measured(results, methods, attack, weights, time.monotonic() - began)
    summary = of_run(prepared, member, name, measured)
    print_summary(summary, member.records.path)
    return summary


def _random_errors(
    prepared: Prepared, member: Member, options: evaluate.Options
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Returns the errors of the last network, which is random, by label, and the settings.

    Nothing verifies a random network. Its PGD error is the largest of those at `eps_test`.
    """
    config, label = member.records.config, f"last epoch ({prepared.config.train.epochs})"
    random_options = RandomOptions(
        data_dir=options.data_dir,
        name=None if options.name is None else f"{options.name}-last",
        replace=options.replace,
    )
    network = _trained(prepared, member, label, member.state)
    results = evaluate_random(network, member.records.path, random_options).results
    errors = results.errors()
    at_radius = [
        errors["attack_errors"][attack.name]
        for attack in attacks_of(config, random_options)
        if attack.eps == config.robust.eps_test
    ]
    errors |= {"pgd_error": max(at_radius), "verified_error": 1.0, "verified_error_by": {}}
    return {label: errors}, results.settings


def _trained(prepared: Prepared, member: Member, label: str, state: dict[str, Any]) -> Trained:
    splits = prepared.splits
    return Trained(
        config=member.records.config,
        model=prepared.model,
        variables=deployed(member.records.config, prepared.model, state, splits),
        test=splits.test,
        title=splits.title,
        validation=splits.validation,
        label=label,
    )


def _test_errors(
    prepared: Prepared, member: Member, options: evaluate.Options, methods: Sequence[str]
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Returns the errors of the selected and the last network by label, and the last settings.

    If the last epoch was selected, both are the same network, which is evaluated once.
    """
    config, splits = member.records.config, prepared.splits
    networks: list[tuple[Which, str, dict[str, Any]]] = [
        ("last", f"last epoch ({config.train.epochs})", member.state)
    ]
    selected = None
    if len(splits.validation):
        selected = int(member.selected["epoch"])
        networks.insert(0, ("selected", f"selected epoch ({selected})", member.selected))
    results: dict[str, dict[str, Any]] = {}
    settings: dict[str, Any] = {}
    for which, label, state in networks:
        if which == "last" and selected == config.train.epochs:
            results[label] = dict(next(iter(results.values())))
            continue
        network = _trained(prepared, member, label, state)
        name = None if options.name is None else f"{options.name}-{which}"
        network_options = options._replace(which=which, name=name)
        certificates = evaluate.evaluate_trained(
            network, member.records.path, network_options
        ).certificates
        settings, errors = certificates.metadata["settings"], certificates.errors()
        by_method = errors["verified_error_by"]
        reported = {method: by_method[method] for method in methods}
        results[label] = errors | {"verified_error_by": reported}
    return results, settings
