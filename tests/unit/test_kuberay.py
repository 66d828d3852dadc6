"""The manifests of configs/kuberay against the CRDs' own schemas, and their commands against our command line.

Nothing of Kubernetes runs here: a manifest that passes is one that the API server would not refuse for its form (its
CEL rules aside, of which the manifests use none), whose command samray would not refuse, and whose numbers agree.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from samray import cli
from samray.config import ClusterConfig, Config
from samray.pipeline.cluster import IO_CPUS, check_fits, choose_sizes
from samray.pipeline.report import LabelReport
from samray.pipeline.run import GIVE_UP_S, LEAVE_S

REPOSITORY = Path(__file__).resolve().parents[2]
KUBERAY = REPOSITORY / "configs" / "kuberay"
CRDS = REPOSITORY.parent / "shared" / "data" / "kuberay"
MANIFESTS = sorted(KUBERAY.glob("*.yaml"))
GPU_JOB, KIND_JOB, GPU_CLUSTER = (KUBERAY / f"{n}.yaml" for n in ("rayjob-gpu", "rayjob-cpu-kind", "raycluster-gpu"))
Schemas = dict[tuple[str, str], dict[str, Any]]


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def ray_document(path: Path) -> dict[str, Any]:
    """The one document of a manifest that is KubeRay's."""
    (found,) = (document for document in documents(path) if document["apiVersion"].startswith("ray.io/"))
    return found


def cluster_spec(document: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = document["spec"]
    return spec["rayClusterSpec"] if document["kind"] == "RayJob" else spec


def groups(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The head group and the worker groups."""
    spec = cluster_spec(document)
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def container(group: dict[str, Any]) -> dict[str, Any]:
    (found,) = group["template"]["spec"]["containers"]
    return found


def quantity(text: str | float) -> float:
    """`500m`, `24Gi`, `1`, as Kubernetes reads them."""
    number, unit = re.fullmatch(r"([\d.]+)(\D*)", str(text)).groups()  # type: ignore[union-attr]
    return float(number) * {"": 1, "m": 1e-3, "Mi": 2**20, "Gi": 2**30}[unit]


# ---- against the CRDs


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """A structural schema as JSON Schema that refuses what Kubernetes would prune or refuse."""
    made = {key: value for key, value in schema.items() if key in ("type", "enum", "pattern", "required", "anyOf")}
    made |= {key: value for key, value in schema.items() if re.match("(min|max)(imum|Length|Items|Properties)", key)}
    if "properties" in schema:
        made["properties"] = {key: strict(value) for key, value in schema["properties"].items()}
    if "items" in schema:
        made["items"] = strict(schema["items"])
    if schema.get("x-kubernetes-int-or-string"):
        made["type"] = ["integer", "string"]
        made.pop("anyOf", None)
    elif schema.get("type") == "object" and not schema.get("x-kubernetes-preserve-unknown-fields"):
        values = schema.get("additionalProperties", False)
        made["additionalProperties"] = strict(values) if isinstance(values, dict) else values
    if schema.get("nullable"):
        made = {"anyOf": [made, {"type": "null"}]}
    return made


OBJECT_META = {  # a CRD only says `metadata: object`; these are the fields a manifest may well set
    "type": "object",
    "required": ["name"],
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 47},  # KubeRay's limit
        "namespace": {"type": "string"},
        "labels": {"type": "object", "additionalProperties": {"type": "string"}},
        "annotations": {"type": "object", "additionalProperties": {"type": "string"}},
    },
    "additionalProperties": False,
}


@pytest.fixture(scope="session")
def schemas() -> Schemas:
    """(apiVersion, kind) -> JSON Schema, of KubeRay's CRDs."""
    paths = [CRDS / f"ray.io_{plural}.yaml" for plural in ("rayjobs", "rayclusters")]
    if missing := [str(path) for path in paths if not path.is_file()]:
        pytest.skip(f"the manifests are NOT validated against KubeRay's CRDs: there is no {' and no '.join(missing)}")
    found = {}
    for path in paths:
        crd = yaml.load(path.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))["spec"]
        for version in crd["versions"]:
            if version["served"]:
                schema = strict(version["schema"]["openAPIV3Schema"])
                schema["properties"]["metadata"] = OBJECT_META
                schema["required"] = ["apiVersion", "kind", "metadata", "spec"]
                found[f"{crd['group']}/{version['name']}", crd["names"]["kind"]] = schema
    return found


def faults(document: dict[str, Any], schemas: Schemas) -> list[str]:
    """What the API server would refuse, each with its place."""
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
    ("plant", "told"),
    [
        (_misspell, "'backofLimit' was unexpected"),
        (_misplace, "'tolerations' was unexpected"),
        (_wrong_type, "maxReplicas: '8' is not of type 'integer'"),
        (_number_for_text, "0 is not of type 'string'"),
        (_drop_required, "'groupName' is a required property"),
        (_bad_quantity, "'24 GB' does not match"),
    ],
)
def test_planted_faults_are_found(plant: Callable[[dict[str, Any]], None], told: str, schemas: Schemas) -> None:
    document = ray_document(GPU_JOB)
    plant(document)
    found = faults(document, schemas)
    assert found
    assert all(told in fault for fault in found)


