"""The numbers that `published.rows` reproduces, laid out as in the papers' tables.

`published.rows` gives the full names of the papers and says where each number stands.
"""

from __future__ import annotations

from typing import NamedTuple


class Numbers(NamedTuple):
    """Errors in percent; None where the paper gives none."""

    standard: float | None
    pgd: float | None
    verified: float | None

    @classmethod
    def of_accuracies(
        cls, standard: float | None, pgd: float | None, verified: float | None
    ) -> Numbers:
        """Converts accuracies in percent to errors."""
        return cls(*(None if a is None else round(100 - a, 2) for a in (standard, pgd, verified)))

    def __str__(self) -> str:
        return " / ".join("-" if value is None else f"{value:.2f}" for value in self)


def table(text: str, *, accuracies: bool = False) -> dict[tuple[str, str], Numbers]:
    """Parses a table into its cells, by line and column.

    A cell is standard / PGD / verified or standard / verified; `-` marks a missing value.
    """
    header, *lines = text.strip().splitlines()
    cells_by = {}
    for line in lines:
        label, *cells = line.split()
        for column, cell in zip(header.split(), cells, strict=True):
            values = [None if value == "-" else float(value) for value in cell.split("/")]
            if len(values) == 2:
                values.insert(1, None)
            if cell != "-":
                convert = Numbers.of_accuracies if accuracies else Numbers
                cells_by[label, column] = convert(*values)
    return cells_by


# LLM: data, arguments, their part of the row's name, source, table. The table's lines are radii, or
# another argument where they contain "=".
LANDSCAPE = (
    ("mnist", "", "large", "Table 3.4", table("""
                ibp              crown              cap                one-step
        0.1     1.18/2.16/3.52   1.07/1.69/2.10     0.80/1.73/3.19     1.09/1.77/2.36
        0.2     2.00/3.29/6.31   2.99/5.50/7.97     3.22/6.72/11.06    1.70/3.44/4.34
        0.3     3.50/5.85/10.45  5.73/10.76/16.28   19.19/35.84/47.85  3.49/5.59/9.79
        0.4     3.50/7.30/17.96  5.73/14.63/23.80   -                  3.49/6.77/15.42
    """)),
    ("cifar10", "", "", "Table 3.4", table("""
                ibp                crown              cap                one-step
        2       37.98/49.40/55.39  32.48/42.77/50.15  28.80/38.95/48.50  31.49/42.73/49.42
        4       46.42/57.42/62.80  45.56/58.24/64.47  40.78/52.62/61.88  42.53/55.55/61.52
        6       52.84/63.92/68.79  54.72/65.28/71.04  49.20/60.85/69.03  50.19/61.88/66.90
        8       55.71/66.79/70.95  61.37/70.66/75.37  56.77/66.78/73.02  56.01/66.17/69.70
        16      67.10/75.12/78.26  76.65/81.90/84.42  75.11/80.67/82.07  65.93/75.39/77.87
    """)),
    ("svhn", "", "", "Table 3.4", table("""
                ibp                crown              cap                one-step
        0.01    19.91/34.12/43.83  17.25/30.84/39.88  16.88/30.16/37.09  16.41/30.43/39.44
    """)),
    ("mnist", "beta=0", "large-beta0", "Table C.3, 1 to 0", table("""
                one-step
        0.1     1.29/2.29/3.58
        0.2     1.61/3.09/5.71
        0.3     2.42/4.37/7.84
        0.4     2.42/5.68/13.72
    """)),
    ("cifar10", "beta=0", "beta0", "Tables 3.6 and C.3, 1 to 0", table("""
                crown              one-step
        2       36.30/47.13/52.70  37.77/48.30/54.43
        4       45.92/57.58/62.07  -
        6       53.54/64.14/67.35  -
        8       55.09/66.68/69.97  58.87/67.76/71.50
        16      66.62/76.13/77.88  66.24/74.69/78.66
    """)),
    ("mnist", "kappa=0", "large-kappa0", "Table C.2", table("""
                ibp                one-step
        0.3     3.67/5.55/9.74     3.39/4.85/9.12
    """)),
    ("cifar10", "kappa=0", "kappa0", "Table C.2", table("""
                ibp                one-step
        2       43.60/52.62/56.58  32.04/43.13/49.62
        8       64.11/70.68/72.99  56.35/67.06/70.56
    """)),
    ("cifar10", "kappa=0,steps=7", "7-steps", "Table C.4, 7 steps", table("""
                one-step
        2       31.40/42.30/49.20
        8       54.44/66.29/71.53
    """)),
    ("mnist", "kappa=0,eps_train=same", "large-same", "Table C.5, trained at 0.3", table("""
                ibp                one-step
        0.3     1.95/3.31/12.90    1.70/4.82/9.20
    """)),
    ("mnist", "beta=0,kappa=0,eps_train=same",
     "large-beta0-same", "Table C.5, trained at 0.3", table("""
                crown
        0.3     1.48/3.52/9.40
    """)),
    ("mnist", "beta=0,kappa=0", "large-beta0", "Table C.5, trained at 0.4", table("""
                crown
        0.3     2.37/3.63/7.22
    """)),
    ("cifar10", "kappa=0,eps_train=1.1x", "more", "Table C.6, trained at 2.2/255", table("""
                one-step
        2       33.04/43.70/48.60
    """)),
    ("cifar10", "epochs=200,kappa=0", "", "Table C.1", table("""
                one-step
        8       57.14/66.88/71.45
    """)),
    ("cifar10", "", "", "Table C.1", table("""
                            slopes
        slopes=0-0          70.66/73.84/77.60
        slopes=0-0.25       64.50/72.67/74.47
        slopes=0-0.5        62.72/71.42/74.92
        slopes=0-1          63.24/71.70/75.72
        slopes=0.5-1        70.69/76.68/78.38
        slopes=1-1          71.41/77.03/78.73
        slopes=cap-ibp      60.36/69.46/74.29
    """)),
    ("cifar10", "slopes=0-1", "0-1-stability", "Appendix C.13, CROWN-IBP and RS loss", table("""
                            slopes
        stability=0.01      62.78/71.89/76.34
        stability=10        60.90/70.85/76.00
    """)),
)  # fmt: skip

