"""Verdicts on functions with known answers and on files, and verdicts that must never occur."""

from typing import ClassVar

import jax
import numpy as np
import pytest
from jax import nn
from jax import numpy as jnp
from properties import box, hat

from boundjax import UnsupportedOpError, verify, vnnlib
from boundjax.search import boxes
from boundjax.search.programs import Programs
from boundjax.search.rows import proved_values
from boundjax.verify import __main__ as command
from boundjax.verify import instances, messages, worker


def decide(function, property, **options):
    options = {"method": "crown", "timeout": 60.0} | options
    return verify.verify(function, property, **options)


def check(result, function, property, shape=(-1,)):
    """Checks a counterexample against the definition, in float64."""
    assert result.verdict == "sat"
    x, y = result.counterexample.inputs, result.counterexample.outputs
    assert x.dtype == np.float32
    np.testing.assert_array_equal(y, np.asarray(function(jnp.asarray(x).reshape(shape))).ravel())
    assert any(
        ((case.lower <= x) & (x <= case.upper)).all()
        and any((c.weights @ y.astype(float) + c.offset <= 0).all() for c in case.conjunctions)
        for case in property.cases
    )


SQUARE = [(-1, 1), (-1, 1)]


@pytest.fixture(scope="module")
def compiled():
    return verify.Programs(hat, (2,))


@pytest.mark.parametrize(
    ("unsafe", "verdict"),
    [
        ("(>= Y_0 2.1)", "unsat"),
        ("(>= Y_0 1.9)", "sat"),
        ("(<= Y_0 -0.01)", "unsat"),
        ("(and (>= Y_0 1.9) (<= Y_1 -0.8))", "sat"),
        # Either condition alone is possible, both together are not; proving that needs splits.
        ("(and (>= Y_0 1.5) (<= Y_1 -1.1))", "unsat"),
        ("(and (<= Y_0 0.5) (>= Y_1 0.6))", "unsat"),
        ("(or (>= Y_0 2.1) (>= Y_1 1.1) (<= Y_1 -1.1))", "unsat"),
        ("(or (>= Y_0 2.1) (>= Y_1 1.1) (<= Y_1 -0.9))", "sat"),
    ],
)
@pytest.mark.sampled(4)
def test_known_answers(compiled, unsafe, verdict):
    property = box(SQUARE, 2, unsafe)
    result = decide(hat, property, programs=compiled)
    assert result.verdict == verdict
    assert 0 < result.seconds < 60
    if verdict == "sat":
        check(result, hat, property)
    else:
        assert result.counterexample is None


def test_a_tie_is_unsafe():
    result = decide(lambda x: x - 1.0, box([(0, 1)], 1, "(>= Y_0 0)"))
    check(result, lambda x: x - 1.0, box([(0, 1)], 1, "(>= Y_0 0)"))
    np.testing.assert_array_equal(result.counterexample.inputs, np.ones(1, np.float32))


def test_what_float32_cannot_tell_is_not_proved():
    """The least value lies above the threshold by less than rounding errors may be."""
    property = box([(-1, 1)], 1, "(<= Y_0 0.9999999)")
    assert decide(lambda x: x * x + 1.0, property, timeout=1.0).verdict in ("unknown", "timeout")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("inputs", [2, 30])
def test_a_network_that_is_not_finite_is_never_proved(bad, inputs):
    property = box([(-1, 1)] * inputs, 1, "(or (<= Y_0 -9999) (>= Y_0 9999))")
    function = lambda x: jnp.sum(nn.relu(x), keepdims=True) + jnp.float32(bad)  # noqa: E731
    result = decide(function, property, method="crown-ibp", timeout=1.0 if np.isnan(bad) else 60.0)
    # An infinite output is larger than any number: only then is there a counterexample.
    assert result.verdict in (("unknown", "timeout") if np.isnan(bad) else ("sat",))


