"""The launcher: what it would do, what it does with tools that only pretend, what it refuses."""

import json
import os
import pathlib
import shlex
import subprocess
import sys

import jsonschema
import pytest
import yaml
from launch_fakes import (
    GKE,
    RECIPE,
    World,
    attempts,
    container,
    expanded,
    hosts,
    job,
    pod,
    pool,
    pretend,
    resource,
    run_gke,
    states,
)
from launch_schema import JOBSET

from l4jax.planning import chips
from tpu import flags, queued

ROOT = pathlib.Path(__file__).parent.parent
CLUSTER = ("--cluster", "pods", "--location", "us-east5", "--zone", "us-east5-a")
PROJECT = ("--project", "some-project")
VMS = ("queued", "--name", "scout", *PROJECT, "--zone", "us-east5-a")


@pytest.fixture
def world(tmp_path, monkeypatch, capfd):
    pretend(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_WORLD", str(tmp_path))
    monkeypatch.setattr(queued, "_SECONDS", 0.0)
    monkeypatch.chdir(tmp_path)
    return World(tmp_path, capfd)


# --- Dry runs ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        (
            "launch_gke.txt",
            [*GKE, *PROJECT, *CLUSTER, "--topology", "v5p:4x4x4", "--slices", "2"]
            + ["--queue", "research", "--secret-env", "HF_TOKEN=hugging-face:token"],
        ),
        (
            "launch_queued.txt",
            [*VMS, "--topology", "v6e:8x8", "--slices", "2", "--capacity", "spot"]
            + ["--secret-env", "HF_TOKEN=hugging-face"],
        ),
    ],
)
def test_a_dry_run_prints_everything_and_does_nothing(world, golden, name, arguments):
    status, out, err = world.call("run", "--dry-run", *arguments, recipe=RECIPE)
    assert (status, err, world.calls) == (0, "", [])
    assert [f.name for f in world.path.iterdir()] == ["bin"]
    golden(name, out.replace(str(ROOT), "REPOSITORY").replace(str(world.path), "HERE"))


@pytest.mark.parametrize("backend", [(*GKE, *PROJECT, *CLUSTER), VMS])
def test_what_a_dry_run_prints_is_what_a_run_does(world, backend):
    nasty = 'it\'s $(touch pwned) `touch pwned` {command} "x"\nEND_OF_FILE\ntouch pwned'
    arguments = (*backend, "--topology", "v5p:2x2x2", "--env", f"NOTE={nasty}")
    world.answer("describe", "", resource("ACTIVE", "v5p-16"))
    world.answer("node-pools list", "[]")
    _, script, _ = world.call("run", "--dry-run", *arguments, recipe=(*RECIPE, "--note", nasty))
    assert world.calls == []
    subprocess.run(["bash", "-euc", script], check=True, capture_output=True)
    printed = world.calls
    written = {f: f.read_bytes() for f in world.path.glob("runs/tpu/scout/*") if f.suffix != ".gz"}
    (world.path / "calls").unlink()
    assert world.call("run", *arguments, recipe=(*RECIPE, "--note", nasty))[0] == 0
    asked = [c for c in world.calls if not {"describe", "list", "get"} & set(c)]
    assert printed == asked
    assert len(written) == 2
    assert written == {f: f.read_bytes() for f in written}
    assert list(world.path.rglob("pwned")) == []
    for file in world.path.rglob("start.sh"):
        assert f"export NOTE={shlex.quote(nasty)}\n" in file.read_text()


