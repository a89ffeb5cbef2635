"""ONNX files as JAX functions: `from_onnx`.

The importer is our own because jaxonnxruntime, the package on PyPI for this, was last released in
August 2023 and reads 5 of the 12 VNN-COMP networks that it was tried on (the others use operators
without a version for their opset, or shapes that the graph computes).

Files are untrusted. Nothing in them is executed, sizes are checked before memory is allocated, and
anything that is not understood is refused with an `OnnxError` that names the node.

================ ==================================================================
file             content
================ ==================================================================
content.py       the bytes of a file, uncompressed, with weights from other files
node.py          one node: its attributes by type, and errors that name it
file.py          the protobuf messages, checked and converted to plain data
model.py         inputs and outputs; `from_onnx`, `OnnxModel`
builder.py       nodes in order: constants folded in numpy, others kept as steps
expansions.py    the table of nodes that are written in terms of others
control.py       `If`, `Loop` and `Scan`, written out
stored.py        weights in other types: casts and quantized numbers
steps.py         the steps apart from the weights, as a JAX function and as a key
operators.py     the table: operator -> function, constant operands, types
shaping.py       operators that move values or compute shapes
indexing.py      operators that read or write elements at constant indices
casts.py         casts to integers
resizing.py      Resize and Upsample
elementwise.py   arithmetic, comparisons
activations.py   activation functions
reductions.py    sums, norms, extrema over axes, cumulative sums
layers.py        products, convolutions, pooling, softmax
normalization.py batch, layer, group and other norms
recurrent.py     RNN, GRU, LSTM
================ ==================================================================
"""

from boundjax.onnx.model import OnnxModel as OnnxModel
from boundjax.onnx.model import from_onnx as from_onnx
from boundjax.onnx.node import OnnxError as OnnxError
