"""Searches with too little memory, too little time, or input that nobody should trust."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import nn

import boundjax as bj
from boundjax import check_tree, properties
from boundjax.search import Programs
from boundjax.search.domain_bounds import Parameters
from boundjax.search.inputs import InputSplits
from boundjax.sets.box import Box
from boundjax.verify import __main__ as command
from boundjax.verify import messages, worker

# One worker compiles the programs once.
pytestmark = pytest.mark.xdist_group("search_limits")

BOTH = pytest.mark.parametrize("inputs", [0, 20], ids=["units are split", "the box is split"])
INPUTS = 4
BOX = bj.Box(-jnp.ones(INPUTS), jnp.ones(INPUTS))
HOPELESS = 1e-7  # what float32 cannot tell from 0


def random_mlp(seed, *sizes, bad=0.0):
    random = np.random.default_rng(seed)
    layers = [
        (random.normal(size=shape) / shape[0] ** 0.5, 0.3 * random.normal(size=shape[1]))
        for shape in itertools.pairwise(sizes)
    ]
    layers = [tuple(jnp.asarray(array, jnp.float32) for array in layer) for layer in layers]

    def function(x):
        for kernel, bias in layers[:-1]:
            x = nn.relu(x @ kernel + bias)
        kernel, bias = layers[-1]
        return x @ kernel + bias + jnp.float32(bad)

    return function


def least_of(function, inputs, row):
    optimum = bj.milp_optimum(function, bj.Box(-jnp.ones(inputs), jnp.ones(inputs)), row)
    assert optimum.status == "optimal"
    return optimum.lower


@pytest.fixture(scope="module")
def network():
    return random_mlp(7, INPUTS, 8, 8, 2)


@pytest.fixture(scope="module")
def programs(network):
    return Programs(network, (INPUTS,), devices=jax.local_devices())


@pytest.fixture(scope="module")
def least(network):
    return np.array([least_of(network, INPUTS, row) for row in np.eye(2)])


@BOTH
def test_a_full_queue_ends_the_search_and_keeps_what_is_proved(inputs, network, programs, least):
    """The first output is far from its threshold, the second one is not."""
    rows = properties.all_positive(np.eye(2), np.array([99.0, 1e-4]) - least)
    options = {"programs": programs, "max_split_inputs": inputs}
    result = bj.prove(network, BOX, rows, max_queue_bytes=1, **options)
    assert result.verdict == "unknown"
    parts = "boxes" if inputs else "domains"
    assert f"open {parts} take " in result.note
    assert "max_queue_bytes=1: allow more (--max-queue-bytes of the command)" in result.note
    assert "\n" not in result.note
    assert 0 < result.margins[0] <= 99.0
    assert not result.margins[1] > 0
    assert result.proof is None
    # The same programs go on when there is more.
    assert bj.prove(network, BOX, rows, **options).verdict == "unsat"


@BOTH
def test_what_splits_have_proved_is_kept(inputs, network, programs, least):
    """A queue that suffices to split for the first output, but not for the second one."""
    rows = properties.all_positive(np.eye(2), np.array([0.3, HOPELESS]) - least)
    options = {"programs": programs, "timeout": 120.0}
    alone = properties.all_positive(np.eye(2)[:1], 0.3 - least[0])
    crown = bj.prove(network, BOX, alone, method="crown", max_split_inputs=0, **options)
    assert crown.verdict == "unknown"
    limit = 30_000 if inputs else 450  # two domains and a bit
    options |= {"max_split_inputs": inputs, "max_queue_bytes": limit}
    result = bj.prove(network, BOX, rows, **options)
    assert result.verdict == "unknown"
    assert f"max_queue_bytes={limit}: allow more" in result.note
    assert 0 < result.margins[0] <= 0.3 + 1e-5
    assert not result.margins[1] > 0


def test_a_call_keeps_to_its_memory(optimized):
    """The compiler's account of the largest programs, with their arguments and results."""
    function = random_mlp(0, 20, 128, 128, 10)
    for max_bytes, size in ((2**17, 4), (2**22, 128)):
        programs = Programs(function, (20,), max_bytes=max_bytes)
        domains = programs.domains
        assert domains.sizes == (min(size, 16), size)
        box = Box(-jnp.ones(20), jnp.ones(20))
        root = domains.root(*box.interval(), jnp.zeros((1, 10)), domains.unknown)
        signs = jnp.zeros((size, domains.units), jnp.int8)
        positions = jnp.tile(root.positions, (size, 1))
        multipliers = jnp.zeros((size, domains.units))
        parameters = Parameters(positions, multipliers, jnp.ones((size, 1)))
        shared = box, root.intervals, signs
        state = domains.begin(parameters)
        rows = jnp.zeros((size, 10))
        for lowered in (
            domains.step.lower(*shared, rows[:, None], jnp.zeros((size, 1)), state),
            domains.evaluate.lower(*shared, rows, parameters),
        ):
            memory = lowered.compile().memory_analysis()
            total = memory.temp_size_in_bytes + memory.argument_size_in_bytes
            assert total + memory.output_size_in_bytes <= max_bytes


