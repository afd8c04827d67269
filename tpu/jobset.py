"""Runs on GKE: node pools as capacity, a JobSet for each run.

A JobSet (https://jobset.sigs.k8s.io) holds one Job per slice and one pod per host. When any pod
fails, all Jobs are made anew, and the recipe goes on with `--resume`. GKE tells the pods of each
other, MEGASCALE variables for several slices included; `jax.distributed.initialize()` reads that.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from typing import Any, ClassVar

import yaml

from tpu.job import LABEL, PROJECT, REGION, ZONE, Job, There, UsageError, check
from tpu.shell import Shell

_REPLICATED = "slice"
_CONTAINER = "recipe"
_PORTS = {"tpu": 8471, "tpu-metrics": 8431, "coordinator": 8482}
"""Of libtpu, its metrics, and what JAX uses as coordinator on TPUs."""
_ATTEMPT = "RESTART_ATTEMPT"
_IMAGE = (
    r"[a-z0-9][a-z0-9._-]*(:\d+)?(/[a-z0-9][a-z0-9._-]*)*"
    r"(:\w[\w.-]{0,127})?(@sha256:[0-9a-f]{64})?"
)
"""Host and port, path, tag and digest: https://github.com/distribution/reference."""
_START = """\
# The first attempt begins anew, every later one at the last checkpoint.
if [ "${RESTART_ATTEMPT:-0}" -gt 0 ]; then set -- "$@" --resume; fi
exec python -m "$@"
"""
# DisruptionTarget is what a pod shows when its host is preempted, drained or lost.
_ON_DISRUPTION = {
    "action": "FailJob",
    "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
}
_FREE_RESTART = {
    "name": "disruption",
    "action": "RestartJobSetAndIgnoreMaxRestarts",
    "onJobFailureReasons": ["PodFailurePolicy"],
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gke(Job):
    """Google Kubernetes Engine, with JobSet installed in the cluster."""

    secret_pattern: ClassVar[str] = r"([a-z0-9][-a-z0-9.]*):([-._A-Za-z0-9]+)"
    secret_form: ClassVar[str] = "KUBERNETES_SECRET:KEY"

    image: str
    """Container image with this repository as its working directory."""
    namespace: str = "default"
    """Kubernetes namespace."""
    queue: str | None = None
    """Kueue's LocalQueue; without one the run starts as soon as nodes are free."""
    service_account: str | None = None
    """Kubernetes service account of the pods, bound to what may read and write --out."""
    project: str | None = None
    """Google Cloud project of the cluster."""
    cluster: str | None = None
    """Cluster in which node pools are made when missing. Without it kubectl's current cluster is
    used as it is: Autopilot, or pools of your own."""
    location: str | None = None
    """Region or zone of the cluster."""
    zone: str | None = None
    """Zone of the chips, where the cluster's location is a region."""
    reservation: str | None = None
    """Name of the reservation, for reserved capacity."""

    def __post_init__(self) -> None:
        """Checks everything.

        Raises:
            UsageError: an option is wrong.
        """
        super().__post_init__()
        for option in ("namespace", "queue", "service_account", "cluster", "reservation"):
            if getattr(self, option) is not None:
                check(option, getattr(self, option), LABEL)
        if re.fullmatch(_IMAGE, self.image, re.ASCII) is None:
            raise UsageError(
                f"image {self.image!r} must be a container image such as "
                "us-docker.pkg.dev/my-project/l4jax:1, in lower case up to the tag"
            )
        if _ATTEMPT in self.variables.keys() | self.secrets.keys():
            raise UsageError(f"{_ATTEMPT} is set by JobSet: restarts go by it")
        if self.slices > 1 and self.pod.hosts_per_slice == 1:
            raise UsageError(f"{self.topology} is one host: GKE joins slices of several hosts only")
        if (self.capacity == "reserved") != (self.reservation is not None):
            raise UsageError("--capacity reserved and --reservation NAME go together")
        self._check_cluster()

    def _check_cluster(self) -> None:
        if self.cluster is None:
            if self.project or self.location or self.zone:
                raise UsageError("--project, --location and --zone only go with --cluster")
            return
        if self.project is None or self.location is None:
            raise UsageError("--cluster also needs --project and --location")
        check("project", self.project, PROJECT)
        if re.fullmatch(REGION, self.location) is None:
            check("location", self.location, ZONE)
        elif self.zone is None:
            raise UsageError(f"{self.location} is a region: say the --zone of the chips in it")
        check("zone", self.zone or self.location, ZONE)

    @property
    def place(self) -> str:
        """Where the run is; a name means another run elsewhere."""
        if self.cluster is None:
            return f"namespace {self.namespace} of kubectl's current cluster"
        return (
            f"namespace {self.namespace} of cluster {self.cluster} in {self.location}, "
            f"project {self.project}"
        )

    # --- Capacity ----------------------------------------------------------------------------
    def create(self, shell: Shell) -> None:
        """Makes the node pools that are missing: one for each slice."""
        self._connect(shell)
        self._create_pools(shell)

    def _connect(self, shell: Shell) -> None:
        if self.cluster is None:
            shell.note("no --cluster given: using kubectl's current cluster as it is")
            return
        shell.run(
            *("gcloud", "container", "clusters", "get-credentials", self.cluster),
            *(f"--location={self.location}", f"--project={self.project}"),
        )

    def _create_pools(self, shell: Shell) -> None:
        if self.cluster is None:
            return
        pools = json.loads(self._pools(shell) or "[]")
        fitting = [pool["name"] for pool in pools if self._fits(pool)]
        if fitting:
            shell.note(f"there already: {', '.join(fitting)}")
        taken = {pool["name"] for pool in pools}
        free = (
            name for name in map(self._pool, range(self.slices + len(taken))) if name not in taken
        )
        missing = [name for name, _ in zip(free, range(self.slices - len(fitting)), strict=False)]
        if missing and self._policy is not None:
            self._create_policy(shell)
        for name in missing:
            shell.run(*self._create_pool(name))

    def _pool(self, number: int) -> str:
        return f"{self.name}-{number}"

    def _pools(self, shell: Shell) -> str:
        return shell.ask(
            *("gcloud", "container", "node-pools", "list", f"--cluster={self.cluster}"),
            *(f"--location={self.location}", f"--project={self.project}", "--format=json"),
        )

    def _fits(self, pool: dict[str, Any]) -> bool:
        if pool["config"]["machineType"] != self.pod.machine_type:
            return False
        if bool(pool["config"].get("spot")) != (self.capacity == "spot"):
            return False
        placement = pool.get("placementPolicy", {})
        if self._policy is not None:
            return bool(placement.get("policyName") == self._policy)
        # A pool of single hosts has no topology of its own.
        wanted = self.pod.shape_name if self.pod.hosts_per_slice > 1 else None
        return bool(placement.get("tpuTopology") == wanted)

    @property
    def _policy(self) -> str | None:
        """TPU7x slices get their shape from a policy, the others from the node pool."""
        several = self.pod.hosts_per_slice > 1
        return f"tpu7x-{self.pod.shape_name}" if several and self._is_tpu7x else None

    @property
    def _is_tpu7x(self) -> bool:
        return self.pod.generation.name == "tpu7x"

    def _create_policy(self, shell: Shell) -> None:
        where = (
            f"--project={self.project}",
            f"--region={(self.zone or self.location or '').rpartition('-')[0]}",
        )
        policies = ("gcloud", "compute", "resource-policies")
        names = shell.ask(*policies, "list", f"--project={self.project}", "--format=value(name)")
        if self._policy not in names.split():
            shell.run(
                *(*policies, "create", "workload-policy", str(self._policy), *where),
                *("--type=HIGH_THROUGHPUT", f"--accelerator-topology={self.pod.shape_name}"),
            )

    def _create_pool(self, name: str) -> list[str]:
        argv = [
            *("gcloud", "container", "node-pools", "create", name, f"--cluster={self.cluster}"),
            *(f"--location={self.location}", f"--project={self.project}"),
            f"--node-locations={self.zone or self.location}",
            f"--machine-type={self.pod.machine_type}",
            f"--num-nodes={self.pod.hosts_per_slice}",
        ]
        if self._policy is not None:
            argv.append(f"--placement-policy={self._policy}")
        elif self.pod.hosts_per_slice > 1:
            argv += ["--placement-type=COMPACT", f"--tpu-topology={self.pod.shape_name}"]
        if self.capacity == "spot":
            argv.append("--spot")
        if self.reservation is not None:
            argv += ["--reservation-affinity=specific", f"--reservation={self.reservation}"]
        return argv

    # --- Runs --------------------------------------------------------------------------------
    def look(self, shell: Shell) -> There:
        """Connects to the cluster, and finds what there is of this name."""
        self._connect(shell)
        found = shell.ask(
            *self._kubectl("get", "jobset", self.name, "--ignore-not-found", "--output=json")
        )
        if not found:
            return There()
        ended = json.loads(found).get("status", {}).get("terminalState")
        return There(run="ended" if ended else "going")

    def run(
        self,
        shell: Shell,
        folder: pathlib.Path,
        recipe: tuple[str, ...],
        there: There,
        resume: bool,
    ) -> None:
        """Starts the recipe on every host and returns; the cluster restarts it by itself.

        Args:
            shell: runs the commands.
            folder: for the manifest.
            recipe: module of `experiments` and its arguments.
            there: what `look` found.
            resume: whether to go on at the last checkpoint.

        Raises:
            CommandError: a run of this name is still going, or a command fails.
        """
        self.check_idle(there)
        self._create_pools(shell)
        if there.run == "ended":
            shell.run(*self._kubectl("delete", "jobset", self.name))
        file = folder / "jobset.yaml"
        shell.write(file, to_yaml(manifest(self, recipe, resume=resume)))
        shell.run(*self._kubectl("apply", f"--filename={file}"))

    def status(self, shell: Shell) -> None:
        """Shows the JobSet and its pods."""
        shell.run(*self._kubectl("get", "jobset", self.name))
        pods = f"--selector=jobset.sigs.k8s.io/jobset-name={self.name}"
        shell.run(*self._kubectl("get", "pods", pods, "--output=wide"))

    def logs(self, shell: Shell, slice_index: int, worker: int) -> None:
        """Follows the output of one host."""
        selector = (
            f"jobset.sigs.k8s.io/jobset-name={self.name},"
            f"jobset.sigs.k8s.io/job-index={slice_index},"
            f"batch.kubernetes.io/job-completion-index={worker}"
        )
        shell.run(*self._kubectl("logs", f"--selector={selector}", "--follow", "--tail=-1"))

    def delete(self, shell: Shell) -> None:
        """Ends the run and gives back the node pools that were made for it."""
        shell.run(*self._kubectl("delete", "jobset", self.name, "--ignore-not-found"))
        if self.cluster is None:
            return
        ours = re.compile(rf"{re.escape(self.name)}-\d+")
        pools = [pool["name"] for pool in json.loads(self._pools(shell) or "[]")]
        if shell.dry:
            pools = [self._pool(number) for number in range(self.slices)]
        for pool in filter(ours.fullmatch, pools):
            shell.run(
                *("gcloud", "container", "node-pools", "delete", pool, "--quiet"),
                f"--cluster={self.cluster}",
                *(f"--location={self.location}", f"--project={self.project}"),
            )

    def _kubectl(self, *arguments: str) -> tuple[str, ...]:
        """A kubectl command that cannot reach another cluster than the one meant."""
        context = f"--context=gke_{self.project}_{self.location}_{self.cluster}"
        return (
            "kubectl",
            *((context,) if self.cluster else ()),
            f"--namespace={self.namespace}",
            *arguments,
        )


# --- Manifest ------------------------------------------------------------------------------------
def manifest(job: Gke, recipe: tuple[str, ...], *, resume: bool) -> dict[str, Any]:
    """The JobSet that runs `python -m experiments.RECIPE` on every host of every slice."""
    labels = {"app.kubernetes.io/part-of": "l4jax"}
    if job.queue is not None:
        labels["kueue.x-k8s.io/queue-name"] = job.queue
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": job.name,
            "namespace": job.namespace,
            "labels": labels,
            # All pods of a Job in one node pool, and no other Job there: one Job is one slice.
            "annotations": {
                "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
            },
        },
        "spec": {
            "failurePolicy": {"maxRestarts": job.max_restarts, "rules": [_FREE_RESTART]},
            # A headless service: the hosts find each other by name before all are ready.
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "replicatedJobs": [
                {
                    "name": _REPLICATED,
                    "replicas": job.slices,
                    "template": {
                        "spec": {
                            "parallelism": job.pod.hosts_per_slice,
                            "completions": job.pod.hosts_per_slice,
                            "completionMode": "Indexed",
                            "backoffLimit": 0,
                            "podFailurePolicy": {"rules": [_ON_DISRUPTION]},
                            "template": {"spec": _pod(job, recipe, resume)},
                        }
                    },
                }
            ],
        },
    }


