"""The standard library splits by file, always in the same way."""

import ast
import re
import sysconfig

import pytest

from l4jax.data import corpus, mined
from l4jax.data.records import normalise

NAMES = [f"package/module_{i}.py" for i in range(300)]


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A folder that stands for the standard library; returns a function that adds files to it."""

    def add(*names, text="# {}\n"):
        for name in names:
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text.format(name), encoding="utf-8")

    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    return add


def test_the_real_library_is_python_and_large_enough_to_learn_from():
    found = corpus.standard_library(max_bytes=2_000_000)
    texts = found.train + found.held_out
    assert 1_000_000 < sum(map(len, texts)) <= 2_000_000
    assert sum(map(len, found.held_out)) > 50_000
    trees = [ast.parse(text) for text in texts[:20]]
    assert any(isinstance(node, ast.FunctionDef) for tree in trees for node in ast.walk(tree))


def test_every_file_is_on_exactly_one_side(library):
    library(*NAMES)
    found = corpus.standard_library()
    assert sorted(found.train + found.held_out) == sorted(f"# {name}\n" for name in NAMES)
    assert not set(found.train) & set(found.held_out)
    assert 0.04 < len(found.held_out) / len(NAMES) < 0.18


@pytest.mark.parametrize(("percent", "held_out"), [(0, 0), (100, 300)])
def test_the_share_held_out_reaches_its_ends(library, percent, held_out):
    library(*NAMES)
    assert len(corpus.standard_library(held_out_percent=percent).held_out) == held_out


def test_files_stay_on_their_side_when_others_come_and_go(library, tmp_path):
    library(*NAMES[:200])
    before = corpus.standard_library()
    library(*NAMES[200:])
    for name in NAMES[:50]:
        (tmp_path / name).unlink()
    after = corpus.standard_library()
    for old, new in zip(before, after, strict=True):
        assert set(old) & {f"# {name}\n" for name in NAMES[50:200]} <= set(new)


def test_a_second_call_gives_the_same_documents_in_the_same_order(library):
    library(*NAMES)
    assert corpus.standard_library() == corpus.standard_library()


def test_what_users_installed_and_tests_are_left_out(library):
    library("kept.py", "json/tests/test_a.py", "test/b.py", "site-packages/numpy/c.py")
    library("x/dist-packages/d.py", "__pycache__/e.py", "idlelib/f.py", "data.txt")
    library("encodings/g.py")
    library("tests_of_time/also.py", "testing.py")
    found = corpus.standard_library()
    kept = {"# kept.py\n", "# tests_of_time/also.py\n", "# testing.py\n"}
    assert set(found.train + found.held_out) == kept


def test_a_library_inside_a_folder_called_tests_is_still_found(library, tmp_path, monkeypatch):
    """Only folders inside the library are left out, not those above it."""
    library("tests/site-packages/lib/kept.py")
    root = tmp_path / "tests/site-packages/lib"
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(root)})
    assert len(sum(corpus.standard_library(), [])) == 1


def test_blank_files_are_no_documents(library):
    library("full.py")
    library("empty.py", "blank.py", text=" \n")
    assert len(sum(corpus.standard_library(), [])) == 1


def test_bytes_that_are_not_utf8_do_not_stop_it(library, tmp_path):
    library("fine.py")
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9\n")
    assert "# caf\ufffd\n" in sum(corpus.standard_library(), [])


def test_max_bytes_is_a_limit_in_bytes_and_keeps_a_prefix(library):
    library(*NAMES, text="# ééé {}\n")
    whole, part = (sum(corpus.standard_library(max_bytes=n), []) for n in (None, 2_000))
    size = sum(len(text.encode()) for text in part)
    assert 1_900 < size <= 2_000
    assert set(part) < set(whole)


def test_more_bytes_only_add_documents(library):
    library(*NAMES)
    small, large = (corpus.standard_library(max_bytes=n) for n in (1_000, 3_000))
    for few, many in zip(small, large, strict=True):
        assert many[: len(few)] == few
    assert len(large.train) > len(small.train)


def test_a_python_without_sources_is_named(library, tmp_path, monkeypatch):
    library("test/only.py")
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}: no Python sources"):
        corpus.standard_library()
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "nowhere")})
    with pytest.raises(FileNotFoundError, match="nowhere: no Python sources"):
        corpus.standard_library()


# --- Records mined from it -----------------------------------------------------------------------
def modules(count, first=0):
    return [
        f'def load_{n}(path, *rest):\n    """Load file {n} and the rest."""\n'
        for n in range(first, first + count)
    ]


@pytest.fixture(scope="module")
def records():
    """Of a part of the real library: instructions and preferences."""
    library = corpus.standard_library(max_bytes=4_000_000)
    return corpus.instructions(library), corpus.preferences(library)


def asked(record):
    return record["prompt"] if "prompt" in record else record["messages"][0]["content"]


def test_there_is_enough_to_learn_and_to_hold_out(records):
    for found in records:
        assert len(found.train) > 400
        assert len(found.held_out) > 20


def test_no_question_is_on_both_sides_not_even_of_functions_that_look_the_same(records):
    for found in records:
        train, held_out = ([asked(record) for record in side] for side in found)
        assert not set(train) & set(held_out)
        assert len(set(train)) == len(train)
    shared, own = modules(3), modules(2, first=3)
    found = corpus.instructions(corpus.Corpus(shared, shared + own))
    each = len(mined.EXACT) + 1
    assert (len(found.train), len(found.held_out)) == (3 * each, 2 * each)


def test_each_side_asks_about_its_own_files_only():
    train, held_out = modules(40), modules(10, first=40)
    for make in (corpus.instructions, corpus.preferences):
        found = make(corpus.Corpus(train, held_out))
        for side, numbers in ((found.train, range(40)), (found.held_out, range(40, 50))):
            assert {int(re.search(r"load_(\d+)", asked(x))[1]) for x in side} == set(numbers)
            told = [int(n) for x in side for n in re.findall(r"(?:load_|file )(\d+)", str(x))]
            assert set(told) == set(numbers), "not even in a worse answer"


def test_conversations_reads_them(records):
    for record in records[0].held_out:
        (user, assistant) = normalise(record).messages
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        assert user["content"]
        assert assistant["content"]
    for record in records[1].held_out:
        found = normalise(record)
        assert found.prompt == record["prompt"]
        assert "" not in found.answers
        assert len(set(found.answers)) == 2


def test_preferences_ask_what_instructions_ask_and_choose_their_answers(records):
    for told, preferred in zip(*records, strict=True):
        answers = {asked(r): (r["messages"][1]["content"], r["kind"]) for r in told}
        assert preferred
        for record in preferred:
            assert answers[record["prompt"]] == (record["chosen"], record["kind"])


def test_records_are_the_same_every_time_and_of_the_whole_library_by_default(library):
    library(*NAMES[:30], text='def f(a, b):\n    """Say {}."""\n')
    for make in (corpus.instructions, corpus.preferences):
        assert make() == make() == make(corpus.standard_library())
        assert make().train
