"""The manifests of configs/kuberay against the CRDs' own schemas, and their commands against our command line.

Nothing of Kubernetes runs here: a manifest that passes is one that the API server would not refuse for its form (its
CEL rules aside, of which the manifests use none), whose command samray would not refuse, and whose numbers agree.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from samray.cluster.sizes import IO_CPUS, check_fits, choose_sizes
from samray.config import ClusterConfig
from samray.pipeline.drive import GIVE_UP_S, LEAVE_S
from tests.kuberay import extract
from tests.support import REPOSITORY, pages
from tests.support.manifests import (
    GPU_CLUSTER,
    GPU_JOB,
    KIND_JOB,
    KUBERAY,
    MANIFESTS,
    Commands,
    check_submission,
    cluster_spec,
    container,
    documented_commands,
    documents,
    entrypoint,
    groups,
    pinned,
    quantity,
    ray_document,
    split_submission,
)

CRDS = REPOSITORY.parent / "shared" / "data" / "kuberay"
Schemas = dict[tuple[str, str], dict[str, Any]]


@pytest.fixture(scope="session")
def schemas() -> Schemas:
    """(apiVersion, kind) -> JSON Schema, of KubeRay's CRDs."""
    return extract.load()


def test_the_extract_is_that_of_the_crds() -> None:
    if missing := [name for name in extract.CRD_FILES if not (CRDS / name).is_file()]:
        pytest.skip(
            f"tests/kuberay/schemas.json is NOT compared with KubeRay's CRDs: {CRDS} does not have "
            f"{' and '.join(missing)}. The manifests are validated all the same"
        )
    assert json.loads(extract.SCHEMAS.read_text()) == extract.extract(CRDS)


def faults(document: dict[str, Any], schemas: Schemas) -> list[str]:
    """What the API server would refuse, each with its place; KeyError for a version that is not served."""
    validator = jsonschema.Draft202012Validator(schemas[document["apiVersion"], document["kind"]])
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(document)]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifests_are_valid(path: Path, schemas: Schemas) -> None:
    document = ray_document(path)
    assert faults(document, schemas) == []
    assert {other["kind"] for other in documents(path)} <= {document["kind"], "PersistentVolumeClaim"}


def _misspell(document: dict[str, Any]) -> None:
    document["spec"]["backofLimit"] = document["spec"].pop("backoffLimit")


def _misplace(document: dict[str, Any]) -> None:
    container(groups(document)[1])["tolerations"] = []


def _wrong_type(document: dict[str, Any]) -> None:
    groups(document)[1]["maxReplicas"] = "8"


def _number_for_text(document: dict[str, Any]) -> None:
    groups(document)[0]["rayStartParams"]["num-cpus"] = 0


def _drop_required(document: dict[str, Any]) -> None:
    del groups(document)[1]["groupName"]


def _bad_quantity(document: dict[str, Any]) -> None:
    container(groups(document)[1])["resources"]["limits"]["memory"] = "24 GB"


@pytest.mark.parametrize(
    ("plant", "problem"),
    [
        (_misspell, "'backofLimit' was unexpected"),
        (_misplace, "'tolerations' was unexpected"),
        (_wrong_type, "maxReplicas: '8' is not of type 'integer'"),
        (_number_for_text, "0 is not of type 'string'"),
        (_drop_required, "'groupName' is a required property"),
        (_bad_quantity, "'24 GB' does not match"),
    ],
)
def test_planted_faults_are_found(plant: Callable[[dict[str, Any]], None], problem: str, schemas: Schemas) -> None:
    document = ray_document(GPU_JOB)
    plant(document)
    problems = faults(document, schemas)
    assert problems
    assert all(problem in fault for fault in problems)


# ---- commands, by the code that runs them


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Commands:
    return Commands(monkeypatch, capsys)


@pytest.mark.parametrize("path", [GPU_JOB, KIND_JOB], ids=lambda path: path.name)
def test_entrypoints_are_samrays(path: Path, commands: Commands) -> None:
    commands.run(entrypoint(path))
    # KubeRay hands it to a shell, and Ray to another: what needs quoting would not survive both.
    assert not re.search(r"[\n'\"\\$`*?#;&|<>()]", entrypoint(path).strip())


def test_documented_commands_are_samrays(commands: Commands) -> None:
    documented = list(documented_commands())
    assert {where for where, _ in documented} >= {
        "README.md",
        "docs/deployment/ray.md",
        GPU_CLUSTER.name,
        KIND_JOB.name,
    }
    for _, command in documented:
        if command.startswith("ray job submit"):
            options, command = split_submission(command)
            check_submission(options)
        if command.startswith("python jobs/train.py "):
            pages.parse(command)
        else:
            commands.run(command)


