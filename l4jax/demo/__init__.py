"""The main job, small: from raw text to a trained, tuned, saved, generating and exported model.

Every stage is a function of what the stages before it made: pre-training, supervised fine-tuning,
preference optimization. After each, the same exam is held on what no stage has seen. The texts are
the Python standard library's, and the questions are about its functions.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
import time
from typing import Any

import numpy as np
from rich.console import Console

from l4jax import roofline
from l4jax.data.ngrams import Ngrams
from l4jax.demo import drawing, held_out, stages
from l4jax.demo.report import show

__all__ = ["run", "show"]

_MADE = ("config.json", "metrics.jsonl", "report.json", "report.txt", *drawing.NAMES)
_MADE_FOLDERS = ("tokenizer", "checkpoint", "export")
_MARKER = ".l4jax-demo"
"""Says that a folder is a demo's, so that the next demo may replace what is in it."""


def run(out: pathlib.Path, *, steps: int, seed: int, console: Console) -> dict[str, Any]:
    """Runs every stage, writes what they make under `out`, and returns the report.

    Args:
        out: made if missing; an earlier demo's files in it are replaced.
        steps: pre-training updates; the later stages take shares of as many, see `stages.SHARES`.
        seed: of the initial parameters, the data's order and the samples.
        console: where progress goes.

    Raises:
        ValueError: `steps` or `seed` is out of range, or `out` holds what no demo made.
    """
    if steps < 2:
        raise ValueError(f"steps {steps} must be at least 2: one to warm up, one to learn")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed {seed} must be from 0 to {2**32 - 1}")
    begun = time.perf_counter()
    _clear(out)
    data = stages.prepare(out, console=console)
    config = stages.model_config(data.tokenizer.vocab_size)
    settings = {
        "steps": {name: stages.updates(name, steps) for name in stages.SHARES},
        "seed": seed,
        "batch": stages.BATCH,
        "length": stages.LENGTH,
    }
    _write_json(out / "config.json", settings | {"model": dataclasses.asdict(config)})
    with console.status("Counting unigrams and bigrams"):
        ngrams = Ngrams(data.documents, config.vocab_size).losses(data.exam.documents)
    how = stages.How(out / "metrics.jsonl", steps, seed, console)
    examine = held_out.Examiner(data.exam, data.tokenizer, beta=stages.BETA)
    pretrained, before = stages.pretrain(how, data, config, examine)
    with console.status("Generating"):
        samples, generation = stages.sample(pretrained.model, data.tokenizer, seed=seed)
    tuned = stages.finetune(how, data, pretrained.model, examine)
    aligned = stages.align(how, data, tuned.model, examine)
    done = {"pretrain": pretrained, "sft": tuned, "dpo": aligned}
    with console.status("Saving with Orbax, restoring, exporting, reading back"):
        agreement = stages.round_trip(out, aligned.model, data)
    after = pretrained.exam
    speeds = [line["tokens_per_second"] for line in pretrained.lines]
    report = {
        "held_out_loss": {
            "before": before["loss"],
            "after": after["documents"],
            "unigram": ngrams[0],
            "bigram": ngrams[1],
        },
        "beats_bigram": after["documents"] < ngrams[1],
        "held_out_tokens": before["count"],
        "stages": {
            name: {**stage.exam, "steps": len(stage.lines), "seconds": stage.seconds}
            for name, stage in done.items()
        },
        "guessed_exact_match": data.exam.guessed(),
        "answers": data.exam.examples({name: stage.exam["given"] for name, stage in done.items()}),
        "training_tokens_per_second": float(np.median(speeds)),
        "generation_tokens_per_second": generation,
        "parameters": roofline.parameters(config).total,
        "active_parameters": roofline.parameters(config).active,
        "samples": samples,
        "largest_logit_difference": agreement,
        "seconds": time.perf_counter() - begun,
        "files": {name: str(out / name) for name in (*_MADE_FOLDERS, *_MADE)},
        "settings": settings,
    }
    for stage in report["stages"].values():
        del stage["given"]
    drawing.draw(out, report, {name: stage.lines for name, stage in done.items()})
    _write_json(out / "report.json", report)
    with open(out / "report.txt", "w", encoding="utf-8") as file:
        show(report, Console(file=file, width=100))
    return report


def _clear(out: pathlib.Path) -> None:
    """Makes `out` an empty folder, if only an earlier demo's files and folders are in it."""
    known = {_MARKER, *_MADE, *_MADE_FOLDERS}
    if out.exists():
        if not out.is_dir():
            raise ValueError(f"{out}: is a file; --out needs a folder")
        names = sorted(path.name for path in out.iterdir())
        if not (out / _MARKER).exists():
            known = set()
        foreign = [name for name in names if name not in known]
        if foreign:
            raise ValueError(
                f"{out}: holds {foreign[0]!r}, which no demo made; choose another --out"
            )
        for path in out.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    out.mkdir(parents=True, exist_ok=True)
    (out / _MARKER).touch()


def _write_json(file: pathlib.Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
