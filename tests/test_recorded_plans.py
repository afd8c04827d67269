"""The table of recorded plans."""

from __future__ import annotations

import json
import types

import pytest

from l4jax import presets
from l4jax.planning import chips
from tpu.plans import __main__ as plans


@pytest.fixture
def few(monkeypatch):
    """A table of two rows, made without compiling."""
    rows = [plans.Row("llama3.1-8b", "v5p:2x2x1", n, "train") for n in (1, 2)]
    monkeypatch.setattr(plans, "rows", lambda: iter(rows))
    monkeypatch.setattr(plans, "version", lambda: "code1")
    made = []

    def fake(command, **_):
        made.append(command)
        facts = {"fits": True, "mesh": {"fsdp": 4}, "remat": "full", "date": "2026-11-26"}
        facts |= {"hbm_gib": {"total": 1.0, "capacity": 2.0}, "wire_gb": {"total": 3.0}}
        facts |= {"roofline_seconds": {"total": 4.0}, "bound": "ici", "mfu_bound": 0.5}
        facts |= {"versions": {"jax": "1", "libtpu": "2"}}
        failed = "--slices" in command
        return types.SimpleNamespace(
            returncode=int(failed), stdout=json.dumps(facts), stderr="noise\nl4jax: no | good\n"
        )

    monkeypatch.setattr(plans.subprocess, "run", fake)
    return made


def test_rows_are_made_once_for_the_same_code(few, tmp_path, capsys, monkeypatch):
    assert plans.main([], tmp_path) == 1, "one row failed"
    assert len(few) == 2
    text = (tmp_path / "README.md").read_text()
    assert (
        "| llama3.1-8b | v5p:2x2x1 | train | fsdp=4 | full | 1.0 of 2.0 | 3 | 4 | ici | 50% |"
        in text
    )
    assert "| llama3.1-8b | v5p:2x2x1 × 2 | train | no / good |" in text
    assert "jax 1, libtpu 2" in text
    assert plans.main([], tmp_path) == 0
    assert len(few) == 2
    assert plans.main(["--force", "--only", "2x2x1_"], tmp_path) == 0
    assert len(few) == 3
    monkeypatch.setattr(plans, "version", lambda: "code2")
    plans.main([], tmp_path)
    assert len(few) == 5


def test_what_does_not_fit_is_planned_with_fewer_sequences(few, tmp_path, monkeypatch):
    made = plans._made

    def large(command):
        found, batch = made(command), 16
        if "--batch" in command:
            batch = int(command[command.index("--batch") + 1])
        if batch == 4:
            return found | {"batch": batch}
        advice = ["--seq 2048", f"--batch {batch // 2} --mesh fsdp=2,tensor=2"]
        return found | {"fits": False, "batch": batch, "advice": advice}

    monkeypatch.setattr(plans, "_made", large)
    plans.main(["--only", "2x2x1_"], tmp_path)
    assert [command[-5:] for command in few[1:]] == [
        ["--batch", n, "--mesh", "fsdp=2,tensor=2", "--json"] for n in ("8", "4")
    ]
    text = (tmp_path / "README.md").read_text()
    assert "| llama3.1-8b | v5p:2x2x1 | train | fsdp=4 | full | 1.0 of 2.0: does not fit |" in text
    assert "| llama3.1-8b | v5p:2x2x1 | train, batch 4 | fsdp=4 | full | 1.0 of 2.0 | 3 |" in text


def test_rows_can_be_listed_and_must_exist(few, tmp_path, capsys):
    assert plans.main(["--list"], tmp_path) == 0
    assert capsys.readouterr().out.splitlines()[0] == (
        "l4jax plan llama3.1-8b --topology v5p:2x2x1 --task train"
    )
    assert plans.main(["--only", "nothing"], tmp_path) == 2
    assert few == []


def test_the_table_names_what_exists():
    assert set(plans.PRESETS) <= set(presets.PRESETS)
    for topology in (*plans.LARGE.values(), *(name for name, _ in plans.SLICES.values())):
        assert chips.parse(topology)
    assert plans.smallest("llama3.1-8b", "v5p", "train") == "v5p:2x2x1"
    assert plans.smallest("llama4-behemoth", "v6e", "train") is None
    assert len(plans.version()) == 12