# RS, by data and radius.
STABILITY = table("""
                errors
    mnist:0.1   1.32/4.87
    mnist:0.3   2.67/19.32
    cifar10:2   38.88/54.07
    cifar10:8   59.55/79.72
""")

# BCP, by network; "linf" is 4C3F in an l-inf ball. The number for BCP on WRN is unknown.
LIPSCHITZ = table(
    """
                        cap                lmt                ibp                bcp
    mnist:4c3f          88.39/62.25/43.95  86.48/53.56/40.55  -                  92.41/64.70/47.95
    cifar10:4c3f        60.14/55.67/50.29  56.49/49.83/37.20  34.50/31.79/24.39  63.88/58.75/49.58
    cifar10:6c2f        60.10/56.20/50.87  63.05/58.32/38.11  32.96/31.08/23.42  65.72/60.78/51.30
    cifar10:wrn         60.70/56.77/51.63  61.33/56.39/33.35  -                  -
    cifar10:linf        19.00/17.33/16.06  -                  35.81/27.30/23.68  36.50/27.82/24.20
    tiny_imagenet:8c2f  -                  0.5/0.5/0.5        0.5/0.5/0.5        28.76/26.64/20.08
""",
    accuracies=True,
)

# REG, by data, radius, network and, on MNIST, number of projections (50 on CIFAR-10, the default
# of its configuration).
TIGHTNESS = table("""
                         baseline             regularised
    mnist:0.1:mlp        3.65/10.9/14.85      4.73/10.9/13.32
    mnist:0.1:small      1.19/2.4/4.47        1.09/2.2/3.65
    mnist:0.1:small:50   1.19/3.3/4.47        1.51/3.4/4.32
    mnist:0.3:mlp        33.16/49.4/61.39     26.10/44.3/56.05
    mnist:0.3:small      7.88/15.0/31.25      7.28/13.7/29.65
    mnist:0.3:small:50   15.93/26.0/42.7      14.29/24.0/41.36
    mnist:0.3:xlarge     1.88/5.88/7.01       1.76/-/6.64
    cifar10:2:small      38.19/48.0/53.19     37.30/47.0/51.52
    cifar10:2:large      29.42/38.5/45.78     29.76/38.8/45.19
    cifar10:8:small      62.79/68.3/75.45     62.50/67.9/74.70
    cifar10:8:large      59.73/68.8/74.04     59.82/68.5/73.74
    cifar10:8:xlarge     54.02/65.42/66.94    53.78/-/66.64
""")

