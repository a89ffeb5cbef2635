"""Evaluation files: whatever is not consistent is refused with one line that names the file."""

import json
import math

import numpy as np
import pytest
from evaluation_files import BOUNDED, record, refusal, settings, store, stored, whole_file

from experiments.settings.errors import ContradictionError, ExperimentError

pytestmark = pytest.mark.quick


@pytest.fixture
def path(tmp_path):
    """The file of a finished cascade."""
    return whole_file(tmp_path)


# --- arrays ---------------------------------------------------------------------------------------

FLAGS = (
    "attacked",
    "correct",
    "resisted_cross_entropy",
    "resisted_margin",
    "interval_run",
    "interval_verified",
    "crown-ibp_run",
    "crown-ibp_verified",
)
INTEGERS = ("index", "labels")
MARGINS = ("interval_margins", "crown-ibp_margins")


def rounded(array):
    return np.where(np.isfinite(array), array, 0).astype(np.int64)


SHAPES = {
    "0-d": lambda array: array[(0,) * array.ndim],
    "empty": lambda array: array[:0],
    "one row less": lambda array: array[:-1],
    "one row more": lambda array: np.concatenate([array, array[-1:]]),
    "leading dimension": lambda array: array[None],
    "trailing dimension": lambda array: array[..., None],
    "flat or square": lambda array: array.reshape(2, -1) if array.ndim == 1 else array.ravel(),
}
TYPES = {
    "complex": lambda array: array.astype(np.complex64),
    "text": lambda array: array.astype(str),
    "bytes": lambda array: array.astype("S8"),
    "objects": lambda array: array.astype(object),
    "dates": lambda array: rounded(array).astype("datetime64[s]"),
    "records": lambda array: array.astype([("value", array.dtype)]),
    "nothing": lambda array: array.astype("V0"),
    "float64": lambda array: array.astype(np.float64),
}
TYPES_OF_FLAGS = {
    "uint8": lambda array: array.astype(np.uint8),
    "int8 of 2": lambda array: 2 * array.astype(np.int8),
}
TYPES_OF_MARGINS = {
    "float16": lambda array: array.astype(np.float16),
    "int64": lambda array: rounded(array),
    "bool": lambda array: rounded(array) > 0,
}


def array_changes():
    for names, more in ((FLAGS, TYPES_OF_FLAGS), (INTEGERS, {}), (MARGINS, TYPES_OF_MARGINS)):
        for name in names:
            yield pytest.param(name, None, id=f"{name}: missing")
            for what, change in (SHAPES | TYPES | more).items():
                yield pytest.param(name, change, id=f"{name}: {what}")


@pytest.mark.parametrize(("name", "change"), tuple(array_changes()))
def test_every_array_has_its_type_and_shape(path, name, change):
    arrays, metadata = stored(path)
    array = arrays.pop(name)
    if change is not None:
        arrays[name] = change(array)
    store(path, arrays, metadata)
    refusal(path, name if change is not None else f"array '{name}' is missing")


# --- values ---------------------------------------------------------------------------------------

VALUES = {}


def values(what, match, error=ExperimentError):
    """Registers a change of arrays (`a`) and metadata (`m`), and what it is refused with."""

    def register(change):
        VALUES[what] = change, match, error
        return change

    return register


def setting(what, match, **changes):
    """Registers a change of arrays to what `changes` gives: (where, value) by name of the array."""

    def change(arrays, metadata):
        del metadata
        for name, (where, value) in changes.items():
            arrays[name.replace("crown", "crown-ibp")][where] = value

    VALUES[what] = change, match, ExperimentError


VERIFIED = "contradicts its margins"
for value in (np.nan, np.inf, -np.inf):
    setting(
        f"margin {value} marked verified",
        rf"interval of example 1 \(1 in all\) {VERIFIED}",
        interval_margins=((1, 0), value),
    )
