"""What the recipes share: how they begin, what they train on, the run itself, what it leaves.

A recipe is a frozen dataclass of `leaves`, some values of it by name (`--preset`), and one function
that reads from top to bottom. Exit status: 0 done, 1 failed, 2 bad usage, 130 interrupted, 143 told
to stop (what was trained is saved, `--resume` goes on).
"""

from __future__ import annotations

import dataclasses
import json
import logging
import pathlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import tyro
from flax import nnx

import l4jax.data.images as pictures
from experiments import leaves, saving
from experiments.console import CONSOLE, INTERRUPTED, STOPPED, say
from experiments.leaves import Recipe
from l4jax import checkpoints, distributed, lora, paths, presets, sharding, weights
from l4jax.checkpoints import formats
from l4jax.config import TextConfig
from l4jax.data import (
    pipeline,
    sources,
)
from l4jax.data.tokenizer import Tokenizer
from l4jax.models.llama4 import Llama
from l4jax.training import checkpointing, hooks, loop, optimizers, signals
from l4jax.training.codistillation import Pair
from l4jax.training.objectives import Objective
from l4jax.training.trainer import Training, batch_sharding

R = TypeVar("R", bound=leaves.Recipe)


def main(
    recipe: R, run: Callable[[R], loop.Result], values: Mapping[str, R], about: str | None
) -> int:
    """Reads the command line, runs the recipe, and says what went wrong in one line.

    Args:
        recipe: its default values.
        run: does it.
        values: by the names that --preset takes.
        about: the recipe's docstring.
    """
    named = {"laptop": recipe, **values}
    name, arguments = _preset(sys.argv[1:])
    if name not in named:
        print(f"--preset {name!r} is unknown; choose from {', '.join(named)}", file=sys.stderr)
        return 2
    names = f"--preset {{{','.join(named)}}} sets the leaves' defaults."
    try:
        chosen = tyro.cli(
            type(recipe),
            default=named[name],
            args=arguments,
            description=f"{about}\n\n{names}",
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
        )
    except ValueError as error:
        print(f"{' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if not chosen.out:
        print(f"--preset {name} needs --out, a folder or address", file=sys.stderr)
        return 2
    # What goes wrong in writing is an event of the run, told in one line.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        distributed.initialize()
        with signals.ending(), chosen.place.use():
            run(chosen)
    except signals.Stopped as stopped:  # all processes are
        return _failed(recipe, f"{stopped}; --resume goes on", STOPPED)
    except (KeyboardInterrupt, ImportError, OSError, ValueError, loop.Diverged) as error:
        if jax.process_count() > 1:
            raise  # ends the other processes too
        if isinstance(error, KeyboardInterrupt):
            return _failed(recipe, "interrupted", INTERRUPTED)
        return _failed(recipe, str(error), 1)
    return 0


def _failed(recipe: Recipe, why: str, status: int) -> int:
    """Says why a recipe ends, in one line; its exit status."""
    print(f"{type(recipe).__name__.lower()}: {' '.join(why.split())}", file=sys.stderr)
    return status


def _preset(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The value of --preset, and the other arguments."""
    name, rest, waiting = "laptop", [], list(arguments)
    while waiting:
        argument = waiting.pop(0)
        if argument == "--preset":
            name = waiting.pop(0) if waiting else ""
        elif argument.startswith("--preset="):
            name = argument.partition("=")[2]
        else:
            rest.append(argument)
    return name, rest


# --- Beginning -----------------------------------------------------------------------------------
def begin(recipe: Recipe) -> None:
    """Makes the folder and says in `config.json` what the run is."""
    folder, start = recipe.folder, getattr(recipe, "checkpoint", None)
    if start is not None:
        check_there(start)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder} is a file: give a folder")
    if (folder / "checkpoints").exists() and not recipe.resume:
        raise ValueError(f"{folder}: holds a run; add --resume to go on, or choose another --out")
    text = json.dumps(dataclasses.asdict(recipe), indent=1)
    if (folder / "checkpoints").exists() and (folder / "config.json").exists():
        # Refused before anything is changed.
        then = json.loads((folder / "config.json").read_text())
        changed = list(paths.differences(then, json.loads(text), free=loop.FREE))
        if changed:
            raise ValueError(f"{folder}: holds another run: {'; '.join(changed)}")
    if not recipe.resume:
        for path in (*recipe.files.data, *recipe.files.eval_data):
            sources.Source(path)  # whether there is something, before any of it is tokenized
    if jax.process_index() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            checkpointing.write(folder / "config.json", text + "\n")
        except OSError as error:
            why = error.strerror or error
            raise OSError(f"--out {folder}: nothing can be written there: {why}") from None


def new_model(config: TextConfig, recipe: Recipe) -> Llama:
    """A model to train from scratch, made in its place."""
    return sharding.create(
        lambda: Llama(config, execution=recipe.place.execution, rngs=nnx.Rngs(recipe.seed))
    )


def load_model(path: str, recipe: Recipe, *, dtype: Any = "float32") -> Llama:
    """A checkpoint's model, with parameters to train; its image encoder too, if images are read."""
    check_there(path)
    vision = recipe.files.images
    return checkpoints.load(path, vision=vision, dtype=dtype, execution=recipe.place.execution)


def check_there(path: str, leaf: str = "--checkpoint") -> None:
    """Whether there is a checkpoint at a path."""
    if "://" in path:
        raise ValueError(
            f"{leaf} {path}: models are read from a disk; l4jax convert {path} FOLDER --to orbax "
            "copies it"
        )
    if not path or not pathlib.Path(path).exists():
        raise FileNotFoundError(
            f"{path or leaf}: no such checkpoint; give one with {leaf}, or make the default one: "
            "experiments.pretrain comes before sft, and sft before dpo"
        )
    inner = pathlib.Path(path) / "model"
    try:
        checkpoints.detect(path)
    except FileNotFoundError as error:
        if not inner.exists():
            raise
        raise FileNotFoundError(f"{path}: is no checkpoint; did you mean {inner}?") from error


def check_whole(recipe: Recipe) -> None:
    """Whether examples stay whole, as conversations must."""
    if recipe.files.too_long == "split":
        raise ValueError("too_long split is for documents; use drop or raise")


def check_vocabulary(tokenizer: Tokenizer, config: TextConfig) -> None:
    """Whether the model knows all of the tokenizer's ids."""
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model {config.vocab_size}: they do "
            "not belong together"
        )


def check_model(recipe: Recipe, config: TextConfig) -> None:
    """Whether a model of this architecture can be trained as the leaves say: before any work."""
    if recipe.length > config.max_context:
        raise ValueError(
            f"length {recipe.length} exceeds the model's longest context of {config.max_context}"
        )
    mesh = jax.sharding.get_mesh()
    if not mesh.empty:
        sharding.check(config, mesh.shape)
        for rows in recipe.batches:
            batch_sharding(rows, recipe.length)
    adapters = getattr(recipe, "adapters", None)
    if adapters is not None:
        start: Any = getattr(recipe, "checkpoint", None)
        sees = checkpoints.read_model(start).vision if recipe.files.images else None
        adapters.check(formats.outline(formats.Model(config, sees), recipe.place.execution))


# --- The run -------------------------------------------------------------------------------------
def train(
    recipe: Recipe,
    model: Llama,
    objective: Objective,
    batches: Any,
    *,
    trainable: Callable[[str], bool] | None = None,
    every: Sequence[hooks.Function] = (),
    kept: Iterable[pipeline.Batch] = (),
    measure: Objective | None = None,
) -> tuple[Training, loop.Result]:
    """Trains to the end, as the leaves say; raises `signals.Stopped` if told to stop before.

    Args:
        recipe: how.
        model: what to train; its parameters are taken over.
        objective: what is minimised.
        batches: see `loop.fit`.
        trainable: see `trainer.Update`.
        every: what to call whenever the run is evaluated.
        kept: held-out batches that are measured then, if there are any.
        measure: by what; the objective by default.
    """
    schedule, optimizer = recipe.optimization.make(recipe.run.steps, tuple(recipe.parts))
    accumulate = recipe.optimization.accumulate
    training = Training(model, objective, optimizer, accumulate=accumulate, trainable=trainable)
    functions = [*every, *([hooks.evaluate(measure or objective, kept)] if kept else [])]
    result = loop.fit(
        training,
        batches,
        recipe.folder,
        settings=recipe.run,
        schedule=schedule,
        hooks=[hooks.every(recipe.run.evaluate_every, function) for function in functions],
        resume=recipe.resume,
        console=CONSOLE,
    )
    if result.ended == "stopped":  # what follows would take longer than whoever stops it waits
        raise signals.Stopped(f"told to stop after {result.step} steps, which are saved")
    return training, result


# --- End -----------------------------------------------------------------------------------------
def finish(
    recipe: Recipe,
    training: Training,
    tokenizer: Tokenizer,
    *,
    export: bool = False,
    images: pictures.Settings | None = None,
) -> Llama:
    """Draws the run's curves and saves the model with its tokenizer in `out/model`.

    Args:
        recipe: of the run.
        training: what it trained; of a model with adapters these are merged, and saved beside it.
        tokenizer: goes with the model.
        export: whether to write Hugging Face's files too, in `out/export`.
        images: how images become tiles, of a model that did not begin with a checkpoint.

    Returns:
        The model that was saved.
    """
    folder = recipe.folder
    if jax.process_index() == 0:
        saving.curves(folder)
    model = training.model
    if recipe.optimization.average:
        average = optimizers.average_of(training.state.optimizer)
        _, frozen = training.update.parts(training.state.params)
        model = training.update.model(training.update.joined(average, frozen))
    if not saving.finite(model):
        raise ValueError(
            "the model has numbers that are not finite and is not saved: lower --learning-rate"
        )
    if isinstance(model, Pair):
        origin = recipe.parts["teacher"]
        saving.save_model(model.teacher, tokenizer, folder / "teacher", origin=origin)
        model = model.student
    if weights.standing(model, lora.LowRank):
        try:
            saving.save_adapters(model, folder / "adapter")
        except ValueError as error:
            say(f"no adapter for PEFT: {error}")
        model = lora.merge(model)
    origin = getattr(recipe, "checkpoint", None)
    goes: dict[str, Any] = {"origin": origin, "images": images}
    saving.save_model(model, tokenizer, folder / "model", **goes)
    if export:
        saving.save_model(model, tokenizer, folder / "export", to="hf", **goes)
    say(f"Model, curves and metrics: {recipe.out}")
    return model


def preset(name: str) -> TextConfig:
    """The configuration of a preset.

    Raises:
        ValueError: there is none of this name.
    """
    return presets.get(name).make()