# CI and REG, by network: verified error of CROWN-IBP in CI, as reproduced by REG, and with r; then
# standard error with r.
FAMILIES = {
    "a": (15.4, 14.70, 14.54, 5.80),
    "b": (10.6, 10.65, 10.46, 3.16),
    "c": (16.1, 13.78, 13.37, 5.16),
    "d": (11.3, 9.89, 9.91, 3.06),
    "e": (11.7, 15.26, 14.43, 6.15),
    "f": (9.96, 9.54, 9.48, 2.95),
    "g": (12.2, 12.06, 11.01, 3.83),
    "h": (9.90, 8.92, 8.83, 2.57),
    "i": (11.2, 10.81, 10.18, 3.29),
    "j": (9.21, 9.67, 9.49, 2.73),
}

# FAST, by data and the argument that differs from the default of its configuration.
SHORT_WARMUP = table("""
                                    ibp          crown-ibp    fast
    mnist:                          2.59/12.03   2.75/12.04   2.33/11.03
    mnist:net=wide_resnet           3.18/12.93   3.39/13.10   2.77/11.76
    mnist:net=resnext               4.09/15.36   4.22/15.24   3.22/13.43
    cifar10:epochs=70               58.72/69.88  63.19/71.29  56.64/68.81
    cifar10:                        53.80/67.01  58.76/69.67  51.72/65.58
    cifar10:net=wide_resnet         54.31/67.45  60.39/70.07  51.95/65.91
    cifar10:net=resnext             55.23/68.28  61.08/71.26  53.68/66.91
    cifar10:parts=init              -            -            54.59/67.63
    cifar10:parts=init+tightness    -            -            53.08/66.74
    cifar10:parts=init+relu         -            -            53.29/66.46
    cifar10:parts=regularizers      -            -            52.45/66.34
    tiny_imagenet:                  74.68/82.84  76.27/83.35  74.29/82.36
    tiny_imagenet:net=wide_resnet   75.65/83.17  75.95/83.08  74.59/82.75
    tiny_imagenet:net=resnext       81.72/87.10  80.81/86.43  78.91/85.78
""")

# CTBench, by data and radius.
CTBENCH = table(
    """
                mnist:0.1    mnist:0.3    cifar10:2    cifar10:8    tiny_imagenet:
    ibp         98.87/98.26  98.54/93.80  67.49/55.99  48.51/35.28  26.77/19.82
    crown-ibp   98.94/98.21  98.48/93.90  67.60/57.11  48.25/32.59  28.44/22.14
    sabr        99.08/98.40  98.66/93.68  77.86/63.61  52.71/35.34  30.58/20.96
    taps        99.16/98.52  98.56/93.95  74.44/61.27  49.96/35.25  29.53/22.71
    staps       99.11/98.47  98.74/93.64  77.05/64.21  51.49/35.11  30.63/22.31
    mtl-ibp     99.18/98.37  98.74/93.90  78.82/64.41  54.28/35.41  35.97/27.73
""",
    accuracies=True,
)

# The expressive losses, from the paper that introduced them.
EXPRESSIVE = table(
    """
                mnist:0.3    cifar10:2    cifar10:8    tiny_imagenet:
    mtl-ibp     98.80/93.62  80.11/63.24  53.35/35.44  37.56/26.09
""",
    accuracies=True,
)

# CTBench's networks at 2/255, certified by intervals alone.
BY_INTERVALS = table(
    """
                cifar10:2
    ibp         67.49/54.22
    crown-ibp   67.60/49.92
    sabr        77.86/12.12
    taps        74.44/28.22
    staps       77.05/0.72
    mtl-ibp     78.82/0.62
""",
    accuracies=True,
)