setting("margins NaN marked verified", VERIFIED, interval_margins=((0, [1, 2]), np.nan))
setting("margin 0 marked verified", VERIFIED, interval_margins=((0, 1), 0.0))
setting("margin -0 marked verified", VERIFIED, interval_margins=((0, 1), -0.0))
setting("verified without margins", rf"example 3 .*{VERIFIED}", interval_verified=(3, True))
setting("margins without verified", rf"example 0 .*{VERIFIED}", interval_verified=(0, False))
setting("all flags of a method set", rf"\(6 in all\) {VERIFIED}", interval_verified=(..., True))
setting("own margin positive", "example 3 .* label", interval_margins=((3, 0), 1.0))
setting("own margin NaN", "example 3 .* label", interval_margins=((3, 0), np.nan))
setting("own margin negative", "example 0 .* label", interval_margins=((0, 0), -1e-30))
setting("labels of others", "label", labels=(0, 1))
setting("label is no class", r"labels .* 0 to 2, got 3", labels=(4, 3))
setting("label is huge", r"labels .* 0 to 2, got 2147483647", labels=(4, 2**31 - 1))
setting("label is negative", r"labels .* got -1", labels=(2, -1))
setting("verified without run", "crown-ibp of example 2", crown_run=(2, False))
setting("margins without run", "crown-ibp of example 3", crown_run=(3, False))
setting("a margin without run", "crown-ibp of example 6", crown_margins=((6, 1), -1.0))
setting("infinite margin without run", "crown-ibp of example 6", crown_margins=((6, 1), np.inf))
setting("index repeats", "index", index=(1, 0))
setting("index is negative", "index", index=(0, -1))
setting("index is outside of the split", "index", index=(7, 8))
setting("index is unsorted", "index", index=([0, 1], [1, 0]))
setting("index wraps around", "index", index=(7, np.iinfo(np.int64).min))


@values("misclassified but verified", r"example 0 .* misclassified", ContradictionError)
def _(a, m):
    a["correct"][0] = a["resisted_margin"][0] = a["resisted_cross_entropy"][0] = False


@values("misclassified but resists", r"resisted_cross_entropy of example 7 .* misclassified")
def _(a, m):
    a["resisted_margin"][7] = a["resisted_cross_entropy"][7] = True


@values("misclassified but resists one loss", r"resisted_margin of example 7 .* misclassified")
def _(a, m):
    a["resisted_margin"][7] = True


@values("verified but broken", r"example 2 .* verified by crown-ibp", ContradictionError)
def _(a, m):
    a["resisted_margin"][2] = False


@values("verified but misclassified and not attacked", r"example 0 ", ContradictionError)
def _(a, m):
    a["correct"][0] = a["attacked"][0] = False


@values("one row taken out of all arrays", r"index .*count")
def _(a, m):
    for name in a:
        a[name] = np.delete(a[name], 3, axis=0)


@values("one example twice in all arrays", "index")
def _(a, m):
    for name in a:
        a[name] = np.concatenate([a[name][:1], a[name]])[:8]


@values("no examples at all", "count must be an integer >= 1, got 0")
def _(a, m):
    m["settings"]["count"] = 0
    for name in a:
        a[name] = a[name][:0]


@values("classes differ between methods", r"crown-ibp_margins")
def _(a, m):
    wider = np.full((8, 4), np.nan, np.float32)
    wider[:, :3] = a["crown-ibp_margins"]
    wider[a["crown-ibp_run"], 3] = 1.0
    a["crown-ibp_margins"] = wider


@values("one class", "margins")
def _(a, m):
    a["labels"][:] = 0
    for name in ("interval", "crown-ibp"):
        a[f"{name}_margins"] = np.where(a[f"{name}_run"], 0, np.nan).astype(np.float32)[:, None]
        a[f"{name}_verified"] = a[f"{name}_run"].copy()
    for name in ("correct", "resisted_margin", "resisted_cross_entropy"):
        a[name][:] = True


@values("no class", "margins")
def _(a, m):
    for name in ("interval", "crown-ibp"):
        a[f"{name}_margins"] = a[f"{name}_margins"][:, :0]
        a[f"{name}_verified"] = np.ones(8, bool)


for _name in ("junk", "interval_bounds", "resisted_best", "_run", "resisted_", "metadata.txt"):

    @values(f"an array {_name}", "unknown|not expected|_verified|resisted")
    def _(a, m, name=_name):
        a[name] = np.zeros(8, bool)


@values("an unknown method", "array 'crown2_run' is of an unknown method, expected one of inter")
def _(a, m):
    for what in ("run", "verified", "margins"):
        a[f"crown2_{what}"] = a[f"crown-ibp_{what}"]