@pytest.mark.parametrize(
    ("right", "wrong", "problem"),
    [
        ("--preset", "--presets", "--presets"),
        ("--preset sa1b", "--preset sa1", "unknown preset 'sa1'"),
        ("cluster.max_actors", "cluster.max_actor", "unknown setting cluster.max_actor"),
        ("cluster.max_actors=8", "cluster.max_actors=eight", "cluster.max_actors = 'eight' is not allowed"),
        ("cluster.max_actors=8", "cluster.max_actors 8", "'cluster.max_actors' is not of the form"),
        ("samray label", "samray labels", "No such command 'labels'"),
        ("samray label", "jobs/autolabel.py", "is no entry point"),  # without python it ends with 126
    ],
)
def test_planted_faults_in_an_entrypoint_are_found(right: str, wrong: str, problem: str, commands: Commands) -> None:
    line = entrypoint(GPU_JOB)
    assert right in line
    with pytest.raises(ValueError, match=re.escape(problem)):
        commands.run(line.replace(right, wrong))
    assert commands.begun == []


def test_a_planted_fault_in_a_submission_is_found() -> None:
    (line,) = (command for where, command in documented_commands() if where == GPU_CLUSTER.name and "submit" in command)
    options, _ = split_submission(line)
    check_submission(options)
    with pytest.raises(Exception, match=r"No such option.*--runtime-env-jsons"):
        check_submission([word.replace("--runtime-env-json", "--runtime-env-jsons") for word in options])


# ---- what they say


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_heads_take_no_work_and_every_node_runs_one_image(path: Path) -> None:
    from ray.scripts.scripts import start

    known = {option.lstrip("-") for parameter in start.params for option in parameter.opts}
    head, *workers = groups(ray_document(path))
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert len({container(group)["image"] for group in (head, *workers)}) == 1
    for group in (head, *workers):
        assert set(group["rayStartParams"]) <= known
        resources = container(group)["resources"]
        assert resources["requests"] == resources["limits"]
        # /dev/shm is charged to the container, so the object store has to leave room in it.
        assert int(group["rayStartParams"]["object-store-memory"]) < 0.3 * quantity(resources["limits"]["memory"])
        assert group["template"]["spec"]["securityContext"]["runAsNonRoot"]
    assert cluster_spec(ray_document(path))["rayVersion"] == pinned("ray")


def test_three_lines_are_to_be_changed() -> None:
    lines = [line.strip() for line in GPU_JOB.read_text().splitlines()]
    to_change = [line for line in lines if "CHANGE-ME" in line]
    assert len(to_change) == 3
    input, output, image = to_change
    assert entrypoint(GPU_JOB).split()[2:4] == [input, output]
    assert container(groups(ray_document(GPU_JOB))[0])["image"] in image
    marks = [re.findall(r"<-- (\d) of 3", line) for line in lines]
    assert sorted(mark for marks_of_page in marks for mark in marks_of_page) == ["1", "2", "3"]
    assert "<-- 1 of 3" in image


@pytest.mark.parametrize("path", [GPU_JOB, GPU_CLUSTER], ids=lambda path: path.name)
def test_the_gpu_group_grows_from_nothing_on_spot_nodes(path: Path, commands: Commands) -> None:
    document = ray_document(path)
    head, workers = groups(document)
    assert cluster_spec(document)["enableInTreeAutoscaling"]
    assert workers["minReplicas"] == 0
    tolerated = {toleration["key"] for toleration in workers["template"]["spec"]["tolerations"]}
    assert {"nvidia.com/gpu", "cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority"} <= tolerated
    (term,) = head["template"]["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][
        "nodeSelectorTerms"
    ]
    assert {rule["operator"] for rule in term["matchExpressions"]} == {"NotIn"}
    assert "tolerations" not in head["template"]["spec"]
    for group in (head, workers):
        (drain,) = (env["value"] for env in container(group)["env"] if env["name"].endswith("DRAIN_TIMEOUT_S"))
        assert int(drain) < group["template"]["spec"]["terminationGracePeriodSeconds"]

    # The run starts when only the head is there: it must ask for actors that fit on the nodes that come then.
    if path == GPU_JOB:
        _, _, config = commands.run(entrypoint(path))
    else:
        (line,) = (command for where, command in documented_commands() if where == path.name and "submit" in command)
        _, _, config = commands.run(split_submission(line)[1])
    sizes = choose_sizes(config.cluster, [{"CPU": 0.0}], num_shards=1000)
    limits = container(workers)["resources"]["limits"]
    node = {"CPU": quantity(limits["cpu"]), "GPU": quantity(limits["nvidia.com/gpu"])}
    check_fits(sizes, [node])
    assert node["CPU"] - sizes.actor_cpus >= 4 * IO_CPUS
    assert sizes.actor_gpus > 0
    assert sizes.max_actors == workers["maxReplicas"] * node["GPU"] / sizes.actor_gpus


