import json
from pathlib import Path

import pytest

from experiments.launching.job import Job
from experiments.launching.kubernetes import job_file
from moe.model.config import ConfigError
from parallel.distributed import Processes, detect

SCHEMA = json.loads((Path(__file__).parent / "kubernetes_1_31.json").read_text("utf-8"))["$defs"]
JOB, SERVICE = "io.k8s.api.batch.v1.Job", "io.k8s.api.core.v1.Service"
TYPES = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "object": dict, "array": list}


def faults(schema, value, at=""):
    """Where `value` departs from a schema of the kind that the fixture uses."""
    if "$ref" in schema:
        return faults(SCHEMA[schema["$ref"].removeprefix("#/$defs/")], value, at)
    if "oneOf" in schema:
        return [] if any(not faults(one, value, at) for one in schema["oneOf"]) else [f"{at}: fits none"]
    kinds = [schema["type"]] if isinstance(schema.get("type"), str) else schema.get("type", [])
    fits = [kind for kind in kinds if kind != "null" and isinstance(value, TYPES[kind])]
    if kinds and not (fits and (isinstance(value, bool) <= ("boolean" in fits))):
        return [f"{at}: {value!r} is no {kinds}"]
    if "enum" in schema and value not in schema["enum"]:
        return [f"{at}: {value!r} is none of {schema['enum']}"]
    found = [f"{at}.{name}: missing" for name in schema.get("required", []) if name not in value]
    if isinstance(value, list):
        return found + [fault for i, item in enumerate(value) for fault in faults(schema["items"], item, f"{at}[{i}]")]
    if isinstance(value, dict):
        other = schema.get("additionalProperties", {})
        for name, item in value.items():
            within = schema.get("properties", {}).get(name, other)
            found += [f"{at}.{name}: unknown"] if within is False else faults(within, item, f"{at}.{name}")
    return found


def written(**changes):
    job = Job(**{"name": "big", "run": ["experiments/hunyuan_large.py", "--steps", "9"], "nodes": 64} | changes)
    text = job_file(job, image="registry/leverage:1", claim="runs", python="python3", resources={"rdma/hca": "8"})
    service, job = json.loads(text)["items"]
    return service, job


@pytest.mark.parametrize(
    "changes", [{}, {"gpus_per_node": 0, "cpu_devices": 4}, {"environment": {"NCCL_DEBUG": "INFO"}}]
)
def test_the_objects_fit_the_published_schema(changes):
    service, job = written(**changes)
    assert faults(SCHEMA[SERVICE], service) == []
    assert faults(SCHEMA[JOB], job) == []


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda job: job["spec"].update(completions="64"), ".spec.completions: '64' is no ['integer', 'null']"),
        (lambda job: job["spec"].update(paralelism=64), ".spec.paralelism: unknown"),
        (lambda job: job["spec"].pop("template"), ".spec.template: missing"),
        (
            lambda job: job["spec"]["template"]["spec"]["containers"][0]["env"][0].pop("name"),
            ".spec.template.spec.containers[0].env[0].name: missing",
        ),
    ],
)
def test_the_check_finds_faults(damage, fault):
    _, job = written()
    damage(job)
    assert faults(SCHEMA[JOB], job) == [fault]


def test_pods_find_each_other_and_share_one_folder():
    service, job = written()
    name, pod = job["metadata"]["name"], job["spec"]["template"]["spec"]
    container = pod["containers"][0]
    environ = {entry["name"]: entry["value"] for entry in container["env"]}
    # Pod i of an indexed Job is called NAME-i, within the headless Service that `subdomain` names.
    assert pod["subdomain"] == service["metadata"]["name"]
    port = service["spec"]["ports"][0]["port"]
    expected = Processes(f"{name}-0.{pod['subdomain']}:{port}", 64, 5)
    assert detect(environ | {"JOB_COMPLETION_INDEX": "5"}) == expected
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"].items() <= job["spec"]["template"]["metadata"]["labels"].items()
    assert job["spec"]["completionMode"] == "Indexed"
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 64
    assert container["command"][:7] == [
        "python3", "-m", "experiments.launch", "node", "experiments/hunyuan_large.py", "--steps", "9",
    ]  # fmt: skip
    assert container["command"][7:] == ["--run-dir", "/shared/runs/big", "--set", "data.cache=/shared/cache"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "8", "rdma/hca": "8"}


def test_what_the_user_says_of_folders_stays():
    _, job = written(run=["e.py", "--run-dir", "/shared/a", "--set", "data.cache=/shared/b"])
    command = job["spec"]["template"]["spec"]["containers"][0]["command"]
    assert command[4:] == ["e.py", "--run-dir", "/shared/a", "--set", "data.cache=/shared/b"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"name": "hunyuan_large"}, "--name 'hunyuan_large': Kubernetes takes up to 50 small letters"),
        ({"processes_per_node": 8}, "--processes-per-node 8: a pod runs one process"),
        ({"nodes": 0}, "--nodes 0: give at least 1"),
        ({"cpu_devices": 2}, "--cpu-devices 2 is for jobs without GPUs: give --gpus-per-node 0 too"),
        ({"gpus_per_node": 0}, "--gpus-per-node 0: give --cpu-devices"),
        ({"processes_per_node": 3}, "--gpus-per-node 8 does not divide over --processes-per-node 3"),
    ],
)
def test_mistakes_are_named(changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        written(**changes)
