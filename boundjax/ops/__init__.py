"""The facts about every op, in one table; importing this package fills it."""

from boundjax.ir.families import Expansion as Expansion
from boundjax.ir.families import Extremum as Extremum
from boundjax.ir.families import Joint as Joint
from boundjax.ir.families import Lines as Lines
from boundjax.ir.families import Planes as Planes
from boundjax.ir.families import Scalar as Scalar
from boundjax.ir.families import Structural as Structural
from boundjax.ir.families import Weighted as Weighted
from boundjax.ir.node import NoProofError as NoProofError
from boundjax.ir.node import Op as Op
from boundjax.ir.table import UnsupportedOpError as UnsupportedOpError
from boundjax.ir.table import all_ops as all_ops
from boundjax.ir.table import register as register
from boundjax.ir.table import supported_ops as supported_ops
from boundjax.ops import activations as _activations
from boundjax.ops import affine as _affine
from boundjax.ops import angle as _angle
from boundjax.ops import branches as _branches
from boundjax.ops import control as _control
from boundjax.ops import cumulative as _cumulative
from boundjax.ops import exponentials as _exponentials
from boundjax.ops import extremum as _extremum
from boundjax.ops import hinge as _hinge
from boundjax.ops import integers as _integers
from boundjax.ops import interpolation as _interpolation
from boundjax.ops import kernels as _kernels
from boundjax.ops import length as _length
from boundjax.ops import lookup as _lookup
from boundjax.ops import normalization as _normalization
from boundjax.ops import order as _order
from boundjax.ops import product as _product
from boundjax.ops import refused as _refused
from boundjax.ops import remainder as _remainder
from boundjax.ops import selection as _selection
from boundjax.ops import solves as _solves
from boundjax.ops import trigonometry as _trigonometry
from boundjax.ops import whole as _whole

del _activations, _affine, _angle, _branches, _control, _cumulative, _exponentials, _extremum
del _hinge, _integers, _interpolation, _kernels, _length, _lookup, _normalization, _order, _product
del _refused, _remainder, _selection, _solves, _trigonometry, _whole
