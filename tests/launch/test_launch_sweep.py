"""Sweeps: their points, and which of them are run."""

import pathlib
import signal
import sys

import pytest
from launched import launched, runs

from launch import sweep
from launch.children import UNFINISHED

DIGITS = "experiments/configs/digits_crown.py"
# Stands in for experiments.main: does what `config.model.name` says.
PROGRAM = """
import os, pathlib, signal, sys
flags = dict(word.split("=", 1) for word in sys.argv[1:])
folder = pathlib.Path(flags["--workdir"])
folder.mkdir(parents=True, exist_ok=True)
with (folder / "log").open("a") as stream:
    stream.write("x")
behaviour = flags["--config.model.name"]
if behaviour == "waits":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    print("ready", os.getpid(), flush=True)
    signal.pause()
elif behaviour == "fails":
    sys.exit(3)
elif behaviour != "interrupted":
    (folder / "summary.json").write_text("{}")
"""


def _names(*arguments, **settings):
    return [point.name for point in sweep.expand(*arguments, **settings)]


def _main(capsys, *arguments):
    status = sweep.main([str(argument) for argument in arguments])
    return status, capsys.readouterr()


def _config(tmp_path, body):
    path = tmp_path / "some_config.py"
    path.write_text(
        "from experiments.configs import common\n\n\n"
        f"def get_config(variant=''):\n    return common.base()\n\n\n{body}"
    )
    return str(path)


# ------------------------------------------------------------------------------------ the points


def test_points_of_a_config(capsys):
    status, printed = _main(capsys, "--config", DIGITS, "--config.train.epochs=20")
    assert status == 0
    assert printed.out.splitlines() == [
        f"python -m experiments.main --config={DIGITS} "
        f"--workdir=runs/sweep-digits_crown/robust.eps_train={eps} "
        f"--config.train.epochs=20 --config.robust.eps_train={eps}"
        for eps in (0.1, 0.12, 0.15)
    ]


def test_a_grid_is_a_product():
    config = "experiments/configs/mnist_ibp.py:cpu"
    points = sweep.expand(config, ["seed=0,1", "optim.milestones=(1,2),(3.5,)"])
    assert [point.arguments[2:] for point in points] == [
        ("--config.seed=0", "--config.optim.milestones=(1,2)"),
        ("--config.seed=0", "--config.optim.milestones=(3.5,)"),
        ("--config.seed=1", "--config.optim.milestones=(1,2)"),
        ("--config.seed=1", "--config.optim.milestones=(3.5,)"),
    ]
    assert {point.arguments[0] for point in points} == {f"--config={config}"}
    # No shell has to quote the names of folders.
    assert points[0].folder == pathlib.Path(
        "runs/sweep-mnist_ibp-cpu/seed=0,optim.milestones=_1,2_"
    )


def test_a_grid_multiplies_the_points_of_the_config(tmp_path):
    body = "def sweep():\n    yield {'seed': 1, 'augment.flip': True}\n    yield {'seed': 2}\n"
    assert _names(_config(tmp_path, body), ["train.epochs=3,4"]) == [
        "seed=1,augment.flip=True,train.epochs=3",
        "seed=1,augment.flip=True,train.epochs=4",
        "seed=2,train.epochs=3",
        "seed=2,train.epochs=4",
    ]


def test_points_are_settings_that_the_config_takes():
    from experiments.configs import digits_crown
    from experiments.settings.checks import from_config_dict

    for point in digits_crown.sweep():
        settings = digits_crown.get_config()
        settings.update_from_flattened_dict(point)
        assert from_config_dict(settings).robust.eps_train == point["robust.eps_train"]


def test_long_names_are_shortened_and_stay_different(tmp_path):
    keys = ["model.mean", "model.std", "kappa"]
    values = ",".join(f"({index}.0123456789,{'0.5,' * 30})" for index in (1, 2))
    names = _names(DIGITS, [f"{keys[0]}={values}"])
    assert len(set(names)) == len(names) == 6
    assert all(len(name) <= 120 for name in names)


