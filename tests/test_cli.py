"""What users and their scripts see: text or one JSON object, one line for an error, exit codes."""

import dataclasses
import importlib.metadata
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys
from typing import NamedTuple

import jax.numpy as jnp
import pytest
from conftest import build

from l4jax import checkpoints, cli, inference, info, presets
from l4jax.data import chat, tokenizer

TEXTS = [
    "The cat sat on the mat, and the dog lay by the door. The café was naïve about it. 🙂",
    "def add(first, second):\n    return first + second\n\n\nfor i in range(10):\n    print(i)\n",
    "A chunk ends where the next one begins; the model reads on and the words go by. Wörter 🙂 ŷ",
]
PROMPT = "The cat"
SCOUT = presets.tiny(presets.llama4_scout())


class Result(NamedTuple):
    code: int
    out: str
    err: str

    def json(self):
        """The one object on standard output."""
        assert self.code == 0, self.err
        assert self.out.count("\n") == 1
        return json.loads(self.out)


@pytest.fixture
def run(capsys):
    """Calls the command line in this process."""

    def call(*arguments):
        capsys.readouterr()
        code = cli.main([str(argument) for argument in arguments])
        return Result(code, *capsys.readouterr())

    return call


def spawn(*arguments, **environment):
    """Calls the command line as its own process."""
    return subprocess.run(
        [sys.executable, "-m", "l4jax.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
    )


@pytest.fixture(scope="module")
def tok():
    return tokenizer.train(TEXTS, vocab_size=320)


@pytest.fixture(scope="module")
def model(tok):
    return build(dataclasses.replace(SCOUT, num_layers=2, vocab_size=tok.vocab_size))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tok, model):
    """A tiny Scout with its tokenizer, as Hugging Face would have it."""
    path = tmp_path_factory.mktemp("checkpoints") / "scout"
    checkpoints.save(model, path, to="hf")
    tok.save(path)
    return path


@pytest.fixture
def copy(checkpoint, tmp_path):
    """A copy of the checkpoint, to be damaged."""
    return pathlib.Path(shutil.copytree(checkpoint, tmp_path / "copy"))


# --- Usage ---------------------------------------------------------------------------------------
def leaves():
    """One line for everything that can be set: verb, option, type and default."""
    for verb, section in cli.VERBS.items():
        for field in dataclasses.fields(section):
            kind, name = str(field.type), "--" + field.name.replace("_", "-")
            if kind.endswith("tyro.conf.Positional]"):
                kind, name = kind[len("Annotated[") : kind.rindex(",")], field.name.upper()
            default = "required" if field.default is dataclasses.MISSING else repr(field.default)
            yield f"{verb} {name}: {kind} = {default}\n"


def test_everything_that_can_be_set_is_listed(golden):
    golden("cli.txt", "".join(leaves()))


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_names_every_option_and_what_it_does(run, capsys, verb):
    with pytest.raises(SystemExit) as exit_:
        run(verb, "--help")
    out, err = capsys.readouterr()
    assert (exit_.value.code, err) == (0, "")
    for line in leaves():
        if line.startswith(f"{verb} --"):
            assert line.split()[1].removesuffix(":") in out
    words = " ".join(out.replace("│", " ").split())
    assert " ".join(cli.VERBS[verb].__doc__.split()) in words


def test_help_lists_every_verb(run, capsys):
    with pytest.raises(SystemExit) as exit_:
        run("--help")
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    assert all(verb in out for verb in cli.VERBS)