def _pod(job: Gke, recipe: tuple[str, ...], resume: bool) -> dict[str, Any]:
    name, *arguments = (*recipe, "--resume") if resume and "--resume" not in recipe else recipe
    selector = {
        "cloud.google.com/gke-tpu-accelerator": job.pod.generation.gke_accelerator,
        "cloud.google.com/gke-tpu-topology": job.pod.shape_name,
    }
    tolerated = ["google.com/tpu"]
    if job.capacity == "spot":
        selector["cloud.google.com/gke-spot"] = "true"
        tolerated.append("cloud.google.com/gke-spot")
    if job.reservation is not None:
        selector["cloud.google.com/reservation-name"] = job.reservation
    container = {
        "name": _CONTAINER,
        "image": job.image,
        "command": ["bash", "-c", _START, _CONTAINER],
        "args": [_literal(argument) for argument in (f"experiments.{name}", *arguments)],
        "env": _environment(job),
        "ports": [{"name": use, "containerPort": port} for use, port in _PORTS.items()],
        "resources": {"limits": {"google.com/tpu": job.pod.chips_per_host}},
        "volumeMounts": [{"name": "shared-memory", "mountPath": "/dev/shm"}],
    }
    spec: dict[str, Any] = {
        "restartPolicy": "Never",
        "nodeSelector": selector,
        "tolerations": [{"key": key, "operator": "Exists"} for key in tolerated],
        "containers": [container],
        "volumes": [{"name": "shared-memory", "emptyDir": {"medium": "Memory"}}],
    }
    if job.slices > 1:
        # Traffic between slices skips the pods' virtual network.
        spec |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    if job.service_account is not None:
        spec["serviceAccountName"] = job.service_account
    return spec


def _environment(job: Gke) -> list[dict[str, Any]]:
    attempt = "metadata.labels['jobset.sigs.k8s.io/restart-attempt']"
    return [
        {"name": _ATTEMPT, "valueFrom": {"fieldRef": {"fieldPath": attempt}}},
        *({"name": name, "value": _literal(value)} for name, value in job.environment.items()),
        *(
            {
                "name": name,
                "valueFrom": {"secretKeyRef": {"name": match[1], "key": match[2]}},
            }
            for name, match in job.secrets.items()
        ),
    ]


def _literal(text: str) -> str:
    """A text that Kubernetes leaves alone: it would put variables in the place of $(NAME)."""
    return text.replace("$", "$$")


class _Dumper(yaml.SafeDumper):
    """Writes several lines as a block, as people do; and nothing as a reference to before."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style="|" if "\n" in text else None
    ),
)


def to_yaml(value: dict[str, Any]) -> str:
    """YAML in the order of `value`."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=1000)
