"""What can be set on a recipe's command line, in sections that the command line flattens."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import jax
from etils import epath
from flax import nnx

from l4jax import lora, paths, quantization, sharding, weights
from l4jax.config import Execution, Remat
from l4jax.data import sources, tokenizing
from l4jax.federated import algorithms, clients, mapping, privacy
from l4jax.federated.compression import Compression
from l4jax.models.llama4 import Llama
from l4jax.planning import meshes
from l4jax.training import loop, optimizers, schedules

R = TypeVar("R", bound="Recipe")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Where and how the model computes."""

    mesh: str | None = None
    """Sizes of mesh axes, such as fsdp=4,expert=16; by default one device."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of matrix products and activations; parameters are float32 unless the recipe says."""
    remat: Remat = "none"
    """What the backward pass computes again instead of keeping."""

    def __post_init__(self) -> None:
        if self.mesh is not None:
            meshes.parse(self.mesh)

    def use(self) -> contextlib.AbstractContextManager[None]:
        """Inside, models are made and trained there."""
        if self.mesh is None:
            return contextlib.nullcontext()
        return sharding.use(sharding.make_mesh(**meshes.parse(self.mesh)))

    @property
    def execution(self) -> Execution:
        """For the model."""
        return Execution(dtype=self.dtype, remat=self.remat)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimization:
    """How parameters change."""

    optimizer: optimizers.Name = "adamw"
    learning_rate: float = 6e-3
    """The highest one."""
    schedule: schedules.Kind = "cosine"
    warmup: int = 10
    """Steps to get there."""
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    """Largest global norm of a gradient."""
    rates: tuple[tuple[str, float], ...] = ()
    """Learning rates of some parameters, relative to the others', by patterns on their names:
    'vision.*' 0.1."""
    moments: Literal["float32", "bfloat16"] = "float32"
    """Type that the optimizer's state is kept in."""
    average: float = 0.0
    """Decay of an exponential average of the parameters, which becomes the model; 0 for none."""
    accumulate: int = 1
    """Pieces that a batch is cut into, to save memory."""

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate < 1e3:
            raise ValueError(f"learning_rate {self.learning_rate} must be above 0 and below 1000")
        if self.accumulate < 1:
            raise ValueError(f"accumulate {self.accumulate} must be at least 1")

    def make(self, steps: int, apart: Sequence[str] = ()) -> tuple[Any, Any]:
        """Learning rate by step, and the optimizer, for a model or for several `apart`."""
        schedule = schedules.schedule(
            self.schedule, self.learning_rate, steps=steps, warmup=self.warmup
        )
        optimizer = optimizers.make(
            self.optimizer,
            schedule,
            weight_decay=self.weight_decay,
            clip_norm=self.clip_norm,
            moments=self.moments,
        )
        if apart:
            optimizer = optimizers.apart(optimizer, apart)
        if self.rates:
            optimizer = optimizers.with_rates(optimizer, dict(self.rates))
        if self.average:
            optimizer = optimizers.averaged(optimizer, self.average)
        return schedule, optimizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Files:
    """Examples to train on."""

    data: tuple[str, ...] = ()
    """Files, folders or patterns, here or at gs:// and s3://; by default what the recipe brings."""
    weights: tuple[float, ...] | None = None
    """How often each of --data comes, by examples; by default each example once in an epoch."""
    eval_data: tuple[str, ...] = ()
    """Files that are only measured on."""
    on_error: sources.OnError = "raise"
    """What a malformed record does: it ends the run, or is counted and skipped."""
    too_long: tokenizing.TooLong = "drop"
    """What becomes of an example longer than a row: it is left out and counted, cut in pieces
    (documents), or ends the run."""
    workers: int = 0
    """Processes that tokenize, and threads that read ahead."""
    images: bool = False
    """Examples may have images, and the checkpoint's encoder is trained with the rest (--frozen
    'vision.*' keeps it). Without, a model is loaded and saved without its encoder."""
    image_folder: str = ""
    """What paths of images in --data are relative to."""

    def __post_init__(self) -> None:
        if (self.eval_data or self.weights) and not self.data:
            raise ValueError("eval_data and weights belong to data of your own: give --data too")
        if self.image_folder and not self.images:
            raise ValueError(f"image_folder {self.image_folder} belongs to --images")
        if self.weights and len(self.weights) != len(self.data):
            raise ValueError(
                f"weights {self.weights}: give one for each of {len(self.data)} --data"
            )
        if self.weights and not all(0 < weight < math.inf for weight in self.weights):
            raise ValueError(f"weights {self.weights} must be above 0: leave such data out")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapters:
    """What is trained of a checkpoint: all of it, or low-rank adapters beside it."""

    rank: int = 0
    """Rank of adapters (LoRA); 0 trains the whole model."""
    alpha: float = 16.0
    """Adapters are scaled by alpha / rank."""
    adapt: tuple[str, ...] = ("*.attention.*",)
    """Which weights have adapters, by patterns on their names."""
    quantize: Literal["int8", "int4", "fp8"] | None = None
    """Keep the base in few bits (QLoRA)."""
    group: int = 128
    """Inputs that share a scale in int4."""
    frozen: tuple[str, ...] = ()
    """Parameters that stay as they are when the whole model is trained, by patterns."""

    def __post_init__(self) -> None:
        if self.rank < 0 or self.rank and self.frozen:
            raise ValueError(
                f"rank {self.rank} must not be negative, and without adapters for --frozen"
            )
        if self.group < 1:
            raise ValueError(f"group {self.group} must be at least 1")
        if self.quantize and not self.rank:
            raise ValueError(f"quantize {self.quantize} trains adapters: give them a --rank")

    def check(self, model: Llama) -> None:
        """Raises ValueError where `apply` would; of the model there need be only shapes."""
        if self.quantize:
            scheme, group = self.quantize, self.group
            jax.eval_shape(lambda x: quantization.qat(x, weights.EVERY, scheme, group=group), model)
        dataclasses.replace(self, quantize=None).apply(model, 0)

    def apply(self, model: Llama, seed: int) -> tuple[Llama, Callable[[str], bool] | None]:
        """The model to train, and which of its parameters to train; None for all."""
        if not self.rank:
            if not self.frozen:
                return model, None
            known = paths.names(nnx.to_pure_dict(nnx.state(model)))
            fixed = paths.chosen(self.frozen, known)
            return model, lambda name: not fixed(name)
        if self.quantize:
            model = quantization.quantize(model, weights.EVERY, self.quantize, group=self.group)
        key = jax.random.key(seed)
        model = lora.apply(model, self.adapt, rank=self.rank, alpha=self.alpha, key=key)
        return model, lora.trainable


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cohorts:
    """Who takes part in a federation's rounds, what is sent, and where clients compute."""

    participation: clients.Participation = clients.Participation()
    compression: Compression = Compression()
    clip: float | None = None
    """Largest norm of a client's update: with --noise, differential privacy of clients."""
    noise: float = 0.0
    """z: the sum of a round's updates gets noise of the standard deviation z · clip."""
    delta: float = 1e-5
    """Probability that this privacy fails."""
    mesh: str | None = None
    """Groups of devices that clients train on at once, and how a model lies on each, such as
    clients=4 or clients=2,fsdp=2; by default one device takes client after client."""

    def __post_init__(self) -> None:
        if self.clip is None and (self.noise or self.delta != Cohorts.delta):
            raise ValueError("noise and delta belong to updates that are clipped: give --clip too")
        if not 0 < self.delta < 1:
            raise ValueError(f"delta {self.delta} must be above 0 and below 1")
        _ = self.private, self.sizes  # refuse what is out of range

    def check(self, count: int) -> None:
        """Raises ValueError if a round has more clients than there are."""
        self.participation.draw(count, 0, seed=0)

    @property
    def private(self) -> privacy.Privacy | None:
        """What makes rounds private."""
        return None if self.clip is None else privacy.Privacy(clip=self.clip, noise=self.noise)

    @property
    def plain(self) -> bool:
        """Whether updates are sent as they are."""
        return self.compression == Compression() and self.clip is None

    def options(self, **own: Any) -> algorithms.Options:
        """What is sent and where clients compute, and an algorithm's `own` options."""
        sent = None if self.compression == Compression() else self.compression
        return algorithms.Options(
            compression=sent, privacy=self.private, mesh=self.make_mesh(), **own
        )

    @property
    def sizes(self) -> dict[str, int]:
        """Those of the mesh, `clients` first; empty if there is none."""
        if self.mesh is None:
            return {}
        first, _, rest = self.mesh.partition(",")
        axis, _, count = first.strip().partition("=")
        if axis != mapping.AXIS or not count.isdecimal() or int(count) < 1:
            raise ValueError(f"mesh {self.mesh!r}: write {mapping.AXIS}=4 first, then other axes")
        return {axis: int(count), **meshes.parse(rest or "data=1")}

    def make_mesh(self) -> jax.sharding.Mesh | None:
        """The mesh, of the devices that are there."""
        return mapping.make_mesh(**self.sizes) if self.mesh else None

    def use(self) -> contextlib.AbstractContextManager[None]:
        """Inside, models are made and trained there."""
        mesh = self.make_mesh()
        return sharding.use(mesh) if mesh else contextlib.nullcontext()

    def guarantee(self, count: int, rounds: int) -> dict[str, Any]:
        """ε (None if infinite), δ and what should be said of them; {} where nothing is private."""
        if self.clip is None:
            return {}
        share = (self.participation.per_round or count) / count
        epsilon = privacy.epsilon(noise=self.noise, rounds=rounds, delta=self.delta, share=share)
        said = privacy.warnings(clients=count, epsilon=epsilon, delta=self.delta)
        finite = epsilon if math.isfinite(epsilon) else None
        return {"epsilon": finite, "delta": self.delta, "rounds": rounds, "warnings": said}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What every recipe has."""

    out: str
    """Folder or address of all that the run leaves."""
    resume: bool = False
    """Go on after the last checkpoint in --out, if there is one."""
    seed: int = 0
    """Of everything random."""
    batch: int = 8
    """Rows in an update."""
    length: int = 256
    """Tokens of a row."""
    run: loop.Settings = loop.Settings(steps=300, checkpoint_every=100, evaluate_every=100)
    place: Place = Place()
    optimization: Optimization = Optimization()
    files: Files = Files()

    def __post_init__(self) -> None:
        if self.batch < 1 or self.length < 2:
            raise ValueError(f"batch {self.batch} must be at least 1, length {self.length} 2")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed {self.seed} must be from 0 to {2**32 - 1}")
        if "://" in self.out:
            if not self.out.startswith("gs://"):
                raise ValueError(f"out {self.out}: a run is kept in a folder or at a gs:// address")
            if getattr(self, "export", False):
                raise ValueError(
                    f"export is for an --out on a disk; of a model at an address l4jax convert "
                    f"{self.out}/model FOLDER --to hf makes the same"
                )
        adapters = getattr(self, "adapters", Adapters())
        if adapters.quantize and getattr(self, "export", False):
            raise ValueError(
                f"quantize {adapters.quantize}: Hugging Face's files are written of plain weights "
                "only; leave --quantize or --export out"
            )
        self.optimization.make(self.run.steps)  # refuses what does not go together
        for rows in self.batches:
            if rows % self.optimization.accumulate:
                raise ValueError(
                    f"accumulate {self.optimization.accumulate} does not divide batch {rows}"
                )

    @property
    def folder(self) -> epath.Path:
        """`out` as a path."""
        return epath.Path(self.out)

    @property
    def batches(self) -> tuple[int, ...]:
        """All numbers of rows that an update has."""
        return (self.batch,)

    @property
    def parts(self) -> dict[str, str | None]:
        """The models that train at once, and what each began with; empty if it is only one."""
        return {}


# --- Pods ----------------------------------------------------------------------------------------
class Pod(NamedTuple):
    """A slice, and how training lies on it; `l4jax plan` shows that it compiles and fits."""

    topology: str
    mesh: str
    batch: int


PODS = {
    "scout-v5p-64": Pod("v5p:4x4x4", "fsdp=4,expert=16", 64),
    "maverick-v5p-128": Pod("v5p:4x4x8", "expert=128", 128),
}


def on_pod(settings: R, name: str, **leaves: Any) -> R:
    """A recipe's values for a pod."""
    pod = PODS[name]
    place = dataclasses.replace(settings.place, mesh=pod.mesh)
    return dataclasses.replace(settings, place=place, batch=pod.batch, **leaves)
