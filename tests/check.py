"""All checks, fastest first: format, lint, import rules, types, tests. Stops at the first failure.

python -m tests.check [pytest arguments]
"""

import subprocess
import sys

CHECKS = (
    ("ruff", "format", "--check", "."),
    ("ruff", "check", "."),
    ("lint-imports",),
    ("mypy",),
)
# A file's tests share what they compile, so each file goes to one of two processes.
TESTS = ("pytest", "-n", "2", "--dist", "loadfile")


def main() -> int:
    for name, *arguments in (*CHECKS, (*TESTS, *sys.argv[1:])):
        print(f"== {name} {' '.join(arguments)}".rstrip(), flush=True)
        if name == "lint-imports":  # a console script without a module to run
            code = (
                "import sys; from importlinter.cli import lint_imports_command as c; sys.exit(c())"
            )
            command = [sys.executable, "-c", code]
        else:
            command = [sys.executable, "-m", name]
        status = subprocess.run([*command, *arguments], check=False).returncode
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