def test_several_boxes_must_all_be_refuted():
    text = """(declare-const X_0 Real)(declare-const X_1 Real)
      (declare-const Y_0 Real)(declare-const Y_1 Real)
      (assert (>= X_1 -1))(assert (<= X_1 1))
      (assert (or (and (>= X_0 -1) (<= X_0 0) (>= Y_0 {})) (and (>= X_0 0) (<= X_0 2) (>= Y_0 {}))
                  (and (>= X_0 0) (<= X_0 2) (<= Y_0 -1) (<= Y_1 0))))"""
    programs = verify.Programs(hat, (2,))
    for thresholds, verdict in (((2.1, 3.1), "unsat"), ((2.1, 2.9), "sat"), ((1.9, 3.1), "sat")):
        property = vnnlib.parse(text.format(*thresholds))
        assert len(property.cases) == 2
        result = decide(hat, property, programs=programs)
        assert result.verdict == verdict
        if verdict == "sat":
            check(result, hat, property)


def test_fixed_inputs_and_an_input_that_is_no_float32():
    ends = [(0.1, 0.1), (-1, 1), *[(2, 2)] * 30]  # more inputs than verify ever splits

    def function(x):
        return jnp.stack([nn.relu(x[1]) - nn.relu(-x[1]) + jnp.sum(x[2:]), x[0]])

    programs = verify.Programs(function, (32,))
    proved = decide(function, box(ends, 2, "(>= Y_0 61.1)"), programs=programs)
    assert proved.verdict == "unsat"
    property = box(ends, 2, "(and (>= Y_0 60.9) (<= Y_1 0.11))")
    result = decide(function, property, programs=programs)
    check(result, function, property)
    assert result.counterexample.inputs[0] == np.float32(0.1)


def test_many_inputs_go_through_the_methods():
    """No splitting: CROWN proves what cheaper bounds cannot, but not the last property."""

    def function(x):
        both = nn.relu(jnp.sum(x)), nn.relu(-jnp.sum(x))
        return jnp.stack([nn.relu(both[0] - both[1]) - nn.relu(both[1] - both[0]) - jnp.sum(x)])

    programs = verify.Programs(function, (5, 5))
    for unsafe, method, verdict in (
        ("(>= Y_0 200)", "interval", "unsat"),
        ("(>= Y_0 40)", "interval", "unknown"),
        ("(>= Y_0 40)", "alpha-crown", "unsat"),
        ("(>= Y_0 0.5)", "crown", "unknown"),
    ):
        property = box([(-1, 1)] * 25, 1, unsafe)
        result = decide(function, property, method=method, programs=programs)
        assert result.verdict == verdict, (unsafe, method)


def test_the_arbiter_has_the_last_word():
    """A point is `sat` only if the other runtime confirms it, wherever it came from."""
    seen = []

    def evaluate(x):
        seen.append(x)
        return np.asarray(hat(jnp.asarray(x))) * np.float32(0.5)

    property = box([(-1, 0.1), (-1, 0.1)], 2, "(>= Y_0 1.9)")
    result = decide(hat, property, evaluate=evaluate, timeout=2.0)
    assert result.verdict in ("unknown", "timeout")
    case = property.cases[0]
    assert seen
    for x in seen:
        assert x.dtype == np.float32
        assert ((case.inner_lower <= x) & (x <= case.inner_upper)).all()


def test_rounding_that_shows_itself_proves_nothing():
    """A lower bound above an attained value of the row is wrong and proves nothing."""
    weights, offset, outputs = np.ones((1, 1)), np.zeros(1), np.array([1.0])
    for lower, expected in ((0.5, 0.5), (1.1, -np.inf), (-0.5, -0.5), (np.nan, -np.inf)):
        proved = proved_values(np.array([lower]), weights, offset, outputs)
        assert proved.tolist() == [expected]
    assert proved_values(np.array([np.inf]), weights, offset, np.array([np.inf])) == -np.inf
    assert proved_values(np.array([1.0]), weights, offset, np.array([np.nan])) == -np.inf


def test_halves_cover_the_box():
    lower = np.array([[0.0, 0.0], [1.0, 0.0], [5.0, 5.0]], np.float32)
    upper = np.array([[1.0, 8.0], [np.nextafter(np.float32(1), np.float32(2)), 8.0], [5.0, 5.0]])
    influence = np.array([[2.0, 1.0], [9.0, np.nan], [1.0, 1.0]], np.float32)
    width = np.full_like(lower, 8.0)
    (first, second), stuck = boxes.halve(lower, upper.astype(np.float32), influence, width)
    assert stuck.tolist() == [False, False, True]
    assert first[1].tolist() == [[0.5, 8.0], [float(upper[1, 0]), 4.0]]
    assert second[0].tolist() == [[0.5, 0.0], [1.0, 4.0]]
    np.testing.assert_array_equal(first[0], lower[:2])
    np.testing.assert_array_equal(second[1], upper[:2])


