"""Evaluation files that are right, in every state that some version of the format has written."""

import numpy as np
import pytest
from evaluation_files import (
    LABELS,
    LOSSES,
    evaluation,
    record,
    refusal,
    settings,
    store,
    stored,
    whole_file,
)

from experiments.evaluation import certificates, shards
from experiments.settings.errors import ExperimentError


@pytest.fixture
def path(tmp_path):
    """The file of a finished cascade."""
    return whole_file(tmp_path)


def assert_same(one, other):
    assert one.metadata == other.metadata
    assert one._fields == other._fields
    for left, right in zip(one[1:], other[1:], strict=True):
        left, right = (
            dict(enumerate([x])) if isinstance(x, np.ndarray) else x for x in (left, right)
        )
        assert list(left) == list(right)
        for name, array in left.items():
            np.testing.assert_array_equal(array, right[name])
            assert array.dtype == right[name].dtype
            assert array.flags.writeable  # an evaluation goes on in place


def test_what_is_written_is_read(path):
    result = certificates.read(path)
    assert_same(result, evaluation())
    assert result.errors() == {
        "standard_error": 1 / 8,
        "pgd_error": 3 / 8,
        "verified_error": 5 / 8,
        "verified_error_by": {"interval": 6 / 8, "crown-ibp": None},
    }


def nothing():
    """Written before anything is computed, by several processes."""
    return certificates.empty(LABELS, LOSSES, settings())


def clean():
    """The clean pass is done; nothing is attacked that is correct."""
    result = nothing()
    result.record_clean_pass(np.arange(8) < 7)
    result.parts["attack"] = record()
    return result


def first_version():
    """The first version did the clean pass batch by batch, with the attack."""
    result = clean()
    result.correct[4:] = result.attacked[4:] = False
    result.attacked[:4] = result.resisted_by["margin"][:4] = True
    return result


def other_packages():
    """The attack began anew with other packages; what it said of the others before is there."""
    result = clean()
    result.attacked[:3] = True
    result.resisted_by["margin"][:] = result.resisted_by["cross_entropy"][:] = result.correct
    return result


def cascade_without_examples():
    """A cascade had no example for its second method, which has arrays but no record."""
    result = evaluation()
    result.add_method("crown-ibp", classes=3)
    del result.parts["crown-ibp"]
    return result


def no_versions():
    """Python says null of a package whose metadata are damaged."""
    result = evaluation()
    result.parts["interval"]["versions"]["orbax-checkpoint"] = None
    return result


def not_clipped():
    result = evaluation()
    result.metadata["settings"] |= {"clip": None, "norm": "2", "split": "validation", "eps": 0}
    return result


@pytest.mark.parametrize(
    "state",
    [
        nothing,
        clean,
        first_version,
        other_packages,
        cascade_without_examples,
        no_versions,
        not_clipped,
    ],
)
def test_every_state_that_is_written_is_read(tmp_path, state):
    path = tmp_path / "state.npz"
    certificates.write(path, state())
    result = certificates.read(path)
    assert_same(result, state())
    if not result.attacked.all():
        with pytest.raises(ExperimentError, match="of 8 images are evaluated"):
            result.errors()


def test_other_machines_and_orders_make_no_difference(path):
    arrays, metadata = stored(path)
    changed = {name: arrays[name] for name in reversed(arrays) if "crown" not in name}
    changed |= {name: array for name, array in arrays.items() if "crown" in name}
    for name, array in changed.items():
        changed[name] = np.asfortranarray(array.astype(array.dtype.newbyteorder(">")))
    changed["labels"] = changed["labels"].astype(np.uint8)
    store(path, changed, metadata)
    result = certificates.read(path)
    assert_same(result._replace(labels=LABELS.copy()), evaluation())
    assert list(result.resisted_by) == list(LOSSES)  # their order decides about random starts


def test_a_part_is_read_as_a_part_only(path):
    rows = np.array([1, 2, 6])
    part = shards.select(evaluation(), rows)
    certificates.write(path, part)
    assert_same(certificates.read(path, part=True), part)
    refusal(path, r"index must be int \[8\], for settings.count 8, got int64 \[3\]")
    for index in ([1, 2, 8], [1, 1, 6], [2, 1, 6], [-1, 2, 6]):
        certificates.write(path, part._replace(index=np.array(index)))
        refusal(path, "index must be 0 to 7 in order, with gaps", part=True)
    certificates.write(path, shards.select(evaluation(), rows[:0]))
    refusal(path, "index must be int", part=True)
    certificates.write(path, part._replace(labels=part.labels[:2]))
    refusal(path, r"labels must be int \[3\], got int32 \[2\]", part=True)
    certificates.write(path, evaluation())
    assert_same(certificates.read(path, part=True), evaluation())


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "whole.npz"
    with pytest.raises(ExperimentError, match=r"whole\.npz cannot be written") as caught:
        certificates.write(path, evaluation())
    assert str(caught.value).startswith(str(path))
