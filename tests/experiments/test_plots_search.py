"""The figure of a branch and bound: where the nodes of its tree stand, and its file."""

import numpy as np
import pytest

from boundjax.search import Leaf, Proof, Result, Round
from boundjax.search.proof import Case, Recorder
from experiments.plots import search
from experiments.settings.errors import ExperimentError

pytestmark = pytest.mark.quick

LEAF = Leaf(np.ones(1, np.float32), np.zeros(0, np.float16), np.zeros(0, np.float32))


def recorded():
    """Unit 3 is split, then unit 5 on its upper side."""
    recorder = Recorder()
    root = recorder.roots(1)
    upper, lower = recorder.split_units(root, np.array([[3]]))[0]
    parts = recorder.split_units(np.array([upper]), np.array([[5]]))[0]
    for node in (lower, *parts):
        recorder.prove(int(node), 0, LEAF)
    return recorder


def test_parts_stand_below_their_whole():
    nodes = list(recorded().walk(0, 0))
    assert [node for node in nodes if not isinstance(node, Leaf)] == [3, 5]
    shape = search.shape_of(nodes)
    assert shape.leaves == [(0.0, 2), (1.0, 2), (2.0, 1)]
    assert sorted(shape.lines) == [((0.5, 1), (0.0, 2), (1.0, 2)), ((1.25, 0), (0.5, 1), (2.0, 1))]


def test_the_figure_is_written(tmp_path):
    proof = Proof(None, "float32", (Case(recorded(), {0: 0}),))
    rounds = (Round(0.1, 1, 1, -1.0), Round(0.3, 5, 2, -0.2), Round(0.4, 7, 0, np.inf))
    result = Result("unsat", None, 0.4, proof=proof, rounds=rounds)
    search.plot_search(result, tmp_path / "s.png")
    assert (tmp_path / "s.png").stat().st_size > 3_000
    with pytest.raises(ExperimentError, match="the answer is 'sat' after 0 rounds; the figure"):
        search.plot_search(Result("sat", None, 0.4), tmp_path / "s.png")


def test_a_file_that_is_not_there(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        search.main(["--onnx", str(tmp_path / "n.onnx"), "--vnnlib", "p.vnnlib"])
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