@BOTH
def test_the_smallest_batches_find_the_same(inputs, network, least):
    programs = Programs(network, (INPUTS,), max_bytes=1)
    assert programs.domains.sizes == (1, 1)
    for offset, verdict in ((1e-3, "unsat"), (-1e-3, "sat")):
        rows = properties.all_positive(np.eye(2)[:1], offset - least[0])
        result = bj.prove(network, BOX, rows, programs=programs, max_split_inputs=inputs)
        assert result.verdict == verdict


@BOTH
@pytest.mark.slow
def test_ten_thousand_parts(inputs, tmp_path, optimized):
    """They are all bounded, and a row that nobody can decide is not proved in their shadow."""
    function = random_mlp(0, 8, 16, 16, 1)
    box = bj.Box(-jnp.ones(8), jnp.ones(8))
    least = least_of(function, 8, np.eye(1)[0])
    programs = Programs(function, (8,), devices=jax.local_devices())
    options = {"programs": programs, "max_split_inputs": inputs, "timeout": 200.0}
    offset = 0.4 if inputs else 1e-3
    rows = properties.all_positive(np.eye(1), offset - least)
    result = bj.prove(function, box, rows, with_proof=True, **options)
    assert result.verdict == "unsat"
    assert 0 < result.margins[0] <= offset + 1e-5
    (case,) = result.proof.cases
    nodes = len(list(case.recorder.walk(case.roots[0], 0)))
    assert nodes > 10_000
    bj.export_weights(jax.vmap(function), np.zeros((1, 8), np.float32), tmp_path / "w.npz")
    bj.save_proof(tmp_path / "p.npz", result.proof, tmp_path / "w.npz")
    files = [str(tmp_path / "p.npz"), "--weights", str(tmp_path / "w.npz")]
    assert check_tree.main(files) == 0
    rows = properties.all_positive(np.eye(1), HOPELESS - least)
    options["timeout"] = 10.0
    assert bj.prove(function, box, rows, **options).verdict in ("unknown", "timeout")


@BOTH
def test_a_tenth_of_a_second(inputs, network, programs, least):
    """Whatever is compiled by then: an answer is right, and there may be none."""
    for offset, wrong in ((HOPELESS, "unsat"), (1e-3, "sat"), (-1e-3, "unsat")):
        rows = properties.all_positive(np.eye(2)[1:], offset - least[1])
        options = {"programs": programs, "max_split_inputs": inputs}
        result = bj.prove(network, BOX, rows, timeout=0.1, **options)
        assert result.verdict != wrong
        assert result.seconds < 60.0
        assert (result.margins <= max(offset, 0.0) + 1e-5).all() or result.margins[0] == -np.inf


@BOTH
@pytest.mark.parametrize("where", ["output", "kernel"])
def test_nan_is_never_proved(inputs, where):
    bad = jnp.full((INPUTS, 1), jnp.nan) if where == "kernel" else jnp.ones((INPUTS, 1))
    offset = jnp.float32(jnp.nan if where == "output" else 0.0)
    function = lambda x: nn.relu(x @ bad) + offset  # noqa: E731
    rows = properties.all_positive(np.eye(1), 9999.0)
    options = {"max_split_inputs": inputs, "timeout": 2.0, "devices": jax.local_devices()}
    result = bj.prove(function, BOX, rows, **options)
    assert result.verdict in ("unknown", "timeout")
    assert not (result.margins > 0).any()


@BOTH
def test_one_input(inputs):
    function = lambda x: 0.5 - nn.relu(x)  # noqa: E731
    box = bj.Box(-jnp.ones(1), jnp.ones(1))
    programs = Programs(function, (1,), devices=jax.local_devices())
    for offset, verdict in ((0.51, "unsat"), (0.49, "sat")):
        rows = properties.all_positive(np.eye(1), offset)
        result = bj.prove(function, box, rows, programs=programs, max_split_inputs=inputs)
        assert result.verdict == verdict