def test_count_and_index(capsys):
    grid = ["--config", DIGITS, "--grid", "seed=0,1"]
    assert _main(capsys, *grid, "--count")[1].out == "6\n"
    dry = ["--run", "--dry-run"]
    everything = _main(capsys, *grid)[1].out.splitlines()
    result = [_main(capsys, *grid, "--index", index, *dry)[1].out for index in range(6)]
    assert result == [f"{line}\n" for line in everything]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--grid", "sed=1"], "unknown config key 'sed': did you mean 'seed'?"),
        (["--grid", "seed="], "--grid seed=: expected KEY=VALUE,VALUE,... as in seed=0,1,2"),
        (["--grid", "seed=1", "--grid", "seed=2"], "'seed' is varied twice: leave one out"),
        (["--grid", "seed=1,1"], "the point robust.eps_train=0.1,seed=1 occurs twice: leave one"),
        (["--index", "3"], "--index=3: this sweep has the points 0 to 2"),
        (["--index", "-1"], "--index=-1: this sweep has the points 0 to 2"),
        (["--config", "no/such.py"], "--config=no/such.py: no such file no/such.py"),
        (
            ["--config", "experiments/configs/svhn_cap.py"],
            "--config=experiments/configs/svhn_cap.py has no sweep() and there is no --grid: not",
        ),
        (
            ["--config", "experiments/configs/svhn_cap.py:cpu", "--grid", "seed=1"],
            "unknown argument 'cpu': this config has no arguments",
        ),
    ],
)
def test_mistakes_of_sweeps(capsys, arguments, message):
    status, printed = _main(capsys, "--config", DIGITS, *arguments)
    assert (status, printed.out) == (2, "")
    assert printed.err.startswith(f"error: {message}")
    assert printed.err.count("\n") == 1


def test_points_are_dictionaries(tmp_path, capsys):
    status, printed = _main(capsys, "--config", _config(tmp_path, "def sweep():\n    yield 3\n"))
    assert status == 2
    assert printed.err.endswith("must yield dictionaries of settings, got 3\n")


def test_unknown_flags_of_sweeps(capsys):
    with pytest.raises(SystemExit) as caught:
        sweep.main(["--config", DIGITS, "--configs.seed=1"])
    assert caught.value.code == 2
    assert "unknown flag --configs.seed=1" in capsys.readouterr().err


# ---------------------------------------------------------------------------------- running them


@pytest.fixture
def program(tmp_path, monkeypatch):
    """The command of a point runs PROGRAM; returns the arguments of a sweep over behaviours."""
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    monkeypatch.setattr(
        sweep.Point,
        "command",
        lambda point, python="python": [python, str(path), *point.arguments],
    )
    config = _config(tmp_path, "")

    def arguments(*behaviours):
        grid = f"model.name={','.join(behaviours)}"
        return [f"--config={config}", "--run", f"--workdir={tmp_path / 'sweep'}", "--grid", grid]

    return arguments


def _logs(tmp_path):
    result = (tmp_path / "sweep").glob("*/log")
    return {path.parent.name.removeprefix("model.name="): path.read_text() for path in result}


def test_a_sweep_goes_on_with_what_is_not_finished(tmp_path, capfd, program):
    assert sweep.main(program("a", "fails", "b")) == 3
    assert _logs(tmp_path) == {"a": "x", "fails": "x", "b": "x"}
    assert "point 2 of 3: model.name=fails: failed with status 3\n" in capfd.readouterr().err
    assert sweep.main(program("a", "c", "b")) == 0
    assert _logs(tmp_path) == {"a": "x", "fails": "x", "b": "x", "c": "x"}
    assert "point 1 of 3: model.name=a: finished already\n" in capfd.readouterr().out


def test_only_the_point_of_the_index_runs(tmp_path, program):
    assert sweep.main([*program("a", "b", "c"), "--index", "1"]) == 0
    assert _logs(tmp_path) == {"b": "x"}


def test_an_interrupted_point_stops_the_sweep(tmp_path, program):
    # Without a signal to the sweep itself: another host got it, or SLURM told the training alone.
    assert sweep.main(program("a", "interrupted", "b")) == UNFINISHED
    assert _logs(tmp_path) == {"a": "x", "interrupted": "x"}


def test_a_signal_is_passed_on_and_stops_the_sweep(tmp_path, program):
    code = f"""
import sys
from launch import sweep
sweep.Point.command = lambda point, python="python": [
    python, {str(tmp_path / "program.py")!r}, *point.arguments
]
sys.exit(sweep.main())"""
    command = [sys.executable, "-c", code, *program("a", "waits", "b")]
    with launched(command) as process:
        line = next(line for line in process.stdout if line.startswith("ready"))
        process.send_signal(signal.SIGTERM)
        process.stdout.read()
        assert process.wait() == UNFINISHED
    assert _logs(tmp_path) == {"a": "x", "waits": "x"}
    assert not runs(int(line.split()[1]))


def test_the_command_is_that_of_the_readme():
    point = sweep.Point("p", pathlib.Path("runs/p"), ("--config=c.py", "--workdir=runs/p"))
    words = ["-m", "experiments.main", "--config=c.py", "--workdir=runs/p"]
    assert point.command() == ["python", *words]
    assert point.command(sys.executable) == [sys.executable, *words]
