"""What tests of the data sets share: small ones, JPEG files, and errors of one line."""

import dataclasses
import io

import numpy as np
import pytest

from experiments import data
from experiments.settings.config import DataConfig
from experiments.settings.errors import ExperimentError


def shrink(monkeypatch, name, **facts):
    """Changes facts of a data set for the test: how many images it has, or classes."""
    monkeypatch.setitem(data.DATASETS, name, dataclasses.replace(data.DATASETS[name], **facts))


def jpeg(pixels: np.ndarray) -> bytes:
    """An image as the content of a JPEG file."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95)
    return file.getvalue()


def assert_refused(name, path, message):
    """Loading the data set at `path` is an error of one line, which names it and has `message`."""
    with pytest.raises(ExperimentError, match=message) as caught:
        data.load(DataConfig(name=name, dir=str(path)))
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
