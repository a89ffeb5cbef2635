"""The rows of GradDiv's tables: random networks, and the deterministic ones beside them."""

from __future__ import annotations

from collections.abc import Iterator

from experiments.published import random_tables
from experiments.published.row import Row
from experiments.published.tables import Numbers

_DEFENCES = {
    "none": "no defence",
    "adv-train": "adversarial training",
    "rse": "RSE",
    "adv-bnn": "Adv-BNN",
}
# Table, title and radius of the number that counts.
_DATA = {
    "mnist": ("A.2", "MNIST", "0.3"),
    "cifar10": ("2.1", "CIFAR-10", "0.03"),
    "stl10": ("A.3", "STL-10", "0.03"),
}
_NOTE = (
    "the published size; the thesis chooses lambda on images held out from training, which are "
    "trained on here; whether it attacks misclassified images is not said, here they stay errors"
)


def graddiv() -> Iterator[Row]:
    """Makes a row of each defence on each data set; the number that counts is of 20 draws."""
    for data, (table, title, eps) in _DATA.items():
        for label, errors in random_tables.errors_of(data).items():
            defence, _, diverse = label.partition("+")
            deterministic = defence in ("none", "adv-train")
            attack = "pgd" if deterministic else "eot-pgd-n20"
            arguments, place = [f"defence={defence}"], table
            if defence == "rse" and diverse:  # for Adv-BNN the best regularizer is the default
                arguments.append("graddiv=kappa")
                place = "A.5"
            elif not diverse and not deterministic:
                arguments.append("graddiv=none")
            name = "undefended" if defence == "none" else defence
            yield Row(
                name="-".join(filter(None, (data, name, diverse))),
                config=f"experiments/configs/{data}_graddiv.py:{','.join(arguments)}",
                published=Numbers(errors["none"], errors[f"{attack}-eps{eps}"], None),
                source=f"GradDiv Table {place}, {title} {eps}, {_DEFENCES[defence]}"
                + (" with GradDiv" if diverse else ""),
                tolerance=2.0,
                note=_NOTE,
                methods=("interval",) if deterministic else (),
                budget="gpu",
                attacks={} if deterministic else {k: v for k, v in errors.items() if k != "none"},
            )