def test_time_runs_out():
    property = box([(-1, 1)] * 6, 1, "(>= Y_0 0.0001)")
    function = lambda x: jnp.sum(jnp.tanh(x) - jnp.tanh(x + 0.0), keepdims=True)  # noqa: E731
    assert decide(function, property, timeout=0.5).verdict == "timeout"


def test_what_will_not_compile_in_time_is_not_begun():
    # Intervals treat the two terms as independent; only linear bounds prove their sum.
    function = lambda x: 1.0 + nn.relu(x) - 0.5 * nn.relu(2.0 * x)  # noqa: E731
    property = box([(0, 1)], 1, "(<= Y_0 0.5)")
    programs = Programs(function, (1,))
    programs.first_call["interval"] = 1e6
    options = {"programs": programs, "max_split_inputs": 0}
    assert decide(function, property, **options).verdict == "timeout"
    programs.first_call["interval"] = 0.1
    assert decide(function, property, **options).verdict == "unsat"
    assert set(programs.first_call) >= {"interval", "crown-ibp"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"method": "crwn"},
            "method must be one of interval, crown-ibp, crown, alpha-crown, complete, got",
        ),
        ({"timeout": 0.0}, "timeout must be positive, in seconds, got 0.0"),
        ({"timeout": float("nan")}, "timeout must be positive"),
        ({"input_shape": (2,)}, "the model has 2 inputs, but the property declares 3"),
        ({}, "the model has 1 outputs, but the property declares 2"),
    ],
)
def test_bad_requests(options, message):
    with pytest.raises(ValueError, match=message):
        decide(lambda x: x[:1], box([(0, 1)] * 3, 2, "(<= Y_0 0)"), **options)


def test_an_unsupported_op_is_named_after_the_attack():
    def function(x):
        return jax.lax.reduce_precision(x, 8, 7)

    answer = decide(function, box(SQUARE, 2, "(<= Y_0 0)"))
    assert answer.verdict == "sat"
    with pytest.raises(UnsupportedOpError, match="reduce_precision"):
        decide(function, box(SQUARE, 2, "(<= Y_0 -2)"))


class FakeNetwork:
    """A stand-in for an imported ONNX file; its name determines what happens."""

    opened: ClassVar[list[str]] = []

    def __init__(self, path, rounding, max_bytes):
        if path.name == "bad.onnx":
            raise UnsupportedOpError("op 'f' is not supported:\n use another")
        self.opened.append((path.name, rounding))

    def verify(self, property, method, timeout, with_proof=False, max_queue_bytes=0, counts=True):
        if timeout > 5:
            raise TypeError("not a number")
        return verify.Result("sat" if timeout <= 1.0 else "unsat", None, 0.0, "no gradient")


def test_a_worker_answers_every_request(tmp_path, capsys):
    (tmp_path / "p.vnnlib").write_text(
        "(declare-const X_0 Real)(declare-const Y_0 Real)(assert (and (<= 0 X_0) (<= X_0 1)))"
        "(assert (<= Y_0 0))"
    )
    (tmp_path / "broken.vnnlib").write_text("(assert")
    stages = []
    decider = worker.Decider(FakeNetwork, stages.append)

    def ask(network, property, seconds, rounding="float32"):
        files = str(tmp_path / network), str(tmp_path / property)
        return decider.answer(messages.Request(*files, "crown", rounding, seconds))

    assert ask("a.onnx", "p.vnnlib", 1.0) == messages.Answer("sat", "no gradient", "sat\n")
    broken = ask("a.onnx", "broken.vnnlib", 1.0)
    assert broken.verdict == "error"
    assert "broken.vnnlib:1: expected" in broken.message
    assert ask("a.onnx", "p.vnnlib", 2.0).verdict == "unsat"
    assert ask("bad.onnx", "p.vnnlib", 3.0) == messages.Answer(
        "unsupported", "op 'f' is not supported: use another"
    )
    assert ask("a.onnx", "none.vnnlib", 3.0).verdict == "error"
    assert ask("a.onnx", "p.vnnlib", 0.0).verdict == "timeout"
    assert ask("a.onnx", "p.vnnlib", 3.0, "real").verdict == "unsat"
    assert capsys.readouterr().err == ""
    assert ask("a.onnx", "p.vnnlib", 9.0, "real") == messages.Answer("error", "not a number")
    assert "TypeError" in capsys.readouterr().err  # a mistake in the code has a traceback
    # Once per run of requests that share it; a network that cannot be read replaces the last.
    read = [("a.onnx", "float32"), ("a.onnx", "float32"), ("a.onnx", "real")]
    assert FakeNetwork.opened == read
    assert [s.text for s in stages].count("reading") == len(read) + 1


