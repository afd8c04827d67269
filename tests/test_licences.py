"""Licences: what they ask, which one a checkpoint has, what an export carries."""

from pathlib import Path

import pytest

from l4jax import presets
from l4jax.checkpoints import licences
from l4jax.checkpoints.licences import LICENCES, check_name, files, from_name, get, named_in


# --- The table -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("version", "model"),
    [
        ("3.0", "Meta Llama 3"),
        ("3.1", "Llama 3.1"),
        ("3.2", "Llama 3.2"),
        ("3.3", "Llama 3.3"),
        ("4", "Llama 4"),
    ],
)
def test_notice_and_title_name_the_version(version: str, model: str) -> None:
    licence = LICENCES[version]
    assert licence.version == version
    assert licence.title == f"{model} Community License Agreement"
    assert licence.notice == (
        f"{model} is licensed under the {model} Community License, "
        "Copyright © Meta Platforms, Inc. All Rights Reserved."
    )


def test_the_first_is_stricter() -> None:
    assert (LICENCES["3.0"].built_with, LICENCES["3.0"].prefix) == (
        "Built with Meta Llama 3",
        "Llama 3",
    )
    assert {v.built_with for v in LICENCES.values() if v.version != "3.0"} == {"Built with Llama"}
    assert {v.prefix for v in LICENCES.values() if v.version != "3.0"} == {"Llama"}


@pytest.mark.parametrize(
    ("words", "versions"),
    [
        ("copy of the agreement", {"3.0", "3.1", "3.2", "3.3", "4"}),
        ("700 million", {"3.0", "3.1", "3.2", "3.3", "4"}),
        ("NOTICE", {"3.0", "3.1", "3.2", "3.3", "4"}),
        ("use-policy", {"3.0", "3.1", "3.2", "3.3", "4"}),
        ("or their outputs begin with", {"3.1", "3.2", "3.3", "4"}),
        ("European Union", {"3.2", "3.3", "4"}),
        ("improve a large language model", {"3.0"}),
    ],
)
def test_duties(words: str, versions: set[str]) -> None:
    assert {v for v in LICENCES if any(words in duty for duty in LICENCES[v].duties)} == versions


@pytest.mark.parametrize(
    ("spelled", "version"),
    [
        *[(v, v) for v in LICENCES],
        ("4.0", "4"),
        ("llama4", "4"),
        ("Llama 4", "4"),
        ("LLAMA-4", "4"),
        ("llama-3.1", "3.1"),
        ("llama3_2", "3.2"),
        (" Llama 3.3\n", "3.3"),
        ("Llama 3", "3.0"),
        ("3", "3.0"),
        ("Meta Llama 3", "3.0"),
    ],
)
def test_get(spelled: str, version: str) -> None:
    assert get(spelled) is LICENCES[version]


@pytest.mark.parametrize(
    "version", ["", "2", "Llama 3.4", "5", "4.1", "apache-2.0", "Llama 4 Scout"]
)
def test_get_rejects(version: str) -> None:
    with pytest.raises(ValueError, match=r"no Llama licence '.*'; known are 3.0, 3.1, 3.2, 3.3, 4"):
        get(version)


def test_get_knows_the_presets() -> None:
    published = {n: p for n, p in presets.PRESETS.items() if p.licence.startswith("Llama")}
    assert len(published) >= 12
    for name, preset in published.items():
        assert get(preset.licence).version == from_name(name), name


