"""Meta's licences for Llama weights: what each asks, whose a checkpoint is, what an export carries.

Five agreements cover the models that l4jax loads. They were read in Meta's public repository
meta-llama/llama-models (models/llama3_1/LICENSE and so on, with the use policies of 3.1, 3.2 and
3.3 beside them). Llama 4's use policy was not in the copy at hand: its clause on the European Union
is taken from quotations. Nothing here is legal advice, and no agreement's text is repeated but the
sentences that it requires to be shown.

    version = named_in(source) or from_name(source.name)  # None: ask whoever knows
    licence = get(version)
    check_name("Llama-4-Scout-mine", licence)
    for file, text in files(licence, name="Llama-4-Scout-mine").items():
        (export / file).write_text(text, encoding="utf-8")
"""

import re
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple


class Licence(NamedTuple):
    """One of Meta's agreements.

    Attributes:
        version: "3.0", "3.1", "3.2", "3.3" or "4".
        title: What the agreement calls itself.
        notice: The sentence that a file NOTICE must hold in every copy of the weights.
        built_with: The words to show wherever the model is offered.
        prefix: How the name of a model made with the weights must begin.
        url: Where Meta publishes the agreement, by address as others cite it; llama.com could not
            be reached when this was written.
        duties: What it asks of whoever passes the weights on or builds on them, in our words.
    """

    version: str
    title: str
    notice: str
    built_with: str
    prefix: str
    url: str
    duties: tuple[str, ...]

    @property
    def identifier(self) -> str:
        """The licence's name in the front matter of a Hugging Face model card."""
        return "llama" + self.version.removesuffix(".0")


def _licence(version: str, url: str) -> Licence:
    first, multimodal = version == "3.0", version in ("3.2", "3.3", "4")
    model = "Meta Llama 3" if first else f"Llama {version}"
    built_with, prefix = (
        ("Built with Meta Llama 3", "Llama 3") if first else ("Built with Llama", "Llama")
    )
    made = "the weights" if first else "the weights or their outputs"
    duties = [
        "Give a copy of the agreement to everybody who receives the weights or what derives from "
        "them.",
        f'Show "{built_with}" prominently on a web site, user interface, blog post, about page or '
        "in the documentation.",
        "Let the name of every distributed model that was made, trained, tuned or improved with "
        f'{made} begin with "{prefix}".',
        "Keep the attribution notice in a text file NOTICE in every copy of the weights.",
        f"Obey the law and the acceptable use policy, {url.replace('license', 'use-policy')}.",
        "Ask Meta for a licence of its own if your products had more than 700 million monthly "
        "active users in the month before the version's release, unless you received the model "
        "inside somebody's finished product.",
    ]
    if multimodal:
        duties.append(
            "Multimodal models are not licensed, says the use policy, to persons domiciled in the "
            "European Union and companies with their principal place of business there; end users "
            "of products that contain them are exempt."
        )
    if first:
        duties.append(
            "Use neither the weights nor their outputs to improve a large language model other "
            "than Llama 3 and its derivatives."
        )
    return Licence(
        version=version,
        title=f"{model} Community License Agreement",
        notice=f"{model} is licensed under the {model} Community License, "
        "Copyright © Meta Platforms, Inc. All Rights Reserved.",
        built_with=built_with,
        prefix=prefix,
        url=url,
        duties=tuple(duties),
    )


LICENCES: dict[str, Licence] = {
    version: _licence(version, url)
    for version, url in {
        "3.0": "https://llama.meta.com/llama3/license/",
        "3.1": "https://www.llama.com/llama3_1/license/",
        "3.2": "https://www.llama.com/llama3_2/license/",
        "3.3": "https://www.llama.com/llama3_3/license/",
        "4": "https://www.llama.com/llama4/license/",
    }.items()
}