def test_instances_without_a_header_and_with_compressed_files(tmp_path):
    (tmp_path / "a.vnnlib.gz").touch()
    listed = tmp_path / "instances.csv"
    listed.write_text("n.onnx,a.vnnlib,116\n\nn.onnx,b.vnnlib,\n")
    listing = instances.read_instances(listed, None)
    assert [i.vnnlib.name for i in listing] == ["a.vnnlib.gz", "b.vnnlib"]
    assert [i.timeout for i in listing] == [116.0, 60.0]
    assert [i.timeout for i in instances.read_instances(listed, 5.0)] == [5.0, 5.0]
    assert [i.known_result for i in listing] == [None, None]


def test_a_result_in_the_format_of_vnncomp():
    point = verify.Counterexample(np.float32([0.1, -2]), np.float32([3]))
    assert worker.result_text(verify.Result("sat", point, 1.0)) == (
        "sat\n((X_0 0.10000000149011612)\n(X_1 -2.0)\n(Y_0 3.0))\n"
    )
    assert worker.result_text(verify.Result("unsat", None, 1.0)) == "unsat\n"


@pytest.mark.parametrize(
    ("arguments", "piece"),
    [
        ([], "expected either --onnx with --vnnlib, or --instances"),
        (["--onnx", "a.onnx"], "expected either"),
        (["--onnx", "a", "--instances", "b"], "expected either"),
        (["--instances", "none.csv"], "No such file"),
        (["--instances", "none.csv", "--timeout", "-1"], "--timeout: expected a positive number"),
        (["--instances", "none.csv", "--timeout", "soon"], "got 'soon'"),
        (["--onnx", "none.onnx", "--vnnlib", "a.vnnlib"], "none.onnx"),
        (["--instances", "none.csv", "--results", "no/folder/r.csv"], "expected a folder"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, piece, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert piece in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "piece"),
    [
        ("", "expected rows"),
        ("a.onnx\n", "instances.csv:1: expected onnx,vnnlib,timeout"),
        ("onnx,vnnlib,timeout\na.onnx,b.vnnlib,x\n", "instances.csv:2: timeout"),
    ],
)
def test_bad_lists_of_instances(text, piece, tmp_path, capsys):
    listed = tmp_path / "instances.csv"
    listed.write_text(text)
    assert command.main(["--instances", str(listed)]) == 2
    assert piece in capsys.readouterr().err


def test_the_command_on_a_benchmark(shared, capsys, tmp_path):
    pytest.importorskip("onnxruntime")
    folder = shared / "suites" / "public" / "smoke"
    if not folder.is_dir():
        pytest.skip("no suites/public/smoke/ in the shared folder")
    assert command.main(["--instances", str(folder / "instances.csv"), "--timeout", "60"]) == 0
    printed = capsys.readouterr().out
    assert "agreed      3" in printed
    assert "WRONG       0" in printed

    # Our own property on one of its networks; every output is unsafe, since Y_0 < 100 everywhere.
    (tmp_path / "p.vnnlib").write_text(
        "(declare-const X_0 Real)(declare-const Y_0 Real)"
        "(assert (and (>= X_0 -1) (<= X_0 1)))(assert (<= Y_0 100))"
    )
    files = ["--onnx", str(folder / "test_tiny.onnx"), "--vnnlib", str(tmp_path / "p.vnnlib")]
    assert command.main([*files, "--results", str(tmp_path / "result.txt")]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("sat\n((X_0 ")
    assert (tmp_path / "result.txt").read_text() == printed


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.sampled(6)
def test_rounding_of_values_that_cancel_is_no_proof(seed):
    """Hidden values near 1e4 cancel in the output, whose true minimum is just below 0."""
    rng = np.random.default_rng(seed)
    first = rng.uniform(0.1, 1.0, size=(30, 64)).astype(np.float32)
    second = rng.normal(size=64)
    second = (second - second.mean()).astype(np.float32)
    lower, upper = (float(np.float32(end)) for end in (0.4, 0.6))
    # All units are active, so the function is linear and its minimum is known.
    slopes = first.astype(np.float64) @ second.astype(np.float64)
    least = 1e4 * second.astype(np.float64).sum()
    least += np.where(slopes > 0, slopes * lower, slopes * upper).sum()

    def model(x):
        return (nn.relu(x @ first + np.float32(1e4)) @ second)[None]

    asked = box([(lower, upper)] * 30, 1, f"(<= Y_0 {least + 1e-6:.12f})")
    assert verify.verify(model, asked, method="crown", timeout=60).verdict != "unsat"


def test_a_counterexample_satisfies_the_property_exactly():
    """The output is 1, which float64 cannot distinguish from the threshold."""
    function = lambda x: nn.relu(x) + 1.0  # noqa: E731
    for digits, verdict in (("0." + "9" * 20, ("unknown", "timeout")), ("1." + "0" * 20, ("sat",))):
        property = box([(-2, -1)], 1, f"(<= Y_0 {digits})")
        assert decide(function, property, method="interval", timeout=1.0).verdict in verdict


@jax.custom_jvp
def without_gradient(x):
    """`relu`."""
    return nn.relu(x)


@without_gradient.defjvp
def _(primals, tangents):
    raise NotImplementedError("no derivative\nis written")


def test_an_attack_that_fails_costs_no_verdict():
    """A model without a gradient is still bounded, and points are still evaluated."""

    def function(x):
        return jnp.sum(without_gradient(x), keepdims=True)

    for ends, threshold, verdict in (
        ([(-1, 1)] * 2, "2.1", "unsat"),
        ([(-1, 1)] * 2, "1.9", "sat"),
        ([(-1, 1)] * 30, "31", "unsat"),
        ([(-1, 1)] * 30, "9", "sat"),
    ):
        property = box(ends, 1, f"(>= Y_0 {threshold})")
        result = decide(function, property)
        assert result.verdict == verdict, (len(ends), threshold)
        assert result.note == (
            "points were looked at but not moved: the attack by gradients failed "
            "(NotImplementedError: no derivative is written)"
        )
        if verdict == "sat":
            check(result, function, property)
    assert decide(hat, box(SQUARE, 2, "(>= Y_0 2.1)")).note == ""


def test_an_attack_that_fails_once_is_not_tried_again(monkeypatch):
    programs = Programs(hat, (2,))

    def fail(*arrays):  # of the class: the programs are its first argument
        calls.append(arrays)
        raise ValueError("far too long " * 100)

    calls = []
    monkeypatch.setattr(Programs, "attack", fail)
    monkeypatch.setattr(Programs, "look", fail)
    result = decide(hat, box(SQUARE, 2, "(>= Y_0 2.1)"), programs=programs)
    assert result.verdict == "unsat"
    assert len(calls) == 2
    assert result.note.startswith(
        "no point was attacked: evaluating the model failed (ValueError: "
    )
    assert len(result.note) < 400
    # Sub-boxes are searched all the same.
    assert decide(hat, box(SQUARE, 2, "(>= Y_0 1.9)"), programs=programs).verdict == "sat"
    assert len(calls) == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_what_ends_a_program_ends_an_attack(error, monkeypatch):
    programs = Programs(hat, (2,))

    def fail(*arrays):
        raise error

    monkeypatch.setattr(Programs, "attack", fail)
    with pytest.raises(error):
        decide(hat, box(SQUARE, 2, "(>= Y_0 2.1)"), programs=programs)
