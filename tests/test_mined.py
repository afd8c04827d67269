"""Questions have their true answers, preferences a worse one beside, always the same."""

import inspect
import random
import re
import sysconfig
from pathlib import Path

import pytest

from l4jax.data import mined

WORDS = ["load", "item", "path", "name", "read", "size", "key", "open", "find", "line"]


def source(draw):
    """A module of functions and methods whose docstrings say what their names do."""
    parts = []
    for _ in range(12):
        verb, noun, *rest = draw.sample(WORDS, 5)
        parameters = ", ".join(rest[: draw.randrange(4)])
        function = f'def {verb}_{noun}({parameters}):\n    """{verb.title()} the {noun} again."""\n'
        if draw.random() < 0.3:
            parts.append(f"class {noun.title()}:\n" + re.sub(r"^", "    ", function, flags=re.M))
        else:
            parts.append(function)
    return "\n\n".join(parts)


@pytest.fixture(scope="module")
def library():
    """Pairs of some real modules."""
    root = Path(sysconfig.get_paths()["stdlib"])
    names = ("argparse", "ast", "bdb", "calendar", "inspect", "pathlib", "random", "typing")
    return mined.pairs((root / f"{name}.py").read_text() for name in names)


@pytest.fixture(scope="module")
def spoilt(library):
    return mined.spoilt(library)


def of_kind(pairs, kind):
    found = [pair for pair in pairs if pair.kind == kind]
    assert len(found) > 30, kind
    return found


def test_there_are_questions_of_every_kind_and_wording_none_twice(library):
    assert {pair.kind for pair in library} == set(mined.QUESTIONS)
    assert set(mined.EXACT) < set(mined.QUESTIONS)
    assert len({pair.question for pair in library}) == len(library)
    for wordings in mined.QUESTIONS.values():
        for wording in wordings:
            begin = wording.partition("{")[0]
            assert any(pair.question.startswith(begin) for pair in library)


def test_every_answer_says_something_in_one_line_of_ascii(library):
    for pair in library:
        assert pair.answer.strip() == pair.answer != ""
        assert (pair.question + pair.answer).isascii()
        assert "\n" not in pair.question + pair.answer
        assert len(pair.answer) <= mined.MOST_LINE


def test_names_and_parameters_stand_in_their_questions(library):
    for pair in of_kind(library, "name"):
        assert f"def {re.fullmatch('It is (.+)[.]', pair.answer)[1]}(" in pair.question
    for pair in of_kind(library, "parameters"):
        assert re.search(rf"def \w+{re.escape(pair.answer)}[?]?$", pair.question)


def test_yes_and_no_follow_from_the_signature(library):
    for pair in of_kind(library, "public"):
        assert pair.answer == ("No." if "def _" in pair.question else "Yes.")
    for pair in of_kind(library, "default"):
        assert pair.answer == ("Yes." if "=" in pair.question else "No.")
    for pair in of_kind(library, "any"):
        assert pair.answer == ("Yes." if re.search(r"\*\w", pair.question) else "No.")
    for kind in ("public", "default", "any"):
        assert {pair.answer for pair in of_kind(library, kind)} == {"Yes.", "No."}


def test_methods_are_the_functions_of_classes(library):
    assert {pair.answer for pair in of_kind(library, "place")} == {"A method.", "A function."}
    text = "class A:\n    def f{0}(x):\n        def g{0}(): ...\n\ndef h{0}(): ...\n"
    found = mined.pairs(text.format(n) for n in range(40))
    answers = {re.search(r"def ([a-z])", p.question)[1]: p.answer for p in of_kind(found, "place")}
    assert answers == {"f": "A method.", "g": "A function.", "h": "A function."}


def test_parameters_are_counted_as_the_compiler_counts_them(library):
    for pair in of_kind(library, "count"):
        signature = re.search(r"def .*\)", pair.question)[0]
        code = compile(f"from __future__ import annotations\n{signature}: ...", "", "exec")
        function = next(x for x in code.co_consts if inspect.iscode(x))
        stars = (inspect.CO_VARARGS, inspect.CO_VARKEYWORDS)
        count = function.co_argcount + function.co_kwonlyargcount
        count += sum(bool(function.co_flags & star) for star in stars)
        assert pair.answer == str(count), pair.question


def test_a_docstring_is_the_functions_own():
    text = '''
class Shelf:
    """Holds books."""

    def take(self, title):
        """
        Take a book away.

        It must be there.
        """

    async def put(self, *titles, **how):
        "Put books in their places."

def short():
    """Too short"""

def long(parameters):
    """Its signature is too long to be asked about."""
'''
    long = ", ".join(f"parameter_{n}" for n in range(9))
    found = mined.pairs([text.replace("parameters", long)])
    answers = [pair.answer for pair in found if pair.kind in ("docstring", "purpose")]
    assert answers == ["Take a book away.", "Put books in their places."]
    assert sum(pair.kind in mined.EXACT for pair in found) == 3 * len(mined.EXACT)
    assert not any("parameter_0" in pair.question for pair in found)


def test_the_same_texts_give_the_same_pairs(library):
    draw = random.Random(1)
    texts = [source(draw) for _ in range(5)]
    random.seed(1)
    first = mined.spoilt(mined.pairs(texts))
    random.seed(2)
    assert mined.spoilt(mined.pairs(texts)) == first


def test_a_text_that_is_no_python_has_no_pairs_and_old_escapes_are_fine():
    assert mined.pairs(["def (:", "nul \0"]) == []
    assert len(mined.pairs(["def escape(x):\n    return '\\d'\n"])) == len(mined.EXACT)


def test_a_worse_answer_is_always_another_one(spoilt):
    assert {worse.fault for worse in spoilt} == {"mismatched", "shuffled", "truncated", "repeated"}
    for worse in spoilt:
        assert worse.rejected.strip() not in ("", worse.pair.answer)


def test_every_description_and_a_part_of_the_rest_become_preferences(library, spoilt):
    told = [worse.pair for worse in spoilt]
    assert told == [pair for pair in library if pair in set(told)], "in their order"
    exact, words = ([p for p in library if (p.kind in mined.EXACT) == x] for x in (True, False))
    assert set(words) < set(told)
    assert {pair.kind for pair in told} == set(mined.QUESTIONS)
    assert 0.6 < mined.SPARSE * (len(told) - len(words)) / len(exact) < 1.6


def test_faults_are_what_they_are_called(library, spoilt):
    for (kind, _, answer), fault, rejected in spoilt:
        words, found = answer.split(), rejected.split()
        assert (fault == "mismatched") == (kind in mined.EXACT)
        if fault == "mismatched":
            assert any(x.answer == rejected for x in library if x.kind == kind)
        elif fault == "truncated":
            assert 0 < len(found) < len(words)
            assert answer.startswith(rejected)
        elif fault == "shuffled":
            assert sorted(found) == sorted(words)
        else:
            assert found == words + words


def test_where_all_answers_are_the_same_there_is_no_worse_one():
    same = [mined.Pair("count", f"Count the parameters: def f{n}(x)", "1") for n in range(99)]
    assert mined.spoilt(same) == []
    found = mined.spoilt([*same, mined.Pair("count", "Count the parameters: def g(x, y)", "2")])
    assert found
    assert {(w.pair.answer, w.rejected) for w in found} <= {("1", "2"), ("2", "1")}
