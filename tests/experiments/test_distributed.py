"""Two processes as one run: the same results, one end, one error."""

import json
import shutil
import signal
import time

import jax
import numpy as np
import pytest
from several import free_port, start

from experiments.cluster.process_group import NOT_JOINED, ProcessGroup, from_flags
from experiments.configs import digits_crown
from experiments.evaluation import trained
from experiments.run import run as runs
from experiments.settings.checks import from_config_dict
from experiments.settings.errors import ExperimentError

SETTINGS = {
    "model.name": "mlp_2x100",
    "data.validation": 144,
    "train.epochs": 1,
    "train.batch_size": 128,
    # Adam divides by the size of the gradient: where that is rounding, so is the parameter.
    "optim.name": "sgd",
    "optim.lr": 0.02,
    "checkpoint.every": 2,
    "robust.warmup_epochs": 0.0,
    "robust.ramp_epochs": 0.0,
    "optim.milestones": (),
    "robust.beta": (1.0, 0.5),
    "evaluation.methods": ("interval",),
    "evaluation.pgd_steps": 1,
    "evaluation.pgd_restarts": 1,
}
WITHIN = {"rtol": 0, "atol": 1e-5}

one_worker = pytest.mark.xdist_group("distributed")


def _command(workdir, **other):
    settings = [f"--config.{key}={value}" for key, value in (SETTINGS | other).items()]
    return [
        "-m",
        "experiments.main",
        "--config=experiments/configs/digits_crown.py",
        f"--workdir={workdir}",
        *settings,
    ]


def _config(**other):
    config = digits_crown.get_config()
    config.update_from_flattened_dict(SETTINGS | other)
    return from_config_dict(config)


def _summary(workdir):
    return json.loads((workdir / "summary.json").read_text())


def _assert_same_network(one, other):
    one, other = (trained.load(workdir).variables for workdir in (one, other))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **WITHIN), one, other)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """2 processes x 4 devices: the run folder."""
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    first, second = start([_command(workdir)] * 2, devices=4)
    assert (first.status, second.status) == (0, 0), first.errors + second.errors
    assert "on 8 x cpu" in first.output
    assert "in 2 processes" in first.output
    assert "last epoch (1)" in first.output
    assert "Gloo" not in first.output
    assert first.errors == second.output == second.errors == ""
    return workdir


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """The same run with SIGTERM to its second process: the run folder."""
    workdir = tmp_path_factory.mktemp("interrupted") / "run"

    def terminate(processes):
        end = time.monotonic() + 100
        # The next checkpoint waits for this one: the run is not at its end yet.
        while not (workdir / "checkpoints" / "2" / "commit_success.txt").exists():
            assert time.monotonic() < end
            assert processes[1].poll() is None
            time.sleep(0.01)
        # Nor does it get there before JAX has seen the signal: no step goes on without process 0.
        processes[0].send_signal(signal.SIGSTOP)
        processes[1].send_signal(signal.SIGTERM)
        assert "SIGTERM" in processes[1].stderr.readline()
        processes[0].send_signal(signal.SIGCONT)

    first, second = start([_command(workdir)] * 2, devices=4, meanwhile=terminate)
    assert (first.status, second.status) == (0, 0), first.errors + second.errors
    assert "the same command continues from there" in first.output.splitlines()[-1]
    assert second.output == ""
    assert not (workdir / "summary.json").exists()
    return workdir


@one_worker
def test_two_processes_end_with_the_parameters_of_one_device(uninterrupted, tmp_path):
    alone = runs.run(_config(**{"mesh.data": 1}), tmp_path / "alone", "test")
    assert alone["device"].startswith("1 x cpu")
    _assert_same_network(uninterrupted, tmp_path / "alone")
    (result,), (expected,) = (
        [errors for label, errors in summary["results"].items() if label.startswith("last")]
        for summary in (_summary(uninterrupted), alone)
    )
    assert result["standard_error"] == pytest.approx(expected["standard_error"], abs=0.01)
    records = (uninterrupted / "metrics.jsonl").read_text().splitlines()
    assert len(records) == 1
    assert "validation_verified_error" in records[0]


