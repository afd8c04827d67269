"""A tool that pretends to be gcloud and kubectl, a folder where it does, and what they tell."""

import json
import pathlib
import re
import sys
from typing import NamedTuple

import pytest
import yaml

from tpu import launch

RECIPE = ("benchmarks.training_step", "--out", "gs://bucket/run")
GKE = ("gke", "--name", "scout", "--image", "docker.pkg.dev/p/l4jax:1")
TOOL = r'''
"""Records its arguments, and answers with what $FAKE_WORLD/answers.json holds for their words.

An answer is text; "(fail) TEXT" to fail so; or "(run)" to play the hosts of a slice: copy files to
their home directories and run commands there. Nothing known: nothing said.
"""
import json, os, pathlib, shutil, subprocess, sys

world = pathlib.Path(os.environ["FAKE_WORLD"])
argv = [pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]
with (world / "calls").open("a") as calls:
    calls.write(json.dumps(argv) + "\n")

def homes(node, option):
    for worker in "01" if option == "all" else option:
        home = world / "hosts" / f"{node}-{worker}"
        home.mkdir(parents=True, exist_ok=True)
        yield home

def play():
    options = dict(word.split("=", 1) for word in argv if word.startswith("--") and "=" in word)
    if "scp" in argv:
        source, target = argv[5:7]
        for home in homes(target.rstrip(":"), options["--worker"]):
            shutil.copy(source, home)
        return 0
    command = ["bash", "-c", options["--command"]]
    return max(
        subprocess.run(command, cwd=home, env={**os.environ, "HOME": str(home)}).returncode
        for home in homes(argv[5], options["--worker"])
    )

file = world / "answers.json"
answers = json.loads(file.read_text()) if file.exists() else {}
for words, outputs in answers.items():
    if set(words.split()) <= set(argv) or (words == "ssh" and "scp" in argv):
        if len(outputs) > 1:
            file.write_text(json.dumps({**answers, words: outputs[1:]}))
        if outputs[0] == "(run)":
            sys.exit(play())
        if outputs[0].startswith("(fail)"):
            sys.exit("ERROR: " + outputs[0][7:])
        if "describe" in argv and not outputs[0]:
            sys.exit("ERROR: NOT_FOUND: no such thing")
        print(outputs[0])
        break
'''


PYTHON = """\
#!/bin/bash
# Stands for every Python of a host: installs nothing, and plays the recipe.
if [ "$2" = uv ] && [ "$3" = venv ]; then mkdir -p .venv/bin; cp "$0" .venv/bin/python; fi
if [[ "$2" != experiments.* ]]; then exit 0; fi
echo "token $HF_TOKEN, arguments ${*:3}"
echo "$@" >> recipe-calls
exit "$(sed -n "$(wc -l < recipe-calls)p" "$FAKE_WORLD/exits")"
"""


class World(NamedTuple):
    """A folder with pretended tools; `answers` is what they say, by words of the command."""

    path: pathlib.Path
    capfd: pytest.CaptureFixture

    def call(self, *arguments: str, recipe: tuple[str, ...] = ()) -> tuple[int, str, str]:
        """Exit status, standard output and standard error of the command line."""
        self.capfd.readouterr()
        try:
            status = launch.main([*arguments, *(("--", *recipe) if recipe else ())])
        except SystemExit as end:
            status = end.code
        return (status, *self.capfd.readouterr())

    def answer(self, words: str, *outputs: str) -> None:
        """The next commands with these words print these outputs, then the last again and again."""
        file = self.path / "answers.json"
        known = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(known | {words: outputs}))

    @property
    def calls(self) -> list[list[str]]:
        """What the tools were called with."""
        file = self.path / "calls"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def said(self, *words: str) -> list[list[str]]:
        """The calls that have all these words."""
        return [call for call in self.calls if set(words) <= set(call)]


def pretend(tools: pathlib.Path) -> None:
    """Makes a folder with the pretended tools."""
    tools.mkdir()
    for name in ("gcloud", "kubectl"):
        (tools / name).write_text(f"#!{sys.executable} -IS\n{TOOL}")
        (tools / name).chmod(0o755)


def states(world: World, *names: str, **options) -> None:
    world.answer("describe", *(resource(name, **options) if name else "" for name in names))


def resource(state: str, kind: str = "v5p-128", slices: int = 1) -> str:
    """What gcloud tells of a queued resource."""
    node = {"node": {"acceleratorType": kind}}
    many = {"multisliceParams": {"nodeCount": slices}} if slices > 1 else {}
    return json.dumps({"state": {"state": state}, "tpu": {"nodeSpec": [node | many]}})


def pool(name: str, machine: str = "ct5p-hightpu-4t", topology: str | None = "4x4x4") -> dict:
    placement = {"placementPolicy": {"tpuTopology": topology}} if topology else {}
    return {"name": name, "config": {"machineType": machine}} | placement


def hosts(world: World, *exits: int) -> None:
    """Hosts whose recipe ends with these statuses, one after another."""
    world.answer("ssh", "(run)")
    world.answer("secrets versions access", "s3cret")
    (world.path / "exits").write_text("".join(f"{status}\n" for status in exits))
    python = world.path / "bin" / "python3"
    python.write_text(PYTHON)
    python.chmod(0o755)


def attempts(world: World) -> list[str]:
    files = sorted((world.path / "hosts").rglob("recipe-calls"))
    assert [f.parts[-3] for f in files] == ["scout-0", "scout-1"]
    texts = {f.read_text() for f in files}
    assert len(texts) == 1
    return texts.pop().splitlines()


def container(manifest: dict) -> dict:
    return pod(manifest)["containers"][0]


def pod(manifest: dict) -> dict:
    return job(manifest)["template"]["spec"]


def job(manifest: dict) -> dict:
    return manifest["spec"]["replicatedJobs"][0]["template"]["spec"]


def expanded(text: str, variables: dict[str, str]) -> str:
    """What Kubernetes makes of a command or a value: $(NAME) is replaced, $$ is a dollar."""
    return re.sub(
        r"\$\$|\$\((\w+)\)",
        lambda m: "$" if m[0] == "$$" else variables.get(m[1], m[0]),
        text,
    )


def run_gke(world: World, *options: str, recipe: tuple[str, ...] = RECIPE) -> dict:
    """Runs, and returns the JobSet."""
    status, _, err = world.call("run", *GKE, *options, recipe=recipe)
    assert status == 0, err
    return yaml.safe_load((world.path / "runs/tpu/scout/jobset.yaml").read_text())
