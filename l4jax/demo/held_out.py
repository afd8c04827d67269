"""What no stage has seen, and the exam that is held on it after each stage."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from l4jax import inference
from l4jax.data import chat, mined, pipeline
from l4jax.data.tokenizer import Tokenizer
from l4jax.models.llama4 import Llama
from l4jax.training import objectives, teacher, trainer

LONGEST_ANSWER = 32
"""Tokens that an answer may take."""


class Question(NamedTuple):
    """Something to ask a model in a chat, and what it should say."""

    kind: str
    text: str
    answer: str


class HeldOut(NamedTuple):
    """Batches of documents, of conversations and of preferences, and questions to answer.

    segments: the most that a row of preferences has. guesses: the answer that comes most often in
    training, by kind of question.
    """

    documents: list[pipeline.Batch]
    answers: list[pipeline.Batch]
    preferences: list[pipeline.Batch]
    questions: list[Question]
    segments: int
    guesses: Mapping[str, str]

    def right(self, given: Sequence[str]) -> dict[str, list[bool]]:
        """Which answers are right to the last character, by kind, of those that can be."""
        found = defaultdict(list)
        for question, answer in zip(self.questions, given, strict=True):
            if question.kind in mined.EXACT:
                found[question.kind].append(answer == question.answer)
        return dict(found)

    def guessed(self) -> float:
        """The share that `guesses` answer right: what is there without reading the questions."""
        return _share(self.right([self.guesses[question.kind] for question in self.questions]))

    def examples(self, given: Mapping[str, Sequence[str]]) -> list[dict[str, str]]:
        """One question of each kind, the true answer, and those that were given at each stage."""
        first: dict[str, int] = {}
        for number, question in enumerate(self.questions):
            first.setdefault(question.kind, number)
        return [
            {
                "kind": kind,
                "question": self.questions[number].text,
                "answer": self.questions[number].answer,
                **{stage: answers[number] for stage, answers in given.items()},
            }
            for kind, number in sorted(first.items())
        ]


class Examiner:
    """Asks models all that is held out; compiled once for all stages.

    Args:
        data: what is held out.
        tokenizer: of the models.
        beta: of the rewards, which are means over an answer's tokens: see `objectives.dpo`.
    """

    def __init__(self, data: HeldOut, tokenizer: Tokenizer, *, beta: float) -> None:
        self._data, self._tokenizer = data, tokenizer
        self._next_token = trainer.evaluator(objectives.next_token())
        self._dpo = trainer.evaluator(objectives.dpo(beta, length_normalized=True, nll=0.0))

    def documents(self, model: Llama) -> dict[str, Any]:
        """How well it predicts text: what an evaluation with `objectives.next_token` finds."""
        return self._next_token(model, self._data.documents)

    def __call__(self, model: Llama) -> dict[str, Any]:
        """The exam.

        Its keys: `documents` and `answers`, mean cross-entropies in nats per token of text and of
        true answers; `expert_load` [layers experts] on the documents; `exact_match`, the share of
        the questions of `mined.EXACT` that it answers right, greedily and to the last character,
        and by kind; `prefers_chosen`, the share of pairs whose chosen answer it finds likelier, per
        token, than the rejected one; `given`, its answer to every question.
        """
        documents = self.documents(model)
        none = np.zeros((len(self._data.preferences[0]["tokens"]), self._data.segments), np.float32)
        pairs = [batch | {"reference": none} for batch in self._data.preferences]
        given = self._asked(model)
        right = self._data.right(given)
        return {
            "documents": documents["loss"],
            "answers": self._next_token(model, self._data.answers)["loss"],
            "expert_load": documents["expert_load"].tolist(),
            "exact_match": _share(right),
            "exact_match_by_kind": {kind: float(np.mean(x)) for kind, x in sorted(right.items())},
            "prefers_chosen": self._dpo(model, pairs)["accuracy"],
            "given": given,
        }

    def rewards(self, model: Llama, reference: Llama) -> dict[str, float]:
        """What DPO's rewards say of held-out pairs, relative to the model it began with."""
        add = teacher.reference(reference, self._data.segments)
        found = self._dpo(model, map(add, self._data.preferences))
        return {
            name: found[name] for name in ("accuracy", "margin", "chosen_reward", "rejected_reward")
        }

    def _asked(self, model: Llama) -> list[str]:
        """Its answers; one that it did not end has an ellipsis."""
        prompts = [
            chat.render(
                [{"role": "user", "content": question.text}],
                self._tokenizer,
                add_generation_prompt=True,
            ).tokens
            for question in self._data.questions
        ]
        found = inference.generate(
            model,
            prompts,
            max_new_tokens=LONGEST_ANSWER,
            stop_ids=self._tokenizer.stop_ids,
        )
        return [
            self._tokenizer.decode(row, skip_special=True) + ("…" if reason == "length" else "")
            for row, reason in zip(found.tokens, found.reasons, strict=True)
        ]


def _share(right: Mapping[str, Sequence[bool]]) -> float:
    return float(np.mean(np.concatenate(list(right.values()))))
