"""Attacks bound robustness from the other side: an attacked example can never be certified."""

from boundjax.attacks.pgd import Descent as Descent
from boundjax.attacks.pgd import pgd as pgd
