"""The objects of a run under Kubernetes: python -m experiments.launch kubernetes, then kubectl apply -f.

An indexed Job of one pod a machine, and a headless Service that gives the pods names: pod i of the Job is
NAME-i.NAME, and process 0 listens at NAME-0.NAME. Each pod runs `launch node`, which watches over its process. A pod
that fails is made anew, and the others, which notice within `HEARTBEAT_SECONDS`, end and are made anew as well; the run
goes on from its last checkpoint. The file is JSON, which kubectl reads as it reads YAML.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from experiments.launching.job import Job
from moe.model.config import ConfigError
from parallel.distributed import COORDINATOR, COUNT

PORT = 8476
"""Of the coordinator in the pod of process 0."""
SECONDS_TO_SAVE = 300
"""A pod that is to go is given so long after SIGTERM."""
SHARED = "/shared"
"""Where the volume is that all pods see: it keeps the run folder and the tokenized corpus."""


def job_file(job: Job, *, image: str, claim: str, python: str, resources: Mapping[str, str]) -> str:
    """The file's text, for `kubectl apply -f`: a List of the Service and the Job.

    Args:
        image: holds this project, as its working directory, and the interpreter.
        claim: a PersistentVolumeClaim that all pods can write at once (ReadWriteMany).
        python: the interpreter within the image.
        resources: of each pod beside its GPUs, such as {"rdma/hca": "8", "memory": "1000Gi"}.

    Raises:
        ConfigError: the name is none that Kubernetes takes, or several processes are asked for on one machine.
    """
    if job.processes_per_node > 1:
        raise ConfigError(
            f"--processes-per-node {job.processes_per_node}: a pod runs one process, which takes all of its GPUs; "
            "leave it at 1"
        )
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", job.name) or len(job.name) > 50:
        raise ConfigError(
            f"--name {job.name!r}: Kubernetes takes up to 50 small letters, digits and hyphens, a letter first"
        )
    items = [_service(job), _job(job, image, claim, python, resources)]
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": items}, indent=2) + "\n"


def _service(job: Job) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": job.name, "labels": _labels(job)},
        "spec": {
            "clusterIP": "None",
            "selector": _labels(job),
            # Processes look for each other before any of them is ready.
            "publishNotReadyAddresses": True,
            "ports": [{"name": "coordinator", "port": PORT}],
        },
    }


def _job(job: Job, image: str, claim: str, python: str, resources: Mapping[str, str]) -> dict[str, Any]:
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": job.name, "labels": _labels(job)},
        "spec": {
            "completionMode": "Indexed",
            "completions": job.nodes,
            "parallelism": job.nodes,
            # One failure ends all pods, and each counts.
            "backoffLimit": job.restarts * job.nodes,
            "podFailurePolicy": {
                "rules": [
                    {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [2]}},
                    {"action": "Ignore", "onExitCodes": {"operator": "In", "values": [130, 143]}},
                    {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                ]
            },
            "template": {
                "metadata": {"labels": _labels(job)},
                "spec": {
                    "restartPolicy": "Never",
                    "subdomain": job.name,
                    "terminationGracePeriodSeconds": SECONDS_TO_SAVE,
                    "containers": [_container(job, image, python, resources)],
                    "volumes": [
                        {"name": "shared", "persistentVolumeClaim": {"claimName": claim}},
                        # NCCL exchanges between the GPUs of a machine through shared memory.
                        {"name": "memory", "emptyDir": {"medium": "Memory"}},
                    ],
                },
            },
        },
    }


def _container(job: Job, image: str, python: str, resources: Mapping[str, str]) -> dict[str, Any]:
    variables = {COUNT: str(job.processes), COORDINATOR: f"{job.name}-0.{job.name}:{PORT}", **job.variables}
    limits = {**({"nvidia.com/gpu": str(job.gpus_per_node)} if job.gpus_per_node else {}), **resources}
    where = [] if "--run-dir" in job.run else ["--run-dir", f"{SHARED}/runs/{job.name}"]
    if not any(argument.startswith("data.cache=") for argument in job.run):
        where += ["--set", f"data.cache={SHARED}/cache"]
    return {
        "name": "train",
        "image": image,
        "command": [python, "-m", "experiments.launch", "node", *job.run, *where],
        "env": [{"name": name, "value": value} for name, value in variables.items()],
        "ports": [{"name": "coordinator", "containerPort": PORT}],
        "resources": {"limits": limits},
        "volumeMounts": [{"name": "shared", "mountPath": SHARED}, {"name": "memory", "mountPath": "/dev/shm"}],
    }


def _labels(job: Job) -> dict[str, str]:
    return {"app": job.name}
