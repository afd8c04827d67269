"""Commands that are shown before they run, or shown only."""

from __future__ import annotations

import dataclasses
import pathlib
import shlex
import shutil
import subprocess
import sys

INSTALL = {
    "gcloud": "the Google Cloud CLI: https://cloud.google.com/sdk/docs/install",
    "kubectl": "it with `gcloud components install kubectl gke-gcloud-auth-plugin`",
    "tar": "tar",
}


class CommandError(RuntimeError):
    """A command is missing or failed."""


@dataclasses.dataclass(frozen=True)
class Shell:
    """Runs commands given as lists of arguments; no local shell ever reads them.

    With `dry` nothing runs and nothing is written. Standard output is then a bash script of all
    that would have been done if nothing was there yet.
    """

    dry: bool = False

    def note(self, text: str) -> None:
        """Says something to people."""
        print(f"# {text}", file=sys.stdout if self.dry else sys.stderr, flush=True)

    def status(self, *argv: str) -> int:
        """Runs a command on this terminal and returns its exit status."""
        print(shlex.join(argv), file=sys.stdout if self.dry else sys.stderr, flush=True)
        if self.dry:
            return 0
        return subprocess.run([_find(argv[0]), *argv[1:]], check=False).returncode

    def run(self, *argv: str) -> None:
        """Runs a command that must succeed.

        Raises:
            CommandError: it is missing or failed.
        """
        if status := self.status(*argv):
            raise CommandError(f"`{shlex.join(argv)}` failed with exit status {status}")

    def ask(self, *argv: str) -> str:
        """The output of a command that changes nothing; empty when dry, or when it says NOT_FOUND.

        Raises:
            CommandError: it is missing, or failed for another reason.
        """
        if self.dry:
            return ""
        done = subprocess.run(
            [_find(argv[0]), *argv[1:]], capture_output=True, text=True, check=False
        )
        if done.returncode and "NOT_FOUND" not in done.stderr:
            reason = " ".join(done.stderr.split())[-300:] or f"exit status {done.returncode}"
            raise CommandError(f"`{shlex.join(argv)}` failed: {reason}")
        return "" if done.returncode else done.stdout.strip()

    def write(self, file: pathlib.Path, text: str) -> None:
        """Writes a text file whose last line is ended."""
        if self.dry:
            end = "END_OF_FILE"
            while end in text:
                end += "_"
            print(f"mkdir -p {shlex.quote(str(file.parent))}")
            print(f"cat > {shlex.quote(str(file))} <<'{end}'\n{text}{end}", flush=True)
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f"{file.name}.partial")
        partial.write_text(text)
        partial.replace(file)


def _find(program: str) -> str:
    path = shutil.which(program)
    if path is None:
        raise CommandError(f"{program} is not installed; get {INSTALL[program]}")
    return path