def test_help_imports_nothing_heavy():
    """Or it would take seconds."""
    code = f"""
import contextlib, io, sys
from l4jax import cli
for verb in ([], *([v] for v in {list(cli.VERBS)})):
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        cli.main([*verb, "--help"])
print(sorted({{"jax", "flax", "numpy", "grain", "orbax", "matplotlib"}} & set(sys.modules)))
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (found.stdout, found.stderr) == ("[]\n", "")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["trian"],
        ["info"],
        ["info", "tiny-llama4-scout", "--contxt", "5"],
        ["info", "tiny-llama4-scout", "--context", "many"],
        ["generate", "--prompt", "x"],
        ["generate", "somewhere", "--prompt", "x", "--dtype", "float8"],
        ["demo", "--steps", "1.5"],
    ],
    ids=" ".join,
)
def test_bad_usage_exits_with_2_and_leaves_standard_output_alone(run, capsys, arguments):
    with pytest.raises(SystemExit) as exit_:
        run(*arguments)
    out, err = capsys.readouterr()
    assert (exit_.value.code, out) == (2, "")
    assert "Traceback" not in err
    assert err


def test_the_installed_command_is_this_one():
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="l4jax")
    assert entry.load() is cli.main


def test_as_a_process_json_is_all_of_standard_output():
    found = spawn("info", "tiny-llama4-scout", "--json")
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout.count("\n") == 1
    assert json.loads(found.stdout)["preset"] == "tiny-llama4-scout"


def test_as_a_process_an_error_is_one_line_and_exit_code_1():
    found = spawn("info", "tiny-llama4-scuot", "--json")
    assert (found.returncode, found.stdout) == (1, "")
    assert found.stderr.startswith("l4jax: no preset is called 'tiny-llama4-scuot'; did you mean")
    assert found.stderr.count("\n") == 1


def test_as_a_process_bad_usage_is_exit_code_2():
    assert spawn("info", "--jsno").returncode == 2


# --- Errors --------------------------------------------------------------------------------------
def assert_one_line(result, *words, code=1):
    assert (result.code, result.out) == (code, "")
    assert result.err.startswith("l4jax: ")
    assert result.err.count("\n") == 1
    for word in words:
        assert str(word) in result.err


def test_an_unknown_preset_gives_the_nearest_names(run):
    assert_one_line(run("info", "lama4-mavrick"), "'lama4-mavrick'", "llama4-maverick")


@pytest.mark.parametrize(
    "verb", [["info"], ["generate", "--prompt", "x"]], ids=["info", "generate"]
)
class TestADirectoryThatIsNoCheckpoint:
    def test_missing(self, run, tmp_path, verb):
        path = tmp_path / "nowhere"
        assert_one_line(run(*verb, path), f"{path}: no such directory")

    def test_empty(self, run, tmp_path, verb):
        assert_one_line(run(*verb, tmp_path), tmp_path, "no checkpoint", "config.json")

    def test_a_file(self, run, tmp_path, verb):
        file = tmp_path / "model.safetensors"
        file.touch()
        assert_one_line(run(*verb, file), file, "this is a file")

    def test_of_another_architecture(self, run, copy, verb):
        (copy / "config.json").write_text(json.dumps({"model_type": "mistral"}))
        assert_one_line(run(*verb, copy), "'mistral' is not supported", "llama4")

    @pytest.mark.parametrize("content", ["", "{", "[]", "null", "{}", '{"model_type": 3}'])
    def test_with_a_broken_configuration(self, run, copy, verb, content):
        (copy / "config.json").write_text(content)
        assert_one_line(run(*verb, copy), "config.json")

    @pytest.mark.parametrize("content", ["", "[]", '{"format": 1, "config": 3}', '{"format": 99}'])
    def test_with_a_broken_marker(self, run, tmp_path, verb, content):
        (tmp_path / "l4jax.json").write_text(content)
        assert_one_line(run(*verb, tmp_path), "l4jax.json")


def test_a_truncated_file_is_named(run, copy):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert_one_line(run("generate", copy, "--prompt", "x"), file)


def test_a_missing_tokenizer_is_named(run, copy):
    (copy / "tokenizer.json").unlink()
    assert_one_line(run("generate", copy, "--prompt", "x"), "no tokenizer in", copy)


def test_a_prompt_beyond_the_context_is_refused(run, checkpoint):
    result = run("generate", checkpoint, "--prompt", "A dog. " * 200)
    assert_one_line(result, "prompt of", "context of 256")


def test_a_tokenizer_larger_than_the_model_is_refused(run, copy, tmp_path, tok):
    larger = tokenizer.train(TEXTS, vocab_size=tok.vocab_size + 20)
    assert larger.bos_id >= tok.vocab_size
    larger.save(copy)
    result = run("generate", copy, "--prompt", PROMPT)
    assert_one_line(result, "token id", f"outside the vocabulary of {tok.vocab_size}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "-1"], "temperature -1.0 must be finite and 0 or more"),
        (["--temperature", "nan"], "temperature nan must be"),
        (["--top-p", "0"], "top_p 0.0 must be greater than 0"),
        (["--top-p", "1.5"], "top_p 1.5 must be"),
        (["--top-k", "-3"], "top_k -3 must be 0 or more"),
        (["--max-new-tokens", "0"], "max_new_tokens 0 must be at least 1"),
        (["--seed", "99999999999999999999"], "seed 99999999999999999999 must be from 0"),
        (["--system", "Be brief."], "--system is part of a conversation: add --chat"),
        (["--messages", "a.json"], "give either --prompt or --messages"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
@pytest.mark.parametrize("json_", [[], ["--json"]], ids=["text", "json"])
def test_values_that_cannot_be_are_refused(run, checkpoint, arguments, message, json_):
    result = run("generate", checkpoint, "--prompt", PROMPT, *arguments, *json_)
    assert_one_line(result, message, code=2)


def test_debug_shows_the_whole_error(run, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such directory"):
        run("info", tmp_path / "nowhere", "--debug")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one\n  two"), "l4jax: one two\n"),
        (OSError(28, "No space left on device"), "l4jax: [Errno 28] No space left on device\n"),
        (KeyError("w"), "l4jax: KeyError: 'w'\n"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_any_error_becomes_one_line(run, monkeypatch, error, line):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(info, "describe", fail)
    assert run("info", "llama4-scout") == (1, "", line)


def test_an_interrupt_is_told_and_exits_with_130(run, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "describe", interrupt)
    assert run("info", "llama4-scout") == (130, "", "l4jax: interrupted\n")


# --- Verbs ---------------------------------------------------------------------------------------
def test_info_prints_for_people_or_for_machines(run, checkpoint):
    facts = run("info", checkpoint, "--json").json()
    assert facts == json.loads(json.dumps(info.describe(str(checkpoint))))
    text = run("info", checkpoint)
    assert (text.code, text.err) == (0, "")
    assert "in total" in text.out


def test_info_counts_at_the_context_that_is_asked_for(run):
    facts = run("info", "tiny-llama4-scout", "--context", "40", "--json").json()
    assert facts["flops_per_token"]["context"] == 40


def ids_of(tok, text=PROMPT):
    return tok.encode(text, bos=True)


def test_generate_is_the_library_s_generation(run, checkpoint, tok, model):
    found = run("generate", checkpoint, "--prompt", PROMPT, "--max-new-tokens", "24", "--json")
    expected = inference.generate(model, [ids_of(tok)], max_new_tokens=24, stop_ids=tok.stop_ids)
    result = found.json()
    assert result["tokens"] == expected.tokens[0]
    assert result["reason"] == expected.reasons[0]
    assert result["text"] == tok.decode(expected.tokens[0], skip_special=True)
    assert result["prompt_tokens"] == len(ids_of(tok))
    assert result["seconds"] > 0


@pytest.mark.parametrize("arguments", [[], ["--temperature", "2", "--seed", "5"]])
def test_text_is_what_json_says_and_a_newline(run, checkpoint, arguments):
    arguments = ["generate", checkpoint, "--prompt", PROMPT, "--max-new-tokens", "24", *arguments]
    text, machine = run(*arguments), run(*arguments, "--json").json()
    assert (text.code, text.err) == (0, "")
    assert text.out == machine["text"] + "\n"


def test_a_seed_decides_what_is_drawn(run, checkpoint):
    def tokens(*arguments):
        options = ("--max-new-tokens", 24, "--json", *arguments)
        return run("generate", checkpoint, "--prompt", PROMPT, *options).json()["tokens"]

    hot = ("--temperature", 2)
    assert tokens(*hot, "--seed", 1) == tokens(*hot, "--seed", 1)
    assert tokens(*hot, "--seed", 1) != tokens(*hot, "--seed", 2)
    assert tokens("--seed", 1) == tokens("--seed", 2)
    assert tokens(*hot, "--top-k", 1, "--top-p", 0.9, "--seed", 1) == tokens()


def with_swapped_head(model, one, other):
    """A model that gives to each of two ids the other's logit."""
    order = jnp.arange(model.config.vocab_size).at[jnp.array([one, other])].set([other, one])
    changed = build(model.config)
    changed.head[...] = changed.head[...][:, order]
    return changed


