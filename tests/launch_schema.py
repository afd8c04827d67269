"""What a JobSet may hold, strictly: a key that is not here is an error.

Keys and types are those of the custom resource definition of JobSet 0.9 to 0.11 and of the
Kubernetes API (Job v1, Pod v1), as far as the launcher uses them.
"""

from typing import Any

TEXT = {"type": "string"}
COUNT = {"type": "integer", "minimum": 0}
FLAG = {"type": "boolean"}
TEXTS = {"type": "object", "additionalProperties": TEXT}


def some(*required: str, **properties: Any) -> dict[str, Any]:
    """An object with these keys only."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


def every(item: dict[str, Any]) -> dict[str, Any]:
    """A list that is not empty."""
    return {"type": "array", "items": item, "minItems": 1}


def one_of(*values: str) -> dict[str, Any]:
    return {"enum": list(values)}


_VARIABLE = some(
    "name",
    name={"type": "string", "pattern": r"^[-._a-zA-Z][-._a-zA-Z0-9]*$"},
    value=TEXT,
    valueFrom=some(
        fieldRef=some("fieldPath", apiVersion=TEXT, fieldPath=TEXT),
        secretKeyRef=some("name", "key", name=TEXT, key=TEXT, optional=FLAG),
    ),
)
_CONTAINER = some(
    "name",
    "image",
    name=TEXT,
    image=TEXT,
    command=every(TEXT),
    args=every(TEXT),
    env=every(_VARIABLE),
    ports=every(
        some(
            "containerPort",
            name={"type": "string", "maxLength": 15},
            containerPort={"type": "integer", "minimum": 1, "maximum": 65535},
            protocol=one_of("TCP", "UDP", "SCTP"),
        )
    ),
    resources=some(limits={"type": "object"}, requests={"type": "object"}),
    volumeMounts=every(some("name", "mountPath", name=TEXT, mountPath=TEXT, readOnly=FLAG)),
)
_POD = some(
    "containers",
    restartPolicy=one_of("Never", "OnFailure"),
    nodeSelector=TEXTS,
    tolerations=every(some(key=TEXT, operator=one_of("Exists", "Equal"), value=TEXT, effect=TEXT)),
    containers=every(_CONTAINER),
    volumes=every(some("name", name=TEXT, emptyDir=some(medium=TEXT, sizeLimit=TEXT))),
    hostNetwork=FLAG,
    dnsPolicy=one_of("ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"),
    serviceAccountName=TEXT,
)
_JOB = some(
    "template",
    parallelism=COUNT,
    completions=COUNT,
    completionMode=one_of("Indexed", "NonIndexed"),
    backoffLimit=COUNT,
    podFailurePolicy=some(
        "rules",
        rules=every(
            some(
                "action",
                action=one_of("FailJob", "FailIndex", "Ignore", "Count"),
                onPodConditions=every(
                    some("type", "status", type=TEXT, status=one_of("True", "False", "Unknown"))
                ),
            )
        ),
    ),
    template=some("spec", metadata=some(labels=TEXTS, annotations=TEXTS), spec=_POD),
)
JOBSET = some(
    "apiVersion",
    "kind",
    "metadata",
    "spec",
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=some("name", name=TEXT, namespace=TEXT, labels=TEXTS, annotations=TEXTS),
    spec=some(
        "replicatedJobs",
        failurePolicy=some(
            maxRestarts=COUNT,
            restartStrategy=one_of("Recreate", "BlockingRecreate"),
            rules=every(
                some(
                    "name",
                    "action",
                    name=TEXT,
                    action=one_of(
                        "FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"
                    ),
                    onJobFailureReasons=every(TEXT),
                    targetReplicatedJobs=every(TEXT),
                )
            ),
        ),
        network=some(enableDNSHostnames=FLAG, subdomain=TEXT, publishNotReadyAddresses=FLAG),
        replicatedJobs=every(
            some(
                "name",
                "template",
                name=TEXT,
                replicas=COUNT,
                groupName=TEXT,
                template=some("spec", spec=_JOB, metadata=some(labels=TEXTS, annotations=TEXTS)),
            )
        ),
    ),
)
