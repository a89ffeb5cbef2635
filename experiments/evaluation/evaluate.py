"""Evaluates the network of a run folder, in one process or several, and resumes evaluations."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

import boundjax as bj
from experiments.cluster import distributed
from experiments.data import Images
from experiments.evaluation import attack_points, certificates, checkable, shards, trained
from experiments.evaluation.certificates import Certificates
from experiments.evaluation.measure import Plan, Problem, check_methods, complete
from experiments.evaluation.trained import Which
from experiments.records.printing import print_table, table_rows
from experiments.records.versions import versions
from experiments.settings import radius
from experiments.settings.config import NORMS, Config, EvaluationConfig, Rounding
from experiments.settings.differences import differing_keys
from experiments.settings.errors import ExperimentError
from experiments.train.mesh import device_name

LOSSES = ("cross_entropy", "margin")


class Options(NamedTuple):
    """What to evaluate of a run, and how; None takes the run's own setting."""

    methods: tuple[str, ...] | None = None
    losses: tuple[str, ...] = LOSSES  # to attack
    eps: float | None = None
    norm: str | None = None  # a key of `experiments.settings.config.NORMS`
    clip: bool | None = None
    which: Which = "last"
    split: Literal["test", "validation"] = "test"
    count: int | None = None  # how many images, from the first on; None: as the run
    pgd_steps: int | None = 100
    pgd_restarts: int | None = 2
    batch_size: int | None = None
    rounding: Rounding | None = None
    timeout: float | None = None
    seed: int | None = None
    cascade: bool = False
    name: str | None = None  # of the file; None: made from split, which, norm and eps
    data_dir: str | None = None
    replace: bool = False  # overwrite a file of other weights or settings instead of refusing it

    def applied(self, config: Config) -> Config:
        """Returns the configuration of a run with the changes that these options make."""

        def changed(group: Any, **values: Any) -> Any:
            return dataclasses.replace(group, **{k: v for k, v in values.items() if v is not None})

        evaluation = changed(
            config.evaluation,
            methods=tuple(dict.fromkeys(self.methods or config.evaluation.methods)),
            pgd_steps=self.pgd_steps,
            pgd_restarts=self.pgd_restarts,
            batch_size=self.batch_size,
            rounding=self.rounding,
            timeout=self.timeout,
        )
        robust = changed(config.robust, eps_test=self.eps, norm=self.norm, clip=self.clip)
        return changed(config, seed=self.seed, evaluation=evaluation, robust=robust)


class Evaluated(NamedTuple):
    """An evaluation of a trained network: its file, the file's content, its table's title.

    `checkable` says whether there are certificate files (`experiments.evaluation.checkable`).
    """

    path: Path
    certificates: Certificates
    title: str
    checkable: bool = False


def evaluate_run(workdir: Path, options: Options) -> Evaluated:
    """Evaluates the network of a run folder, or resumes its evaluation.

    All processes must call this; all get the same result.

    Raises:
      ExperimentError: for a folder without a network, options out of range, or a file of other
        weights or settings.
      RuntimeError: as `measure.complete`.
    """
    check_methods(options.methods or ())
    if options.norm is not None and options.eps is None:
        raise ExperimentError(f"--norm={options.norm} needs --eps: a radius belongs to its norm")
    if distributed.from_main(workdir.is_dir):
        distributed.require_shared(workdir)
    run = trained.load(workdir, options.which, options.data_dir)
    return evaluate_trained(run, workdir, options)


