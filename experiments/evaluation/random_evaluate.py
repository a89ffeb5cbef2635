"""Evaluates the random network of a run folder by attacks, in one process or several.

Random networks are empirical defences: with new draws for every query there is no function to
certify. What is measured are the standard error of the mean softmax and the errors under EOT-FGSM
and EOT-PGD, for several numbers of draws and several radii. Everything follows from a key.
"""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

import boundjax as bj
from experiments.cluster import distributed
from experiments.data import Images
from experiments.evaluation import random_files, trained
from experiments.evaluation.evaluate import check_choices, images_sha256, parameters_sha256
from experiments.evaluation.random_files import CLEAN, RandomResults
from experiments.evaluation.random_network import Attack, RandomNetwork
from experiments.evaluation.trained import Trained, Which
from experiments.records.printing import print_table
from experiments.records.versions import versions
from experiments.settings import radius
from experiments.settings.config import NORMS, Config
from experiments.settings.differences import differing_keys
from experiments.settings.errors import ExperimentError
from experiments.train.mesh import device_name

WARNING = "empirical defence: nothing is certified, stronger attacks may exist"


class RandomOptions(NamedTuple):
    """What to evaluate of a run with a random network; None takes the run's own setting."""

    radii: tuple[float, ...] | None = None
    attack_draws: tuple[int, ...] | None = None
    draws: int | None = None  # of a prediction
    norm: str | None = None
    clip: bool | None = None
    which: Which = "last"
    split: Literal["test", "validation"] = "test"
    count: int | None = None  # how many images, from the first on; None: as the run
    pgd_steps: int | None = None
    batch_size: int | None = None
    seed: int | None = None
    name: str | None = None  # of the file; None: made from split, which and norm
    data_dir: str | None = None
    replace: bool = False  # overwrite a file of other weights or settings instead of refusing it


class RandomEvaluated(NamedTuple):
    """An evaluation of a random network: its file, the file's content, its table's title."""

    path: Path
    results: RandomResults
    title: str


def attacks_of(config: Config, options: RandomOptions) -> tuple[Attack, ...]:
    """The attacks of an evaluation: EOT-FGSM with the most draws, and EOT-PGD with each number."""
    evaluation = config.evaluation
    radii = options.radii or (*evaluation.radii, config.robust.eps_test)
    numbers = sorted(set(options.attack_draws or evaluation.attack_draws))
    steps = evaluation.pgd_steps if options.pgd_steps is None else options.pgd_steps
    radii = sorted(set(radii))
    one_step = [Attack("eot-fgsm", numbers[-1], eps) for eps in radii]
    return (*one_step, *(Attack("eot-pgd", n, eps, steps) for n in numbers for eps in radii))


def evaluate_random_run(workdir: Path, options: RandomOptions) -> RandomEvaluated:
    """Evaluates the random network of a run folder, or resumes its evaluation.

    All processes must call this; all get the same result.

    Raises:
      ExperimentError: for a folder without a network, options out of range, or a file of other
        weights or settings.
    """
    if options.norm is not None and options.radii is None:
        raise ExperimentError(f"--norm={options.norm} needs --eps: a radius belongs to its norm")
    if distributed.from_main(workdir.is_dir):
        distributed.require_shared(workdir)
    return evaluate_random(trained.load(workdir, options.which, options.data_dir), workdir, options)


