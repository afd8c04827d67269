"""What travels beside the weights: tokenizer, templates, settings, licence and notice."""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import l4jax.checkpoints.licences as licences
from l4jax import presets
from l4jax.checkpoints.formats import Format, Model, Source, is_llama3

_CARRIED = re.compile(
    r"tokenizer(_config)?\.(json|model)|special_tokens_map\.json|added_tokens\.json"
    r"|generation_config\.json|(pre)?processor_config\.json|chat_template\.(jinja|json)"
    r"|((licen[sc]e|use_policy|notice)[^/]*|readme\.md)",
    re.IGNORECASE,
)
_NONE = "none"


class Extras(NamedTuple):
    """What to write beside the weights.

    files: by name, contents or the file to copy.
    described: what the new checkpoint remembers of the model's origin.
    name: of the model. licence: its version, or "none".
    notes: for the user, one sentence each.
    """

    files: Mapping[str, bytes | pathlib.Path]
    described: Mapping[str, Any]
    name: str
    licence: str
    notes: tuple[str, ...]


def gather(
    source: Source,
    *,
    to: Format,
    licence: str | None,
    name: str | None,
    default_name: str,
    any_name: bool,
) -> Extras:
    """All that a conversion writes beside the weights.

    Args:
        source: where the weights come from.
        to: the new format.
        licence: the version that the user says, or "none"; found out by default.
        name: what the user calls the model.
        default_name: what it is called otherwise, with the prefix that the licence demands.
        any_name: whether the user may call it without that prefix.

    Raises:
        ValueError: the licence is unknown or cannot be told, or the name is not allowed.
    """
    version, notes = _version(source, licence, export=to != "orbax")
    files: dict[str, bytes | pathlib.Path] = dict(carried(source.directory))
    if to == "hf":
        files = _for_huggingface(source) | files
    called = name or default_name
    if version != _NONE:
        agreement = licences.get(version)
        if name is not None and not any_name:
            licences.check_name(name, agreement)
        if name is None:
            called = _with_prefix(default_name, agreement)
        texts = licences.files(agreement, name=called, source_files=tuple(files))
        files |= {file: text.encode() for file, text in texts.items()}
        notes.append(f"{agreement.title}: {agreement.duties[0]} `l4jax info` lists all duties.")
    described = dict(source.described) | {"licence": version}
    return Extras(files, described, called, version, tuple(notes))


def carried(directory: pathlib.Path) -> dict[str, pathlib.Path]:
    """The files of a checkpoint that go wherever its weights go, by name."""
    return {
        file.name: file
        for file in sorted(directory.iterdir())
        if _CARRIED.fullmatch(file.name) and file.is_file()
    }


def licence_of(directory: pathlib.Path, model: Model, described: Mapping[str, Any]) -> str | None:
    """The licence version of a checkpoint's weights as far as it shows; "none" if said so."""
    said = described.get("licence")
    if said is not None:
        return str(said)
    called = (described.get("huggingface") or {}).get("_name_or_path")
    return (
        licences.named_in(directory)
        or licences.from_name(directory.resolve().name)
        or licences.from_name(called if isinstance(called, str) else "")
        or _of_architecture(model)
    )


def _version(source: Source, said: str | None, *, export: bool) -> tuple[str, list[str]]:
    """The version to go by, and what the user should know of how it was found."""
    if said is not None:
        return (_NONE, []) if said.lower() == _NONE else (licences.get(said).version, [])
    found = licence_of(source.directory, source.model, source.described)
    if found is not None:
        note = f"The weights' licence is taken to be Llama {found}; say --licence if it is another"
        return found, [] if found == _NONE else [f"{note}, or none if they are your own."]
    versions = _candidates(source.model)
    if len(versions) > 1 and export:
        raise ValueError(
            f"{source.directory}: its licence may be that of Llama {' or '.join(versions)}, whose "
            f"models of this size are built alike; say which (--licence), as NOTICE names it"
        )
    return _NONE, [
        "No Meta licence shows in the source: no NOTICE is written. If the weights are, or come "
        "from, a Llama model, say which with --licence."
    ]


def _candidates(model: Model) -> list[str]:
    """Versions whose published models have this architecture, whatever their context."""
    found = {
        licences.get(preset.licence).version
        for preset in presets.PRESETS.values()
        if preset.licence.startswith("Llama")
        and presets.same_but_context(preset.make(), model.text)
    }
    return sorted(found)


def _of_architecture(model: Model) -> str | None:
    """Llama 4's architecture is nobody else's; a dense model's only if its sizes are published."""
    if not is_llama3(model):
        return "4"
    versions = _candidates(model)
    return versions[0] if len(versions) == 1 else None


def _with_prefix(name: str, agreement: licences.Licence) -> str:
    try:
        licences.check_name(name, agreement)
    except ValueError:
        return f"{agreement.prefix} {name}".replace(" ", "-")
    return name


def _for_huggingface(source: Source) -> dict[str, bytes | pathlib.Path]:
    """What transformers needs and a source in Meta's format does not have."""
    ranks = source.directory / "tokenizer.model"
    if not ranks.is_file() or (source.directory / "tokenizer.json").exists():
        return {}
    from l4jax.data import companions, templates, tokenizer, tokenizer_json

    coder = tokenizer.load(ranks)
    context = source.model.text.max_context
    files: dict[str, bytes | pathlib.Path] = dict(
        tokenizer_json.from_rank_file(ranks, max_length=context)
    )
    if coder.family is not None:
        files["chat_template.jinja"] = templates.chat_template(coder.family).encode()
    settings = {
        "generation_config.json": companions.generation_config(
            bos_id=coder.bos_id, stop_ids=coder.stop_ids, pad_id=coder.pad_id
        )
    }
    if (images := source.model.vision) is not None:
        settings |= companions.processor_configs(
            image_size=images.image_size,
            patch_size=images.patch_size,
            shuffle_ratio=1 / images.pixel_shuffle,
        )
    return files | {name: json.dumps(x, indent=2).encode() + b"\n" for name, x in settings.items()}
