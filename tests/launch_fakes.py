"""A tool that pretends to be gcloud and kubectl, and a folder where it does."""

import json
import pathlib
from typing import NamedTuple

import pytest

from tpu import launch

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