# --- Whose a checkpoint is -----------------------------------------------------------------------
@pytest.mark.parametrize(
    ("file", "text", "version"),
    [
        *[("NOTICE", licence.notice, v) for v, licence in LICENCES.items()],
        ("Notice.txt", "Llama 3.1 is licensed\nunder the Llama 3.1\nCommunity License", "3.1"),
        ("LICENSE", "META LLAMA 3 COMMUNITY LICENSE AGREEMENT\nMeta Llama 3 Version", "3.0"),
        ("LICENSE.txt", "**LLAMA 3.3 COMMUNITY LICENSE AGREEMENT**", "3.3"),
        ("LICENSE", "LLAMA 2 COMMUNITY LICENSE AGREEMENT", None),
        ("LICENSE", "Apache License, for code that runs Llama 4", None),
        ("README.md", "---\nlicense: llama4\n---\n# A model", "4"),
        (
            "README.md",
            "---\nlanguage: en\nlicense: 'llama3.1'  # as its base\ntags: [a]\n---\n",
            "3.1",
        ),
        ("README.md", "---\r\nlicense: other\r\nlicense_name: llama4\r\n---\r\n", "4"),
        ("README.md", "---\nlicense: llama3\n---", "3.0"),
        ("README.md", "---\nlicense: llama2\n---", None),
        ("README.md", "---\nlicense: mit\n---\nLike license: llama4, but not.", None),
        ("README.md", "No front matter.\nlicense: llama4\n", None),
        ("README.md", "---\nlicense: llama4\nnever closed", None),
        ("NOTES", LICENCES["4"].notice, None),
        ("config.json", LICENCES["4"].notice, None),
    ],
)
def test_named_in(file: str, text: str, version: str | None, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(text.encode())
    assert named_in(tmp_path) == version


def test_named_in_reads_whatever_lies_there(tmp_path: Path) -> None:
    assert named_in(tmp_path) is None
    (tmp_path / "NOTICE").mkdir()
    (tmp_path / "LICENSE").write_bytes(b"\xff\xfe LLAMA 4 COMMUNITY LICENSE \x80")
    (tmp_path / "README.md").write_text("---\nlicense: llama4\n---")
    assert named_in(tmp_path) == "4"


def test_named_in_rejects_contradictions(tmp_path: Path) -> None:
    (tmp_path / "NOTICE").write_text(LICENCES["3.1"].notice)
    (tmp_path / "README.md").write_text("---\nlicense: llama3.2\n---")
    with pytest.raises(ValueError, match=r"several.*3\.2 \(README\.md\).*3\.1 \(NOTICE\)"):
        named_in(tmp_path)
    (tmp_path / "README.md").unlink()
    (tmp_path / "NOTICE").write_text(LICENCES["3.1"].notice + LICENCES["4"].notice)
    with pytest.raises(ValueError, match="several"):
        named_in(tmp_path)


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("Llama-4-Scout-17B-16E", "4"),
        ("meta-llama/Llama-4-Maverick-17B-128E-Instruct-FP8", "4"),
        ("Meta-Llama-3-8B", "3.0"),
        ("llama3-8b", "3.0"),
        ("Llama-3.1-405B", "3.1"),
        ("Meta-Llama-3.1-8B-Instruct", "3.1"),
        ("llama3-1-8b-instruct", "3.1"),
        ("llama3_2", "3.2"),
        ("Llama_3_8B", "3.0"),
        ("Llama3.2-11B-Vision", "3.2"),
        ("Llama 3.3 70B", "3.3"),
        ("Hermes-3-Llama-3.1-8B", "3.1"),
        ("Llama-Guard-4-12B", "4"),
        ("llama-guard-4", "4"),
        ("Llama-Guard-3-8B-INT8", "3.1"),
        ("Llama-Guard-3-1B-INT4", "3.2"),
        ("Llama-Guard-3-11B-Vision", "3.2"),
        ("Meta-Llama-Guard-2-8B", "3.0"),
        ("Llama-Guard-3", None),
        ("LlamaGuard-7b", None),
        ("Llama-2-7b", None),
        ("llama-13b", None),
        ("open_llama_3b_v2", None),
        ("TinyLlama-1.1B", None),
        ("CodeLlama-34b", None),
        ("llama-7b-4bit", None),
        ("llama-4bit", None),
        ("Llama-3.9-1B", None),
        ("Llama-3.14", None),
        ("DeepSeek-R1-Distill-Llama-8B", None),
        ("Llama-3.1-to-Llama-4-merge", None),
        ("checkpoint-4", None),
        ("", None),
    ],
)
def test_from_name(name: str, version: str | None) -> None:
    assert from_name(name) == version


# --- What an export carries ----------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("Llama-4-Scout-mine", "4"),
        ("llama 4 scout", "4"),
        ("LLAMA_mine", "3.1"),
        ("Llama3-mine", "3.1"),
        ("Llama-3-8B-mine", "3.0"),
        ("llama_3 mine", "3.0"),
        ("LLAMA 3", "3.0"),
    ],
)
def test_names_that_do(name: str, version: str) -> None:
    check_name(name, LICENCES[version])


@pytest.mark.parametrize(
    ("name", "version", "better"),
    [
        ("Scout-mine", "4", "Llama-Scout-mine"),
        ("my llama", "3.1", "Llama-my-llama"),
        ("Meta-Llama-3.1-8B", "3.1", "Llama-8B"),
        ("Meta-Llama-3-8B-mine", "3.0", "Llama-3-8B-mine"),
        ("Llama-mine", "3.0", "Llama-3-mine"),
        ("Llama3-mine", "3.0", "Llama-3-mine"),
        ("Llama-3.1-mine", "3.0", "Llama-3-mine"),
        ("Llama-30-mine", "3.0", "Llama-3-mine"),
        ("Metal-8B", "3.0", "Llama-3-Metal-8B"),
        ("", "4", "Llama-mine"),
    ],
)
def test_names_that_do_not(name: str, version: str, better: str) -> None:
    with pytest.raises(ValueError, match=f"model name '{name}' does not.*; call it {better}, say"):
        check_name(name, LICENCES[version])
    check_name(better, LICENCES[version])


@pytest.mark.parametrize("version", LICENCES)
def test_files(version: str, tmp_path: Path) -> None:
    licence = LICENCES[version]
    texts = files(licence, name="Llama-3-tiny")
    assert list(texts) == ["NOTICE", "LICENSE", "README.md"]
    assert texts["NOTICE"] == licence.notice + "\n"
    assert licence.title in texts["LICENSE"]
    assert licence.url in texts["LICENSE"]
    assert "copy of\nthe agreement" in texts["LICENSE"]
    card = texts["README.md"]
    identifier = "llama3" if version == "3.0" else f"llama{version}"
    assert card.startswith(f"---\nlicense: {identifier}\n")
    for words in ("# Llama-3-tiny\n", licence.built_with, "l4jax", licence.notice, "add a copy"):
        assert words in card
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert named_in(tmp_path) == version


def test_files_of_the_source_are_kept() -> None:
    taken = ["LICENSE.txt", "Notice", "USE_POLICY.md", "config.json"]
    texts = files(LICENCES["4"], name="Llama-4", source_files=taken)
    assert list(texts) == ["README.md"]
    assert "a copy is beside this card" in texts["README.md"]
    assert "README.md" not in files(LICENCES["4"], name="Llama-4", source_files=["README.md"])


@pytest.mark.parametrize("name", ["", "  ", "Llama\nlicense: mit"])
def test_files_reject_names(name: str) -> None:
    with pytest.raises(ValueError, match="must be one line"):
        files(licences.get("4"), name=name)
