"""Accuracies of GradDiv's tables (chapter 2 of Lee's thesis: Tables 2.1, A.2, A.3 and A.5).

A line is a defence under one attack; the columns are radii, `-` where a value is missing. Without
an attack a network has its accuracy at radius 0. In Table A.4 the labels of the last lines have
slipped; its numbers are those of Table 2.1.
"""

from __future__ import annotations

# Attacks by their word: kind and draws per gradient. `pgd` is of deterministic networks.
ATTACKS = {
    "fgsm": ("eot-fgsm", 20),
    "pgd": ("pgd", 1),
    **{f"pgd-{draws}": ("eot-pgd", draws) for draws in (1, 5, 10, 20)},
}

MNIST = """
                     attack  0      0.1    0.2    0.3    0.32   0.34   0.36   0.38   0.4
    none             fgsm    99.41  92.48  61.24  27.3   23.66  20.67  18.5   17.08  15.95
    adv-train        fgsm    99.4   98.7   97.95  97.42  96.69  93.22  86.47  77.05  62.74
    rse              fgsm    99.44  96.08  82.52  47.76  40.11  33.73  28.37  23.71  20.03
    adv-bnn          fgsm    99.38  98.85  98.18  97.23  97.28  97.11  96.28  92.82  85.02
    adv-bnn+graddiv  fgsm    99.14  98.43  97.39  96.03  95.46  95.02  94.18  93.57  92.32
    none             pgd     -      77.87  5.46   1.12   1.06   1.05   1.05   1.05   1.05
    adv-train        pgd     -      98.53  97.16  94.85  86.41  50.26  26.57  12.44  3.48
    rse              pgd-5   -      94.71  47.55  1.63   0.82   0.47   0.38   0.34   0.33
    adv-bnn          pgd-5   -      98.8   97.65  94.32  90.62  74.83  28.55  5.18   0.15
    adv-bnn+graddiv  pgd-5   -      98.27  96.33  90.12  86.67  80.23  68.34  47.24  21.37
    rse              pgd-10  -      94.37  41.39  1.03   0.51   0.38   0.3    0.22   0.25
    adv-bnn          pgd-10  -      98.76  97.59  93.88  90.07  73.87  25.38  3.26   0.05
    adv-bnn+graddiv  pgd-10  -      98.19  96.08  89.21  85.36  78.34  64.88  43.07  17.31
    rse              pgd-20  -      94.23  37.25  0.7    0.44   0.27   0.27   0.19   0.15
    adv-bnn          pgd-20  -      98.74  97.43  93.83  90     73.62  25.82  2.33   0.02
    adv-bnn+graddiv  pgd-20  -      97.99  95.8   88.73  84.54  77.58  63.34  40.05  15.57
"""

CIFAR10 = """
                     attack  0      0.01   0.02   0.03   0.04   0.05   0.06   0.07
    none             fgsm    92.39  26.57  12.06  8.37   7.18   6.83   6.81   6.96
    adv-train        fgsm    78.83  68.12  57.65  49.63  42.72  37.38  33.14  29.26
    rse              fgsm    84.06  68.49  51.83  35.67  21.6   12.9   7.08   4.12
    rse+graddiv      fgsm    84.88  77.77  69.42  59.88  50.1   41.53  33.71  28.52
    adv-bnn          fgsm    75.97  67.94  59.28  49.9   41.59  33.91  27.47  22.1
    adv-bnn+graddiv  fgsm    76.45  71.37  65.65  59.02  53.69  47.71  42.72  37.69
    none             pgd     -      3.16   0      0      0      0      0      0
    adv-train        pgd     -      66.75  52.84  39.49  28.32  18.26  11.47  7.23
    rse              pgd-1   -      68.76  48.15  28.07  14.06  5.84   2.29   0.77
    rse+graddiv      pgd-1   -      72.05  54.75  36.95  21.83  11.4   6.09   3.12
    rse              pgd-5   -      66.39  44.5   23.86  10.48  3.98   1.4    0.44
    rse+graddiv      pgd-5   -      68.49  47.9   27.69  12.83  5.57   2.38   1.11
    adv-bnn          pgd-5   -      67.57  58.06  46.81  36.13  25.15  16.24  9.18
    adv-bnn+graddiv  pgd-5   -      69.81  61.88  53.63  44.52  36.4   28.52  20.91
    rse              pgd-10  -      65.95  43.1   22.4   9.43   3.24   1.19   0.37
    rse+graddiv      pgd-10  -      67.61  44.91  24.53  10.46  4.12   1.69   0.73
    adv-bnn          pgd-10  -      67.41  56.85  45.46  33.73  23.04  13.81  7.31
    adv-bnn+graddiv  pgd-10  -      68.59  59.31  49.17  38.96  29.53  20.74  13.56
    rse              pgd-20  -      65.48  42.12  21.65  9.02   3.18   1.01   0.3
    rse+graddiv      pgd-20  -      67.07  44.88  25.43  11.6   5.2    2.59   1.46
    adv-bnn          pgd-20  -      67.17  56.36  44.49  32.75  21.5   12.27  6.29
    adv-bnn+graddiv  pgd-20  -      66.39  56.73  44.88  33.81  22.95  14.52  8.6
"""