def evaluate_trained(run: trained.Trained, workdir: Path, options: Options) -> Evaluated:
    """Evaluates `run`, or resumes its evaluation; the files lie in the run folder `workdir`.

    All processes must call this with a `workdir` that they share; all get the same result. `run`
    is the network that `options.which` names.

    Raises:
      ExperimentError, RuntimeError: as `evaluate_run`.
    """
    applied = options.applied(run.config)
    config, seed = applied.evaluation, applied.seed
    eps, norm = applied.robust.eps_test, applied.robust.norm
    clip = (0.0, 1.0) if applied.robust.clip else None
    if run.config.random.draws:
        raise ExperimentError(
            f"{workdir} has a random network: fresh draws for every query cannot be certified; "
            "experiments.evaluate measures it by attacks"
        )
    check_methods(config.methods)
    _check_options(options, norm, config)
    radius.check("--eps", eps, norm, run.test.images.shape[1:], run.title)
    images = run.test if options.split == "test" else run.validation
    if len(images) == 0:
        raise ExperimentError(f"{workdir} has no {options.split} images: data.validation was 0")
    data = images.take(slice(options.count or config.images or None))
    settings = {
        "parameters_sha256": parameters_sha256(run.variables),
        "images_sha256": images_sha256(data),
        "data": run.title,
        "split": options.split,
        "count": len(data),
        "which": run.label,
        "eps": eps,
        "norm": norm,
        "clip": list(clip) if clip else None,
        "attack": {
            "name": "PGD, best iterate, the first start at the image",
            "losses": list(options.losses),
            "steps": config.pgd_steps,
            "step_size": "eps / 4",
            "restarts": config.pgd_restarts,
            "batch_size": config.batch_size,
            "seed": seed,
        },
    }
    path = workdir / "evaluations" / f"{options.name or _name_of(options, norm, eps, clip)}.npz"
    title = (
        f"{workdir.name}: error on {len(data):,} {options.split} images of {run.title}, "
        f"{NORMS[norm].label} eps {eps:.6g}, {'clipped to [0, 1]' if clip else 'not clipped'}; "
        f"PGD-{config.pgd_steps}, {config.pgd_restarts} start(s) "
        f"on {' and '.join(options.losses)} loss, best iterate"
    )
    problem = Problem(run.pure, data, bj.Threat(eps, NORMS[norm].order, clip))
    made_with = {"versions": versions(), "device": device_name(jax.devices())}
    folder = checkable.folder_of(path)
    keep_points = functools.partial(attack_points.keep, folder)
    plan = Plan(seed, options.cascade, made_with, keep_points)
    if distributed.processes() == 1:
        results = _open(path, problem, options, settings)
        complete(results, problem, config, plan, _Saver(path))
    else:
        results = _share(path, problem, config, plan, options, settings)
    written = results.attacked.all() and distributed.from_main(
        lambda: checkable.write(folder, results, problem)
    )
    return Evaluated(path, results, title, bool(written))


def _share(
    path: Path,
    problem: Problem,
    config: EvaluationConfig,
    plan: Plan,
    options: Options,
    settings: dict[str, Any],
) -> Certificates:
    """Evaluates with all processes, each on its share of the images."""
    request = {"path": str(path), "cascade": plan.cascade, **dataclasses.asdict(config)}
    distributed.agree({"evaluation": {**settings, **request}})
    # All processes record the same, although their machines may differ.
    plan = plan._replace(made_with=distributed.from_main(lambda: plan.made_with))

    def write() -> None:
        certificates.write(path, _open(path, problem, options, settings))

    distributed.from_main(write)
    results = shards.read_together(path)
    return shards.complete(results, problem, config, plan, path, _Saver)


def _open(path: Path, problem: Problem, options: Options, settings: dict[str, Any]) -> Certificates:
    """Reads the evaluation in the file, or starts an empty one.

    Raises:
      ExperimentError: for a damaged file, or for one of other weights or settings that
        `options.replace` does not allow to overwrite.
    """
    results = shards.gather(path)
    keys = _differences(results, problem, settings) if results else []
    if keys and not options.replace:
        raise ExperimentError(
            f"{path} holds an evaluation of other weights or settings, which differs in "
            f"{', '.join(keys)}; give this one another --name, or delete that file"
        )
    if results is None or keys:
        shards.discard(path)
        checkable.discard(checkable.folder_of(path))
        return certificates.empty(problem.data.labels, options.losses, settings)
    # The first version predicted and attacked batch by batch. An image that it had not reached may
    # be correct, so the clean pass and the attack start again.
    if (~results.attacked & ~results.correct).any():
        results.attacked[:] = False
    return results


def _differences(stored: Certificates, problem: Problem, settings: dict[str, Any]) -> list[str]:
    """Names the settings and arrays in which a file differs from the problem; empty if it fits.

    The settings identify the images and the weights; the arrays must match them as well.
    """
    keys = differing_keys(stored.metadata["settings"], settings)
    if not keys and (stored.labels != problem.data.labels).any():
        keys.append("labels")
    sizes = {margins.shape[-1] for margins in stored.margins_by.values()}
    if not keys and sizes and sizes != {problem.num_classes}:
        keys.append("the number of classes")
    return keys


