"""Training methods are spelled with hyphens; old configs and runs with underscores are read."""

import json
import sys

import pytest
from absl.testing import flagsaver
from several import start

from experiments import main, methods
from experiments.configs import cifar10_slopes, common, mnist_families
from experiments.evaluation import trained
from experiments.evaluation.evaluate import Options, evaluate_run
from experiments.records.printing import Report
from experiments.run import run as runs
from experiments.settings import method_names
from experiments.settings.checks import from_config_dict
from experiments.settings.errors import ExperimentError

# The finished run is made once.
one_worker = pytest.mark.xdist_group("method_names")
# How ml_collections loads a config file.
in_this_process = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

RENAMED = {
    "crown_ibp": "crown-ibp",
    "one_step": "one-step",
    "cap_ibp": "cap-ibp",
    "random_slopes": "random-slopes",
    "pq_slopes": "pq-slopes",
    "mtl_ibp": "mtl-ibp",
    "exp_ibp": "exp-ibp",
    "cc_ibp": "cc-ibp",
}
# Came after 0.1: they never had underscores.
LATER = {"adv-bnn", "adv-train"}
NOTICE = "method names have hyphens now: {}; 0.3 will reject the old spelling"
CONFIG = """
from experiments.configs import common

def get_config(variant=""):
    options = common.arguments(variant, method=("ibp", "cc-ibp", "exp-ibp"))
    config = common.base()
    config.robust.method = "mtl_ibp" if variant == "" else options.method
    return config
"""
SETTINGS = {
    "data": {"name": "digits"},
    "model": {"name": "mlp_2x100"},
    "train": {"epochs": 1, "batch_size": 128},
    "robust": {"method": "crown-ibp", "eps_train": 0.03, "eps_test": 0.02, "ramp_epochs": 0.5},
    "evaluation": {"pgd_steps": 1, "pgd_restarts": 1},
    "checkpoint": {"every": 4},
}


def test_no_method_has_an_underscore():
    assert not [name for name in methods.METHODS if "_" in name]


def test_every_old_spelling_is_read():
    assert set(RENAMED.values()) | LATER == {name for name in methods.METHODS if "-" in name}
    for old, name in RENAMED.items():
        assert method_names.current(old) == method_names.current(name) == name
        assert from_config_dict({"robust": {"method": old}}).robust.method == name
    assert method_names.notice(methods.METHODS) == ""
    assert method_names.notice(["mtl_ibp", "ibp", "", "mtl_ibp"]) == NOTICE.format(
        "'mtl_ibp' is read as 'mtl-ibp'"
    )


@pytest.mark.parametrize("name", ["mtl_ipb", "crown_ibp_fused", "small_box"])
def test_an_unknown_name_is_shown_as_it_was_written_beside_names_with_hyphens(name):
    config = from_config_dict({"robust": {"method": name}})
    listed = r"bcp, cap, cap-ibp, cc-ibp, crown-ibp, exp-ibp, .*mtl-ibp, .*one-step, .*, taps$"
    with pytest.raises(ExperimentError, match=rf"^unknown robust\.method '{name}': .* {listed}"):
        methods.create(None, config)


@pytest.mark.parametrize("robust", [{"method": 3}, {"method": ["mtl_ibp"]}, 3])
def test_methods_that_are_no_names_are_refused_as_before(robust):
    with pytest.raises(ExperimentError, match=r"config\.robust(\.method)?: expected "):
        from_config_dict({"robust": robust})


def test_arguments_of_config_files_have_old_spellings_too():
    for config, old in (
        (mnist_families, "net=b,method=one_step"),
        (cifar10_slopes, "slopes=cap_ibp"),
    ):
        new = old.replace("_", "-")
        assert config.get_config(old).to_dict() == config.get_config(new).to_dict()
    # An old spelling excludes the same arguments as the new one.
    with pytest.raises(ExperimentError, match="'fused' excludes 'method=one-step'"):
        mnist_families.get_config("fused,method=one_step")
    options = common.arguments("method=cc_ibp", method=("ibp", "cc-ibp"))
    assert (options.method, options.texts) == ("cc-ibp", ("method=cc-ibp",))


@pytest.fixture
def printed(tmp_path, monkeypatch, capsys):
    """What `experiments.main` prints with further arguments; its run prints the method."""

    def command(variant, *arguments):
        path = tmp_path / "experiment.py"
        path.write_text(CONFIG)
        words = ["main", *arguments, f"--config={path}{variant}"]
        monkeypatch.setattr(sys, "argv", words)  # where ml_collections looks for settings
        with flagsaver.flagsaver():
            main.main(main.parse_flags(words))
        return capsys.readouterr().out.splitlines()

    def run(config, workdir, name):
        print(config.robust.method, workdir)

    monkeypatch.setattr(runs, "run", run)
    return command


