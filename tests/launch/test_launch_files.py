"""The launch files for Kubernetes and Docker fit together, with JAX and with the checkout."""

import configparser
import os
import pathlib
import re
import shlex
import subprocess

import pytest
import yaml

pytestmark = pytest.mark.quick

LAUNCH = pathlib.Path(__file__).resolve().parents[2] / "launch"


def _manifests(name):
    result = list(yaml.safe_load_all((LAUNCH / "k8s" / name).read_text()))
    return {manifest["kind"]: manifest for manifest in result}


def test_rbac_allows_what_jax_asks_and_nothing_else():
    result = _manifests("rbac.yaml")
    assert {kind: m["apiVersion"] for kind, m in result.items()} == {
        "ServiceAccount": "v1",
        "Role": "rbac.authorization.k8s.io/v1",
        "RoleBinding": "rbac.authorization.k8s.io/v1",
    }
    assert result["Role"]["rules"] == [
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list"]},
        {"apiGroups": ["batch"], "resources": ["jobs"], "verbs": ["get"]},
    ]
    role, account = (result[kind]["metadata"]["name"] for kind in ("Role", "ServiceAccount"))
    binding = result["RoleBinding"]
    group = "rbac.authorization.k8s.io"
    assert binding["roleRef"] == {"apiGroup": group, "kind": "Role", "name": role}
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": account}]