@pytest.mark.quick
def test_empty_boxes_are_refused():
    rows = properties.all_positive(np.eye(1))
    for box, message in (
        (lambda: bj.Box(jnp.ones(2), -jnp.ones(2)), "Box needs lower <= upper"),
        (lambda: bj.Box(jnp.ones(0), jnp.ones(0)), "must have elements"),
        (
            lambda: bj.LpBall(jnp.zeros(2), 0.1, clip=(1.0, 2.0)),
            r"got none of its points in \[1, 2\] at index \(0,\): center 0, eps 0.1",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            bj.prove(lambda x: x[:1], box(), rows)


@pytest.mark.quick
@pytest.mark.parametrize("name", ["max_bytes", "max_queue_bytes"])
@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_limits_that_are_refused(name, value):
    rows = properties.all_positive(np.eye(1))
    with pytest.raises(ValueError, match=f"{name} must be >= 1, in bytes, got {value}"):
        bj.prove(lambda x: x[:1], BOX, rows, **{name: value})


@pytest.mark.quick
@pytest.mark.parametrize("flag", ["--max-bytes", "--max-queue-bytes"])
@pytest.mark.parametrize("value", ["0", "-5", "1e9", "much"])
def test_flags_that_are_refused(flag, value, capsys):
    assert command.main(["--onnx", "n", "--vnnlib", "p", f"{flag}={value}"]) == 2
    error = capsys.readouterr().err
    assert error == f"error: {flag}: expected a positive number of bytes, got {value!r}\n"


@pytest.mark.quick
def test_a_worker_passes_the_limits_on(tmp_path):
    """A network is read again for another memory of its calls."""
    (tmp_path / "p.vnnlib").write_text(
        "(declare-const X_0 Real)(declare-const Y_0 Real)(assert (and (<= 0 X_0) (<= X_0 1)))"
        "(assert (<= Y_0 0))"
    )
    seen = []

    class Network:
        def __init__(self, path, rounding, max_bytes):
            seen.append(max_bytes)

        def verify(self, property, method, timeout, with_proof, max_queue_bytes, counts):
            seen.append((max_queue_bytes, counts))
            return bj.search.Result("unknown", None, 0.0, "full")

    decider = worker.Decider(Network, lambda stage: None)
    for limits in ((2**20, 7, True), (2**20, 8, False), (2**21, 8, True)):
        request = messages.Request(
            "n", str(tmp_path / "p.vnnlib"), "crown", "real", 9.0, "", *limits
        )
        assert messages.decode(messages.encode(request)) == request
        assert decider.answer(request) == messages.Answer("unknown", "full", "unknown\n")
    assert seen == [2**20, (7, True), (8, False), 2**21, (8, True)]


def test_weights_make_no_batch_smaller():
    """What counts is memory for values that depend on the input, not for casts of the weights."""
    weights = jnp.ones((300, 300), jnp.float16)

    def narrow(weights, x):
        return nn.relu(x @ weights.astype(jnp.float32)[:2, :8])

    with_weights = Programs(narrow, (2,), weights=weights)
    without = Programs(lambda x: narrow(jnp.ones((2, 8), jnp.float16), x), (2,))
    assert with_weights.network.largest == without.network.largest == 8
    assert with_weights.boxes == without.boxes > 1


def test_a_box_of_a_large_network_is_bounded_alone():
    """A batch of one costs no copies of the box, which would take seconds each."""
    large = Programs(lambda x: nn.relu(jnp.outer(x, jnp.ones(2**13))).sum(1), (8,))
    assert (large.few_boxes, large.boxes) == (1, 1)


def test_the_best_of_random_points_is_the_one_nearest_to_unsafe():
    programs = Programs(lambda x: jnp.where(x > 0.9, jnp.nan, jnp.stack([x[0], -x[0]])), (1,))
    points = jnp.asarray([[[0.3], [-0.1], [0.95]], [[0.5], [-0.7], [0.4]]])
    rows = jnp.asarray([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [1.0, 0.0]]])
    best = programs.nearest(points, rows, jnp.zeros((2, 2)))
    np.testing.assert_array_equal(best, np.float32([[-0.1], [-0.7]]))


def test_random_points_find_what_no_gradient_leads_to(monkeypatch):
    """The function is flat but for a cube of 0.1 % of the box; no box is split."""
    monkeypatch.setattr(InputSplits, "decide", lambda *_: "unknown")
    center = jnp.asarray([0.31, -0.52, 0.17, 0.64])

    def flat(x):
        away = jnp.max(jnp.abs(x - center))
        return (0.1 - nn.relu(0.18 - away))[None]

    box = bj.Box(-jnp.ones(INPUTS), jnp.ones(INPUTS))
    property = properties.all_positive([[1.0]])
    assert bj.prove(flat, box, property, method="interval", timeout=60).verdict == "sat"