@values("a method without a name", "array '_run' is of an unknown method")
def _(a, m):
    for what in ("run", "verified", "margins"):
        a[f"_{what}"] = a[f"crown-ibp_{what}"]


@values("the attack as a method", "array 'attack_run' is of an unknown method")
def _(a, m):
    for what in ("run", "verified", "margins"):
        a[f"attack_{what}"] = a[f"crown-ibp_{what}"]


# --- metadata -------------------------------------------------------------------------------------

BAD = {
    "null": None,
    "true": True,
    "a number": 1.5,
    "NaN": float("nan"),
    "infinity": float("inf"),
    "text": "x",
    "two lines": "0\n1",
    "a list": [1],
    "an object": {"a": 1},
}
# What is right for a key by chance.
GOOD = {("settings", "clip", "null"), ("settings", "data", "text"), ("settings", "which", "text")}
GOOD |= {
    ("settings", "eps", "a number"),
    ("attack", "name", "text"),
    ("attack", "step_size", "text"),
}
GOOD |= {("part", "device", "text"), ("part", "seconds", "a number")}
NUMBERS = {
    ("settings", "count"): (0, -8, 7, 9, 8.0, 10**400),
    ("settings", "eps"): (-0.03, -1, 10**400),
    ("settings", "norm"): ("1", "Inf", 2, ""),
    ("settings", "split"): ("train", ""),
    ("settings", "clip"): (
        [0.0],
        [1.0, 0.0],
        [0.0, 1.0, 1.0],
        [0.0, 2.0],
        [False, True],
        ["0", "1"],
    ),
    ("settings", "parameters_sha256"): ("0" * 63, "0" * 65, "G" * 64, "0" * 64 + "\n"),
    ("settings", "images_sha256"): ("", "0" * 63),
    ("settings", "data"): ("", "\ud800"),
    ("attack", "losses"): (
        [],
        ["margin"],
        ["cross_entropy", "margin", "margin"],
        ["cross_entropy", "carlini"],
        ["cross_entropy", ["margin"]],
        "margin",
    ),
    ("attack", "steps"): (-1, 3.0),
    ("attack", "restarts"): (0, -1),
    ("attack", "batch_size"): (0,),
    ("attack", "seed"): (0.0, "0"),
    ("part", "seconds"): (-1e-9, "1.5", 10**400),
    ("part", "versions"): ({"jax": 1}, {"": "1"}, {"jax": "0\n1"}),
    ("part", "arithmetic"): ("float", "", "exact"),
    ("part", "dtype"): ("float16", "bfloat16", "f4"),
}


def group_of(metadata, name):
    if name == "attack":
        return metadata["settings"]["attack"]
    return metadata["parts"]["interval"] if name == "part" else metadata["settings"]


def setting_changes():
    metadata = {"settings": settings(), "parts": {"interval": record(**BOUNDED)}}
    for group in ("settings", "attack", "part"):
        for key in group_of(metadata, group):
            yield pytest.param(group, key, (), id=f"{group}.{key}: missing")
            for what, value in BAD.items():
                if (group, key, what) not in GOOD:
                    yield pytest.param(group, key, (value,), id=f"{group}.{key}: {what}")
            for value in NUMBERS.get((group, key), ()):
                shown = repr(value)[:24]
                yield pytest.param(group, key, (value,), id=f"{group}.{key}: {shown}")
        yield pytest.param(group, "unknown", (1,), id=f"{group}: a further key")


@pytest.mark.parametrize(("group", "key", "value"), tuple(setting_changes()))
def test_every_setting_is_checked(path, group, key, value):
    arrays, metadata = stored(path)
    group_of(metadata, group).pop(key, None)
    if value:
        group_of(metadata, group)[key] = value[0]
    store(path, arrays, metadata)
    if value and isinstance(value[0], float) and not math.isfinite(value[0]):
        refusal(path, "metadata: expected JSON, got the number (NaN|Infinity)")
    elif value == (10**400,):
        refusal(path, "metadata: expected integers of 64 bits, got one of 401 digits")
    else:
        # The number of examples, and the losses, are those of the arrays.
        refusal(path, {"count": "count", "losses": "losses"}.get(key, f"{group}.*{key}"))


