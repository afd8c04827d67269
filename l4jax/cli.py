"""The command line: `l4jax VERB …`. Nothing else in the library knows tyro.

Every verb prints for people, or with `--json` one JSON object on standard output; progress and
errors go to standard error. Exit status: 0 done, 1 failed, 2 bad usage. What a verb needs is
imported when it runs, so that `--help` is instant.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

if TYPE_CHECKING:
    from rich.console import Console

    from l4jax.config import VisionConfig
    from l4jax.data.tokenizer import Tokenizer
    from l4jax.models.multimodal import Images


class UsageError(ValueError):
    """Options that do not go together or are out of range."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """What every verb has."""

    json: bool = False
    """Print one JSON object on standard output instead of text."""
    debug: bool = False
    """Show the whole traceback of an error."""

    def console(self) -> Console:
        """Where progress goes: standard error."""
        from rich.console import Console

        return Console(stderr=True)

    def print(self, value: dict[str, Any], show: Any) -> None:
        """Prints `value` as JSON, or lets `show` print it on a console for people."""
        if self.json:
            print(json.dumps(value, ensure_ascii=False))
            return
        from rich.console import Console

        show(Console())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demo(Output):
    """Pre-train, fine-tune and align a tiny Scout on the Python standard library; export it."""

    out: pathlib.Path = pathlib.Path("runs/demo")
    """Folder for checkpoints, curves, samples and the report; an earlier demo's is replaced."""
    steps: int = 800
    """Pre-training updates of 1024 tokens each; fine-tuning and DPO take shares of as many."""
    seed: int = 0
    """Of the initial parameters, the order of the data and the samples."""

    def run(self) -> None:
        """Runs the demo."""
        from l4jax import demo

        report = demo.run(self.out, steps=self.steps, seed=self.seed, console=self.console())
        self.print(report, lambda console: demo.show(report, console))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Info(Output):
    """Tell what a preset or a checkpoint is: parameters, bytes, cache, operations, licence."""

    name: Annotated[str, tyro.conf.Positional]
    """A preset (`tiny-NAME` for its tiny twin) or a checkpoint's directory."""
    context: int | None = None
    """Tokens of context to count operations per token at; 8192 or all the model allows."""

    def run(self) -> None:
        """Prints the facts."""
        from l4jax import info

        facts = info.describe(self.name, context=self.context)
        self.print(facts, lambda console: info.show(facts, console))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate(Output):
    """Continue a prompt, with images or without, or answer a chat message or conversation."""

    checkpoint: Annotated[pathlib.Path, tyro.conf.Positional]
    """Directory of the model, with its tokenizer.json or tokenizer.model."""
    prompt: str | None = None
    """What to continue, or with --chat what the user says."""
    messages: str | None = None
    """A conversation to answer in place of a prompt: a JSON file, or - for standard input, of
    messages in OpenAI's form. Paths of its images are relative to the file."""
    image: Annotated[tuple[pathlib.Path, ...], tyro.conf.UseAppendAction] = ()
    """A file, once for each image. They come where the prompt says <|image|>, or else before it."""
    chat: bool = False
    """Render the prompt as a conversation and stop at the end of the answer."""
    system: str | None = None
    """A system message before the prompt; only with --chat."""
    max_new_tokens: int = 128
    """Longest continuation."""
    temperature: float = 0.0
    """0 for the most likely token; 0.6 is what Meta's generation defaults say."""
    top_p: float = 1.0
    """Draw from the fewest tokens that together reach this probability."""
    top_k: int | None = None
    """Draw from this many most likely tokens."""
    seed: int = 0
    """Of the draws."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the parameters and the computation; as stored by default."""

    def run(self) -> None:
        """Generates, printing text as it comes."""
        from l4jax import checkpoints, inference
        from l4jax.data import tokenizer

        self._check()
        vision = checkpoints.read_model(self.checkpoint).vision
        if self.image and vision is None:
            raise ValueError(f"{self.checkpoint} reads text only: it has no encoder for --image")
        coder = tokenizer.load(self.checkpoint)
        ids, seen = self._prompt(coder, vision)
        with self.console().status(f"Loading {self.checkpoint}"):
            model = checkpoints.load(self.checkpoint, vision=seen is not None, dtype=self.dtype)
        begun = time.perf_counter()
        new, text, decoder = [], "", coder.stream(skip_special=True)
        for token in inference.stream(
            model,
            ids,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=self.seed,
            stop_ids=coder.stop_ids,
            images=seen,
        ):
            # A vocabulary padded beyond the tokenizer's has ids that are no text.
            piece = decoder.push(token) if token < coder.vocab_size else ""
            new.append(token)
            text += piece
            if not self.json:
                print(piece, end="", flush=True)
        text += (rest := decoder.flush())
        seconds = time.perf_counter() - begun
        result = {
            "text": text,
            "tokens": new,
            "reason": "stop" if new and new[-1] in coder.stop_ids else "length",
            "prompt_tokens": len(ids),
            "seconds": seconds,
        }
        self.print(result, lambda console: print(rest))

    def _check(self) -> None:
        """Raises UsageError if options do not go together or are out of range."""
        from l4jax.inference import sampling

        if (self.prompt is None) == (self.messages is None):
            raise UsageError("give either --prompt or --messages")
        if self.messages is not None and (self.image or self.system is not None):
            raise UsageError("--messages is the whole conversation: put --image, --system in it")
        if self.system is not None and not self.chat:
            raise UsageError("--system is part of a conversation: add --chat")
        if self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens {self.max_new_tokens} must be at least 1")
        if not 0 <= self.seed < 2**32:
            raise UsageError(f"seed {self.seed} must be from 0 to {2**32 - 1}")
        try:
            sampling.Sampling(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)
        except ValueError as error:
            raise UsageError(str(error)) from None

    def _prompt(
        self, coder: Tokenizer, vision: VisionConfig | None
    ) -> tuple[list[int], Images | None]:
        """The prompt as token ids, and its images if it has any."""
        import numpy as np

        from l4jax.data import chat, images
        from l4jax.models import multimodal

        settings = None if vision is None else images.of_checkpoint(self.checkpoint, vision)
        tiled: Sequence[images.Tiled] = ()
        if self.chat or self.messages is not None:
            messages = self._conversation(placed=settings is not None)
            rendered = chat.render(messages, coder, add_generation_prompt=True, images=settings)
            ids, tiled = rendered.tokens, rendered.images
        elif settings is None:
            ids = coder.encode(self.prompt or "", bos=coder.bos_id is not None)
        else:
            tiled = images.process(self.image, settings)
            ids = images.prompt(self.prompt or "", tiled, coder, settings.tokens_per_tile)
        if vision is None or not tiled:
            return ids, None
        tiles = np.concatenate([image.tiles for image in tiled])
        patch = images.special(coder, images.PATCH)
        return ids, multimodal.arrange(np.array([ids]), tiles, vision, patch_id=patch)

    def _conversation(self, *, placed: bool) -> list[Any]:
        """The messages to answer; `placed` says whether <|image|> in a prompt stands for one."""
        from l4jax.data import chat, images

        if self.messages is not None:
            return chat.read(self.messages)
        prompt = self.prompt or ""
        content = [
            {"type": "text", "text": x} if isinstance(x, str) else {"type": "image", "image": x}
            for x in (images.parts(prompt, self.image) if placed else [prompt])
        ]
        user = {"role": "user", "content": content}
        return [{"role": "system", "content": self.system}, user] if self.system else [user]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convert(Output):
    """Write a checkpoint in another format, in constant memory; the same command resumes."""

    source: Annotated[str, tyro.conf.Positional]
    """Directory of the checkpoint: Hugging Face's, Meta's or ours, as its files show; gs:// and
    s3:// addresses too."""
    destination: Annotated[str, tyro.conf.Positional]
    """Directory to make, or an address."""
    to: Literal["orbax", "hf", "meta"]
    """Format to write."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of floating-point tensors; given, quantized weights are multiplied out. As they are by
    default."""
    quantize: Literal["int8", "int4", "fp8"] | None = None
    """Store routed experts, or a dense model's feed-forward layers, in few bits."""
    group_size: int = 128
    """Inputs that share a scale in int4."""
    max_shard_size: str = "5GB"
    """Size at which a new safetensors file begins, such as 500MB or 5GB."""
    shards: int = 1
    """Model-parallel files of Meta's format."""
    licence: Literal["3.0", "3.1", "3.2", "3.3", "4", "none"] | None = None
    """Llama licence of the weights, "none" if they are your own; found out by default."""
    name: str | None = None
    """What the model is called in its card; the destination's name by default."""
    any_name: bool = False
    """Allow a --name without the prefix that the licence demands of derivatives."""
    staging: pathlib.Path | None = None
    """Folder in which checkpoints from or for an address lie meanwhile; a temporary one by
    default."""

    def run(self) -> None:
        """Converts."""
        reuse_memory()
        from l4jax import checkpoints
        from l4jax.checkpoints.plan import check_options

        try:
            options = checkpoints.Options(
                dtype=self.dtype,
                scheme=self.quantize,
                group=self.group_size,
                max_shard_bytes=parse_size(self.max_shard_size),
                shards=self.shards,
                staging=self.staging,
            )
            check_options(self.to, options)
        except ValueError as error:
            raise UsageError(str(error)) from None
        with bytes_bar(self.console(), f"{self.source} → {self.destination}") as begin:
            report = checkpoints.convert(
                self.source,
                self.destination,
                to=self.to,
                options=options,
                licence=self.licence,
                name=self.name,
                any_name=self.any_name,
                begin=begin,
            )

        def show(console: Console) -> None:
            console.print(
                f"{report['destination']}: {report['tensors']:,} tensors, "
                f"{report['bytes'] / 1e9:,.2f} GB in {report['seconds']:,.0f} s "
                f"({report['megabytes_per_second']:,.0f} MB/s)",
                highlight=False,
                markup=False,
            )
            for note in report["notes"]:
                console.print(note, highlight=False, markup=False)

        self.print(report, show)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verify(Output):
    """Check that a checkpoint is whole: every tensor there, finite, and as it was written."""

    checkpoint: Annotated[pathlib.Path, tyro.conf.Positional]
    """Directory in any of the formats."""

    def run(self) -> None:
        """Reads everything."""
        from l4jax import checkpoints

        with bytes_bar(self.console(), str(self.checkpoint)) as begin:
            report = checkpoints.verify(self.checkpoint, begin=begin)

        def show(console: Console) -> None:
            sums = f"{report['checksums']:,} checksums" if report["checksums"] else "no checksums"
            md5 = f", {report['md5_sums']} MD5 sums" if report["md5_sums"] else ""
            console.print(
                f"{report['checkpoint']}: whole; {report['tensors']:,} tensors, "
                f"{report['bytes'] / 1e9:,.2f} GB, {sums}{md5}",
                highlight=False,
                markup=False,
            )

        self.print(report, show)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan(Output):
    """Compile a step for a TPU pod that nobody holds: memory, traffic, time, what would fit."""

    preset: Annotated[str, tyro.conf.Positional]
    """A preset (`tiny-NAME` for its tiny twin)."""
    topology: str
    """Generation and slice, such as v5p:4x4x4, v6e:16x16 or tpu7x:2x2x1."""
    slices: int = 1
    """Slices joined by the data centre's network; the data axis crosses them."""
    task: Literal["train", "sft", "dpo", "distill", "teach", "prefill", "decode"] = "train"
    """Step to compile; teach is what a teacher does for distill."""
    mesh: str | None = None
    """Sizes of mesh axes, such as fsdp=4,expert=16; what suits the slice by default."""
    remat: Literal["none", "dots", "attention", "full", "offload"] | None = None
    """What training computes again instead of keeping; what suits the memory by default."""
    batch: int | None = None
    """Sequences in a step of all devices; one for each by default, at least 16 when decoding."""
    seq: int | None = None
    """Tokens of a sequence; 8192 or all the model allows by default."""
    context: str | None = None
    """Tokens in the cache when decoding, or "max" for as many as fit; 8192 by default."""
    tiles: int = 0
    """Tiles of images in each sequence; with any, the image encoder is part of the step."""
    freeze_vision: bool = False
    """Train the decoder only."""
    local_steps: int | None = None
    """Steps that each slice makes by itself before all average (DiLoCo); the mesh is of one."""
    search: bool = False
    """Compile several meshes and remat policies, and rank them."""
    limit: int = 6
    """Most programs that --search compiles."""
    price_per_chip_hour: float | None = None
    """What a chip costs; adds the cost of a million tokens."""
    measure: bool = False
    """Run the compiled step too, if this machine has the TPU, and compare."""
    out: pathlib.Path | None = None
    """Folder for plan.json, plan.png, and the compiler's whole message if it refuses."""

    def run(self) -> None:
        """Plans."""
        from l4jax.planning import report

        try:
            request = report.request(
                self.preset,
                topology=self.topology,
                slices=self.slices,
                task=self.task,
                mesh=self.mesh,
                remat=self.remat,
                batch=self.batch,
                seq=self.seq,
                context=self.context,
                tiles=self.tiles,
                freeze_vision=self.freeze_vision,
                local_steps=self.local_steps,
                price=self.price_per_chip_hour,
            )
            how = report.how(
                search=self.search, limit=self.limit, context=self.context, measure=self.measure
            )
        except ValueError as error:
            raise UsageError(str(error)) from None
        facts = report.make(request, how, out=self.out, console=self.console())
        self.print(facts, lambda console: report.show(facts, console))


