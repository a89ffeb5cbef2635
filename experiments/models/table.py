"""Architectures of the papers by name, with their numbers of parameters.

The columns count for 10 classes, on MNIST (28x28x1 images) and on CIFAR-10 (32x32x3). Models for
Tiny ImageNet (64x64x3, 200 classes) and STL-10 (96x96x3) are counted on their own data.

REG: "Improved Training of Certifiably Robust Models" (ICLR 2020 submission). LLM: "Loss Landscape
Matters", published as "Towards Better Understanding of Training Certifiably Robust Models against
Adversarial Examples" (Lee et al. 2021). CAP: Wong & Kolter 2018, Wong et al. 2018. IBP: Gowal et
al. 2018. CROWN-IBP: Zhang et al. 2020. BCP: Lee et al. 2020. FAST: Shi et al. 2021. CTBench: Mao et
al. 2024. GradDiv: Lee et al. 2022.

=======================  ==================================================  ==========  ==========
name                     paper                                                    MNIST    CIFAR-10
=======================  ==================================================  ==========  ==========
tiny                     ours: 8x8 images, two CPU cores; 19,242 there
mlp_2x100                REG                                                     89,610
small                    LLM, CROWN-IBP                                         550,406     730,118
small_valid              IBP: its small, without padding                        329,606     470,918
small_star               LLM: Small*; CAP, REG: Small                           166,406     214,918
small_star_leaky         ours: the same with LeakyReLU, for GradDiv on 2 cores  166,406     214,918
small_star_bn            the same with batch normalisation                      166,702     215,214
medium                   LLM; BCP: 4C3F; CAP, REG: Large                      1,974,762   2,466,858
medium_valid             IBP: its medium, without padding                       893,418   1,188,906
large                    LLM; CROWN-IBP: dm-large; REG: XLarge               13,257,290  17,190,602
large_star               LLM: Large*, for CAP                                13,220,362  17,153,674
cnn7                     FAST, CTBench: Large with batch normalisation       13,259,338  17,192,650
cnn7_tiny                FAST, CTBench on Tiny ImageNet: 17,290,120
6c2f                     BCP                                                              2,250,378
8c2f                     BCP on Tiny ImageNet: 4,342,984
wrn                      BCP: WRN; CAP: its ResNet                                        4,214,850
wide_resnet              FAST: Wide-ResNet-8                                 17,615,434  21,547,882
wide_resnet_tiny         FAST on Tiny ImageNet: 91,424,776
resnext                  FAST                                                13,677,706  17,611,018
resnext_tiny             FAST on Tiny ImageNet: 16,981,960
vgg16                    GradDiv, Adv-BNN: VGG-16 of one dense layer                     14,728,266
graddiv_mnist            GradDiv (LeakyReLU: PyTorch's default slope)         6,526,474
graddiv_stl10            GradDiv on STL-10: 2,166,282
family_a                 CROWN-IBP                                               52,182      67,670
family_b                 CROWN-IBP                                              205,730     267,426
family_c                 CROWN-IBP                                               27,170      34,922
family_d                 CROWN-IBP                                              107,130     137,994
family_e                 CROWN-IBP                                               21,090      27,946
family_f                 CROWN-IBP                                               82,682     109,706
family_g                 CROWN-IBP                                              170,598     201,390
family_h                 CROWN-IBP                                              275,714     337,298
family_i                 CROWN-IBP                                              470,630     532,142
family_j                 CROWN-IBP                                              676,098     799,122
two_layer_w8_n128        CROWN-IBP, as all below                                            560,106
two_layer_w16_n256                                                                        2,234,314
three_layer_k3_w8_n256                                                                    1,136,394
three_layer_k3_w8_n512                                                        1,695,690
three_layer_k3_w16_n512                                                                   4,537,866
three_layer_k5_w4_n512                                                          625,130
three_layer_k5_w8_n512                                                        1,302,986
three_layer_k5_w16_n512                                                       2,833,802
four_layer_w4_n512                                                            1,096,442
four_layer_w8_n256                                                                        1,218,602
four_layer_w8_n512       the layers of medium                                 1,974,762   2,466,858
four_layer_w16_n256                                                                       2,569,290
four_layer_w16_n512                                                           3,881,930   4,866,122
=======================  ==================================================  ==========  ==========
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from boundjax.stochastic import GaussianWeights, adv_bnn_means
from experiments.models.convnet import (
    Block,
    ConvolutionalClassifier,
    GroupedConvolution,
    Pool,
    Residual,
)
from experiments.models.convnet import Convolution as C
from experiments.settings.config import ModelConfig, RandomConfig
from experiments.settings.errors import ExperimentError

_SMALL = (C(16, 4, 2, 1), C(32, 4, 1, 1))
_SMALL_STAR = (C(16, 4, 2, 1), C(32, 4, 2, 1))
_MEDIUM = (C(32, 3, 1, 1), C(32, 4, 2, 1), C(64, 3, 1, 1), C(64, 4, 2, 1))
_SIX = (
    *(C(32, 3, 1, 1), C(32, 3, 1, 1), C(32, 4, 2, 1)),
    *(C(64, 3, 1, 1), C(64, 3, 1, 1), C(64, 4, 2, 1)),
)
_EIGHT = (
    *(C(64, 3, 1, 1), C(64, 3, 1, 1), C(64, 4, 2, 0)),
    *(C(128, 3, 1, 1), C(128, 3, 1, 1), C(128, 4, 2, 0)),
    *(C(256, 3, 1, 1), C(256, 4, 2, 0)),
)
_LARGE = (C(64, 3, 1, 1), C(64, 3, 1, 1), C(128, 3, 2, 1), C(128, 3, 1, 1), C(128, 3, 1, 1))


def _unpadded(convolutions: Sequence[C]) -> tuple[C, ...]:
    return tuple(layer._replace(padding=0) for layer in convolutions)


def _pooled(*stages: Sequence[int]) -> tuple[C | Pool, ...]:
    """3x3 convolutions with these filters; 2x2 max pooling follows every stage."""
    return tuple(layer for stage in stages for layer in (*(C(f, 3, 1, 1) for f in stage), Pool(2)))


def _basic(filters: int, stride: int) -> Residual:
    """Basic block of a residual network; the skip is a 1x1 convolution."""
    return Residual(
        body=(C(filters, 3, stride, 1), C(filters, 3, 1, 1)), skip=C(filters, 1, stride, 0)
    )


def _bottleneck(width: int, stride: int, project: bool = True) -> Residual:
    """Block of FAST's ResNeXt: cardinality 2, and twice as many output as inner channels.

    The skip is a 1x1 convolution, or the block's input with `project=False`.
    """
    inner, outer = 2 * width, 4 * width
    body = (C(inner, 1, 1, 0), GroupedConvolution(inner, 3, stride, 1, groups=2), C(outer, 1, 1, 0))
    return Residual(body, skip=C(outer, 1, stride, 0) if project else None)


def _two_layer(w: int, n: int) -> dict[str, Any]:
    return {"convolutions": (C(4 * w, 4, 2, 1), C(8 * w, 4, 2, 1)), "hidden": (n,)}


def _three_layer(k: int, w: int, n: int) -> dict[str, Any]:
    convolutions = (C(4 * w, k, 1, 1), C(8 * w, k, 1, 1), C(8 * w, 4, 4, 0))
    return {"convolutions": convolutions, "hidden": (n,)}


def _four_layer(w: int, n: int) -> dict[str, Any]:
    convolutions = (C(4 * w, 3, 1, 1), C(4 * w, 4, 2, 1), C(8 * w, 3, 1, 1), C(8 * w, 4, 2, 1))
    return {"convolutions": convolutions, "hidden": (n, n)}


# The larger members of CROWN-IBP's families: width w, kernel k, n hidden units. The paper's MNIST
# table of eight lists four_layer_w4_n512 twice, once labelled n = 256.
_LARGER = {
    **{f"two_layer_w{w}_n{n}": _two_layer(w, n) for w, n in ((8, 128), (16, 256))},
    **{
        f"three_layer_k{k}_w{w}_n{n}": _three_layer(k, w, n)
        for k, w, n in (
            *((3, 8, 256), (3, 8, 512), (3, 16, 512)),
            *((5, 4, 512), (5, 8, 512), (5, 16, 512)),
        )
    },
    **{
        f"four_layer_w{w}_n{n}": _four_layer(w, n)
        for w, n in ((4, 512), (8, 256), (8, 512), (16, 256), (16, 512))
    },
}
MNIST_LARGE = (
    *("four_layer_w4_n512", "four_layer_w8_n512", "four_layer_w16_n512"),
    *("three_layer_k5_w16_n512", "three_layer_k5_w8_n512", "three_layer_k5_w4_n512"),
    "three_layer_k3_w8_n512",
)
CIFAR_LARGE = (
    *("two_layer_w8_n128", "two_layer_w16_n256", "four_layer_w8_n256", "four_layer_w16_n256"),
    *("four_layer_w8_n512", "four_layer_w16_n512"),
    *("three_layer_k3_w8_n256", "three_layer_k3_w16_n512"),
)

MODELS: dict[str, dict[str, Any]] = {
    "tiny": {"convolutions": (C(8, 3, 1, 1), C(16, 4, 2, 1)), "hidden": (64,)},
    "mlp_2x100": {"hidden": (100, 100)},
    "small": {"convolutions": _SMALL, "hidden": (100,)},
    "small_valid": {"convolutions": _unpadded(_SMALL), "hidden": (100,)},
    "small_star": {"convolutions": _SMALL_STAR, "hidden": (100,)},
    "small_star_leaky": {"convolutions": _SMALL_STAR, "hidden": (100,), "negative_slope": 0.01},
    "small_star_bn": {"convolutions": _SMALL_STAR, "hidden": (100,), "batch_norm": True},
    "medium": {"convolutions": _MEDIUM, "hidden": (512, 512)},
    "medium_valid": {"convolutions": _unpadded(_MEDIUM), "hidden": (512, 512)},
    "large": {"convolutions": _LARGE, "hidden": (512,)},
    "large_star": {"convolutions": (_LARGE[0], *_LARGE[2:]), "hidden": (512,)},
    "cnn7": {"convolutions": _LARGE, "hidden": (512,), "batch_norm": True},
    "cnn7_tiny": {
        "convolutions": (*_LARGE[:4], C(128, 3, 2, 1)),
        "hidden": (512,),
        "num_classes": 200,
        "batch_norm": True,
    },
    "6c2f": {"convolutions": _SIX, "hidden": (512,)},
    "8c2f": {"convolutions": _EIGHT, "hidden": (256,), "num_classes": 200},
    "wrn": {
        "convolutions": (C(16, 3, 1, 1),),
        "blocks": (Block(16), Block(16), Block(32, halve=True), Block(64, halve=True)),
        "hidden": (1000,),
    },
    "wide_resnet": {
        "convolutions": (C(16, 3, 1, 1),),
        "blocks": (_basic(128, 1), _basic(256, 2), _basic(512, 2)),
        "hidden": (512,),
        "batch_norm": True,
    },
    "wide_resnet_tiny": {
        "convolutions": (C(16, 3, 1, 1),),
        "blocks": (_basic(160, 1), _basic(320, 2), _basic(640, 2)),
        "hidden": (512,),
        "num_classes": 200,
        "batch_norm": True,
    },
    "resnext": {
        "convolutions": (C(64, 3, 1, 1),),
        "blocks": (_bottleneck(32, 1), _bottleneck(64, 2), _bottleneck(128, 2)),
        "hidden": (512,),
        "batch_norm": True,
    },
    "resnext_tiny": {
        "convolutions": (C(16, 3, 1, 1),),
        "blocks": (
            *(_bottleneck(8, 1), _bottleneck(8, 1, project=False)),
            *(_bottleneck(16, 2), _bottleneck(16, 1, project=False)),
            *(_bottleneck(32, 2), _bottleneck(32, 1, project=False)),
        ),
        "hidden": (512,),
        "num_classes": 200,
        "batch_norm": True,
    },
    "vgg16": {
        "convolutions": _pooled((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3),
        "batch_norm": True,
    },
    "graddiv_mnist": {
        "convolutions": _pooled((32, 64), (128,)),
        "hidden": (1024,),
        "negative_slope": 0.01,
    },
    "graddiv_stl10": {
        "convolutions": (
            *_pooled((32,), (64,), (128,), (256,)),
            *(C(256, 3, 1, 0), C(512, 3, 1, 0), Pool(2, average=True)),
        ),
        "batch_norm": True,
    },
    "family_a": _two_layer(1, 128),
    "family_b": _two_layer(2, 256),
    "family_c": _three_layer(3, 1, 64),
    "family_d": _three_layer(3, 2, 128),
    "family_e": _three_layer(5, 1, 64),
    "family_f": _three_layer(5, 2, 128),
    "family_g": _four_layer(1, 256),
    "family_h": _four_layer(2, 256),
    "family_i": _four_layer(1, 512),
    "family_j": _four_layer(2, 512),
    **_LARGER,
}


def create(name: str, **overrides: Any) -> ConvolutionalClassifier:
    """Creates the unbound Linen module called `name`.

    Args:
      name: a key of `MODELS`.
      **overrides: fields of `ConvolutionalClassifier` to replace, e.g. `num_classes=100`.

    Raises:
      ExperimentError: for an unknown name.
    """
    if name not in MODELS:
        raise ExperimentError(f"unknown model {name!r}: use one of {', '.join(sorted(MODELS))}")
    return ConvolutionalClassifier(**{**MODELS[name], **overrides})


def from_config(config: ModelConfig, random: RandomConfig = RandomConfig()) -> nn.Module:  # noqa: B008 - frozen
    """Creates the unbound module of a run's configuration.

    With `random.prior_std` it is a `boundjax.stochastic.GaussianWeights` around the network, whose
    first means are Adv-BNN's.

    Raises:
      ExperimentError: for an unknown name, initial weights that Gaussian ones do not have, or noise
        in a network without convolutions.
    """
    network = create(
        config.name,
        mean=config.mean or None,
        std=config.std or None,
        kernel_init=config.init,
        noise=random.noise or None,
    )
    if random.noise and not network.convolutions:
        raise ExperimentError(
            f"config.random.noise comes before convolutions, and {config.name!r} has none; choose "
            "another network, or random weights by config.random.prior_std"
        )
    if not random.prior_std:
        return network
    if config.init != "fan_in":
        raise ExperimentError(
            f"config.random.prior_std needs config.model.init='fan_in', got {config.init!r}: "
            "the first means of Gaussian weights are Adv-BNN's"
        )
    return GaussianWeights(
        network.clone(parent=None),
        random.prior_std,
        random.initial_std or None,
        adv_bnn_means,
    )


def network_of(model: nn.Module) -> ConvolutionalClassifier:
    """The network whose weights `model` draws, or `model` itself."""
    network = model.network if isinstance(model, GaussianWeights) else model
    assert isinstance(network, ConvolutionalClassifier)
    return network


def count_parameters(model: nn.Module, image_shape: Sequence[int]) -> int:
    """Counts the trained parameters for images `[H, W, channels]`, without allocating them."""
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