def test_a_version_that_is_not_served_is_found(schemas: Schemas) -> None:
    with pytest.raises(KeyError):
        faults({**ray_document(GPU_JOB), "apiVersion": "ray.io/v1beta1"}, schemas)


# ---- commands, by the code that runs them


class Commands:
    """Runs samray's command line up to where the work would begin, and keeps what it would begin with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys
        self.begun: list[tuple[str, str, Config]] = []
        monkeypatch.setattr("samray.pipeline.run.label_with", self._label)
        monkeypatch.setattr("samray.demo.run_demo", self._demo)

    def _label(self, input: str, output: str, config: Config, **options: Any) -> LabelReport:
        self.begun.append((input, output, config))
        return LabelReport(output, num_images=1, num_shards=1)

    def _demo(self, directory: Path, config: Config, *args: Any, **options: Any) -> int:
        self.begun.append((str(directory), str(directory), config))
        return 0

    def run(self, line: str) -> tuple[str, str, Config]:
        """What an entrypoint comes to: input, output and settings. Raises ValueError with samray's own words."""
        words = shlex.split(line, comments=True)
        if words[:2] == ["python", "jobs/autolabel.py"]:
            words = ["samray", "label", *words[2:]]
        if words[0] != "samray":
            raise ValueError(f"{words[0]} is no entry point of samray")
        self.capsys.readouterr()
        if cli.main(words[1:]) != 0:
            raise ValueError(self.capsys.readouterr().err.strip())
        return self.begun[-1]


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Commands:
    return Commands(monkeypatch, capsys)


def entrypoint(path: Path) -> str:
    return str(ray_document(path)["spec"]["entrypoint"])


def told_commands() -> Iterator[tuple[str, str]]:
    """(where, command) for each `samray label|demo` and `ray job submit` in the README's blocks and the comments here."""
    texts = {path.name: path.read_text() for path in MANIFESTS}
    comments = {name: "\n".join(re.findall(r"^ *# *(.*)", text, re.M)) for name, text in texts.items()}
    readme = "\n".join(re.findall(r"^```bash\n(.*?)^```", (REPOSITORY / "README.md").read_text(), re.M | re.S))
    for where, text in [*comments.items(), ("README.md", readme)]:
        for line in re.sub(r"\\\n\s*", "", text).splitlines():
            quoted = re.findall(r"`((?:samray (?:label|demo)|ray job submit) [^`]+)`", line)
            if re.match(r"(samray (label|demo)|ray job submit) ", line):
                quoted.append(line)
            for command in quoted:
                yield where, command


def split_submission(line: str) -> tuple[list[str], str]:
    """`ray job submit OPTIONS -- ENTRYPOINT`, taken apart."""
    options, dashes, command = line.removeprefix("ray job submit").partition(" -- ")
    assert dashes, f"no -- between Ray's options and the command: {line}"
    return shlex.split(options), command


def check_submission(options: list[str]) -> None:
    """Raises click's error where `ray job submit` would not take these options."""
    from ray.dashboard.modules.job.cli import submit

    submit.make_context("submit", [*options, "--", "true"])