# --- Manifests -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("topology", "slices", "hosts", "limit", "accelerator"),
    [
        ("v5e:2x4", 1, 1, 8, "tpu-v5-lite-podslice"),
        ("v5e:4x8", 3, 8, 4, "tpu-v5-lite-podslice"),
        ("v5p:4x4x8", 2, 32, 4, "tpu-v5p-slice"),
        ("v6e:16x16", 1, 64, 4, "tpu-v6e-slice"),
        ("tpu7x:2x2x1", 1, 1, 4, "tpu7x"),
    ],
)
def test_a_manifest_is_valid_and_covers_every_host(
    world, topology, slices, hosts, limit, accelerator
):
    options = ("--topology", topology, "--slices", str(slices), "--capacity", "spot")
    manifest = run_gke(world, *options, "--queue", "q", "--secret-env", "A=b:c", "--env", "D=e")
    jsonschema.validate(manifest, JOBSET)
    assert manifest["spec"]["replicatedJobs"][0]["replicas"] == slices
    assert (job(manifest)["parallelism"], job(manifest)["completions"]) == (hosts, hosts)
    assert container(manifest)["resources"] == {"limits": {"google.com/tpu": limit}}
    selector = pod(manifest)["nodeSelector"]
    assert selector["cloud.google.com/gke-tpu-accelerator"] == accelerator
    assert selector["cloud.google.com/gke-tpu-topology"] == topology.partition(":")[2]
    assert pod(manifest).get("hostNetwork", False) == (slices > 1)


def test_the_schema_notices_a_wrong_key(world):
    manifest = run_gke(world, "--topology", "v5p:4x4x4")
    for broken in (manifest, manifest["spec"], job(manifest), pod(manifest), container(manifest)):
        broken["typo"] = broken
        with pytest.raises(jsonschema.ValidationError, match="typo"):
            jsonschema.validate(manifest, JOBSET)
        del broken["typo"]


def test_the_published_schema_of_jobs_agrees(world):
    validate = pytest.importorskip("kubernetes_validate").validate
    manifest = run_gke(world, "--topology", "v5p:4x4x4", "--slices", "2", "--secret-env", "A=b:c")
    template = manifest["spec"]["replicatedJobs"][0]["template"]
    validate(
        {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "slice"}, **template},
        "1.33",
        strict=True,
    )


@pytest.mark.parametrize("attempt", ["0", "1", "12"])
def test_a_pod_runs_the_recipe_and_resumes_after_a_restart(world, attempt):
    odd = ("--note", "a 'b' $HOME $(NOTE) $$ *", "--empty", "")
    manifest = run_gke(
        world, "--topology", "v5e:4x4", "--env", "NOTE=$(A) $x", recipe=(*RECIPE, *odd)
    )
    python = world.path / "bin" / "python"
    python.write_text('#!/bin/bash\nprintf "%s\\n" "$NOTE" "$@"\n')
    python.chmod(0o755)
    c = container(manifest)
    variables = {"RESTART_ATTEMPT": attempt}
    for variable in c["env"]:
        if "value" in variable:
            variables[variable["name"]] = expanded(variable["value"], variables)
    argv = [expanded(word, variables) for word in (*c["command"], *c["args"])]
    shown = subprocess.run(argv, env=os.environ | variables, capture_output=True, text=True)
    resumed = ["--resume"] if attempt != "0" else []
    module = ["-m", f"experiments.{RECIPE[0]}"]
    wanted = ["$(A) $x", *module, *RECIPE[1:], *odd, *resumed]
    assert shown.stdout.removesuffix("\n").split("\n") == wanted, shown.stderr


