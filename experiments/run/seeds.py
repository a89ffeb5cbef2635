"""The runs of one or several seeds: trained together where that pays, evaluated one by one."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from experiments import models
from experiments.cluster import distributed
from experiments.evaluation import evaluate
from experiments.evaluation.trained import Trained
from experiments.plots.curves import plot_curves
from experiments.records.folder import Records
from experiments.records.printing import Report
from experiments.records.versions import versions
from experiments.run.summary import print_summary
from experiments.settings.config import Config
from experiments.train.loop import Member, open_members, train
from experiments.train.prepare import Prepared, prepare
from experiments.train.variables import deployed

# Seeds share an accelerator as one program if their states take at most this part of its memory:
# what a step needs besides is several times as much.
_SHARE = 0.02


def run_seeds(
    config: Config, workdir: Path, name: str, options: evaluate.Options | None = None
) -> list[dict[str, Any]]:
    """The runs of `config.seeds` seeds from `config.seed` on, in `workdir/seed-K`: their summaries.

    They conclude with an evaluation by `options`; None: as configured.

    Raises:
      ExperimentError: for whatever the user can correct.
    """
    members = []
    for seed in range(config.seed, config.seed + config.seeds):
        alone = dataclasses.replace(config, seed=seed, seeds=1)
        members.append(Member(seed, Records(workdir / f"seed-{seed}", alone)))
    return run_members(config, members, name, options or configured(config))


def run_members(
    config: Config, members: Sequence[Member], name: str, options: evaluate.Options
) -> list[dict[str, Any]]:
    """The summaries of all, those that are finished already as they are."""
    for member in members:
        summary = member.records.summary()
        if summary is not None:
            finished = f"{member.records.path} holds a finished run ({summary['finished']})"
            print(f"{finished}; nothing to do.")
    open_ones = [member for member in members if member.records.summary() is None]
    if not open_ones:
        return [member.records.summary() for member in members]
    # Not before all that can be wrong with the config has been said is anything written.
    prepared = prepare(dataclasses.replace(config, seeds=1))
    report = Report(prepared.total_steps)
    folders = ", ".join(str(member.records.path) for member in open_ones)
    report.line(
        f"{name}: {config.robust.method} training of {config.model.name} "
        f"({models.count_parameters(prepared.model, prepared.splits.shape):,} parameters) "
        f"on {len(prepared.splits.train):,} images of {prepared.splits.title}, "
        f"{prepared.total_steps:,} steps of {config.train.batch_size}, "
        f"on {prepared.devices}; run folder {folders}"
    )
    for member in open_ones:
        member.records.create()
    with contextlib.ExitStack() as opened:
        for member in open_ones:
            opened.enter_context(member.records)
        open_members(prepared, open_ones)
        for member in open_ones:
            if member.step:
                report.line(f"resumed after step {member.step:,} of {prepared.total_steps:,}")
            member.records.drop_metrics_after(member.step)
        with report:
            for group in _groups(open_ones):
                train(prepared, group, report)
    for member in open_ones:
        member.records.write_summary(_conclude(prepared, member, name, options))
    return [member.records.summary() for member in members]


def _groups(members: Sequence[Member]) -> list[list[Member]]:
    """Which runs are trained as one program.

    All, if they are equally far and their states are small for the device. XLA's CPU backend is
    slow at convolutions with other kernels for every example, which `vmap` over seeds makes them:
    there only networks without convolutions are trained together.
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
    """How a run is evaluated at its end, apart from what `experiments.evaluate` is asked for."""
    settings = config.evaluation
    return evaluate.Options(
        methods=settings.methods,
        losses=(settings.pgd_loss,),
        pgd_steps=settings.pgd_steps,
        pgd_restarts=settings.pgd_restarts,
        name="summary",
        replace=True,
    )


def _conclude(
    prepared: Prepared, member: Member, name: str, options: evaluate.Options
) -> dict[str, Any]:
    """Evaluates a trained run on the test images, draws its curves and prints its summary."""
    config, splits, threat = member.records.config, prepared.splits, prepared.threat
    print(
        f"evaluating on {len(splits.test):,} test images of {splits.title} "
        f"at {config.robust.norm_label} eps {config.robust.eps_test:.6g}"
    )
    began = time.monotonic()
    results: dict[str, dict[str, Any]] = {}
    candidates = {"last": (f"last epoch ({config.train.epochs})", member.state)}
    if len(splits.validation):
        epoch = int(member.selected["epoch"])
        candidates = {"selected": (f"selected epoch ({epoch})", member.selected)} | candidates
    settings: dict[str, Any] = {}
    for which, (label, state) in candidates.items():
        if which == "last" and results and epoch == config.train.epochs:
            results[label] = dict(next(iter(results.values())))  # the last epoch was selected
            continue
        run = Trained(
            config=config,
            model=prepared.model,
            variables=deployed(config, prepared.model, state, splits),
            test=splits.test,
            title=splits.title,
            validation=splits.validation,
            label=label,
        )
        own = None if options.name is None else f"{options.name}-{which}"
        chosen = options._replace(which=which, name=own)
        found = evaluate.evaluate_trained(run, member.records.path, chosen).found
        settings, errors = found.metadata["settings"], found.errors()
        by = errors["verified_error_by"]
        results[label] = errors | {"verified_error_by": {name: by[name] for name in chosen.methods}}

    title = f"{name}: {config.robust.method}, {config.model.name}, {splits.title}"
    member.records.draw_curves(
        lambda metrics, path: plot_curves(metrics, title, path, config.robust.norm_label)
    )
    attack = settings["attack"]
    summary = {
        "experiment": name,
        "results": results,
        "selection": (
            f"smallest verified error ({config.evaluation.selection_method}) on the last "
            f"{len(splits.validation)} training images, which were not trained on"
            if len(splits.validation)
            else "none: trained on all training images, the last epoch is reported"
        ),
        "eps_test": config.robust.eps_test,
        "eps_train": config.robust.eps_train,
        "norm": config.robust.norm,
        "clip": list(threat.clip) if threat.clip else None,
        "bounds": list(options.methods),
        "attack": (
            f"PGD-{attack['steps']}, {attack['restarts']} start(s), "
            f"{' and '.join(attack['losses'])} loss, best iterate"
        ),
        "method": config.robust.method,
        "model": config.model.name,
        "parameters": models.count_parameters(prepared.model, splits.shape),
        "parameters_sha256": settings["parameters_sha256"],
        "data": splits.title,
        "train_images": len(splits.train),
        "validation_images": len(splits.validation),
        "test_images": len(splits.test),
        "epochs": config.train.epochs,
        "steps": prepared.total_steps,
        "seed": member.seed,
        "train_seconds": round(member.seconds, 1),
        "evaluation_seconds": round(time.monotonic() - began, 1),
        "device": prepared.devices,
        "versions": versions(),
        "finished": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
    }
    print_summary(summary, member.records.path)
    return summary