@pytest.mark.parametrize("path", [GPU_JOB, KIND_JOB], ids=lambda path: path.name)
def test_entrypoints_are_samrays(path: Path, commands: Commands) -> None:
    commands.run(entrypoint(path))
    # KubeRay hands it to a shell, and Ray to another: what needs quoting would not survive both.
    assert not re.search(r"[\n'\"\\$`*?#;&|<>()]", entrypoint(path).strip())


def test_told_commands_are_samrays(commands: Commands) -> None:
    told = list(told_commands())
    assert {where for where, _ in told} >= {"README.md", GPU_CLUSTER.name, KIND_JOB.name}
    for _, command in told:
        if command.startswith("ray job submit"):
            options, command = split_submission(command)
            check_submission(options)
        commands.run(command)


@pytest.mark.parametrize(
    ("right", "wrong", "told"),
    [
        ("--preset", "--presets", "--presets"),
        ("--preset sa1b", "--preset sa1", "there is no preset 'sa1'"),
        ("cluster.max_actors", "cluster.max_actor", "there is no setting cluster.max_actor"),
        ("cluster.max_actors=8", "cluster.max_actors=eight", "cluster.max_actors = 'eight' is not allowed"),
        ("cluster.max_actors=8", "cluster.max_actors 8", "'cluster.max_actors' is not of the form"),
        ("samray label", "samray labels", "No such command 'labels'"),
        ("samray label", "jobs/autolabel.py", "is no entry point"),  # without python it ends with 126
    ],
)
def test_planted_faults_in_an_entrypoint_are_found(right: str, wrong: str, told: str, commands: Commands) -> None:
    line = entrypoint(GPU_JOB)
    assert right in line
    with pytest.raises(ValueError, match=re.escape(told)):
        commands.run(line.replace(right, wrong))
    assert commands.begun == []


def test_a_planted_fault_in_a_submission_is_found() -> None:
    (line,) = (command for where, command in told_commands() if where == GPU_CLUSTER.name and "submit" in command)
    options, _ = split_submission(line)
    check_submission(options)
    with pytest.raises(Exception, match="No such option.*--runtime-env-jsons"):
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
    assert cluster_spec(ray_document(path))["rayVersion"] == _pinned("ray")


def _pinned(package: str) -> str:
    (version,) = re.findall(rf"^{package}==(.*)$", (REPOSITORY / "constraints.txt").read_text(), re.M)
    return str(version)


def test_three_lines_are_to_be_changed() -> None:
    lines = [line.strip() for line in GPU_JOB.read_text().splitlines()]
    to_change = [line for line in lines if "CHANGE-ME" in line]
    assert len(to_change) == 3
    input, output, image = to_change
    assert entrypoint(GPU_JOB).split()[2:4] == [input, output]
    assert container(groups(ray_document(GPU_JOB))[0])["image"] in image
    marks = [re.findall(r"<-- (\d) of 3", line) for line in lines]
    assert sorted(mark for found in marks for mark in found) == ["1", "2", "3"]
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
        (line,) = (command for where, command in told_commands() if where == path.name and "submit" in command)
        _, _, config = commands.run(split_submission(line)[1])
    sizes = choose_sizes(config.cluster, [{"CPU": 0.0}], num_shards=1000)
    limits = container(workers)["resources"]["limits"]
    node = {"CPU": quantity(limits["cpu"]), "GPU": quantity(limits["nvidia.com/gpu"])}
    check_fits(sizes, [node])
    assert node["CPU"] - sizes.actor_cpus >= 4 * IO_CPUS
    assert sizes.actor_gpus > 0
    assert sizes.max_actors == workers["maxReplicas"] * node["GPU"] / sizes.actor_gpus


def test_a_job_may_finish_what_is_in_flight() -> None:
    needed = ClusterConfig().drain_timeout_s + GIVE_UP_S + LEAVE_S
    found = [yaml.safe_load(ray_document(path)["spec"]["runtimeEnvYAML"]) for path in (GPU_JOB, KIND_JOB)]
    for where, command in told_commands():
        if where == GPU_CLUSTER.name and "submit" in command:
            options, _ = split_submission(command)
            found.append(yaml.safe_load(options[options.index("--runtime-env-json") + 1]))
    assert len(found) == 3
    for environment in found:
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
    assert "grep '^torch=='" in text
    assert _pinned("torch")
