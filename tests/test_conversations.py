"""Every form of a record means the same tokens, and only what should be learned is."""

import json
import pickle

import pytest

from l4jax.data import chat
from l4jax.data import tokenizer as tk
from l4jax.data.conversations import Conversations, Documents, Preferences, fingerprint
from l4jax.data.records import Completion, Conversation, Document, Preference, normalise

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Hi 🎉"}
ANSWER = {"role": "assistant", "content": "Hello!"}
MORE = {"role": "user", "content": "naïve 你好?"}
LAST = {"role": "assistant", "content": "Yes."}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"function": {"name": "now", "arguments": '{"zone": "UTC"}'}}],
}
RESULT = {"role": "tool", "content": "12:00"}


@pytest.fixture(scope="module")
def bpe():
    return tk.train(["Hello! Be brief. Hi there, naïve 你好 🎉 yes no"] * 3, vocab_size=300)


def learned(segment, bpe):
    """The text to be predicted."""
    pairs = zip(segment.tokens, segment.loss_mask, strict=True)
    return bpe.decode([token for token, learn in pairs if learn])


# --- Forms ---------------------------------------------------------------------------------------
FORMS = {
    "OpenAI": {"messages": [SYSTEM, USER, ANSWER, MORE, LAST]},
    "tables": {
        "text": None,
        "messages": [m | {"tool_calls": None, "name": None} for m in (SYSTEM, USER, ANSWER)]
        + [MORE, LAST],
    },
    "ShareGPT": {
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "Hi 🎉"},
            {"from": "gpt", "value": "Hello!"},
            {"from": "user", "value": "naïve 你好?"},
            {"from": "chatgpt", "value": "Yes."},
        ]
    },
    "ShareGPT with system apart": {
        "system": "Be brief.",
        "conversations": [
            {"from": "human", "value": "Hi 🎉"},
            {"from": "gpt", "value": "Hello!"},
            {"from": "human", "value": "naïve 你好?"},
            {"from": "gpt", "value": "Yes."},
        ],
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_conversation_means_the_same(form, bpe):
    (segment,) = Conversations(bpe)(FORMS[form])
    rendered = chat.render([SYSTEM, USER, ANSWER, MORE, LAST], bpe)
    assert segment == rendered
    assert learned(segment, bpe) == "Hello!<|eot|>Yes.<|eot|>"


def test_alpaca(bpe):
    plain = normalise({"instruction": "Add.", "input": "", "output": "3"})
    assert plain == Conversation(
        ({"role": "user", "content": "Add."}, {"role": "assistant", "content": "3"})
    )
    full = {"instruction": "Add.", "input": "1 2", "output": "3", "system": "Be brief."}
    messages = normalise(full).messages
    assert messages[0] == SYSTEM
    assert messages[1]["content"] == "Add.\n\n1 2"
    (segment,) = Conversations(bpe)(full)
    assert learned(segment, bpe) == "3<|eot|>"


def test_prompt_and_completion(bpe):
    texts = {"prompt": "Hi 🎉", "completion": "Hello!"}
    assert normalise(texts) == Completion("Hi 🎉", "Hello!")
    turns = {"prompt": [SYSTEM, USER, ANSWER, MORE], "completion": [LAST]}
    assert normalise(turns) == Conversation((SYSTEM, USER, ANSWER, MORE, LAST), 4)
    encode = Conversations(bpe)
    assert encode(texts) == [chat.render([USER, ANSWER], bpe)]
    (segment,) = encode(turns)
    # The answer in the prompt is given, not learned.
    assert learned(segment, bpe) == "Yes.<|eot|>"
    assert segment.tokens == chat.render([SYSTEM, USER, ANSWER, MORE, LAST], bpe).tokens


def test_completions_for_base_models(bpe):
    (segment,) = Conversations(bpe, template=False)({"prompt": "Hi ", "completion": "Hello!"})
    assert bpe.decode(segment.tokens) == "<|begin_of_text|>Hi Hello!<|end_of_text|>"
    assert learned(segment, bpe) == "Hello!<|end_of_text|>"
    (whole,) = Conversations(bpe, template=False, learn="all")({"prompt": "H", "completion": "i"})
    assert all(whole.loss_mask)


def test_documents(bpe):
    text = "two\n\nlines 🎉 <|eot|>\n"
    assert normalise({"text": text, "id": 3}) == Document(text)
    (segment,) = Documents(bpe)({"text": text})
    assert bpe.decode(segment.tokens) == f"<|begin_of_text|>{text}<|end_of_text|>"
    assert bpe.special["<|eot|>"] not in segment.tokens
    assert all(segment.loss_mask)
    (bare,) = Documents(bpe, bos=False, eos=False, key="body")({"body": text})
    assert bare.tokens == segment.tokens[1:-1]
    assert Documents(bpe)({"text": " \n"}) == []


# --- What is learned -----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("learn", "expected"),
    [("assistant", "Hello!<|eot|>Yes.<|eot|>"), ("last", "Yes.<|eot|>")],
)
def test_what_is_learned(learn, expected, bpe):
    (segment,) = Conversations(bpe, learn=learn)(FORMS["OpenAI"])
    assert learned(segment, bpe) == expected