def test_failures_restart_from_a_limited_supply_and_preemptions_for_free(world):
    manifest = run_gke(world, "--topology", "v5e:4x4", "--max-restarts", "3")
    policy = manifest["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 3
    assert [r["action"] for r in policy["rules"]] == ["RestartJobSetAndIgnoreMaxRestarts"]
    assert job(manifest)["backoffLimit"] == 0
    (rule,) = job(manifest)["podFailurePolicy"]["rules"]
    assert rule["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]


# --- GKE -----------------------------------------------------------------------------------------
def test_create_makes_only_the_node_pools_that_are_missing(world):
    others = [pool("a", "ct6e-standard-4t"), pool("b", topology="2x2x2"), pool("scout-0", "n2")]
    world.answer("node-pools list", json.dumps([*others, pool("mine")]))
    create = ("create", *GKE, *PROJECT, *CLUSTER, "--topology", "v5p:4x4x4", "--slices")
    assert world.call(*create, "1")[0] == 0
    assert world.said("node-pools", "create") == []
    assert world.call(*create, "3")[0] == 0
    made = world.said("node-pools", "create")
    assert [call[4] for call in made] == ["scout-1", "scout-2"]
    assert {"--tpu-topology=4x4x4", "--num-nodes=16"} <= set(made[0])


def test_tpu7x_slices_get_their_shape_from_a_policy(world):
    world.answer("resource-policies list", "", "tpu7x-4x4x4")
    create = ("create", *GKE, *PROJECT, *CLUSTER, "--topology", "tpu7x:4x4x4")
    for _ in range(2):
        assert world.call(*create)[0] == 0
    assert len(world.said("resource-policies", "create")) == 1
    assert len(world.said("node-pools", "create", "--placement-policy=tpu7x-4x4x4")) == 2


def test_a_run_is_not_replaced_before_it_ended(world):
    run_gke(world, "--topology", "v5p:4x4x4")
    world.answer("get jobset", json.dumps({"status": {}}))
    other = ("benchmarks.decode", "--out", "gs://bucket/other")
    for verb in ("run", "create"):
        known = {f: f.read_bytes() for f in world.path.glob("runs/tpu/scout/*")}
        options = (*GKE, "--topology", "v5p:2x2x2")
        status, _, err = world.call(verb, *options, recipe=other if verb == "run" else ())
        assert (status, "still going" in err, len(world.said("apply"))) == (1, True, 1)
        assert known == {f: f.read_bytes() for f in known}
    assert world.call("resume", "scout")[0] == 1
    world.answer("get jobset", json.dumps({"status": {"terminalState": "Failed"}}))
    assert world.call("resume", "scout")[0] == 0
    assert [call[2] for call in world.calls if "get" not in call] == ["apply", "delete", "apply"]
    manifest = yaml.safe_load((world.path / "runs/tpu/scout/jobset.yaml").read_text())
    assert container(manifest)["args"] == [f"experiments.{RECIPE[0]}", *RECIPE[1:], "--resume"]


def test_no_node_pool_is_made_for_a_run_that_is_refused(world):
    world.answer("get jobset", json.dumps({"status": {}}))
    options = (*GKE, *PROJECT, *CLUSTER, "--topology", "v5p:4x4x4")
    assert world.call("run", *options, recipe=RECIPE)[0] == 1
    assert world.said("node-pools", "create") == []
    assert not (world.path / "runs").exists()


def test_a_name_stays_where_it_is(world):
    run_gke(world, "--topology", "v5p:4x4x4", *PROJECT, *CLUSTER)
    for target in (VMS, GKE):
        status, _, err = world.call("run", *target, "--topology", "v5p:4x4x4", recipe=RECIPE)
        assert (status, err.count("\n")) == (2, 1)
        assert "run scout is in namespace default of cluster pods in us-east5" in err


def test_create_keeps_the_recipe(world):
    run_gke(world, "--topology", "v5p:4x4x4")
    assert world.call("create", *GKE, "--topology", "v5p:2x2x2")[0] == 0
    assert world.call("resume", "scout")[0] == 0
    manifest = yaml.safe_load((world.path / "runs/tpu/scout/jobset.yaml").read_text())
    assert container(manifest)["args"][:3] == [f"experiments.{RECIPE[0]}", *RECIPE[1:]]
    assert pod(manifest)["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "2x2x2"


def test_the_other_verbs_know_the_run_by_its_name(world):
    run_gke(world, "--topology", "v5p:4x4x4", "--slices", "2", *PROJECT, *CLUSTER)
    world.answer("node-pools list", json.dumps([pool("scout-1"), pool("scout-x"), pool("mine")]))
    assert world.call("status", "scout")[0] == 0
    assert world.call("logs", "scout", "--slice", "1", "--worker", "15")[0] == 0
    (logs,) = world.said("logs")
    assert "job-index=1" in logs[4]
    assert "completion-index=15" in logs[4]
    assert world.call("delete", "scout")[0] == 0
    assert [call[4] for call in world.said("node-pools", "delete")] == ["scout-1"]
    kubectl = [call for call in world.calls if call[0] == "kubectl"]
    assert {call[1] for call in kubectl} == {"--context=gke_some-project_us-east5_pods"}


# --- TPU VMs -------------------------------------------------------------------------------------
def test_create_waits_for_what_is_queued_and_asks_again_for_what_was_lost(world):
    create = ("create", *VMS, "--topology", "v5p:4x4x4")
    states(world, "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
    assert world.call(*create)[0] == 0
    assert world.said("create") == []
    states(world, "SUSPENDED", "ACTIVE")
    assert world.call(*create)[0] == 0
    assert [call[4] for call in world.calls if "describe" not in call] == ["delete", "create"]
    states(world, "", "WAITING_FOR_RESOURCES", "FAILED")
    status, _, err = world.call(*create)
    assert (status, "scout is FAILED" in err) == (1, True)


def test_create_refuses_capacity_of_another_shape(world):
    states(world, "ACTIVE", kind="v5p-64", slices=2)
    status, _, err = world.call("create", *VMS, "--topology", "v5p:4x4x4")
    assert status == 1
    assert "exists with 2 × v5p-64, not 1 × v5p-128" in err


RUN = ("run", *VMS, "--topology", "v5e:4x4", "--secret-env", "HF_TOKEN=hub:3")


def test_a_run_restarts_from_the_checkpoint_until_it_is_done(world):
    states(world, "", "ACTIVE", "ACTIVE", kind="v5litepod-16")
    hosts(world, 1, 139, 0)
    status, _, err = world.call(*RUN, recipe=RECIPE)
    assert status == 0, err
    line = f"-m experiments.{' '.join(RECIPE)}"
    assert attempts(world) == [line, f"{line} --resume", f"{line} --resume"]
    assert "restart 2 of 10" in err
    assert len(world.said("scp")) == 1  # what is installed stays
    assert "token s3cret, arguments" in world.call("status", "scout")[1]
    written = [f for f in (world.path / "runs").rglob("*") if f.is_file()]
    assert "s3cret" not in "".join(map(str, world.calls))
    assert not any(b"s3cret" in f.read_bytes() for f in written)


def test_a_run_that_was_preempted_is_installed_on_new_capacity(world):
    states(world, "ACTIVE", "ACTIVE", "SUSPENDED", "ACTIVE", kind="v5litepod-16")
    hosts(world, 1, 0)
    assert world.call(*RUN, recipe=RECIPE)[0] == 0
    assert len(world.said("queued-resources", "create")) == 1
    assert len(world.said("scp")) == 2
    assert len(attempts(world)) == 2


def test_a_run_on_vms_that_still_goes_is_not_replaced(world):
    states(world, "ACTIVE", kind="v5litepod-16")
    world.answer("ssh", "alive")
    status, _, err = world.call(*RUN, recipe=RECIPE)
    assert (status, "still going" in err, world.said("scp")) == (1, True, [])
    assert not (world.path / "runs").exists()


@pytest.mark.parametrize(
    ("exits", "restarts", "message"),
    [([2], "5", "refuses its arguments"), ([1, 7], "1", "exit status 7 after 1 restarts")],
)
def test_a_run_gives_up(world, exits, restarts, message):
    states(world, "ACTIVE", kind="v5litepod-16")
    hosts(world, *exits)
    status, _, err = world.call(*RUN, "--max-restarts", restarts, recipe=RECIPE)
    assert status == 1
    assert message in err.splitlines()[-1]
    assert len(attempts(world)) == len(exits)


# --- Flags ---------------------------------------------------------------------------------------
def test_every_flag_has_a_reason_and_a_source():
    for flag in flags.FLAGS:
        assert flag.purpose.endswith(".")
        assert flag.source.startswith("https://")
        assert set(flag.generations) <= set(chips.GENERATIONS)


def test_the_training_step_asks_for_the_same():
    from l4jax.training.trainer import TPU_OPTIONS

    table = {flag.name: flag.value for flag in flags.FLAGS}
    assert TPU_OPTIONS.items() <= table.items()


def test_flags_follow_the_number_of_slices():
    def of(topology: str, slices: int = 1) -> str:
        return flags.libtpu_init_args(chips.parse(topology, slices=slices))

    assert "data_parallel" not in of("v5p:4x4x4")
    assert "data_parallel" in of("v5p:4x4x4", 2)


def test_the_installed_libtpu_knows_every_flag():
    pytest.importorskip("libtpu")
    code = (
        "from jax.experimental import topologies as t;"
        "print(len(t.get_topology_desc(platform='tpu', topology_name='v5p:2x2x1').devices))"
    )
    environment = {
        "LIBTPU_INIT_ARGS": " ".join(f"--{f.name}={f.value}" for f in flags.FLAGS),
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5p-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    argv = [sys.executable, "-c", code]
    done = subprocess.run(argv, env=os.environ | environment, capture_output=True, text=True)
    assert done.stdout == "4\n", done.stderr


# --- Bad input -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--topology v5p:4x4x5", "slices of v5p are v5p:2x2x1, "),
        ("--topology v3:2x2", "generations are v5e, v5p, v6e, tpu7x"),
        ("--topology tpu7x:4x4x4", "tpu7x is had by GKE"),
        ("--topology v5p:4x4x4 --slices 0", "slices 0 must be at least 1"),
        ("--topology v5p:4x4x4 --name Scout", "name 'Scout' must be 1 to 32 small letters"),
        ("--topology v5p:4x4x4 --name scout\n", "name 'scout\\n' must be"),
        ("--topology v5p:4x4x4 --zone east", "zone 'east' must be a zone such as us-east5-a"),
        ("--topology v5p:4x4x4 --project $(x)", "project '$(x)' must be a project id"),
        ("--topology v5p:4x4x4 --runtime a;b", "runtime 'a;b' has characters"),
        ("--topology v5p:4x4x4 --max-restarts -1", "max_restarts -1 must not be negative"),
        ("--topology v5p:4x4x4 --env HF_TOKEN=hf_x", "HF_TOKEN looks like a secret"),
        ("--topology v5p:4x4x4 --env PRIVATE_KEY=x", "PRIVATE_KEY looks like a secret"),
        ("--topology v5p:4x4x4 --env 1=2", "env name '1' must be letters"),
        ("--topology v5p:4x4x4 --env A", "env 'A' must have the form NAME=VALUE"),
        ("--topology v5p:4x4x4 --env A=1 --env A=2", "env A is given twice"),
        ("--topology v5p:4x4x4 --secret-env A=a;b", "secret_env A must have the form NAME=SECRET"),
    ],
)
def test_bad_options_get_one_line_and_status_2(world, arguments, message):
    options = arguments.split(" ")
    status, out, err = world.call("run", *VMS, *options, recipe=RECIPE)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert world.calls == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "a b"], "image 'a b' must be a container image"),
        (["--image", "REPO/l4jax:1"], "in lower case up to the tag"),
        (["--env", "RESTART_ATTEMPT=0"], "RESTART_ATTEMPT is set by JobSet"),
        (["--secret-env", "hf_123"], "secret_env must have the form NAME=KUBERNETES_SECRET:KEY"),
        (["--secret-env", "hf_123=="], "secret_env must have the form NAME=KUBERNETES_SECRET:KEY"),
        (["--namespace", "A"], "namespace 'A' must be 1 to 63 small letters"),
        (["--zone", "us-east5-a"], "only go with --cluster"),
        (["--cluster", "c"], "--cluster also needs --project and --location"),
        ([*PROJECT, "--cluster", "c", "--location", "us-east5"], "say the --zone of the chips"),
        (["--capacity", "reserved"], "--capacity reserved and --reservation NAME go together"),
        (
            ["--secret-env", "A=hf_123"],
            "secret_env A must have the form NAME=KUBERNETES_SECRET:KEY",
        ),
        (["--topology", "v5e:2x2", "--slices", "2"], "v5e:2x2 is one host"),
    ],
)
def test_bad_gke_options_get_one_line_and_status_2(world, arguments, message):
    status, out, err = world.call("run", *GKE, "--topology", "v5p:4x4x4", *arguments, recipe=RECIPE)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert "hf_123" not in err


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ((), "say what to run after `--`"),
        (("nothing", "--out", "x"), "no recipe 'nothing' in experiments/; there are benchmarks."),
        (("../l4jax/cli", "--out", "x"), "no recipe '../l4jax/cli'"),
        (("benchmarks.__init__", "--out", "gs://b/x"), "no recipe 'benchmarks.__init__'"),
        *(
            (("benchmarks.training_step", *out), "give the recipe an --out that every host can")
            for out in ((), ("--out",), ("--out=",), ("--out", "runs/local"), ("--out", "--x"))
        ),
    ],
)
def test_a_recipe_that_cannot_run_is_refused_before_anything_is_paid_for(world, recipe, message):
    status, _, err = world.call("run", *GKE, "--topology", "v5p:4x4x4", recipe=recipe)
    assert (status, message in err, world.calls) == (2, True, [])