for _key in ("format", "settings", "parts"):

    @values(f"no {_key}", _key)
    def _(a, m, key=_key):
        del m[key]

    for _what, _value in BAD.items():

        @values(f"{_key} is {_what}", f"{_key}|NaN|Infinity")
        def _(a, m, key=_key, value=_value):
            m[key] = value


for _value in ("1", 1.0, True, 0, -1, [1]):

    @values(f"format {_value!r}", "expected format 1, got .*; delete it")
    def _(a, m, value=_value):
        m["format"] = value


@values("format 2", "expected format 1, got 2, which a newer version wrote; read it with that")
def _(a, m):
    m["format"] = 2
    m["settings"] = "somewhere else"


@values("a further key of the metadata", "unknown|note")
def _(a, m):
    m["note"] = "checked by hand"


@values("no record of the attack", "attack")
def _(a, m):
    del m["parts"]["attack"]


@values("no record of a method that was run", "interval")
def _(a, m):
    del m["parts"]["interval"]


@values("no records", "attack")
def _(a, m):
    m["parts"] = {}


@values("a record of no method", r"keys of parts must be attack or methods, got 'x\\ny'")
def _(a, m):
    m["parts"]["x\ny"] = record(**BOUNDED)


@values("a record of a method that is not there", "lmt")
def _(a, m):
    m["parts"]["lmt"] = record(**BOUNDED)


@values("a method is not there, its record is", "interval")
def _(a, m):
    for what in ("run", "verified", "margins"):
        del a[f"interval_{what}"]


@values("a record that is no object", "interval")
def _(a, m):
    m["parts"]["interval"] = [1]


@values("a method that was run, in no arithmetic", "arithmetic")
def _(a, m):
    del m["parts"]["interval"]["arithmetic"], m["parts"]["interval"]["dtype"]


@values("an attack with an arithmetic", "attack")
def _(a, m):
    m["parts"]["attack"] |= BOUNDED


@pytest.mark.parametrize("what", VALUES)
def test_the_contents_agree_with_each_other(path, what):
    change, match, error = VALUES[what]
    arrays, metadata = stored(path)
    change(arrays, metadata)
    store(path, arrays, metadata)
    refusal(path, match, error)


TEXTS = {
    "no JSON": (np.array("settings"), "metadata: expected JSON, got something else"),
    "empty": (np.array(""), "metadata: expected JSON, got something else"),
    "cut": (np.array('{"format": 1'), "metadata: expected JSON, got something else"),
    "a list": (np.array("[]"), r"metadata: expected a JSON object, got \[\]"),
    "a number": (np.array("1"), "metadata: expected a JSON object, got 1"),
    "null": (np.array("null"), "metadata: expected a JSON object, got None"),
    "bytes": (np.array(b'{"format": 1}'), r"metadata must be one text, got \|S13 \[\]"),
    "a list of texts": (np.array(['{"format": 1}']), r"metadata must be one text, got <U13 \[1\]"),
    "an integer": (np.array(1), r"metadata must be one text, got int64 \[\]"),
    "objects": (np.array({"format": 1}, dtype=object), "'metadata' must hold numbers or text"),
    "deep": (np.array("[" * 100_000 + "]" * 100_000), "metadata: expected JSON, got something"),
    "huge number": (
        np.array('{"format": ' + "1" * 10_000 + "}"),
        "metadata: expected integers of 64 bits, got one of 10000 digits",
    ),
    "huge": (np.array(" " * 2_000_000), "metadata must be at most 1,000,000 .* got 2,000,000"),
    "no characters": (
        np.frombuffer(b"\xff\xff\xff\x7f" * 4, "<U4").reshape(()),
        "metadata: ",
    ),
}


@pytest.mark.parametrize("what", TEXTS)
def test_the_metadata_are_an_object_of_json(path, what):
    arrays, _ = stored(path)
    text, match = TEXTS[what]
    store(path, arrays, text)
    refusal(path, match)


@pytest.mark.parametrize("key", ["eps", "count"])
def test_no_key_of_the_metadata_stands_twice(path, key):
    arrays, metadata = stored(path)
    text = json.dumps(metadata)
    assert text.count(f'"{key}": ') == 1
    doubled = text.replace(f'"{key}": ', f'"{key}": 0, "{key}": ')
    store(path, arrays, np.array(doubled))
    refusal(path, f"metadata: expected every key once, got '{key}' twice")