def reuse_memory() -> None:
    """Lets the C library keep freed buffers in the process, where it would give them back.

    A conversion frees and asks for buffers of the same few sizes all the time; faulting them in
    anew took a quarter of its CPU time, and several arenas took more memory, not less.
    """
    if sys.platform == "linux":
        import ctypes

        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        trim_threshold, mmap_max, arena_max = -1, -4, -8
        for option, value in ((trim_threshold, -1), (mmap_max, 0), (arena_max, 1)):
            if mallopt is not None:
                mallopt(option, value)


def parse_size(text: str) -> int:
    """Bytes of a size such as "500MB", "5GB", "2GiB" or "1000000".

    Raises:
        ValueError: it is none, or not positive.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?))?b?", text.strip(), re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise ValueError(f"size {text!r} must be a number of bytes, such as 500MB, 5GB or 2GiB")
    power = " kmgt".index(match[2].lower()) if match[2] else 0
    size = int(float(match[1]) * (1024 if match[3] else 1000) ** power)
    if size < 1:
        raise ValueError(f"size {text!r} must be at least one byte")
    return size


@contextlib.contextmanager
def bytes_bar(
    console: Console, title: str
) -> Iterator[Callable[[int, int], Callable[[int], None]]]:
    """A progress bar with bytes, rate and time left.

    It begins when what it gives is called with the total and with what was done before; that
    returns what is to be called with every number of bytes.
    """
    from rich import progress

    columns = (
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    # Without a terminal even a bar that nobody sees would leave its last state behind.
    quiet = not console.is_terminal
    with progress.Progress(*columns, console=console, disable=quiet) as bar:

        def begin(total: int, done: int) -> Callable[[int], None]:
            task = bar.add_task(title, total=total, completed=done)
            return lambda size: bar.advance(task, size)

        yield begin


VERBS: dict[str, Any] = {
    "demo": Demo,
    "info": Info,
    "generate": Generate,
    "convert": Convert,
    "verify": Verify,
    "plan": Plan,
}


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    verb = tyro.extras.subcommand_cli_from_dict(
        VERBS,
        prog="l4jax",
        description="Llama 4 and Llama 3 in JAX.",
        args=arguments,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    try:
        verb.run()
    except KeyboardInterrupt:
        print("l4jax: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if verb.debug:
            raise
        kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
        print(f"l4jax: {kind}{' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
