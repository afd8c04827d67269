"""The demo's stages. Each is a function of what the stages before it made."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import pathlib
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from rich import progress
from rich.console import Console

from l4jax import checkpoints, inference, presets, sharding
from l4jax.config import TextConfig
from l4jax.data import conversations, corpus, pipeline, templates, tokenizer
from l4jax.data.chat import Rendered
from l4jax.data.mixture import Mixture
from l4jax.data.store import MemoryStore
from l4jax.data.tokenizing import encoded
from l4jax.demo.held_out import Examiner, HeldOut, Question
from l4jax.models.llama4 import Llama
from l4jax.training import objectives, optimizers, schedules, teacher, trainer

VOCABULARY = 512
LENGTH = 256
BATCH = 4
SEGMENTS = 8
"""Most segments in a row of preferences."""
SHARES = {"pretrain": 1.0, "sft": 0.25, "dpo": 0.2}
"""Updates of each stage, as shares of those of pre-training."""
RATES = {"pretrain": 6e-3, "sft": 1.5e-3, "dpo": 2e-4}
"""Peaks of the learning rates."""
BETA = 5.0
"""Of DPO on means over tokens, as in Tülu 3 (Lambert et al. 2024): sums favour what is short."""
TAUGHT, ASKED = 8192, 256
"""Conversations and preferences to train on, and held out; more would only take longer."""
HARD = ("name", "parameters")
"""Kinds of questions left out: a model this small does not learn to copy in minutes."""
PROMPTS = ("import ", "def __init__(self", "    for i in range(", '"""Return ')
_SHOWN = ("accuracy", "margin", "chosen_reward", "rejected_reward", "nll")


class Data(NamedTuple):
    """Tokenized documents, conversations and preferences to train on, and what is held out."""

    tokenizer: tokenizer.Tokenizer
    documents: list[list[int]]
    conversations: MemoryStore
    preferences: MemoryStore
    exam: HeldOut


class How(NamedTuple):
    """What all stages share: the file of metrics, pre-training's updates, the seed, a console."""

    metrics: pathlib.Path
    steps: int
    seed: int
    console: Console


class Trained(NamedTuple):
    """The model after a stage, what each step reported, the exam, and the seconds it all took."""

    model: Llama
    lines: list[dict[str, Any]]
    exam: dict[str, Any]
    seconds: float


def updates(stage: str, steps: int) -> int:
    """Of a stage, when pre-training makes `steps`: at least one to warm up and one to learn."""
    return max(2, round(SHARES[stage] * steps))


