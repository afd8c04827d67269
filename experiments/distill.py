"""Distillation: a small model learns from what a large one says of every next token, and from data.

By default the model of `python -m experiments.pretrain` teaches one of half its width, from
scratch, in about a minute:

    python -m experiments.distill
    python -m experiments.distill --soft 0        # hard targets alone, the baseline
    python -m experiments.distill --teacher DIR --student llama3.2-1b --data corpus/*.jsonl --top 64

The loss is `objectives.distill`: the weight of the teacher goes from --soft to --soft-end along
half a cosine (`objectives.soft_weight`), that of the data's own tokens is the rest. Llama 4's
report says that such weights changed through training, not how. The weight follows the number of
the batch, which is part of where the data stand: a resumed run goes on with the same.

The teacher answers while the student learns, on the same mesh or on one beside it (--teacher-mesh);
or, with --cache, once for all batches of the run before it begins, as Llama 4's did for most data:
later runs on the same batches read the answers, --top tokens and 8 bytes for each.

With --codistill the teacher learns as well, from the data, in the same steps: its answers are by
what its own training computes, as when Maverick learned from Behemoth. It is saved beside the
student, in --out/teacher. Leaves what pre-training leaves.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterable
from typing import Any

import jax
from etils import epath

from experiments import examples, leaves, recipe
from experiments.console import say, told
from l4jax import checkpoints, roofline, sharding
from l4jax.config import TextConfig
from l4jax.data import conversations, pipeline
from l4jax.data import tokenizer as tokenizers
from l4jax.planning import meshes
from l4jax.training import codistillation, loop, objectives, teacher
from l4jax.training.trainer import evaluate, spread


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distill(leaves.Recipe):
    """Leaves of the recipe."""

    out: str = "runs/distill"
    batch: int = 4
    teacher: str = "runs/pretrain/model"
    """A checkpoint in any format, with its tokenizer; parameters stay as stored."""
    student: str | None = None
    """A preset; by default the teacher's architecture at half its width."""
    soft: float = 1.0
    """Weight of the teacher at the first step; 0 with --soft-end 0 does without one."""
    soft_end: float = 0.0
    """Weight of the teacher at the last step."""
    temperature: float = 1.0
    """Above 1, tokens that are unlikely to the teacher count for more."""
    top: int = 32
    """Tokens that the teacher tells the probability of, the likeliest ones."""
    cache: str | None = None
    """Folder of the teacher's answers, under --out unless it is absolute: made if it is missing. On
    a disk that all hosts see."""
    teacher_mesh: str | None = None
    """Sizes of mesh axes for the teacher, on the devices behind those of --mesh."""
    codistill: bool = False
    """Train the teacher too, on the same mesh."""
    balance: float = 0.01
    """Weight of the load balance between experts."""
    files: leaves.Files = leaves.Files(too_long="split")

    def __post_init__(self) -> None:
        super().__post_init__()
        examples.check_text(self)
        for name in ("soft", "soft_end"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 0 and at most 1")
        if self.top < 1 or not self.temperature > 0:
            raise ValueError(
                f"top {self.top} must be at least 1, temperature {self.temperature} above 0"
            )
        if self.teacher_mesh is not None:
            meshes.parse(self.teacher_mesh)
        if self.codistill and not (self.taught and self.cache is None and not self.teacher_mesh):
            raise ValueError(
                "codistill asks a teacher that changes in every step: it needs --soft or "
                "--soft-end above 0, and goes without --cache and --teacher-mesh"
            )

    @property
    def parts(self) -> dict[str, str | None]:
        """See `Recipe`."""
        return {"teacher": self.teacher, "student": None} if self.codistill else {}

    @property
    def taught(self) -> bool:
        """Whether there is a teacher."""
        return self.soft > 0 or self.soft_end > 0


def run(settings: Distill) -> loop.Result:
    recipe.check_there(settings.teacher, "--teacher")
    recipe.begin(settings)
    tokenizer = tokenizers.load(settings.teacher)
    train, held_out = examples.mixtures(
        settings,
        conversations.Documents(tokenizer),
        examples.standard_library,
        "Tokenizing the standard library",
    )
    config = student_config(settings)
    recipe.check_vocabulary(tokenizer, config)
    recipe.check_model(settings, config)
    kept: Any = []
    if held_out is not None:
        kept = examples.held_out_batches(held_out, settings, packing="split")
    batches: Any = examples.training_batches(train, settings, packing="split")
    objective = objectives.next_token(balance=settings.balance)
    model: Any = recipe.new_model(config, settings)
    measure = objectives.next_token()
    if settings.codistill:
        model = codistillation.Pair(recipe.load_model(settings.teacher, settings), model)
        batches = batches.map_with_index(weigher(settings))
        objective = codistillation.codistill(
            settings.top, temperature=settings.temperature, balance=settings.balance
        )
        measure = codistillation.measure
    elif settings.taught:
        batches = taught(batches, kept, settings)
        objective = objectives.distill(temperature=settings.temperature, balance=settings.balance)
    size, of = roofline.parameters(config), checkpoints.read_config(settings.teacher)
    say(f"{size.total:,} parameters; the teacher has {roofline.parameters(of).total:,}")
    training, result = recipe.train(
        settings,
        model,
        objective,
        batches,
        kept=kept,
        measure=measure,
    )
    recipe.finish(settings, training, tokenizer)
    return result


def student_config(settings: Distill) -> TextConfig:
    """The student's architecture.

    Raises:
        ValueError: teacher and student have different vocabularies.
    """
    of = checkpoints.read_config(settings.teacher)
    config = half(of) if settings.student is None else recipe.preset(settings.student)
    if config.vocab_size != of.vocab_size:
        raise ValueError(
            f"the teacher has {of.vocab_size} tokens, student {settings.student} "
            f"{config.vocab_size}: it could not say what the teacher says"
        )
    return config


def half(config: TextConfig) -> TextConfig:
    """The architecture with half the heads and every width halved, but not the heads' own."""
    attention, moe = config.attention, config.moe
    return dataclasses.replace(
        config,
        embed_dim=config.embed_dim // 2,
        mlp_dim=config.mlp_dim // 2,
        attention=dataclasses.replace(
            attention,
            num_heads=max(1, attention.num_heads // 2),
            num_kv_heads=max(1, attention.num_kv_heads // 2),
        ),
        moe=moe
        and dataclasses.replace(
            moe, mlp_dim=moe.mlp_dim // 2, shared_mlp_dim=moe.shared_mlp_dim // 2
        ),
    )


# --- The teacher ---------------------------------------------------------------------------------
def taught(batches: pipeline.Batches, kept: Iterable[pipeline.Batch], settings: Distill) -> Any:
    """The batches with what the teacher says of them, and its weight.

    Args:
        batches: of the run.
        kept: held-out batches, for the teacher's own loss; it is not measured if its answers are
            on the disk already.
        settings: of the run.
    """
    if settings.cache is None:
        answers = ask(settings, kept)
    else:
        folder = settings.folder / settings.cache
        if "://" in str(folder):
            raise ValueError(f"cache {folder} must be on a disk, as it is read by memory maps")
        if not folder.exists():
            fill(folder, batches, settings, kept)
        answers = teacher.Cache(folder)
    return batches.map(answers).map_with_index(weigher(settings))


def weigher(settings: Distill) -> Callable[[int, Any], dict[str, Any]]:
    """A function that adds the teacher's weight to the batch of a number."""

    def weigh(number: int, batch: Any) -> dict[str, Any]:
        weight = objectives.soft_weight(
            number, settings.run.steps, first=settings.soft, last=settings.soft_end
        )
        return {**batch, "soft_weight": weight}

    return weigh


def ask(settings: Distill, kept: Iterable[pipeline.Batch]) -> Any:
    """A function that adds the answers of the teacher, which is loaded, to a batch."""
    kept, mesh = list(kept), None
    if settings.teacher_mesh is not None:
        if jax.process_count() > 1:
            raise ValueError(
                f"teacher_mesh {settings.teacher_mesh}: a teacher on other devices is for runs of "
                "one process"
            )
        sizes = meshes.parse(settings.teacher_mesh)
        used = jax.sharding.get_mesh().size or 1
        mesh = sharding.make_mesh(jax.devices()[used:], **sizes)
    with settings.place.use() if mesh is None else sharding.use(mesh):
        model = checkpoints.load(settings.teacher, vision=False, execution=settings.place.execution)
        if kept:
            loss = evaluate(model, objectives.next_token(), kept)["loss"]
            say(f"the teacher's loss on held-out data: {loss:.4f}")
    answers = teacher.top_tokens(model, settings.top, mesh=mesh)
    return answers if mesh is not None else lambda batch: answers(spread(batch))


def fill(
    folder: epath.Path, batches: pipeline.Batches, settings: Distill, kept: Iterable[pipeline.Batch]
) -> None:
    """Writes what the teacher says of all batches of a run."""
    steps = settings.run.steps
    with told(f"The teacher answers {steps:,} batches"):
        rows = teacher.save(folder, ask(settings, kept), itertools.islice(batches, steps))
    say(f"the teacher's answers on {rows:,} rows: {folder}")


POD = Distill(
    out="",
    teacher="",
    student="llama4-scout",
    cache="teacher",
    top=64,
    length=8192,
    batch=128,
    run=loop.Settings(
        steps=10_000, checkpoint_every=500, checkpoint_minutes=20.0, evaluate_every=500
    ),
    # Experts of both models lie on 16 devices, and on 8 more dimensions each.
    place=leaves.Place(mesh="fsdp=8,expert=16", dtype="bfloat16", remat="full"),
    optimization=leaves.Optimization(learning_rate=3e-4, warmup=500),
    files=leaves.Files(too_long="split", workers=4),
)
PRESETS = {"scout-from-maverick-v5p-128": POD}

if __name__ == "__main__":
    sys.exit(recipe.main(Distill(), run, PRESETS, __doc__))
