"""Questions and answers about Python functions, mined from sources that have both.

A function's signature answers some questions exactly (how many parameters it has, whether it is
public), and its docstring says what it does. Preferences have the true answer beside a worse one:
that to another question of the same kind, or the same words shuffled, cut short or said twice.

Everything follows from the sources: what looks drawn is drawn by a hash of the question.
"""

from __future__ import annotations

import ast
import hashlib
import random
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

QUESTIONS: dict[str, tuple[str, ...]] = {
    "any": ("Does it take any number? {signature}", "Any number of arguments? {signature}"),
    "count": ("Count the parameters: {signature}", "How many parameters has {signature}?"),
    "default": ("Has it a default? {signature}", "Is a parameter optional? {signature}"),
    "name": ("Name the function: {signature}", "What is the name of {signature}?"),
    "parameters": ("List the parameters: {signature}", "What are the parameters of {signature}?"),
    "place": ("Is it a function or a method? {signature}", "Method or function? {signature}"),
    "public": ("Is it public? {signature}", "May others call it? {signature}"),
    "docstring": ("Write a docstring for {signature}", "Describe {signature}"),
    "purpose": ("What does {name}({parameters}) do?", "What is {name}({parameters}) for?"),
}
"""Wordings by kind of question."""
EXACT = ("any", "count", "default", "name", "parameters", "place", "public")
"""Kinds with one right answer, that follows from the signature."""
MOST_SIGNATURE, LEAST_LINE, MOST_LINE = 60, 10, 80
"""Characters of signatures and of docstrings' first lines; others are passed over."""
SPARSE = 16
"""One question in so many, of those with one right answer, becomes a preference."""


class Pair(NamedTuple):
    """A question of some kind, and its answer."""

    kind: str
    question: str
    answer: str


class Spoilt(NamedTuple):
    """A pair, and a worse answer: how it was made, and what it is."""

    pair: Pair
    fault: str
    rejected: str


def pairs(texts: Iterable[str]) -> list[Pair]:
    """Of every function: all questions that it answers exactly, and one for its docstring.

    No question comes twice; texts that this Python cannot parse have none.
    """
    found: dict[str, Pair] = {}
    for text in texts:
        for node, method in _functions(text):
            for pair in _asked(node, method=method):
                found.setdefault(pair.question, pair)
    return list(found.values())


def spoilt(given: Sequence[Pair]) -> list[Spoilt]:
    """Of pairs, a worse answer each, always another one than the true.

    Of a question that has one right answer, that is one to another question of the same kind, if
    there is a different one; every `SPARSE`-th of them is enough. A description is badly said.
    """
    answers = defaultdict(list)
    for pair in given:
        answers[pair.kind].append(pair.answer)
    made = []
    for pair in given:
        if pair.kind not in EXACT:
            faults = _faults(pair)
            fault = _pick(f"{pair.question} fault", sorted(faults))
            made.append(Spoilt(pair, fault, faults[fault]))
        elif not _number(pair.question, SPARSE):
            others = answers[pair.kind]
            start = _number(f"{pair.question} other", len(others))
            following = (others[(start + step) % len(others)] for step in range(len(others)))
            other = next((answer for answer in following if answer != pair.answer), None)
            made += [] if other is None else [Spoilt(pair, "mismatched", other)]
    return made


# --- Questions -----------------------------------------------------------------------------------
_Function = ast.FunctionDef | ast.AsyncFunctionDef


def _functions(text: str) -> Iterator[tuple[_Function, bool]]:
    """Functions in the order of `ast.walk`, and whether they are methods."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old sources have escapes that are none
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):
            return
    for node in ast.walk(tree):
        if isinstance(node, _BLOCKS):
            functions = (child for child in node.body if isinstance(child, _Function))
            yield from ((child, isinstance(node, ast.ClassDef)) for child in functions)


_BLOCKS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def _asked(node: _Function, *, method: bool) -> Iterator[Pair]:
    parameters = ast.unparse(node.args)
    signature = f"def {node.name}({parameters})"
    if len(signature) > MOST_SIGNATURE or not signature.isascii():
        return
    facts = {"name": node.name, "parameters": parameters, "signature": signature}
    for kind, answer in _exact(node, method=method).items():
        yield _pair(kind, facts, answer)
    line = " ".join((ast.get_docstring(node) or "").partition("\n")[0].split())
    if LEAST_LINE <= len(line) <= MOST_LINE and line.isascii():
        yield _pair(_pick(f"{signature} words", ("docstring", "purpose")), facts, line)


def _exact(node: _Function, *, method: bool) -> dict[str, str]:
    """What the signature says, by kind of question."""
    found = node.args
    named = [*found.posonlyargs, *found.args, *found.kwonlyargs]
    count = len(named) + (found.vararg is not None) + (found.kwarg is not None)
    defaults = [*found.defaults, *filter(None, found.kw_defaults)]
    answers = {
        "any": "Yes." if found.vararg or found.kwarg else "No.",
        "count": str(count),
        "default": "Yes." if defaults else "No.",
        "name": f"It is {node.name}.",
        "parameters": f"({ast.unparse(found)})",
        "place": "A method." if method else "A function.",
    }
    if not node.name.endswith("__"):
        # Those with two underscores at both ends are public without being for others to call.
        answers["public"] = "No." if node.name.startswith("_") else "Yes."
    return answers


def _pair(kind: str, facts: dict[str, str], answer: str) -> Pair:
    wording = _pick(f"{facts['signature']} {kind}", QUESTIONS[kind])
    return Pair(kind, wording.format(**facts), answer)


# --- Worse answers -------------------------------------------------------------------------------
def _faults(pair: Pair) -> dict[str, str]:
    """What can be made of the answer itself."""
    words = pair.answer.split()
    found = {"repeated": [*words, *words]}
    if len(words) > 1:
        found["truncated"] = words[: len(words) // 2]
    if len(set(words)) > 2:
        found["shuffled"] = words[:]
        draw = random.Random(pair.question)
        while found["shuffled"] == words:
            draw.shuffle(found["shuffled"])
    return {name: " ".join(words) for name, words in found.items()}


def _pick(key: str, choices: Sequence[str]) -> str:
    """One of them, always the same for a key."""
    return choices[_number(key, len(choices))]


def _number(key: str, below: int) -> int:
    """A number that always is the same for a key."""
    return int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) % below
