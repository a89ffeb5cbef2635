"""Models by name."""

from experiments.models.convnet import KERNEL_INITS as KERNEL_INITS
from experiments.models.convnet import Block as Block
from experiments.models.convnet import Convolution as Convolution
from experiments.models.convnet import ConvolutionalClassifier as ConvolutionalClassifier
from experiments.models.convnet import GroupedConvolution as GroupedConvolution
from experiments.models.convnet import Pool as Pool
from experiments.models.convnet import Residual as Residual
from experiments.models.table import CIFAR_LARGE as CIFAR_LARGE
from experiments.models.table import MNIST_LARGE as MNIST_LARGE
from experiments.models.table import MODELS as MODELS
from experiments.models.table import count_parameters as count_parameters
from experiments.models.table import create as create
from experiments.models.table import from_config as from_config
from experiments.models.table import network_of as network_of