def test_all_can_be_learned(bpe):
    (segment,) = Conversations(bpe, learn="all")(FORMS["OpenAI"])
    assert all(segment.loss_mask)


def test_the_last_answer_need_not_be_the_last_turn(bpe):
    (segment,) = Conversations(bpe, learn="last")({"messages": [USER, ANSWER, MORE, LAST, USER]})
    assert learned(segment, bpe) == "Yes.<|eot|>"


def test_calls_are_learned_and_results_are_not(bpe):
    (segment,) = Conversations(bpe)({"messages": [USER, CALL, RESULT, LAST]})
    call = '{"type": "function", "name": "now", "parameters": {"zone": "UTC"}}'
    assert learned(segment, bpe) == f"{call}<|eom|>Yes.<|eot|>"
    shared = [
        {"from": "human", "value": "Hi 🎉"},
        {"from": "function_call", "value": '{"name": "now", "arguments": {"zone": "UTC"}}'},
        {"from": "observation", "value": "12:00"},
        {"from": "gpt", "value": "Yes."},
    ]
    assert Conversations(bpe)({"conversations": shared}) == [segment]
    (listed,) = Conversations(bpe, tool_format="python_list")({"conversations": shared})
    assert learned(listed, bpe) == '[now(zone="UTC")]<|eom|>Yes.<|eot|>'


@pytest.mark.parity
def test_transformers_masks_the_same_tokens(bpe, tmp_path):
    """By its own generation markers, for which the end of a turn stands in front of `generation`'s
    end in a template made for the purpose."""
    transformers = pytest.importorskip("transformers", reason='needs the extra "parity"')
    bpe.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    theirs.chat_template = (
        "<|begin_of_text|>{% for m in messages %}<|header_start|>{{ m.role }}<|header_end|>\n\n"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|eot|>{% endgeneration %}"
        "{% else %}{{ m.content }}<|eot|>{% endif %}{% endfor %}"
    )
    found = theirs.apply_chat_template(
        FORMS["OpenAI"]["messages"], return_dict=True, return_assistant_tokens_mask=True
    )
    (segment,) = Conversations(bpe)(FORMS["OpenAI"])
    assert found["input_ids"] == segment.tokens
    assert found["assistant_masks"] == [int(learn) for learn in segment.loss_mask]