class _Saver:
    """Writes the file after every batch and prints the progress every `every` seconds."""

    def __init__(self, path: Path, every: float = 30.0):
        self._path, self._every, self._last_print = path, every, time.monotonic()

    def __call__(self, results: Certificates) -> None:
        certificates.write(self._path, results)
        if time.monotonic() - self._last_print > self._every:
            self._last_print = time.monotonic()
            done = ", ".join(f"{name} {count:,}" for name, count in results.progress.items())
            whose = "" if distributed.processes() == 1 else " of this process"
            print(f"of {len(results.labels):,} images{whose}: {done}", flush=True)


def _name_of(options: Options, norm: str, eps: float, clip: tuple[float, float] | None) -> str:
    name = f"{options.split}-{options.which}-{NORMS[norm].label}-eps{eps:.6g}"
    name += "" if clip else "-unclipped"
    return name if options.count is None else f"{name}-first{options.count}"


def _check_options(options: Options, norm: str, config: EvaluationConfig) -> None:
    check_choices(options.which, options.split, norm, options.name)
    for flag, number, minimum in (
        ("--count", 1 if options.count is None else options.count, 1),
        ("--pgd-steps", config.pgd_steps, 0),
        ("--pgd-restarts", config.pgd_restarts, 1),
        ("--batch-size", config.batch_size, 1),
    ):
        if number < minimum:
            raise ExperimentError(f"{flag} must be >= {minimum}, got {number}")
    if not 0 < config.timeout < float("inf"):
        raise ExperimentError(f"--timeout must be positive, in seconds, got {config.timeout:g}")


def check_choices(which: str, split: str, norm: str, name: str | None) -> None:
    """Checks the options that evaluations of all networks have.

    Raises:
      ExperimentError: for a value that is not among those allowed, or a name with folders.
    """
    for flag, value, allowed in (
        ("--which", which, ("last", "selected")),
        ("--split", split, ("test", "validation")),
        ("--norm", norm, tuple(NORMS)),
    ):
        if value not in allowed:
            raise ExperimentError(f"{flag} must be {' or '.join(allowed)}, got {value!r}")
    if name is not None and Path(name).name != name:
        raise ExperimentError(f"--name must be a file name without folders, got {name!r}")


def parameters_sha256(variables: Any) -> str:
    """SHA-256 over names, types, shapes and bytes of all leaves: equal if bit-identical."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def images_sha256(data: Images) -> str:
    """SHA-256 over the type, shape and bytes of images and labels."""
    digest = hashlib.sha256(f"{data.images.dtype} {data.images.shape}\n".encode())
    digest.update(np.ascontiguousarray(data.images).tobytes())
    digest.update(np.ascontiguousarray(data.labels).tobytes())
    return digest.hexdigest()


def print_evaluated(evaluated: Evaluated) -> None:
    """Prints the closing table, the arithmetic that certificates hold for, and the file's path."""
    results = evaluated.certificates
    settings = results.metadata["settings"]
    print_table(evaluated.title, *table_rows({settings["which"]: results.errors()}))
    partial = [name for name, flags in results.run_by.items() if not flags.all()]
    if partial:
        print(f"not run on all images, so without an error of their own: {', '.join(partial)}")
    for name, falsified in results.falsified_by.items():
        run, verified = (int(by[name].sum()) for by in (results.run_by, results.verified_by))
        refuted = int(falsified.sum())
        print(
            f"{name}: of {run} images {verified} verified, {refuted} with a counterexample, "
            f"{run - verified - refuted} undecided after {results.parts[name]['timeout']:g} s each"
        )
    print(
        f"certificates hold for {_arithmetic(results)}; evaluated in {results.seconds:.1f} s; "
        f"parameters sha256 {settings['parameters_sha256'][:16]}"
    )
    print(f"file: {evaluated.path}", flush=True)
    if evaluated.checkable:
        folder = checkable.folder_of(evaluated.path)
        print(
            f"certificate files: {folder}; to prove one again: python -m boundjax.check "
            f"{folder}/METHOD.npz --weights {folder}/weights.npz --data {folder}/inputs.npz "
            "(check_attack for pgd.npz)"
        )


def _arithmetic(results: Certificates) -> str:
    """Names the arithmetic that the certificates hold for, in words."""
    kinds = {
        (part["arithmetic"], part["dtype"]) for part in results.parts.values() if "dtype" in part
    }
    nearest = "real arithmetic, up to the rounding of the bounds, computed in"
    words = {
        "nearest": nearest,
        "exact-real": nearest,  # as files of the first versions say
        "real": "real arithmetic, computed in",
        "float32": "every floating-point execution, computed in",
    }
    return "; ".join(f"{words.get(name, name)} {dtype}" for name, dtype in sorted(kinds))
