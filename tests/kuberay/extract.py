"""Make schemas.json from KubeRay's CRDs, which are not in this repository:

    python -m tests.kuberay.extract FOLDER

FOLDER has KubeRay's `ray.io_rayjobs.yaml` and `ray.io_rayclusters.yaml` (helm-chart/kuberay-operator/crds). The extract
has every field of ray.io/v1 with its type and limits. It leaves out descriptions, CEL rules and ray.io/v1alpha1. A part
that occurs more than once (a container, a volume, a pod template) is stored once, under `$defs`.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

SCHEMAS = Path(__file__).with_name("schemas.json")
CRD_FILES = ("ray.io_rayjobs.yaml", "ray.io_rayclusters.yaml")
VERSION = "v1"
ABOUT = (
    "Extract of KubeRay's CRDs (https://github.com/ray-project/kuberay, Apache-2.0), made by tests/kuberay/extract.py"
)
MIN_SHARED_CHARS = 80
"""A shorter part is repeated: a reference would be as long."""

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


def crd_schema(path: Path) -> tuple[str, dict[str, Any]]:
    """("ray.io/v1 RayJob", JSON Schema) of one CRD file."""
    crd = yaml.load(path.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))["spec"]
    (version,) = (version for version in crd["versions"] if version["name"] == VERSION)
    assert version["served"], f"{path}: {VERSION} is not served"
    schema = strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = OBJECT_META
    schema["required"] = ["apiVersion", "kind", "metadata", "spec"]
    return f"{crd['group']}/{VERSION} {crd['names']['kind']}", schema


def share_parts(schemas: dict[str, Any]) -> dict[str, Any]:
    """{schemas, $defs}: each object that occurs more than once becomes a reference into `$defs`."""
    uses: Counter[str] = Counter()

    def count(node: Any) -> None:
        if isinstance(node, dict):
            text = json.dumps(node, sort_keys=True)
            uses[text] += 1
            if uses[text] == 1:  # the parts of a repeated part repeat with it
                for value in node.values():
                    count(value)

    names: dict[str, str] = {}
    definitions: dict[str, Any] = {}

    def refer(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        text = json.dumps(node, sort_keys=True)
        if uses[text] == 1 or len(text) < MIN_SHARED_CHARS:
            return {key: refer(value) for key, value in node.items()}
        if text not in names:
            names[text] = f"part{len(names)}"
            definitions[names[text]] = {key: refer(value) for key, value in node.items()}
        return {"$ref": f"#/$defs/{names[text]}"}

    count(schemas)
    return {"schemas": refer(schemas), "$defs": definitions}


def extract(folder: Path) -> dict[str, Any]:
    """What schemas.json holds, from the CRD files in `folder`."""
    return {"about": ABOUT, **share_parts(dict(crd_schema(folder / name) for name in CRD_FILES))}


def load() -> dict[tuple[str, str], dict[str, Any]]:
    """(apiVersion, kind) -> JSON Schema, from schemas.json."""
    content = json.loads(SCHEMAS.read_text())
    return {
        tuple(name.split(" ")): {**schema, "$defs": content["$defs"]}  # type: ignore[misc]
        for name, schema in content["schemas"].items()
    }


def main(folder: str) -> None:
    made = extract(Path(folder))
    definitions = made.pop("$defs")
    # One part per line, so that a new version of KubeRay gives a diff that can be read.
    lines = [f" {json.dumps(name)}: {json.dumps(part, separators=(',', ':'))}" for name, part in definitions.items()]
    rest = json.dumps(made, separators=(",", ":"))
    SCHEMAS.write_text(rest.removesuffix("}") + ',\n"$defs":{\n' + ",\n".join(lines) + "\n}}\n")


if __name__ == "__main__":
    main(sys.argv[1])