def test_jobset_finds_its_account_its_volume_and_its_coordinator():
    jobset = _manifests("jobset.yaml")["JobSet"]
    assert jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    spec = jobset["spec"]
    # The service is called like the set, which is where JAX looks, unless a subdomain is given.
    assert spec["network"] == {"enableDNSHostnames": True, "publishNotReadyAddresses": True}
    [replicated] = spec["replicatedJobs"]
    assert replicated["replicas"] == 1  # JAX counts the pods of one job
    job = replicated["template"]["spec"]
    assert job["completionMode"] == "Indexed"
    assert job["parallelism"] == job["completions"]
    pod = job["template"]["spec"]
    account = _manifests("rbac.yaml")["ServiceAccount"]["metadata"]["name"]
    assert pod["serviceAccountName"] == account
    claim = _manifests("volume.yaml")["PersistentVolumeClaim"]
    assert claim["apiVersion"] == "v1"
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes["runs"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    [container] = pod["containers"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(mounts) == set(volumes)
    variables = {each["name"]: each["value"] for each in container["env"]}
    assert variables["WORKDIR"].startswith(mounts["runs"] + "/")
    assert (LAUNCH.parent / variables["CONFIG"]).is_file()
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 8
    assert (
        container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"]
    )


# Where in the file, and the fields that JobSet v1alpha2, batch/v1 and core/v1 have there; of the
# large types those that are used here.
FIELDS = {
    "": "apiVersion kind metadata spec",
    "spec": (
        "replicatedJobs network successPolicy failurePolicy startupPolicy suspend coordinator "
        "managedBy ttlSecondsAfterFinished"
    ),
    "spec.network": "enableDNSHostnames subdomain publishNotReadyAddresses",
    "spec.failurePolicy": "maxRestarts restartStrategy rules",
    "spec.failurePolicy.rules.0": "name action onJobFailureReasons targetReplicatedJobs",
    "spec.replicatedJobs.0": "name groupName template replicas dependsOn",
    "spec.replicatedJobs.0.template": "metadata spec",
    "spec.replicatedJobs.0.template.spec": (
        "parallelism completions activeDeadlineSeconds podFailurePolicy successPolicy backoffLimit "
        "backoffLimitPerIndex maxFailedIndexes completionMode suspend podReplacementPolicy template"
    ),
    "spec.replicatedJobs.0.template.spec.podFailurePolicy.rules.0": (
        "action onExitCodes onPodConditions"
    ),
    "spec.replicatedJobs.0.template.spec.template.spec": (
        "serviceAccountName restartPolicy terminationGracePeriodSeconds securityContext containers "
        "volumes nodeSelector tolerations"
    ),
    "spec.replicatedJobs.0.template.spec.template.spec.containers.0": (
        "name image command args env resources securityContext volumeMounts"
    ),
}


@pytest.mark.parametrize("place", FIELDS)
def test_jobset_has_no_field_that_kubernetes_does_not_know(place):
    result = _manifests("jobset.yaml")["JobSet"]
    for step in place.split(".") if place else ():
        result = result[int(step)] if step.isdigit() else result[step]
    assert set(result) <= set(FIELDS[place].split())


def test_jobset_restarts_what_was_interrupted_and_not_what_is_wrong():
    spec = _manifests("jobset.yaml")["JobSet"]["spec"]
    assert spec["failurePolicy"]["maxRestarts"] == 50
    [rule] = spec["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    # What JobSet's webhook accepts: no hyphen.
    assert re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])
    job = spec["replicatedJobs"][0]["template"]["spec"]
    assert job["backoffLimit"] == 0
    pod = job["template"]["spec"]
    # Kubernetes refuses a podFailurePolicy with any other restartPolicy.
    assert pod["restartPolicy"] == "Never"
    assert pod["terminationGracePeriodSeconds"] >= 120
    [container] = pod["containers"]
    [mistake] = job["podFailurePolicy"]["rules"]
    assert mistake["action"] == "FailJob"
    assert mistake["onExitCodes"] == {
        "containerName": container["name"],
        "operator": "In",
        "values": [2],
    }
    values = {each["name"]: each["value"] for each in container["env"]}
    words = [
        re.sub(r"\$\((\w+)\)", lambda match: values[match[1]], word)
        for word in container["command"] + container["args"]
    ]
    words.insert(2, "--dry-run")
    done = subprocess.run(words, cwd=LAUNCH.parent, capture_output=True, text=True, check=True)
    assert shlex.split(done.stdout) == [
        *("python", "-m", "experiments.main"),
        *("--config=experiments/configs/cifar10_crown.py", "--workdir=/runs/crown"),
    ]


def _instructions():
    text = (LAUNCH / "docker" / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [tuple(line.split(maxsplit=1)) for line in lines]


def test_the_image_is_pinned_and_not_of_root():
    result = _instructions()
    names = [name for name, _ in result]
    assert names.count("FROM") == 1
    base = dict(result)["FROM"]
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", base), base
    assert "ADD" not in names
    assert ("ARG", "EXTRA=gpu") in result
    users = [(i, value) for i, (name, value) in enumerate(result) if name == "USER"]
    assert [value for _, value in users] == ["boundjax"]
    assert names[users[0][0] :] == ["USER", "CMD"]
    runs = [value for name, value in result if name == "RUN"]
    assert any("--uid 1000" in value for value in runs)
    [install] = [value for value in runs if "pip install" in value]
    assert "--no-cache-dir --constraint launch/docker/constraints.txt" in install
    assert not any(re.search(r"https?://|curl|wget", value) for _, value in result)


def test_what_the_image_copies_is_there():
    allowed = (LAUNCH / "docker" / "Dockerfile.dockerignore").read_text().splitlines()
    kept = {line[1:] for line in allowed if line.startswith("!")}
    for name, value in _instructions():
        for source in value.split()[:-1] if name == "COPY" else ():
            assert source == "." or (LAUNCH.parent / source).exists(), source
            assert source == "." or pathlib.PurePath(source).parts[0] in kept, source


def test_the_extras_of_the_image_exist():
    [install] = [value for name, value in _instructions() if "pip install" in value]
    words = install[install.index("pip") :]
    result = {}
    for extra in ("gpu", "tpu", ""):
        done = subprocess.run(
            ["bash", "-c", f"pip() {{ printf '%s' \"${{@: -1}}\"; }}; {words}"],
            env={"EXTRA": extra, "PATH": os.environ["PATH"]},
            capture_output=True,
            text=True,
            check=True,
        )
        result[extra] = done.stdout
    assert result == {"gpu": ".[train,gpu]", "tpu": ".[train,tpu]", "": ".[train]"}
    setup = configparser.ConfigParser()
    setup.read(LAUNCH.parent / "setup.cfg", encoding="utf-8")
    assert {"train", "gpu", "tpu"} <= set(setup["options.extras_require"])


def test_every_constraint_is_one_version():
    lines = (LAUNCH / "docker" / "constraints.txt").read_text().splitlines()
    given = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line) for line in given)
    names = [line.partition("==")[0] for line in given]
    assert len(names) == len(set(names))
    assert {"jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "kubernetes"} <= set(names)