def model_config(vocab_size: int) -> TextConfig:
    """A twin of Scout that learns in minutes: its layer pattern, experts, qk-norm and temperature.

    Chunk and temperature floor are shorter than a row, so that training crosses both.
    """
    base = presets.tiny(presets.llama4_scout())
    attention, moe = base.attention, base.moe
    assert attention.temperature is not None
    assert moe is not None
    return dataclasses.replace(
        base,
        num_layers=4,
        embed_dim=128,
        vocab_size=vocab_size,
        max_context=4 * LENGTH,
        attention=dataclasses.replace(
            attention,
            num_kv_heads=2,
            head_dim=32,
            chunk_size=LENGTH // 4,
            temperature=dataclasses.replace(attention.temperature, floor=LENGTH // 4),
        ),
        moe=dataclasses.replace(moe, mlp_dim=256, shared_mlp_dim=256),
    )


# --- Data ----------------------------------------------------------------------------------------
def prepare(out: pathlib.Path, *, console: Console) -> Data:
    """Collects the corpus, trains a byte-level BPE tokenizer on its training side, tokenizes."""
    with console.status("Collecting the standard library, training a tokenizer"):
        texts = corpus.standard_library()
        bpe = tokenizer.train(texts.train, vocab_size=VOCABULARY)
        bpe.save(out / "tokenizer")
    with console.status("Mining questions and answers"):
        instructions, preferences = (
            corpus.Records(_some(records.train, TAUGHT), _some(records.held_out, ASKED))
            for records in (corpus.instructions(texts), corpus.preferences(texts))
        )
    with console.status("Tokenizing"):
        train, held_out = ([bpe.encode(text, bos=True) for text in side] for side in texts)
        chats, pairs = (
            [encoded(side, _short(encode)) for side in records]
            for records, encode in (
                (instructions, conversations.Conversations(bpe)),
                (preferences, conversations.Preferences(bpe)),
            )
        )
    size = 8 * BATCH
    documents = _batches(MemoryStore(held_out), seed=None, size=size, packing="split")
    exam = HeldOut(
        list(itertools.islice(documents, 4)),
        list(_batches(chats[1], seed=None, size=size)),
        list(_batches(pairs[1], seed=None, size=size, segments=SEGMENTS)),
        [_question(record) for record in instructions.held_out],
        SEGMENTS,
        _commonest(map(_question, instructions.train)),
    )
    console.print(
        f"{len(train)} files to train on, {len(held_out)} held out; "
        f"{sum(map(len, train)):,} and {sum(map(len, held_out)):,} tokens, "
        f"vocabulary {bpe.vocab_size}; {len(chats[0]):,} and {len(instructions.held_out):,} "
        "questions with answers"
    )
    return Data(bpe, train, chats[0], pairs[0], exam)


def _short(encode: Callable) -> Callable[[Any], list[Rendered]]:
    """An encoder that leaves out what does not fit a row."""

    def run(record: Any) -> list[Rendered]:
        segments = encode(record)
        return segments if sum(len(segment.tokens) for segment in segments) <= LENGTH else []

    return run


def _some(records: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """Some records that are not too hard, always the same."""
    easy = [record for record in records if record["kind"] not in HARD]
    return random.Random(0).sample(easy, min(most, len(easy)))


def _question(record: dict[str, Any]) -> Question:
    asked, answer = (message["content"] for message in record["messages"])
    return Question(record["kind"], asked, answer)


def _commonest(questions: Iterable[Question]) -> dict[str, str]:
    """The answer that comes most often, by kind."""
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for question in questions:
        counts[question.kind][question.answer] += 1
    return {kind: found.most_common(1)[0][0] for kind, found in counts.items()}


def _batches(
    store: MemoryStore,
    *,
    seed: int | None,
    size: int = BATCH,
    packing: Literal["best_fit", "split"] = "best_fit",
    segments: int | None = None,
) -> pipeline.Batches:
    """Batches of a store: shuffled and for ever, or without a seed once and in its order."""
    return pipeline.batches(
        Mixture([store], epochs=1 if seed is None else None),
        length=LENGTH,
        batch_size=size,
        seed=seed,
        packing=packing,
        segments=segments,
    )


# --- Training ------------------------------------------------------------------------------------
def pretrain(
    how: How, data: Data, config: TextConfig, examine: Examiner
) -> tuple[Trained, dict[str, Any]]:
    """Trains a new model on next tokens; also how well it predicted documents before."""
    begun = time.perf_counter()
    model = sharding.create(lambda: Llama(config, rngs=nnx.Rngs(how.seed)))
    with how.console.status("Compiling"):
        before = examine.documents(model)
    batches = _batches(MemoryStore(data.documents), seed=how.seed, packing="split")
    model, lines = _train(how, "pretrain", model, objectives.next_token(balance=0.01), batches)
    return _examined(how, model, lines, examine, begun), before


def finetune(how: How, data: Data, model: Llama, examine: Examiner) -> Trained:
    """Trains on the answers of conversations: next tokens, of which those of questions are given.

    The model that comes in is used up.
    """
    begun = time.perf_counter()
    batches = _batches(data.conversations, seed=how.seed)
    model, lines = _train(how, "sft", model, objectives.next_token(balance=0.01), batches)
    return _examined(how, model, lines, examine, begun)


def align(how: How, data: Data, model: Llama, examine: Examiner) -> Trained:
    """Direct preference optimization; the exam has `rewards` too, on held-out pairs.

    The model that comes in is used up; a copy of it is the reference.
    """
    begun = time.perf_counter()
    before = jax.tree.map(jnp.copy, model)
    add = teacher.reference(before, SEGMENTS)
    batches = map(add, _batches(data.preferences, seed=how.seed, segments=SEGMENTS))
    model, lines = _train(
        how, "dpo", model, objectives.dpo(BETA, length_normalized=True, balance=0.01), batches
    )
    trained = _examined(how, model, lines, examine, begun)
    return trained._replace(exam=trained.exam | {"rewards": examine.rewards(model, before)})


def _train(
    how: How,
    stage: str,
    model: Llama,
    objective: objectives.Objective,
    batches: Iterable[trainer.Batch],
) -> tuple[Llama, list[dict[str, Any]]]:
    """The model after a stage's updates with AdamW, and every step's line of metrics."""
    steps = updates(stage, how.steps)
    warmup = max(1, min(50, steps // 10))
    schedule = schedules.warmup_cosine(RATES[stage], steps=steps, warmup=warmup)
    training = trainer.Training(model, objective, optimizers.make("adamw", schedule))
    lines = []
    with open(how.metrics, "a", encoding="utf-8") as file:
        for line in _lines(how, stage, training.run(batches, steps), steps, schedule):
            file.write(json.dumps(line) + "\n")
            lines.append(line)
    return training.model, lines


def _lines(
    how: How,
    stage: str,
    steps: Iterable[dict[str, Any]],
    count: int,
    schedule: optax.Schedule,
) -> Iterator[dict[str, Any]]:
    """What is written down of each step, with a progress bar."""
    columns = (
        *progress.Progress.get_default_columns(),
        progress.TextColumn("loss {task.fields[loss]:.3f} · {task.fields[speed]:,.0f} tokens/s"),
    )
    names = {"pretrain": "Pre-training", "sft": "Fine-tuning", "dpo": "Aligning"}
    with progress.Progress(*columns, console=how.console) as bar:
        task = bar.add_task(names[stage], total=count, loss=float("nan"), speed=0)
        for metrics in steps:
            line = {
                "stage": stage,
                "step": metrics["step"],
                "loss": float(metrics["loss"]),
                "grad_norm": float(metrics["grad_norm"]),
                "learning_rate": float(schedule(metrics["step"])),
                "tokens_per_second": BATCH * LENGTH / metrics["seconds"],
                "router_entropy": float(metrics["router_entropy"]),
            }
            line |= {name: float(metrics[name]) for name in _SHOWN if name in metrics}
            yield line
            bar.update(task, advance=1, loss=line["loss"], speed=line["tokens_per_second"])


def _examined(
    how: How, model: Llama, lines: list[dict[str, Any]], examine: Examiner, begun: float
) -> Trained:
    with how.console.status("Examining"):
        exam = examine(model)
    return Trained(model, lines, exam, time.perf_counter() - begun)


# --- What becomes of the model -------------------------------------------------------------------
def round_trip(out: pathlib.Path, model: Llama, data: Data) -> dict[str, float]:
    """Saves with Orbax and as Hugging Face safetensors, reads both back, compares logits.

    Both get the tokenizer and its chat template. Returns the largest absolute difference of each
    from the model in memory; both should be 0.
    """
    bpe = data.tokenizer
    checkpoints.save(model, out / "checkpoint", to="orbax")
    ids = {"bos_token_id": bpe.bos_id, "eos_token_id": list(bpe.stop_ids)}
    checkpoints.save(model, out / "export", to="hf", extra=ids)
    assert bpe.family is not None
    for folder in ("checkpoint", "export"):
        bpe.save(out / folder)
        template = templates.chat_template(bpe.family)
        (out / folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    forward = jax.jit(lambda model, tokens: model(tokens))
    tokens = data.exam.documents[0]["tokens"][:2]
    ours = forward(model, tokens)
    return {
        folder: float(abs(forward(checkpoints.load(out / folder), tokens) - ours).max())
        for folder in ("checkpoint", "export")
    }


def sample(
    model: Llama, bpe: tokenizer.Tokenizer, *, seed: int
) -> tuple[list[dict[str, str]], float]:
    """A continuation of every prompt, and how many tokens per second came after compilation."""
    prompts = [bpe.encode(prompt, bos=True) for prompt in PROMPTS]

    def generate() -> Sequence[list[int]]:
        return inference.generate(
            model,
            prompts,
            max_new_tokens=96,
            temperature=0.7,
            top_p=0.95,
            seed=seed,
            stop_ids=bpe.stop_ids,
        ).tokens

    generate()
    begun = time.perf_counter()
    rows = generate()
    speed = sum(map(len, rows)) / (time.perf_counter() - begun)
    texts = [bpe.decode(row, skip_special=True) for row in rows]
    return [{"prompt": p, "text": t} for p, t in zip(PROMPTS, texts, strict=True)], speed
