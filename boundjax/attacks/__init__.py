"""Attacks: the bound from the other side. An attacked example can never be certified."""

from boundjax.attacks.pgd import Descent as Descent
from boundjax.attacks.pgd import pgd as pgd