@in_this_process
def test_an_old_spelling_in_a_config_is_told_of_in_one_line(printed):
    read = "'mtl_ibp' is read as 'mtl-ibp'"
    assert printed("") == [NOTICE.format(read), "mtl-ibp runs/experiment"]


@in_this_process
def test_an_old_spelling_by_flag_is_told_of_in_one_line(printed):
    read = "'one_step' is read as 'one-step'"
    lines = printed("", "--config.robust.method=one_step")
    assert lines == [NOTICE.format(read), "one-step runs/experiment"]
    assert printed("", "--config.robust.method=one-step") == ["one-step runs/experiment"]


@in_this_process
def test_an_old_spelling_by_argument_is_told_of_in_one_line(printed):
    # The folder keeps its name: the command goes on with the run that it began.
    read = "'cc_ibp' is read as 'cc-ibp'"
    lines = printed(":method=cc_ibp")
    assert lines == [NOTICE.format(read), "cc-ibp runs/experiment-method=cc_ibp"]
    assert printed(":method=cc-ibp") == ["cc-ibp runs/experiment-method=cc-ibp"]
    both = printed(":method=cc_ibp", "--config.robust.method=exp_ibp")
    assert both[0] == NOTICE.format(f"{read}, 'exp_ibp' is read as 'exp-ibp'")
    assert both[1:] == ["exp-ibp runs/experiment-method=cc_ibp"]


def _respell(path, *groups):
    """Gives the group of a JSON file that holds the method its spelling of 0.1."""
    content = json.loads(path.read_text())
    group = content
    for name in groups:
        group = group[name]
    assert group["method"] == "crown-ibp"
    group["method"] = "crown_ibp"
    path.write_text(json.dumps(content))


def _as_of_old(folder):
    _respell(folder / "config.json", "robust")
    checkpoints = list(folder.glob("checkpoints/*/metadata/metadata"))
    assert checkpoints
    for path in checkpoints:
        _respell(path, "config", "robust")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of 0.1: (config, folder, summary)."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    config = from_config_dict(SETTINGS)
    summary = runs.run(config, folder, "test")
    _as_of_old(folder)
    _respell(folder / "summary.json")
    return config, folder, summary


@one_worker
def test_a_finished_run_of_old_is_read(finished, capsys):
    config, folder, summary = finished
    assert runs.run(config, folder, "test") == summary
    old = from_config_dict(SETTINGS | {"robust": SETTINGS["robust"] | {"method": "crown_ibp"}})
    assert runs.run(old, folder, "test") == summary
    other = from_config_dict(SETTINGS | {"robust": SETTINGS["robust"] | {"method": "cap_ibp"}})
    with pytest.raises(ExperimentError, match=r"another config, which differs in robust\.method;"):
        runs.run(other, folder, "test")
    assert "hyphens" not in capsys.readouterr().out


@one_worker
def test_the_network_and_the_evaluations_of_old_are_read(finished):
    config, folder, summary = finished
    assert trained.load(folder).config == config
    (errors,) = summary["results"].values()
    attack = {"losses": ("margin",), "pgd_steps": None, "pgd_restarts": None}
    stored = folder / "evaluations" / "summary-last.npz"
    before = stored.read_bytes()
    again = evaluate_run(folder, Options(name="summary-last", **attack))
    assert again.path == stored
    assert again.certificates.errors() == errors
    assert list(again.certificates.run_by) == ["interval", "crown-ibp"]
    assert stored.read_bytes() == before  # nothing was computed again


@pytest.mark.slow
@one_worker
def test_an_interrupted_run_of_old_goes_on(finished, tmp_path, monkeypatch, capsys):
    config, _, summary = finished
    folder = tmp_path / "run"
    update = Report.update

    def interrupted(self, step):
        update(self, step)
        if step == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Report, "update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            runs.run(config, folder, "test")
    _as_of_old(folder)
    resumed = runs.run(config, folder, "test")
    assert "resumed after step 4 of" in capsys.readouterr().out
    assert resumed["parameters_sha256"] == summary["parameters_sha256"]
    assert resumed["results"] == summary["results"]
    assert resumed["method"] == "crown-ibp"
    assert json.loads((folder / "config.json").read_text()) == config.to_dict()


@pytest.mark.xdist_group("distributed")
def test_two_processes_tell_of_an_old_spelling_once(tmp_path):
    command = [
        *("-m", "experiments.main", "--config=experiments/configs/digits_crown.py"),
        *(f"--workdir={tmp_path / 'run'}", "--config.robust.method=mtl_ibp"),
        "--config.train.batch_size=1000000",  # refused once the processes have joined
    ]
    first, second = start([command] * 2)
    assert first.output == NOTICE.format("'mtl_ibp' is read as 'mtl-ibp'") + "\n"
    assert "at most the" in first.errors
    assert (first.status, second.status, second.output, second.errors) == (2, 2, "", "")
