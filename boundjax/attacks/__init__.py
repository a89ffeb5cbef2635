"""Attacks bound robustness from the other side: an attacked example can never be certified."""

from boundjax.attacks.fgsm import fgsm as fgsm
from boundjax.attacks.objective import expected_gradient as expected_gradient
from boundjax.attacks.pgd import Descent as Descent
from boundjax.attacks.pgd import pgd as pgd
from boundjax.attacks.transfer import transfer_accuracy as transfer_accuracy
