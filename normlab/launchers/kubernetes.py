"""Kubernetes: one manifest, an indexed job of one pod a run inside a JobSet. Written, not applied.

The manifest holds all that the pods need beside image and volumes: the runs stand in a ConfigMap.
Fields are those of jobset.x-k8s.io/v1alpha2 (https://jobset.sigs.k8s.io) and of batch/v1 with
`backoffLimitPerIndex` (Kubernetes 1.29 and later), so that a run that fails ends no other one.
"""

import dataclasses
import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from normlab.environment import thread_environment
from normlab.errors import UserError
from normlab.launchers import task
from normlab.launchers.launcher import Rendered
from normlab.pool import Event, unsettled
from normlab.run import write_text
from normlab.sweep import Plan, PlannedRun

TASKS = "/etc/normlab/tasks.json"  # in the pods
MANIFEST = "jobset.yaml"
LARGEST_CONFIG_MAP = 1_000_000  # bytes; Kubernetes takes 1 MiB
MISTAKE = 2  # exit code of a mistake in config or command: another attempt would end likewise


@dataclasses.dataclass(frozen=True)
class Kubernetes:
    """Kubernetes with JobSet; `image` has normlab and, in its working directory, `configs/`."""

    image: str
    claim: str  # the PersistentVolumeClaim where the runs go; pods of several nodes write it
    mount: str = "/runs"  # where it is mounted in the pods; the sweep is MOUNT/FOLDER's name
    data_claim: str | None = None  # the claim with the data sets, mounted to be read only
    data_mount: str = "/data"
    cpus: int | None = None  # of a pod; as many as the run has threads
    gpus: int = 0
    memory: float = 4.0  # GiB
    grace: int = 120  # seconds in which a pod that is told to end saves its run
    attempts: int = 3  # further ones of a run whose pod failed; preemption does not count

    def __post_init__(self) -> None:
        """Raises UserError for a place that is none in a pod."""
        for option in ("mount", "data_mount"):
            path = getattr(self, option)
            if not path.startswith("/"):
                raise UserError(f"launcher: {option}={path!r} must begin with '/', as '/{path}'")

    def __call__(
        self,
        plan: Plan,
        folder: Path,
        jobs: int | None,
        threads: int,
        on_event: Callable[[Event], None],
    ) -> dict[str, str] | Rendered:
        """Writes the manifest of what is not done here; where all is, returns {run id: state}."""
        states, pending = unsettled(plan, folder)
        if not pending:
            return {run_id: state or "planned" for run_id, state in states.items()}
        path = folder / MANIFEST
        name = folder.resolve().name
        write_text(path, as_yaml(self.manifest(pending, name, jobs, threads)))
        where = PurePosixPath(self.mount) / name
        advice = (
            f"{len(pending)} of {len(states)} runs to do, as pods; nothing was applied. Type:\n"
            f"  kubectl apply --server-side -f {path}\n"
            f"When they have ended, bring {where} of claim {self.claim} to {folder}, and type the "
            "same command again: it writes the report, or the manifest of what is left."
        )
        return Rendered(path, advice)

    def manifest(
        self, runs: Sequence[PlannedRun], name: str, jobs: int | None, threads: int
    ) -> list[dict[str, Any]]:
        """Returns the documents: a ConfigMap with the runs, and the JobSet.

        Both bear the sweep's name and a digest of the runs, so that the same work applied twice is
        one JobSet. Raises UserError if the runs are too many for one ConfigMap.
        """
        text = task.as_text(runs, Path(self.mount) / name)
        if len(text.encode()) > LARGEST_CONFIG_MAP:
            raise UserError(
                f"{len(runs)} runs take {len(text.encode())} bytes in a manifest, more than "
                f"{LARGEST_CONFIG_MAP}; split the sweep, e.g. by --seeds"
            )
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        label = f"normlab-{_dns_label(name)}-{digest}"
        config_map = {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": label},
            "data": {PurePosixPath(TASKS).name: text},
        }
        count = len(runs)
        job = {
            "completionMode": "Indexed",
            "completions": count,
            "parallelism": min(jobs or count, count),
            "backoffLimitPerIndex": self.attempts,
            "podFailurePolicy": {
                "rules": [
                    {
                        "action": "FailIndex",
                        "onExitCodes": {
                            "containerName": "run",
                            "operator": "In",
                            "values": [MISTAKE],
                        },
                    },
                    {
                        "action": "Ignore",  # preempted, evicted, or its node drained
                        "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
                    },
                ]
            },
            "template": {"spec": self._pod(label, threads)},
        }
        jobset = {
            "apiVersion": "jobset.x-k8s.io/v1alpha2",
            "kind": "JobSet",
            "metadata": {"name": label},
            "spec": {
                "network": {"enableDNSHostnames": False},  # the pods do not talk to each other
                "failurePolicy": {"maxRestarts": 0},  # the indexed job tries each run again itself
                "replicatedJobs": [{"name": "run", "replicas": 1, "template": {"spec": job}}],
            },
        }
        return [config_map, jobset]

    def _pod(self, config_map: str, threads: int) -> dict[str, Any]:
        """Returns the specification of a pod, which takes the run of its index."""
        resources = {"cpu": str(self.cpus or threads), "memory": f"{round(self.memory * 1024)}Mi"}
        accelerators = {"nvidia.com/gpu": str(self.gpus)} if self.gpus else {}
        mounts = [
            {"name": "tasks", "mountPath": str(PurePosixPath(TASKS).parent), "readOnly": True},
            {"name": "runs", "mountPath": self.mount},
        ]
        volumes: list[dict[str, Any]] = [
            {"name": "tasks", "configMap": {"name": config_map}},
            {"name": "runs", "persistentVolumeClaim": {"claimName": self.claim}},
        ]
        if self.data_claim is not None:
            claim = {"claimName": self.data_claim, "readOnly": True}
            mounts.append({"name": "data", "mountPath": self.data_mount, "readOnly": True})
            volumes.append({"name": "data", "persistentVolumeClaim": claim})
        container = {
            "name": "run",
            "image": self.image,
            "command": ["python", "-m", task.MODULE, TASKS],
            "env": [
                {"name": name, "value": value}
                for name, value in thread_environment(threads).items()
            ],
            "resources": {"requests": resources | accelerators, "limits": resources | accelerators},
            "volumeMounts": mounts,
        }
        return {
            "restartPolicy": "Never",  # a new pod, which the policy above counts
            "terminationGracePeriodSeconds": self.grace,
            "containers": [container],
            "volumes": volumes,
        }


def as_yaml(documents: Sequence[dict[str, Any]]) -> str:
    """Returns documents as YAML, keys in the order in which they are given."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Writes a text of several lines as one that a person can read."""

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
        style = "|" if "\n" in value else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)

    Dumper.add_representer(str, text)
    return yaml.dump_all(documents, Dumper=Dumper, sort_keys=False, width=100)


def _dns_label(name: str) -> str:
    """Returns a name as Kubernetes takes it, short enough for the names made of it."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:30].strip("-") or "sweep"