def test_an_unknown_run_lists_the_known_ones(world):
    run_gke(world, "--topology", "v5p:4x4x4")
    assert "there are: scout" in world.call("status", "other")[2]
    assert world.call("logs", "scout", "--worker", "16")[0] == 2
    assert world.call("status", "scout", recipe=RECIPE)[0] == 2


def test_variables_that_only_resemble_a_secret_are_accepted(world):
    options = ("--env", "TOKENIZERS_PARALLELISM=false", "--image", "host:5000/a/b:V1")
    manifest = run_gke(world, "--topology", "v5p:4x4x4", *options)
    assert {"name": "TOKENIZERS_PARALLELISM", "value": "false"} in container(manifest)["env"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"job": []}, "job must be an object"),
        ({"recipe": "text"}, "recipe a list of texts"),
        ({"backend": ["gke"]}, "must be gke or queued"),
        ({"topology": 5}, "topology cannot be 5"),
        ({"capacity": "free"}, "capacity cannot be 'free'"),
        ({"env": "A=1"}, "env cannot be 'A=1'"),
        ({"slices": 0}, "slices 0 must be at least 1"),
        ({"typo": 1}, "typo"),
        ({"name": "other"}, "it is of run 'other'"),
        (None, "it has no backend, job and recipe"),
    ],
)
def test_a_damaged_file_gets_one_line(world, change, message):
    run_gke(world, "--topology", "v5p:4x4x4")
    called = len(world.calls)
    file = world.path / "runs/tpu/scout/launch.json"
    values = json.loads(file.read_text())
    if change is not None:
        (values if change.keys() <= values.keys() else values["job"]).update(change)
    file.write_text(json.dumps(values if change else [values]))
    for verb in (("status", "scout"), ("create", *GKE, "--topology", "v5p:4x4x4")):
        status, _, err = world.call(*verb)
        assert (status, err.count("\n"), len(world.calls)) == (2, 1, called)
        assert "scout/launch.json is damaged: " in err
        assert message in err


def test_a_missing_tool_says_where_to_get_it(world, monkeypatch):
    monkeypatch.setenv("PATH", str(world.path))
    status, _, err = world.call("run", *GKE, "--topology", "v5p:4x4x4", recipe=RECIPE)
    assert (status, err.count("\n")) == (1, 2)
    assert "kubectl is not installed; get it with `gcloud components install kubectl" in err


def test_a_failing_tool_is_named_with_its_last_words(world):
    world.answer("describe", "(fail) PERMISSION_DENIED: not yours")
    status, _, err = world.call("create", *VMS, "--topology", "v5p:4x4x4")
    assert status == 1
    assert "gcloud compute tpus queued-resources describe scout" in err
    assert "PERMISSION_DENIED: not yours" in err


def test_it_runs_as_a_module():
    argv = [sys.executable, "-m", "tpu.launch", "run", *VMS, "--topology", "v9:1"]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("launch: topology 'v9:1'")
