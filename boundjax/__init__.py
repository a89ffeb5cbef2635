"""boundjax: guaranteed bounds on JAX functions, and certified training of Flax models.

Everything public is here: `interval` and `linear` turn a function of one example into a
function from an input set to bounds; `certify` and `certified_radius` answer for a model and a
batch.
"""

from boundjax import attacks as attacks
from boundjax import diagnostics as diagnostics
from boundjax import ops as ops
from boundjax import slopes as slopes
from boundjax import training as training
from boundjax import vnnlib as vnnlib
from boundjax.certification.certify import Certificate as Certificate
from boundjax.certification.certify import certified_radius as certified_radius
from boundjax.certification.certify import certify as certify
from boundjax.certification.certify import memory_estimate as memory_estimate
from boundjax.certification.memory import MemoryEstimate as MemoryEstimate
from boundjax.certification.models import PureModel as PureModel
from boundjax.onnx import from_onnx as from_onnx
from boundjax.ops import UnsupportedOpError as UnsupportedOpError
from boundjax.ops import supported_ops as supported_ops
from boundjax.precision import training_precision as training_precision
from boundjax.sets.ball import LpBall as LpBall
from boundjax.sets.ball_box import BallBox as BallBox
from boundjax.sets.box import Box as Box
from boundjax.sets.input_set import InputSet as InputSet
from boundjax.sets.interval import Interval as Interval
from boundjax.sets.threat import Threat as Threat
from boundjax.slopes import optimized as optimized
from boundjax.tracing.jaxprs import unroll_limit as unroll_limit
from boundjax.transforms.forward import forward_linear as forward_linear
from boundjax.transforms.interval import interval as interval
from boundjax.transforms.linear import Relaxation as Relaxation
from boundjax.transforms.linear import linear as linear
from boundjax.transforms.linear import relax as relax
from boundjax.transforms.lipschitz import global_lipschitz as global_lipschitz
from boundjax.transforms.lipschitz import lipschitz as lipschitz
from boundjax.transforms.lipschitz import power_iteration as power_iteration
from boundjax.transforms.lipschitz import power_vectors as power_vectors
from boundjax.transforms.lipschitz import spectral_norms as spectral_norms
from boundjax.transforms.projection import Estimate as Estimate
from boundjax.transforms.projection import estimate as estimate
from boundjax.transforms.specification import margin_specification as margin_specification

__version__ = "0.1.0"
