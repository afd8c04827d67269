"""Limits on the code itself: sizes, import cycles, what importing the model costs."""

from __future__ import annotations

import ast
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
FILES = sorted((ROOT / "l4jax").rglob("*.py"))
MAX_REACH, MAX_FILE, MAX_FUNCTION, MAX_SUPPRESSIONS = 2000, 500, 80, 2 / 1000
SUPPRESSION = re.compile(r"#\s*(noqa|type:\s*ignore|ruff:|mypy:|pyright:|pragma)")


def code_lines(file: pathlib.Path) -> int:
    return sum(bool(line.strip()) for line in file.read_text().splitlines())


def module_name(file: pathlib.Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in FILES}


def imported(name: str) -> set[str]:
    """Modules of ours that a module names in its import statements, wherever they stand."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & set(MODULES) - {name}


GRAPH = {name: imported(name) for name in MODULES}


def reachable(start: str) -> set[str]:
    seen, waiting = set(), list(GRAPH[start])
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += GRAPH[name]
    return seen


def test_the_model_is_read_in_one_sitting():
    modules = reachable("l4jax.models.llama4") | {"l4jax.models.llama4"}
    assert {"l4jax.models.attention", "l4jax.kernels.experts", "l4jax.config"} <= modules
    assert sum(code_lines(MODULES[name]) for name in modules) <= MAX_REACH


@pytest.mark.parametrize("folder", ["l4jax", "tests"])
def test_no_file_is_too_long(folder):
    sizes = {str(f): len(f.read_text().splitlines()) for f in (ROOT / folder).rglob("*.py")}
    assert sizes
    assert {name: size for name, size in sizes.items() if size > MAX_FILE} == {}


def test_no_function_is_too_long():
    functions = [
        (f"{name}:{node.name}", node.end_lineno - node.lineno + 1)
        for name, file in MODULES.items()
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert len(functions) > 50
    assert [f for f in functions if f[1] > MAX_FUNCTION] == []


def test_no_module_imports_itself_by_way_of_others():
    assert [name for name in MODULES if name in reachable(name)] == []


def test_suppressions_are_rare_and_named():
    lines = [line for file in FILES for line in file.read_text().splitlines()]
    found = [line.strip() for line in lines if SUPPRESSION.search(line)]
    assert len(found) <= MAX_SUPPRESSIONS * len(lines), found
    assert [line for line in found if not re.search(r"noqa: [A-Z]+\d+|ignore\[\w", line)] == []


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("l4jax.models.llama4", "torch transformers tyro grain orbax tokenizers matplotlib"),
        ("l4jax.checkpoints", "torch transformers tyro grain tokenizers matplotlib"),
    ],
)
def test_importing_loads_nothing_heavy(module, absent):
    code = f"import sys, {module}; print(*sorted(set({absent.split()!r}) & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.split() == []
