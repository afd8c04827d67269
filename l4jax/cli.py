"""The command line: `l4jax VERB …`. Nothing else in the library knows tyro.

Every verb prints for people, or with `--json` one JSON object on standard output; progress and
errors go to standard error. Exit status: 0 done, 1 failed, 2 bad usage. What a verb needs is
imported when it runs, so that `--help` is instant.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

if TYPE_CHECKING:
    from rich.console import Console


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
    """Train a tiny Scout on the Python standard library, generate, export and read back."""

    out: pathlib.Path = pathlib.Path("runs/demo")
    """Folder for checkpoints, curves, samples and the report; an earlier demo's is replaced."""
    steps: int = 800
    """Pre-training updates of 1024 tokens each."""
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
    """Continue a prompt, or answer it as a chat message, with a checkpoint."""

    checkpoint: Annotated[pathlib.Path, tyro.conf.Positional]
    """Directory of the model, with its tokenizer.json or tokenizer.model."""
    prompt: str
    """What to continue, or with --chat what the user says."""
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
        from l4jax.data import chat, tokenizer
        from l4jax.inference import sampling

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
        checkpoints.read_config(self.checkpoint)
        coder = tokenizer.load(self.checkpoint)
        if self.chat:
            messages = [{"role": "system", "content": self.system}] if self.system else []
            messages.append({"role": "user", "content": self.prompt})
            ids = chat.render(messages, coder, add_generation_prompt=True).tokens
        else:
            ids = coder.encode(self.prompt, bos=coder.bos_id is not None)
        with self.console().status(f"Loading {self.checkpoint}"):
            model = checkpoints.load(self.checkpoint, dtype=self.dtype)
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


VERBS: dict[str, Any] = {"demo": Demo, "info": Info, "generate": Generate}


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