def get(version: str) -> Licence:
    """The licence of a version: "4", "4.0", "llama4", "Llama 3" (the first, 3.0), "llama-3.1".

    Raises:
        ValueError: If there is no such version; the text lists the known ones.
    """
    match = re.fullmatch(
        r"(?:meta[-_ ]?)?(?:llama[-_ ]?)?(\d+)(?:[._](\d+))?", version.strip().lower()
    )
    found = match and _version(match[1], match[2])
    if not found:
        raise ValueError(f"no Llama licence {version!r}; known are {', '.join(LICENCES)}")
    return LICENCES[found]


def _version(major: str, minor: str | None) -> str | None:
    """The known version of these numbers, if there is one."""
    spelled = f"{major}.{minor or 0}"
    return next((v for v in (spelled, spelled.removesuffix(".0")) if v in LICENCES), None)


# --- Whose a checkpoint is -----------------------------------------------------------------------
# As in a notice ("... is licensed under") and in an agreement's title, also across a line break.
_STATED = re.compile(r"\bllama\s+(\d+)(?:\.(\d+))?\s+(?:is\s+licensed|community\s+licen[sc]e)\b")
_FRONT_MATTER = re.compile(r"\A\ufeff?---\s*\n(.*?)\n---\s*$", re.DOTALL | re.MULTILINE)
_IDENTIFIER = re.compile(r"\bllama[-_ ]?(\d+)(?:[._](\d+))?(?!\.?\d)")
_CARD_FIELD = re.compile(r"^license(?:_name)?:\s*[\"']?([^\"'#\n]+)", re.MULTILINE)


def named_in(directory: Path) -> str | None:
    """The version that a checkpoint's own files state, None if they state none.

    Looked at are the files NOTICE, LICENSE (with any ending) and the front matter of README.md,
    where Meta's own cards say `license: llama3.1` or `license_name: llama4`.

    Raises:
        ValueError: If they state more than one version.
    """
    stated: dict[str, str] = {}
    for file in sorted(directory.iterdir()):
        name = file.name.lower()
        if not file.is_file() or not name.startswith(("notice", "license", "licence", "readme.md")):
            continue
        text = file.read_text(encoding="utf-8", errors="replace").lower()
        read = _card_versions if name == "readme.md" else _text_versions
        stated = dict.fromkeys(sorted(read(text)), file.name) | stated
    if len(stated) > 1:
        found = " and ".join(f"{version} ({file})" for version, file in stated.items())
        raise ValueError(
            f"{directory} states several Llama licences: {found}; keep the one of these weights"
        )
    return next(iter(stated), None)


def _text_versions(text: str) -> set[str]:
    found = (_version(match[1], match[2]) for match in _STATED.finditer(text))
    return {version for version in found if version}


def _card_versions(text: str) -> set[str]:
    """Versions in the front matter of a model card; other licences state nothing."""
    matter = _FRONT_MATTER.search(text)
    fields = _CARD_FIELD.findall(matter[1]) if matter else []
    matches = [_IDENTIFIER.search(field) for field in fields]
    return {version for m in matches if m and (version := _version(m[1], m[2]))}


# A version, but no number of parameters ("open_llama_3b") and no number of bits. Some name 3.1 with
# a hyphen, which is a version only where a size follows ("llama3-1-8b", but "Llama-3-1B").
_IN_NAME = re.compile(
    r"(?<![a-z])llama[-_ ]?(\d+)(?:[._](\d+)|-([123])(?=-\d))?(?![a-z0-9])(?!\.\d)(?![-_ ]?bit)"
)
# Safety models count their own generations: the third has sizes cut from Llama 3.1 and from 3.2.
# That the second, cut from Llama 3, is under its agreement follows from that; no copy was at hand.
_GUARD = re.compile(r"(?<![a-z])llama[-_ ]?guard[-_ ]?(\d)(?![a-z0-9.])(?:[-_ ](\d+)b(?![a-z]))?")
_GUARDS = {"2": "3.0", "3 8": "3.1", "3 1": "3.2", "3 11": "3.2", "4": "4"}