def test_the_cluster_that_stays_is_the_jobs_cluster() -> None:
    """So that one of the two files has the comments, and a change of one alone is noticed."""
    assert cluster_spec(ray_document(GPU_CLUSTER)) == cluster_spec(ray_document(GPU_JOB))


def test_a_job_may_finish_what_is_in_flight() -> None:
    needed = ClusterConfig().drain_timeout_s + GIVE_UP_S + LEAVE_S
    environments = [yaml.safe_load(ray_document(path)["spec"]["runtimeEnvYAML"]) for path in (GPU_JOB, KIND_JOB)]
    for where, command in documented_commands():
        if where == GPU_CLUSTER.name and "submit" in command:
            options, _ = split_submission(command)
            environments.append(yaml.safe_load(options[options.index("--runtime-env-json") + 1]))
    assert len(environments) == 3
    for environment in environments:
        assert int(environment["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) >= needed


def test_jobs_are_tried_again_and_clean_up() -> None:
    for path in (GPU_JOB, KIND_JOB):
        spec = ray_document(path)["spec"]
        assert spec["submissionMode"] == "K8sJobMode"
        assert spec["backoffLimit"] >= 1
        assert spec["shutdownAfterJobFinishes"]
        assert spec["ttlSecondsAfterFinished"] > 0
        assert "activeDeadlineSeconds" not in spec  # the one failure that is not tried again


SUBMITTER = {"cpu": "1", "memory": "1Gi"}
"""Limits that KubeRay gives the pod that submits a job."""


def test_the_variant_for_kind_is_as_small_as_it_says() -> None:
    cpus, gib = map(int, re.search(r"(\d+) CPUs and (\d+) GiB at most", KIND_JOB.read_text()).groups())  # type: ignore[union-attr]
    assert cpus <= 3
    assert gib <= 6
    head, *workers = groups(ray_document(KIND_JOB))
    pods = [container(head)["resources"]["limits"], SUBMITTER]
    pods += [container(group)["resources"]["limits"] for group in workers for _ in range(group["maxReplicas"])]
    assert sum(quantity(pod["cpu"]) for pod in pods) <= cpus
    assert sum(quantity(pod["memory"]) for pod in pods) <= gib * 2**30
    assert not any("gpu" in resource for pod in pods for resource in pod)
    image = container(head)["image"]
    assert f"kind load docker-image {image}" in KIND_JOB.read_text()
    assert f"-t {image} " in (KUBERAY / "Dockerfile").read_text()


# ---- the image


def test_the_dockerfile_copies_what_is_there_and_what_is_sent() -> None:
    text = (KUBERAY / "Dockerfile").read_text()
    sources = [word for line in re.findall(r"^COPY (.*)$", text, re.M) for word in line.split()[:-1]]
    assert {"constraints.txt", "pyproject.toml", "samray", "jobs"} <= set(sources)
    ignore = [line for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert ignore[0] == "*"
    sent = {line.removeprefix("!") for line in ignore if line.startswith("!")}
    assert sent == set(sources)
    assert all((REPOSITORY / source).exists() for source in sources)
    # The long layer first: the source is copied after the dependencies are there.
    assert text.index("pip install ${TORCH_INDEX") < text.index("COPY samray")


def test_the_image_is_as_the_manifests_expect() -> None:
    text = (KUBERAY / "Dockerfile").read_text()
    (user,) = re.findall(r"^USER (\d+):\d+$", text, re.M)  # a name could not be checked by runAsNonRoot
    for path in MANIFESTS:
        for group in groups(ray_document(path)):
            assert group["template"]["spec"]["securityContext"]["runAsUser"] == int(user) != 0
    (python,) = re.findall(r"^FROM python:(3\.\d+)-slim$", text, re.M)
    assert f"(Python {python})" in (REPOSITORY / "constraints.txt").read_text().splitlines()[0]