@pytest.mark.slow
@one_worker
def test_a_terminated_run_goes_on_bit_identically(uninterrupted, interrupted, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(interrupted, workdir)
    first, second = start([_command(workdir)] * 2, devices=4)
    assert (first.status, second.status) == (0, 0), first.errors + second.errors
    assert "resumed after step" in first.output
    result, expected = _summary(workdir), _summary(uninterrupted)
    assert result["parameters_sha256"] == expected["parameters_sha256"]
    assert result["results"] == expected["results"]


@one_worker
@pytest.mark.slow
def test_a_terminated_run_goes_on_in_one_process(uninterrupted, interrupted, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(interrupted, workdir)
    runs.run(_config(**{"mesh.fsdp": 2}), workdir, "test")
    assert "resumed after step" in capsys.readouterr().out
    _assert_same_network(uninterrupted, workdir)


@one_worker
def test_processes_with_different_configs_are_refused(tmp_path):
    commands = [_command(tmp_path / "run", **{"optim.lr": lr}) for lr in (0.1, 0.2)]
    first, second = start(commands)
    assert (first.status, second.status) == (2, 2)
    assert "config.optim.lr (0.1 on process 0, 0.2 on process 1)" in first.errors
    assert len(first.errors.splitlines()) == 1
    assert second.errors == ""
    assert not (tmp_path / "run").exists()


BODY = """
from pathlib import Path
from experiments.cluster import distributed
from experiments.cluster.process_group import from_flags
from experiments.settings.errors import ExperimentError
with distributed.joined(from_flags()):
"""


def _body(text):
    return ["-c", BODY + "\n".join(f"    {line}" for line in text.strip().splitlines())]


@one_worker
def test_a_work_folder_that_is_not_shared_is_refused(tmp_path):
    folders = [tmp_path / "one", tmp_path / "other"]
    for folder in folders:
        folder.mkdir()
    body = "distributed._FOLDER_TIMEOUT = 1.0\ndistributed.require_shared(Path('run'))"
    first, second = start([_body(body)] * 2, folders=folders)
    assert (first.status, second.status) == (2, 2)
    assert "--workdir=run is not shared" in first.errors
    assert "process 1" in first.errors
    assert not any((folder / "run").exists() for folder in folders)


@one_worker
def test_an_error_of_one_process_ends_the_others_too():
    body = """
if distributed.process() == 1:
    raise ExperimentError("the disk is full")
distributed.decided(None, len)
"""
    first, second = start([_body(body)] * 2)
    assert (first.status, second.status) == (2, 2)
    assert first.errors == ""
    assert second.errors == "error: the disk is full (on process 1)\n"


@one_worker
def test_processes_decide_together():
    body = """
assert distributed.decided(distributed.process() + 5, sum) == 11
assert distributed.from_main(distributed.process) == 0
distributed.require_shared(Path("."))
print(distributed.processes())
"""
    first, second = start([_body(body)] * 2)
    assert (first.status, first.output, second.output) == (0, "2\n", ""), first.errors
    assert second.status == 0


@one_worker
def test_every_process_reads_its_own_part_of_a_batch():
    body = """
import jax, numpy as np
from experiments.train.mesh import batch_sharding, create_mesh
from experiments.data import Images
from experiments.settings.config import MeshConfig
from experiments.train import feed
feed._fits = lambda size, device: False
taken = []
take = Images.take
Images.take = lambda self, indices: taken.append(indices.size) or take(self, indices)
data = Images(np.arange(24.0, dtype=np.float32).reshape(24, 1, 1, 1), np.arange(24, dtype=np.int32))
for mesh in (MeshConfig(), MeshConfig(spec=2)):
    batch = feed.Feed(data, 8, (3,), batch_sharding(create_mesh(mesh)))(4)
    expected = data.images[feed.batch_indices(3, 4, 24, 8)]
    for shard in batch[0].addressable_shards:
        np.testing.assert_array_equal(shard.data, expected[shard.index])
assert sum(taken) == 8, taken
"""
    first, second = start([_body(body)] * 2, devices=2)
    assert (first.status, second.status) == (0, 0), first.errors + second.errors


@one_worker
@pytest.mark.parametrize(
    ("process", "message"),
    [("1", "the coordinator .* did not answer within 2 s"), ("0", "not all 2 processes joined")],
)
def test_who_does_not_come_is_given_up(process, message):
    (ended,) = start(
        [_body("pass")],
        BOUNDJAX_COORDINATOR=f"127.0.0.1:{free_port()}",
        BOUNDJAX_PROCESSES="2",
        BOUNDJAX_PROCESS=process,
        BOUNDJAX_JOIN_TIMEOUT="2",
    )
    assert ended.status == NOT_JOINED
    with pytest.raises(ExperimentError, match=message):
        raise ExperimentError(ended.errors)
    assert len(ended.errors.splitlines()) == 1


def test_by_default_a_coordinator_is_given_up_within_a_minute():
    assert ProcessGroup().timeout < 60


@one_worker
def test_slurm_is_detected():
    def command(process):
        body = f"import os\nos.environ['SLURM_PROCID'] = '{process}'\n" + BODY
        return ["-c", body + "    print(distributed.processes(), distributed.process())"]

    first, second = start(
        [command(0), command(1)],
        BOUNDJAX_COORDINATOR="",
        BOUNDJAX_PROCESSES="",
        BOUNDJAX_PROCESS="",
        SLURM_JOB_ID="1",
        JAX_COORDINATOR_PORT=str(free_port()),
        SLURM_STEP_NODELIST="localhost",
        SLURM_NTASKS="2",
        SLURM_LOCALID="0",
    )
    assert (first.status, second.status) == (0, 0), first.errors + second.errors
    assert first.output == "2 0\n"


def test_clusters_are_known_by_their_environment():
    def cluster(**environment):
        return from_flags(environment=environment).cluster

    slurm = {"SLURM_STEP_NODELIST": "node[1-2]", "SLURM_PROCID": "0"}
    assert cluster(**slurm, SLURM_NTASKS="2") == "SLURM"
    outside = {**slurm, "SLURM_NTASKS": "2"}
    del outside["SLURM_STEP_NODELIST"]
    assert cluster(**slurm, SLURM_NTASKS="1") == cluster(**outside) == cluster()
    assert cluster(OMPI_COMM_WORLD_SIZE="4") == "Open MPI"
    assert cluster(KUBERNETES_SERVICE_HOST="10.0.0.1") == cluster()
    pod = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}
    assert cluster(**pod) == "Kubernetes"
    assert from_flags("off", "host:1", 2, 0).alone
    given = {"BOUNDJAX_COORDINATOR": "host:1", "OMPI_COMM_WORLD_SIZE": "4"}
    result = from_flags(environment=given | {"OMPI_COMM_WORLD_RANK": "3"})
    assert result == ProcessGroup("host:1", 4, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"coordinator": "host", "processes": 2, "process": 0}, "must be HOST:PORT"),
        ({"coordinator": "host:1"}, "needs --processes=N and --process=I"),
        ({"coordinator": "host:1", "processes": 2, "process": 2}, "--process must be in"),
        ({"processes": 2}, "need --coordinator"),
        ({"environment": {"BOUNDJAX_PROCESS": "one"}}, "BOUNDJAX_PROCESS must be a number"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(arguments, message):
    with pytest.raises(ExperimentError, match=message):
        from_flags(**({"environment": {}} | arguments))


def test_one_process_answers_sigterm_after_a_step(tmp_path):
    body = """
import os, signal
from experiments.cluster.preemption import preemption
with preemption.deferred(lambda calls: calls):
    assert not preemption.due()
    os.kill(os.getpid(), signal.SIGTERM)
    assert preemption.due()
    print("finished the step", flush=True)
os.kill(os.getpid(), signal.SIGTERM)
"""
    (ended,) = start(
        [_body(body)], BOUNDJAX_COORDINATOR="", BOUNDJAX_PROCESSES="", BOUNDJAX_PROCESS=""
    )
    assert ended.status == 0
    assert ended.errors == ""
    assert ended.output.splitlines()[0] == "finished the step"
    assert "stopped by SIGTERM" in ended.output.splitlines()[1]