def test_generation_ends_at_a_stop_token_which_is_not_printed(run, tmp_path, tok, model):
    usual = inference.generate(model, [ids_of(tok)], max_new_tokens=24).tokens[0]
    place = next(i for i in range(2, 24) if usual[i] not in usual[:i])
    stop = tok.special["<|eot|>"]
    assert stop not in usual[: place + 1]
    path = tmp_path / "stops"
    checkpoints.save(with_swapped_head(model, usual[place], stop), path, to="hf")
    tok.save(path)
    options = ("generate", path, "--prompt", PROMPT, "--max-new-tokens", "24")
    result = run(*options, "--json").json()
    assert result["tokens"] == [*usual[:place], stop]
    assert result["reason"] == "stop"
    assert result["text"] == tok.decode(usual[:place], skip_special=True)
    assert run(*options).out == result["text"] + "\n"


def test_text_beyond_ascii_goes_in_and_comes_out(run, tmp_path, tok, model):
    prompt = "naïve café 🙂"
    usual = inference.generate(model, [ids_of(tok, prompt)], max_new_tokens=1).tokens[0][0]
    path = tmp_path / "accents"
    checkpoints.save(with_swapped_head(model, usual, tok.encode("é")[0]), path, to="hf")
    tok.save(path)
    options = ("generate", path, "--prompt", prompt, "--max-new-tokens", "12")
    result = run(*options, "--json")
    assert result.json()["prompt_tokens"] == len(ids_of(tok, prompt))
    assert not result.out.isascii()
    assert run(*options).out == result.json()["text"] + "\n"


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_chat_renders_a_conversation(run, checkpoint, tok, model, system):
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": PROMPT})
    ids = chat.render(messages, tok, add_generation_prompt=True).tokens
    expected = inference.generate(model, [ids], max_new_tokens=24, stop_ids=tok.stop_ids)
    options = ["--chat", "--max-new-tokens", "24", "--json"]
    options += ["--system", system] if system else []
    result = run("generate", checkpoint, "--prompt", PROMPT, *options).json()
    assert result["prompt_tokens"] == len(ids)
    assert result["tokens"] == expected.tokens[0]


