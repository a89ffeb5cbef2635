"""The published rows that `python -m experiments.reproduce ROW` runs, and how near it must come.

LLM: "Loss Landscape Matters" (Lee et al. 2021); REG: "Improved Training of Certifiably Robust
Models"; BCP: Lee, Lee & Park 2020; FAST: Shi et al. 2021; CTBench: Mao et al. 2024. Where a smaller
network stands in for the published one, the anchor is what it has been seen to reach, or the
published number with a tolerance for its size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Numbers(NamedTuple):
    """Errors in percent; None where nothing is known."""

    standard: float | None
    pgd: float | None
    verified: float | None

    @classmethod
    def of_accuracies(cls, standard: float, pgd: float | None, verified: float) -> Numbers:
        """From accuracies in percent."""
        return cls(*(None if a is None else round(100 - a, 2) for a in (standard, pgd, verified)))

    def __str__(self) -> str:
        return " / ".join("-" if value is None else f"{value:.2f}" for value in self)


class Row(NamedTuple):
    """One row of results.

    Attributes:
      name: how it is called on the command line.
      config: a configuration of `experiments.main`, `experiments/configs/FILE.py[:ARGUMENTS]`.
      published: the numbers of the paper.
      source: where they stand.
      tolerance: by how many percentage points the mean over the seeds may exceed the anchor, in
        verified and in standard error. One-sided: better is within.
      note: why so much, and what differs from the published row.
      methods: bounds whose union is the verified error.
      budget: `"cpu"`: minutes to an hour or two on 2 cores; `"gpu"`: an accelerator.
      seeds: how many runs, with seeds 0, 1, ...
      prototype: what the very network has been seen to reach; then it is the anchor.
      overrides: settings by dotted key, after the configuration.
    """

    name: str
    config: str
    published: Numbers
    source: str
    tolerance: float
    note: str
    methods: tuple[str, ...] = ("interval", "crown-ibp")
    budget: str = "cpu"
    seeds: int = 3
    prototype: Numbers | None = None
    overrides: Mapping[str, Any] = {}

    @property
    def anchor(self) -> Numbers:
        """What is compared with."""
        return self.published if self.prototype is None else self.prototype


_LINEAR = ("interval", "crown-ibp", "one-step")
_BALLS = ("bcp", "lmt")
_FILE = "experiments/configs/{}.py"


def _config(stem: str, arguments: str = "") -> str:
    return _FILE.format(stem) + (f":{arguments}" if arguments else "")


# --------------------------------------------------------------------------- for 2 CPU cores

_SMALL_FOR_LARGE = (
    "Small* (166,406 parameters, 60 epochs) stands in for Large (13,257,290, 200 epochs), a soft "
    "reference: its CROWN-IBP run had 1.3 points more standard and 2.9 more verified error"
)
_FAMILY = (
    "the paper's own network and recipe; its seeds have a standard deviation of up to 1.0, and it "
    "selects on the test images, for which half a point is allowed"
)
_NOT_PUBLISHED = (
    "the paper has CROWN-IBP only, this is its recipe with another method: twice the tolerance of "
    "its own rows"
)
_EXACT = (
    "30 epochs instead of 80, the stairs compressed likewise, and clipped to the pixel range: two "
    "points are allowed for it, about what the regularizers gain"
)
_ESTIMATED = (
    "trained on 50 projections, which the paper has not for this network: they cost Small at 0.3 "
    "11 points of verified error, and the exact row is a soft reference"
)


def _family(net: str, arguments: str, published: Numbers, *, tolerance: float, note: str) -> Row:
    method = arguments.replace("method=", "").replace(",r,epochs=140", "-r").replace("_", "-")
    return Row(
        f"mnist-family-{net}-{method}",
        _config("mnist_families", f"net={net},{arguments}"),
        published,
        "REG Table 4, " + ("with r" if "-r" in method else "CROWN-IBP"),
        tolerance,
        note,
        methods=_LINEAR if "one_step" in arguments else ("interval", "crown-ibp"),
    )


_FAMILIES = {  # net: verified by CROWN-IBP, verified and standard with r
    "a": (14.70, 14.54, 5.80),
    "b": (10.65, 10.46, 3.16),
    "c": (13.78, 13.37, 5.16),
    "d": (9.89, 9.91, 3.06),
    "e": (15.26, 14.43, 6.15),
    "f": (9.54, 9.48, 2.95),
    "g": (12.06, 11.01, 3.83),
    "h": (8.92, 8.83, 2.57),
    "i": (10.81, 10.18, 3.29),
    "j": (9.67, 9.49, 2.73),
}


def _families() -> list[Row]:
    rows = []
    for net, (verified, verified_r, standard_r) in _FAMILIES.items():
        plain, with_r = Numbers(None, None, verified), Numbers(standard_r, None, verified_r)
        if net in "ab":
            for method in ("ibp", "one_step"):
                rows.append(
                    _family(net, f"method={method}", plain, tolerance=3.0, note=_NOT_PUBLISHED)
                )
        for arguments, published in (
            ("method=crown_ibp", plain),
            ("method=crown_ibp,r,epochs=140", with_r),
        ):
            row = _family(net, arguments, published, tolerance=1.5, note=_FAMILY)
            rows.append(row._replace(budget="cpu" if net in "ab" else "gpu"))
    return rows


def _tightness(name: str, arguments: str, published: Numbers, tolerance: float, note: str) -> Row:
    return Row(
        f"mnist-mlp-{name}",
        _config("mnist_tightness", f"cpu{arguments}"),
        published,
        "REG, MNIST 0.1, 2x100",
        tolerance,
        note,
        methods=("interval", "crown-ibp", "fast-lin"),
    )


_CAP_MLP, _REG_MLP = Numbers(3.65, 10.9, 14.85), Numbers(4.73, 10.9, 13.32)
_LMT_4C3F = Numbers.of_accuracies(86.48, 53.56, 40.55)
_BCP_4C3F = Numbers.of_accuracies(92.41, 64.70, 47.95)
_PROTOTYPE = (
    "Small* for 20 epochs stands in for 4C3F for 60; the anchor is one seed of a prototype of this "
    "very run, and the first run here (docs/results.md) came within half a point of it"
)

_CPU = [
    Row(
        "mnist-ibp-0.1",
        _config("mnist_ibp", "cpu60"),
        Numbers(1.18, 2.16, 3.52),
        "LLM Table 3.4, IBP, Large",
        3.0,
        _SMALL_FOR_LARGE,
        seeds=1,
    ),
    Row(
        "mnist-ibp-0.2",
        _config("mnist_ibp", "cpu60,eps=0.2"),
        Numbers(2.00, 3.29, 6.31),
        "LLM Table 3.4, IBP, Large",
        5.0,
        _SMALL_FOR_LARGE + "; at twice the radius the gap between small and large is wider",
        seeds=1,
    ),
    Row(
        "mnist-short-warmup-small",
        _config("mnist_short_warmup", "cpu"),
        Numbers(1.19, 2.4, 4.47),
        "REG, MNIST 0.1, Small, CAP exact (3.65 verified with d and r)",
        2.0,
        "another method on the same network: IBP with batch normalisation and FAST's regularizers "
        "for 30 epochs, where the paper trains on exact linear bounds; two points are allowed",
    ),
    _tightness("cap", ",baseline", _CAP_MLP, 2.0, _EXACT),
    _tightness("cap-tight", "", _REG_MLP, 2.0, _EXACT),
    _tightness("cap-50", ",projections=50,baseline", _CAP_MLP, 8.0, _ESTIMATED),
    _tightness("cap-50-tight", ",projections=50", _REG_MLP, 8.0, _ESTIMATED),
    Row(
        "mnist-lmt-small",
        _config("mnist_lmt", "cpu"),
        _LMT_4C3F,
        "BCP, MNIST l2 1.58, LMT, 4C3F",
        2.0,
        _PROTOTYPE,
        methods=_BALLS,
        prototype=Numbers.of_accuracies(87.29, None, 40.19),
    ),
    Row(
        "mnist-bcp-small",
        _config("mnist_bcp", "cpu"),
        _BCP_4C3F,
        "BCP, MNIST l2 1.58, BCP, 4C3F",
        2.0,
        _PROTOTYPE,
        methods=_BALLS,
        prototype=Numbers.of_accuracies(88.69, None, 41.49),
    ),
]

# --------------------------------------------------------------------------- for an accelerator

_SELECTED = (
    "the published size; the epoch is selected on images held out from training, where the paper "
    "selects on the test images"
)
_MEAN_OF_FIVE = (
    f"{_SELECTED}; published are means of 5 seeds, of which the best is 0.2 (MNIST) or 0.5 better"
)
_BY_BOUNDS = f"{_SELECTED}; the paper's certificates are by a complete verifier, ours by bounds"
_COMPRESSED = (
    f"{_SELECTED}; and 100 epochs instead of 400: 70 instead of 160 cost IBP 2.9 points in FAST"
)
_NOT_CLIPPED = (
    f"{_SELECTED}; its balls are not clipped to the pixel range, ours are; its authors' notebook "
    "is 0.6 points off its table"
)


def _on_accelerator(
    name: str,
    config: str,
    published: Numbers,
    source: str,
    tolerance: float,
    note: str,
    methods: tuple[str, ...] = ("interval", "crown-ibp"),
    seeds: int = 3,
) -> Row:
    return Row(name, config, published, source, tolerance, note, methods, "gpu", seeds)


_GPU = [
    _on_accelerator(
        "mnist-short-warmup-0.4",
        _config("mnist_short_warmup"),
        Numbers(2.33, None, 11.03),
        "FAST, MNIST 0.4, CNN-7",
        0.5,
        _MEAN_OF_FIVE,
        seeds=5,
    ),
    _on_accelerator(
        "mnist-ctbench-ibp-0.1",
        _config("mnist_ctbench", "eps=0.1,method=ibp"),
        Numbers.of_accuracies(98.87, None, 98.26),
        "CTBench (recalled, not checked), MNIST 0.1, IBP",
        0.4,
        _BY_BOUNDS,
    ),
    _on_accelerator(
        "mnist-ctbench-ibp-0.3",
        _config("mnist_ctbench", "eps=0.3,method=ibp"),
        Numbers.of_accuracies(98.54, None, 93.80),
        "CTBench (recalled, not checked), MNIST 0.3, IBP",
        0.7,
        _BY_BOUNDS,
    ),
    _on_accelerator(
        "cifar10-short-warmup-70",
        _config("cifar10_short_warmup", "epochs=70"),
        Numbers(56.64, None, 68.81),
        "FAST, CIFAR-10 8/255, CNN-7, 70 epochs",
        1.0,
        _MEAN_OF_FIVE,
        seeds=5,
    ),
    _on_accelerator(
        "cifar10-short-warmup-160",
        _config("cifar10_short_warmup"),
        Numbers(51.72, None, 65.58),
        "FAST, CIFAR-10 8/255, CNN-7, 160 epochs",
        1.0,
        _MEAN_OF_FIVE,
        seeds=5,
    ),
    _on_accelerator(
        "cifar10-ctbench-ibp-8",
        _config("cifar10_ctbench", "eps=8,method=ibp"),
        Numbers.of_accuracies(48.51, None, 35.28),
        "CTBench (recalled, not checked), CIFAR-10 8/255, IBP",
        1.0,
        _BY_BOUNDS,
    ),
    _on_accelerator(
        "cifar10-ibp-8",
        _config("cifar10_ibp", "eps=8,epochs=100"),
        Numbers(55.71, 66.79, 70.95),
        "LLM Table 3.4, IBP, Medium",
        3.0,
        _COMPRESSED,
    ),
    _on_accelerator(
        "cifar10-crown-ibp-8",
        _config("cifar10_crown", "eps=8,beta=0,epochs=100"),
        Numbers(55.09, 66.68, 69.97),
        "LLM Table 3.4, CROWN-IBP 1 to 0, Medium",
        3.0,
        _COMPRESSED,
    ),
    _on_accelerator(
        "cifar10-one-step-8",
        _config("cifar10_one_step", "eps=8,epochs=100"),
        Numbers(56.01, 66.17, 69.70),
        "LLM Table 3.4, OURS, Medium",
        3.0,
        _COMPRESSED,
        methods=_LINEAR,
    ),
    _on_accelerator(
        "cifar10-one-step-2",
        _config("cifar10_one_step", "eps=2,epochs=100"),
        Numbers(31.49, 42.73, 49.42),
        "LLM Table 3.4, OURS, Medium",
        3.0,
        _COMPRESSED,
        methods=_LINEAR,
    ),
    _on_accelerator(
        "cifar10-crown-ibp-2",
        _config("cifar10_crown", "eps=2,epochs=100"),
        Numbers(32.48, 42.77, 50.15),
        "LLM Table 3.4, CROWN-IBP, Medium",
        3.0,
        _COMPRESSED,
    ),
    *(
        _on_accelerator(
            f"cifar10-{method}-{net}",
            _config(f"cifar10_{method}", f"net={net}"),
            Numbers.of_accuracies(*accuracies),
            f"BCP, CIFAR-10 l2 36/255, {method.upper()}, {net.upper()}",
            1.5,
            _NOT_CLIPPED,
            methods=_BALLS,
        )
        for method, net, accuracies in (
            ("bcp", "4c3f", (63.88, 58.75, 49.58)),
            ("bcp", "6c2f", (65.72, 60.78, 51.30)),
            ("lmt", "4c3f", (56.49, 49.83, 37.20)),
            ("lmt", "6c2f", (63.05, 58.32, 38.11)),
        )
    ),
    _on_accelerator(
        "mnist-bcp-4c3f",
        _config("mnist_bcp"),
        _BCP_4C3F,
        "BCP, MNIST l2 1.58, BCP, 4C3F",
        1.5,
        _NOT_CLIPPED,
        methods=_BALLS,
    ),
]


def _by_name(rows: list[Row]) -> dict[str, Row]:
    ordered = sorted(rows, key=lambda row: row.budget != "cpu")  # the cheaper ones first
    return {row.name: row for row in ordered}


ROWS: dict[str, Row] = _by_name([*_CPU, *_families(), *_GPU])