def evaluate_random(run: Trained, workdir: Path, options: RandomOptions) -> RandomEvaluated:
    """Evaluates `run`, or resumes its evaluation; the files lie in the run folder `workdir`.

    Raises:
      ExperimentError: as `evaluate_random_run`.
    """
    config = run.config
    attacks = attacks_of(config, options)
    norm = options.norm or config.robust.norm
    draws = options.draws or config.evaluation.draws
    batch_size = config.evaluation.batch_size if options.batch_size is None else options.batch_size
    clips = config.robust.clip if options.clip is None else options.clip
    seed = config.seed if options.seed is None else options.seed
    _check(options, norm, batch_size, attacks, run)
    images = run.test if options.split == "test" else run.validation
    if len(images) == 0:
        raise ExperimentError(f"{workdir} has no {options.split} images: data.validation was 0")
    data = images.take(slice(options.count or config.evaluation.images or None))
    clip = (0.0, 1.0) if clips else None
    settings = {
        "parameters_sha256": parameters_sha256(run.variables),
        "images_sha256": images_sha256(data),
        "data": run.title,
        "split": options.split,
        "count": len(data),
        "which": run.label,
        "norm": norm,
        "clip": list(clip) if clip else None,
        "prediction_draws": draws,
        "pgd_steps": attacks[-1].steps,
        "batch_size": batch_size,
        "seed": seed,
    }
    path = workdir / "evaluations" / f"{options.name or _name_of(options, norm, clips)}.npz"
    title = (
        f"{workdir.name}: error in % on {len(data):,} {options.split} images of {run.title}, "
        f"{NORMS[norm].label}, {'clipped to [0, 1]' if clips else 'not clipped'}; mean softmax of "
        f"{draws} draws; EOT-PGD has {attacks[-1].steps} steps; {WARNING}"
    )
    distributed.agree({"evaluation": {**settings, "attacks": [a.name for a in attacks]}})
    results = _open(path, data, settings, options.replace)
    network = RandomNetwork(
        run.pure, bj.Threat(0.0, NORMS[norm].order, clip), min(batch_size, len(data))
    )
    _complete(results, network, data, attacks, path)
    return RandomEvaluated(path, results, title)


def _open(path: Path, data: Images, settings: dict[str, Any], may_replace: bool) -> RandomResults:
    """Reads the evaluation in the file, on every process the same, or starts an empty one."""
    exists = distributed.from_main(path.exists)
    results = random_files.read(path) if exists else random_files.empty(data.labels, settings)
    keys = differing_keys(results.settings, settings)
    if not keys and (results.labels != data.labels).any():
        keys = ["labels"]
    if keys and not may_replace:
        raise ExperimentError(
            f"{path} holds an evaluation of other weights or settings, which differs in "
            f"{', '.join(keys)}; give this one another --name, or delete that file"
        )
    return random_files.empty(data.labels, settings) if keys else results


def _complete(
    results: RandomResults,
    network: RandomNetwork,
    data: Images,
    attacks: tuple[Attack, ...],
    path: Path,
) -> None:
    """Computes what is missing: the clean pass, then every attack on the correct images.

    Process i takes every N-th batch. One process writes the file after every batch. Several
    exchange their flags after every attack, and process 0 writes the file then.
    """
    key, draws = jax.random.key(results.settings["seed"]), results.settings["prediction_draws"]

    def predicted(part: Images, name: str, block: int) -> np.ndarray:
        return network.correct(part, jax.random.split(_key(key, name, block, "predict"), draws))

    def clean(rows: np.ndarray, block: int) -> np.ndarray:
        return predicted(data.take(rows), CLEAN, block)

    everything = np.ones(len(data), bool)
    _run_part(
        results, network.size, CLEAN, everything, results.clean_run, results.correct, clean, path
    )
    for attack in attacks:
        results.add_attack(attack.name)
        length = attack.eps if attack.kind == "eot-fgsm" else attack.eps / 4

        def attacked(
            rows: np.ndarray, block: int, attack: Attack = attack, length: float = length
        ) -> np.ndarray:
            part = data.take(rows)
            keys = attack.keys(_key(key, attack.name, block, "attack"))
            points = network.attacked(part, attack.eps, length, keys)
            return predicted(Images(points, part.labels), attack.name, block)

        run, resisted = results.run_by[attack.name], results.resisted_by[attack.name]
        run[~results.correct] = True  # the ball contains its centre
        _run_part(
            results, network.size, attack.name, results.correct, run, resisted, attacked, path
        )