# --- Preferences ---------------------------------------------------------------------------------
GOOD, BAD, BEST = ({"role": "assistant", "content": text} for text in ("good", "bad", "best"))
PREFERENCES = {
    "texts": {"prompt": "Hi 🎉", "chosen": "good", "rejected": "bad"},
    "messages": {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    "text and messages": {"prompt": "Hi 🎉", "chosen": [GOOD], "rejected": [BAD]},
    "conversations": {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "prompt twice": {"prompt": "Hi 🎉", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "ShareGPT": {
        "conversations": [{"from": "human", "value": "Hi 🎉"}],
        "chosen": {"from": "gpt", "value": "good"},
        "rejected": {"from": "gpt", "value": "bad"},
    },
}


@pytest.mark.parametrize("form", PREFERENCES)
def test_every_form_of_a_preference_means_the_same(form, bpe):
    segments = Preferences(bpe)(PREFERENCES[form])
    assert [segment.tokens for segment in segments] == [
        chat.render([USER, answer], bpe).tokens for answer in (GOOD, BAD)
    ]
    assert [learned(segment, bpe) for segment in segments] == ["good<|eot|>", "bad<|eot|>"]


def test_what_answers_share_is_their_prompt(bpe):
    """Answers of the assistant in it are not learned again, those after it all are."""
    before = [SYSTEM, USER, ANSWER, MORE]
    value = {"chosen": [*before, GOOD, USER, GOOD], "rejected": [*before, BAD]}
    assert normalise(value) == Preference(tuple(before), ((GOOD, USER, GOOD), (BAD,)))
    chosen, rejected = Preferences(bpe)(value)
    assert learned(chosen, bpe) == "good<|eot|>good<|eot|>"
    assert learned(rejected, bpe) == "bad<|eot|>"


def test_an_edited_answer_comes_first_where_it_is_wanted(bpe):
    value = PREFERENCES["texts"] | {"edited": "best"}
    assert len(Preferences(bpe)(value)) == 2
    segments = Preferences(bpe, edited="add")(value)
    assert [learned(segment, bpe) for segment in segments] == [
        "best<|eot|>",
        "good<|eot|>",
        "bad<|eot|>",
    ]
    assert len(Preferences(bpe, edited="add")(PREFERENCES["texts"] | {"edited": None})) == 2
    for edited, best in (("leave", "good"), ("replace", "best")):
        pair = Preferences(bpe, edited=edited)(value)
        assert [learned(x, bpe) for x in pair] == [f"{best}<|eot|>", "bad<|eot|>"]
    unedited = Preferences(bpe, edited="replace")(PREFERENCES["texts"])
    assert [learned(x, bpe) for x in unedited] == ["good<|eot|>", "bad<|eot|>"]


def test_tokens_that_end_a_turn_are_left_out_where_they_shall_not_count(bpe):
    ends = set(bpe.special.values())
    for whole, part in zip(
        Preferences(bpe)(PREFERENCES["texts"]),
        Preferences(bpe, formatting=False)(PREFERENCES["texts"]),
        strict=True,
    ):
        assert part.tokens == whole.tokens
        learned, kept = (
            [t for t, learns in zip(x.tokens, x.loss_mask, strict=True) if learns]
            for x in (whole, part)
        )
        assert learned[-1] in ends
        assert kept == learned[:-1]
        assert not ends.intersection(kept)


def test_preferences_for_base_models(bpe):
    chosen, rejected = Preferences(bpe, template=False)(PREFERENCES["texts"])
    assert bpe.decode(chosen.tokens) == "<|begin_of_text|>Hi 🎉good<|end_of_text|>"
    assert learned(rejected, bpe) == "bad<|end_of_text|>"


# --- Encoders ------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["llama3", "llama4"])
def test_encoders_travel_to_other_processes(family):
    bpe = tk.train(["Hello! Hi there"] * 3, vocab_size=290, family=family)
    for encode, value in (
        (Documents(bpe, eos=False), {"text": "Hi 🎉"}),
        (Conversations(bpe, learn="last"), FORMS["OpenAI"]),
        (Preferences(bpe, edited="add"), PREFERENCES["texts"] | {"edited": "best"}),
    ):
        again = pickle.loads(pickle.dumps(encode))
        assert again.settings() == encode.settings()
        assert again(value) == encode(value)
        json.dumps(encode.settings())


def test_fingerprints_tell_tokenizers_apart(bpe, tmp_path):
    bpe.save(tmp_path)
    assert fingerprint(tk.load(tmp_path)) == fingerprint(bpe)
    assert fingerprint(tk.train(["Hello there"], vocab_size=280)) != fingerprint(bpe)


# --- Errors --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"body": "x", "id": 3}, r"a record with the names body, id; known are text; messages;"),
        ({}, "a record with the names none; known are"),
        ({"text": None, "n": 1}, "a record with the names n; known are"),
        ({"messages": []}, r"messages is \[\]; expected a list of messages"),
        ({"messages": "Hi"}, "messages is 'Hi'; expected a list"),
        ({"messages": [USER, "Hi"]}, r"messages\[1\] is 'Hi'; expected role and content"),
        ({"messages": [{"who": "me"}]}, r"messages\[0\] has who; expected role and content, or fr"),
        ({"conversations": [{"from": "dog", "value": "x"}]}, r"\[0\] is of 'dog'; known are human"),
        ({"messages": [USER, MORE]}, "a conversation without an assistant's turn"),
        ({"prompt": [ANSWER], "completion": [USER]}, "a conversation without an assistant's turn"),
        ({"messages": [USER, {"role": "assistant"}]}, r"message 1 \(assistant\) has no content"),
        ({"instruction": 3, "output": "x"}, "instruction is 3; expected a text"),
        (
            {"conversations": [{"from": "function_call", "value": "now()"}]},
            r"\[0\] calls 'now\(\)', which is no JSON",
        ),
        ({"text": "x"}, "the record is a document; wanted is a conversation"),
        (PREFERENCES["texts"], "the record is a preference; wanted is a conversation"),
    ],
)
def test_what_is_no_conversation_is_told(value, message, bpe):
    with pytest.raises(ValueError, match=message):
        Conversations(bpe)(value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"text": "x"}, "the record is a document; wanted are chosen and rejected answers"),
        ({"chosen": "a", "rejected": "b"}, "texts without a prompt; add prompt"),
        ({"prompt": "x", "chosen": "a", "rejected": "a"}, "two of the answers are the same"),
        ({"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, "two of the answers are the same"),
        ({"prompt": "x", "chosen": [USER], "rejected": "b"}, "an answer without an assistant's"),
        ({"chosen": [USER], "rejected": 3}, "rejected is 3; expected a list of messages"),
    ],
)
def test_what_is_no_preference_is_told(value, message, bpe):
    with pytest.raises(ValueError, match=message):
        Preferences(bpe)(value)


