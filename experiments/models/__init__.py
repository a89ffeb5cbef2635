"""The table of models by name."""

from experiments.models.convnet import Block as Block
from experiments.models.convnet import Convolution as Convolution
from experiments.models.convnet import ConvolutionalClassifier as ConvolutionalClassifier
from experiments.models.table import MODELS as MODELS
from experiments.models.table import count_parameters as count_parameters
from experiments.models.table import create as create
from experiments.models.table import from_config as from_config
