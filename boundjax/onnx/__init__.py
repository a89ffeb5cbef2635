"""ONNX files as JAX functions: ``from_onnx``.

Written here and not taken from a library: jaxonnxruntime, the package on PyPI that does this, was
last released in August 2023 and reads 5 of the 12 VNN-COMP networks that it was tried on (the
others have operators without a version for their opset, or shapes that the graph computes).

A file is untrusted. Nothing in it is executed, sizes are checked before memory is taken, and
whatever is not understood is refused with an ``OnnxError`` that names the node.

============== ====================================================================
file           what it knows
============== ====================================================================
node.py        one node: its attributes by type, its errors
file.py        the protobuf messages, checked and brought to plain data
model.py       constants folded in numpy, the rest kept as steps; ``OnnxModel``
operators.py   the table: operator -> function, operands that must be known, types
shaping.py     operators that move values, or compute shapes
elementwise.py arithmetic, comparisons, activations
layers.py      products, convolutions, pooling, normalisation
============== ====================================================================
"""

from boundjax.onnx.model import OnnxModel as OnnxModel
from boundjax.onnx.model import from_onnx as from_onnx
from boundjax.onnx.node import OnnxError as OnnxError