def test_documents_are_texts(bpe):
    with pytest.raises(ValueError, match="a record with the names messages; wanted is text"):
        Documents(bpe)(FORMS["OpenAI"])
    with pytest.raises(ValueError, match="text is 3; expected a text"):
        Documents(bpe)({"text": 3})


def test_without_a_template_only_texts_will_do(bpe):
    with pytest.raises(ValueError, match="the record is a conversation; without a template prompt"):
        Conversations(bpe, template=False)(FORMS["OpenAI"])
    with pytest.raises(ValueError, match="a preference of messages; without a template texts"):
        Preferences(bpe, template=False)(PREFERENCES["messages"])


def test_a_tokenizer_without_the_tokens_is_refused(bpe):
    bare = tk.Tokenizer(
        lambda text: list(text.encode()),
        pieces=[bytes([i]) for i in range(256)],
        special={},
        files={},
    )
    with pytest.raises(ValueError, match=r"no <\|begin_of_text\|> token; use bos=False"):
        Documents(bare)
    for make in (
        lambda: Documents(bare, bos=False),
        lambda: Conversations(bare, template=False),
        lambda: Preferences(bare, template=False),
    ):
        with pytest.raises(ValueError, match=r"no <\|end_of_text\|> token; use eos=False or a tem"):
            make()
    (segment,) = Documents(bare, bos=False, eos=False)({"text": "ab"})
    assert segment.tokens == [97, 98]