def _run_part(
    results: RandomResults,
    size: int,
    name: str,
    due: np.ndarray,
    run: np.ndarray,
    flags: np.ndarray,
    evaluate: Any,
    path: Path,
) -> None:
    """Evaluates the images that are `due` and not `run`, batch by batch, and fills in `flags`."""
    if run.all():
        return
    made_with = {"versions": versions(), "device": device_name(jax.devices())}
    made_with = distributed.from_main(lambda: made_with)
    part = results.parts.setdefault(name, {**made_with, "seconds": 0.0})
    if part["versions"] != made_with["versions"]:  # begun with other packages: start again
        run[due], flags[due] = False, False
        part |= {**made_with, "seconds": 0.0}
    process, processes = distributed.process(), distributed.processes()
    rows = np.flatnonzero(due)
    blocks = [rows[start : start + size] for start in range(0, len(rows), size)]
    for number, block in list(enumerate(blocks))[process::processes]:
        if run[block].all():
            continue
        began = time.monotonic()
        flags[block] = evaluate(block, number)
        run[block] = True
        part["seconds"] += time.monotonic() - began
        if processes == 1:
            random_files.write(path, results)
    if processes > 1:
        # The processes' store holds text: send one bit per image, in hexadecimal digits.
        texts = distributed.decided(np.packbits(flags).tobytes().hex(), lambda values: values)
        for text in texts:
            bits = np.frombuffer(bytes.fromhex(text), np.uint8)
            flags |= np.unpackbits(bits, count=len(flags)).astype(bool)
        run[due] = True
        part["seconds"] = distributed.decided(part["seconds"], max)
    run[~due] = True
    distributed.from_main(lambda: random_files.write(path, results))


def _key(key: jax.Array, name: str, block: int, use: str) -> jax.Array:
    """The key of a batch of a part; it depends on neither order nor process."""
    digest = hashlib.sha256(f"{use} {name}".encode()).digest()
    return jax.random.fold_in(jax.random.fold_in(key, int.from_bytes(digest[:4], "little")), block)


def _name_of(options: RandomOptions, norm: str, clips: bool) -> str:
    name = f"{options.split}-{options.which}-{NORMS[norm].label}-eot{'' if clips else '-unclipped'}"
    return name if options.count is None else f"{name}-first{options.count}"


def _check(
    options: RandomOptions,
    norm: str,
    batch_size: int,
    attacks: tuple[Attack, ...],
    run: Trained,
) -> None:
    check_choices(options.which, options.split, norm, options.name)
    for flag, number, minimum in (
        ("--count", 1 if options.count is None else options.count, 1),
        ("--pgd-steps", attacks[-1].steps, 0),
        ("--batch-size", batch_size, 1),
        ("--attack-draws", min(attack.draws for attack in attacks), 1),
        ("--draws", 1 if options.draws is None else options.draws, 1),
    ):
        if number < minimum:
            raise ExperimentError(f"{flag} must be >= {minimum}, got {number}")
    for attack in attacks:
        radius.check("--eps", attack.eps, norm, run.test.images.shape[1:], run.title)


def table_of(errors: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of the closing table, in percent: a row per attack and draws."""
    rows: dict[str, dict[float, str]] = {}
    for name, error in errors["attack_errors"].items():
        kind, draws, eps = random_files.parsed(name)
        text = "-" if error is None else f"{100 * error:.2f} %"
        rows.setdefault(f"{kind.upper()}, n = {draws}", {})[eps] = text
    radii = sorted({eps for cells in rows.values() for eps in cells})
    header = ["attack", "0", *(f"{eps:.6g}" for eps in radii)]
    clean = ["none", f"{100 * errors['standard_error']:.2f} %", *("" for _ in radii)]
    return header, [
        clean,
        *([label, "", *(cells.get(eps, "") for eps in radii)] for label, cells in rows.items()),
    ]


def print_random(evaluated: RandomEvaluated) -> None:
    """Prints the closing table, the time and the file's path."""
    results = evaluated.results
    print_table(evaluated.title, *table_of(results.errors()))
    print(
        f"evaluated in {results.seconds:.1f} s; "
        f"parameters sha256 {results.settings['parameters_sha256'][:16]}"
    )
    print(f"file: {evaluated.path}", flush=True)