def from_name(name: str) -> str | None:
    """The version that the name of a model or folder spells, None if it spells none or several.

    "Llama-4-Scout-17B-16E" is 4, "Meta-Llama-3-8B" 3.0, "Llama-Guard-3-1B" 3.2.
    """
    lowered = name.lower()
    found = {_version(m[1], m[2] or m[3]) for m in _IN_NAME.finditer(lowered)}
    for m in _GUARD.finditer(lowered):
        found.add(_GUARDS.get(m[1]) or _GUARDS.get(f"{m[1]} {m[2]}"))
    found.discard(None)
    return found.pop() if len(found) == 1 else None


# --- What an export carries ----------------------------------------------------------------------
def check_name(name: str, licence: Licence) -> None:
    """Refuses a name that the licence does not allow for a model made with its weights.

    Letter case is free, and spaces, hyphens and underscores are the same. Under 3.0 the name must
    begin with "Llama 3": "Meta-Llama-3-..." does not, as the agreement lends that one mark only and
    "Meta" is not part of it. Meta's own models, passed on unchanged, keep their names unchecked.

    Raises:
        ValueError: If the name begins otherwise.
    """
    words = re.sub(r"[-_\s]+", " ", name).strip().lower()
    rest = words.removeprefix(licence.prefix.lower())
    # "Llama 3.1" and "Llama 30" begin with the letters of "Llama 3", but are other names.
    number = licence.prefix[-1].isdigit() and re.match(r"\w|\.\d", rest)
    if rest == words or number:
        prefix = licence.prefix.replace(" ", "-")
        raise ValueError(
            f"model name {name!r} does not begin with {licence.prefix!r}, as the {licence.title} "
            f"asks; call it {prefix}-{_bare(name)}, say"
        )


def _bare(name: str) -> str:
    """`name` without what looks like Meta's own at its beginning."""
    bare = re.sub(
        r"^(?:(?:meta|llama)(?![a-z])|[\d.]+(?![^\s_-])|[-_\s])+", "", name.strip(), flags=re.I
    )
    return re.sub(r"\s+", "-", bare) or "mine"


def files(licence: Licence, *, name: str, source_files: Collection[str] = ()) -> dict[str, str]:
    """Texts to write into an export, by file name: NOTICE, LICENSE and README.md.

    LICENSE says which agreement governs and where it is; it is no copy of the agreement, which
    whoever passes the export on must add.

    Args:
        licence: The licence of the weights.
        name: The model's name, on the model card.
        source_files: Names of the files that the export takes over from its source. Of NOTICE,
            LICENSE and README.md those that are among them, in whatever spelling, are left out.

    Raises:
        ValueError: If `name` is empty or has several lines.
    """
    if not name.strip() or len(name.splitlines()) != 1:
        raise ValueError(f"model name {name!r} must be one line of text")
    taken = {_kind(file) for file in source_files}
    texts = {
        "NOTICE": licence.notice + "\n",
        "LICENSE": _reference(licence),
        "README.md": _card(licence, name, has_agreement="license" in taken),
    }
    return {file: text for file, text in texts.items() if _kind(file) not in taken}


def _kind(file: str) -> str:
    return file.lower().removesuffix(".txt").removesuffix(".md").replace("licence", "license")


def _reference(licence: Licence) -> str:
    duties = "\n".join(f"- {duty}" for duty in licence.duties)
    return (
        f"These weights are governed by the {licence.title},\n"
        f"published by Meta at {licence.url}\n\n"
        "This file only refers to that agreement. Before you pass the weights on, put a copy of\n"
        "the agreement in its place. In short, and without replacing it, the agreement asks:\n\n"
        f"{duties}\n"
    )


def _card(licence: Licence, name: str, *, has_agreement: bool) -> str:
    copy = "a copy is beside this card" if has_agreement else "add a copy when passing the model on"
    return (
        f"---\nlicense: {licence.identifier}\nlibrary_name: transformers\n---\n\n"
        f"# {name.strip()}\n\n{licence.built_with}.\n\n"
        "The weights were converted with l4jax, a JAX library for Llama models.\n\n"
        f"{licence.notice}\nThe [agreement]({licence.url}) governs their use; {copy}.\n"
    )