STL10 = """
                     attack  0      0.01   0.02   0.03   0.04   0.05   0.06   0.07
    none             fgsm    75.69  31.08  16.35  10.5   8.05   7.14   6.9    6.66
    adv-train        fgsm    62.43  48.53  37.7   29.22  22.96  18.16  15.1   12.76
    rse              fgsm    73.65  47.86  26.29  13.01  7.18   4.43   2.9    1.99
    adv-bnn          fgsm    54.85  48.38  41.64  35.24  30.21  25.4   20.46  17.14
    adv-bnn+graddiv  fgsm    60.31  56.39  51.76  47.94  43.84  40.54  35.93  32.62
    none             pgd     -      18.35  2.2    0.11   0.01   0      0      0
    adv-train        pgd     -      47.84  34.94  25.18  17.51  11.91  7.76   4.74
    rse              pgd-5   -      44.99  21.31  8.55   3.39   1.18   0.34   0.08
    adv-bnn          pgd-5   -      47.4   40.49  33.63  27.18  21.08  16.48  11.21
    adv-bnn+graddiv  pgd-5   -      54.8   48.6   42.43  36.49  30.49  25.28  21.04
    rse              pgd-10  -      44.33  20.38  8.1    3.06   0.99   0.26   0.05
    adv-bnn          pgd-10  -      47.64  39.98  32.41  25.69  19.35  13.84  9.74
    adv-bnn+graddiv  pgd-10  -      54.19  47.14  40.75  34.56  28.15  22.79  17.75
    rse              pgd-20  -      43.65  19.64  7.69   2.93   0.88   0.25   0.04
    adv-bnn          pgd-20  -      47.16  38.99  31.65  24.59  18.53  13.06  9.05
    adv-bnn+graddiv  pgd-20  -      53.36  46.18  38.94  32.19  26.23  19.98  15.05
"""

TABLES = {"mnist": MNIST, "cifar10": CIFAR10, "stl10": STL10}


def errors_of(data: str) -> dict[str, dict[str, float]]:
    """Errors in percent of each defence on a data set, by attack as files name it, or `"none"`.

    Names are those of `experiments.evaluation.random_network.Attack`; on deterministic networks the
    word is `pgd-eps0.3`.
    """
    header, *lines = TABLES[data].strip().splitlines()
    radii = header.split()[2:]
    errors: dict[str, dict[str, float]] = {}
    for line in lines:
        defence, word, clean, *cells = line.split()
        kind, draws = ATTACKS[word]
        prefix = "pgd" if kind == "pgd" else f"{kind}-n{draws}"
        by_attack = errors.setdefault(defence, {})
        if clean != "-":
            by_attack["none"] = round(100 - float(clean), 2)
        for radius, cell in zip(radii, cells, strict=True):
            by_attack[f"{prefix}-eps{radius}"] = round(100 - float(cell), 2)
    return errors
