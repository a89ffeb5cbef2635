"""Architectures of the papers by name, with parameter counts for 28x28x1 images, 10 classes.

REG: "Improved Training of Certifiably Robust Models" (ICLR 2020 submission); LLM: "Loss Landscape
Matters", published as "Towards Better Understanding of Training Certifiably Robust Models against
Adversarial Examples" (Lee et al. 2021); CAP: Wong & Kolter 2018; CROWN-IBP: Zhang et al. 2020; BCP:
Lee et al. 2020; FAST: Shi et al. 2021.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from experiments.config import ModelConfig
from experiments.errors import ExperimentError
from experiments.models.convnet import Block, ConvolutionalClassifier
from experiments.models.convnet import Convolution as C

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

MODELS: dict[str, dict[str, Any]] = {
    # For 8x8 images and two CPU cores; ours, from no paper: 19,242 parameters there.
    "tiny": {"convolutions": (C(8, 3, 1, 1), C(16, 4, 2, 1)), "hidden": (64,)},
    # REG: 89,610
    "mlp_2x100": {"hidden": (100, 100)},
    # Small* of LLM, "Small" of REG and CAP: 166,406
    "small_star": {"convolutions": (C(16, 4, 2, 1), C(32, 4, 2, 1)), "hidden": (100,)},
    # Small of LLM and CROWN-IBP: 550,406
    "small": {"convolutions": (C(16, 4, 2, 1), C(32, 4, 1, 1)), "hidden": (100,)},
    # Medium of LLM, 4C3F of BCP: 1,974,762
    "medium": {"convolutions": _MEDIUM, "hidden": (512, 512)},
    # Large of LLM, dm-large of CROWN-IBP: 13,257,290
    "large": {"convolutions": _LARGE, "hidden": (512,)},
    # CNN-7 of FAST and CTBench, Large with batch normalisation: 13,259,338
    "cnn7": {"convolutions": _LARGE, "hidden": (512,), "batch_norm": True},
    # Families A and B of CROWN-IBP: 52,182 and 205,730
    "family_a": {"convolutions": (C(4, 4, 2, 1), C(8, 4, 2, 1)), "hidden": (128,)},
    "family_b": {"convolutions": (C(8, 4, 2, 1), C(16, 4, 2, 1)), "hidden": (256,)},
    # 6C2F of BCP, for CIFAR-10: 2,250,378 parameters there
    "6c2f": {"convolutions": _SIX, "hidden": (512,)},
    # 8C2F of BCP, for 64x64x3 images of 200 classes: 4,342,984 there
    "8c2f": {"convolutions": _EIGHT, "hidden": (256,), "num_classes": 200},
    # "WRN" of BCP, the residual network of CAP, for CIFAR-10: 4,214,850 there
    "wrn": {
        "convolutions": (C(16, 3, 1, 1),),
        "blocks": (Block(16), Block(16), Block(32, halve=True), Block(64, halve=True)),
        "hidden": (1000,),
    },
}


def create(name: str, **overrides: Any) -> ConvolutionalClassifier:
    """The unbound Linen module called `name`.

    Args:
      name: a key of `MODELS`.
      **overrides: fields of `ConvolutionalClassifier` to replace, e.g. `num_classes=100`.

    Raises:
      ExperimentError: for an unknown name.
    """
    if name not in MODELS:
        raise ExperimentError(f"unknown model {name!r}: use one of {', '.join(sorted(MODELS))}")
    return ConvolutionalClassifier(**{**MODELS[name], **overrides})


def from_config(config: ModelConfig) -> ConvolutionalClassifier:
    """The unbound module of a run's configuration.

    Raises:
      ExperimentError: for an unknown name.
    """
    return create(
        config.name,
        mean=config.mean or None,
        std=config.std or None,
        convolution_init=config.init,
    )


def count_parameters(model: ConvolutionalClassifier, image_shape: Sequence[int]) -> int:
    """Number of trained parameters for images `[H, W, channels]`; nothing is allocated."""
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