def test_a_type_can_be_asked_for(run, checkpoint):
    options = ("--prompt", PROMPT, "--max-new-tokens", "4", "--dtype", "bfloat16", "--json")
    assert len(run("generate", checkpoint, *options).json()["tokens"]) == 4


def test_special_names_in_a_prompt_are_text(run, checkpoint, tok):
    """A user cannot end a turn by writing its name."""
    options = ("--max-new-tokens", "8", "--json")
    result = run("generate", checkpoint, "--prompt", "<|eot|>", *options).json()
    assert result["prompt_tokens"] == 1 + len(tok.encode("<|eot|>")) > 3


def test_generate_needs_something_to_continue(run, checkpoint):
    assert_one_line(run("generate", checkpoint), "give either --prompt or --messages", code=2)


def test_a_conversation_comes_from_a_file_or_standard_input(
    run, checkpoint, tok, model, tmp_path, monkeypatch
):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "naïve?"},
        {"role": "assistant", "content": "Yes."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "Wh"}, {"type": "text", "text": "y?"}],
        },
    ]
    ids = chat.render(messages, tok, add_generation_prompt=True).tokens
    expected = inference.generate(model, [ids], max_new_tokens=9, stop_ids=tok.stop_ids).tokens[0]
    (tmp_path / "a.json").write_text(json.dumps(messages))
    options = ("--max-new-tokens", "9", "--json")
    found = run("generate", checkpoint, "--messages", tmp_path / "a.json", *options).json()
    assert (found["prompt_tokens"], found["tokens"]) == (len(ids), expected)
    content = io.TextIOWrapper(io.BytesIO(json.dumps({"messages": messages}).encode()))
    monkeypatch.setattr(sys, "stdin", content)
    assert run("generate", checkpoint, "--messages", "-", *options).json()["tokens"] == expected


ASK = {"role": "user", "content": "Why?"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not JSON"),
        ("\udcff", "not JSON"),
        ("[]", "holds no messages"),
        ('"Why?"', "holds no messages"),
        ({"messages": 3}, "holds no messages"),
        ({"messages": [ASK], "tools": [], "n": 1}, "says tools, n beside its messages"),
        ([ASK, {"role": "assistant", "content": "So."}], "the last message is the assistant's"),
        ([3], "message 0 is 3; use"),
        ([{"role": "critic", "content": "No."}], "message 0 has role 'critic'; use one of system"),
        ([{"role": "user"}], "message 0 (user) has no content"),
        ([{"role": "user", "content": [{"type": "input_audio"}]}], "message 0, part 0 is"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}}]}],
            "message 0, part 0 is an image; images need the vision model, this is text only",
        ),
    ],
)
def test_conversations_that_cannot_be_answered(run, checkpoint, tmp_path, content, words):
    file = tmp_path / "a.json"
    text = content if isinstance(content, str) else json.dumps(content)
    file.write_bytes(text.encode(errors="surrogateescape"))
    assert_one_line(run("generate", checkpoint, "--messages", file), words)


def test_a_conversation_that_is_not_there(run, checkpoint, tmp_path):
    missing = run("generate", checkpoint, "--messages", tmp_path / "a.json")
    assert_one_line(missing, f"{tmp_path / 'a.json'}: No such file")
    assert_one_line(run("generate", checkpoint, "--messages", tmp_path), "Is a directory")
    for option in ("--image", "--system"):
        result = run("generate", checkpoint, "--messages", "a.json", option, "x")
        assert_one_line(result, "--messages is the whole conversation", code=2)
