r"""Text to token ids and back, for Llama 3, Llama 4 and small tokenizers trained here.

Two kinds of file hold a tokenizer. Meta's `tokenizer.model` has one line per token (base64 bytes,
a space, the rank) and names no special tokens: those follow from the number of ranks. Hugging
Face's `tokenizer.json` holds a byte-level BPE and its special tokens by name. Both become the same
`Tokenizer`, which treats special names inside a text as plain text unless told otherwise, so a
user cannot forge the end of a turn.

    tok = load("path/to/Llama-4-Scout")             # or: train(texts, vocab_size=4096)
    ids = tok.encode("Hello\n", bos=True)
    text = tok.decode(ids, skip_special=True)
"""

import base64
import codecs
import json
import operator
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal, SupportsIndex, get_args

import tiktoken
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

Family = Literal["llama3", "llama4"]

# Meta's limits for one call of the encoder: it can panic on longer texts, and slows on long runs.
_MAX_CHARS = 400_000
_MAX_RUN = 25_000
_LONG_RUN = re.compile(rf"(?<!\s)\s{{{_MAX_RUN + 1},}}|(?<!\S)\S{{{_MAX_RUN + 1},}}")

# --- How text is cut into pieces before BPE ------------------------------------------------------
_LEAD = r"[^\r\n\p{L}\p{N}]?"  # one space or sign may stick to the word that follows it
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"  # letters without case belong to both halves of a word
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CONTRACTION = r"(?i:'(?:[sdmt]|ll|ve|re))"
_DIGITS = r"\p{N}{1,3}"
_SIGNS = r" ?[^\s\p{L}\p{N}]+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
# The two word rules must stay whole alternatives. Sharing their common start would change which one
# wins on a combining mark before a capital, as a mark can be a lead or a letter.
_WORDS = "|".join(
    f"{_LEAD}{letters}{_CONTRACTION}?" for letters in (f"{_UPPER}*{_LOWER}+", f"{_UPPER}+{_LOWER}*")
)
SPLIT_PATTERNS: dict[Family, str] = {
    "llama3": rf"{_CONTRACTION}|{_LEAD}\p{{L}}+|{_DIGITS}|{_SIGNS}[\r\n]*|{_SPACES}",
    "llama4": rf"{_WORDS}|{_DIGITS}|{_SIGNS}[\r\n/]*|{_SPACES}",
}


# --- Special tokens ------------------------------------------------------------------------------
def _numbered(group: str, start: int, stop: int) -> list[str]:
    """Names of the reserved tokens of a group, from number `start` up to but without `stop`."""
    return [f"{group}reserved_special_token_{n}" for n in range(start, stop)]


def _llama3_names() -> list[str]:
    """The 256 special names of Llama 3, in id order from 128000."""
    names = ["begin_of_text", "end_of_text", *_numbered("", 0, 2), "finetune_right_pad_id"]
    names += ["step_id", "start_header_id", "end_header_id", "eom_id", "eot_id", "python_tag"]
    names += ["image", *_numbered("", 2, 246)]
    return [f"<|{name}|>" for name in names]


def _llama4_names() -> list[str]:
    """The 2048 special names of Llama 4, in id order from 200000."""
    text, vision, reasoning = "text_post_train_", "vision_", "reasoning_"
    names = ["begin_of_text", "end_of_text", "fim_prefix", "fim_middle", "fim_suffix"]
    names += ["header_start", "header_end", "eom", "eot", "step", *_numbered(text, 0, 6)]
    names += ["python_start", "python_end", "finetune_right_pad", *_numbered(text, 8, 69)]
    names += ["image_start", "image_end", *_numbered(vision, 0, 2)]
    names += ["tile_x_separator", "tile_y_separator", *_numbered(vision, 2, 6)]
    names += ["image", *_numbered(vision, 6, 7), "patch", *_numbered(vision, 7, 1048)]
    names += [*_numbered(reasoning, 0, 8), "reasoning_thinking_start", "reasoning_thinking_end"]
    names += _numbered("", 0, 2048 - len(names))
    return [f"<|{name}|>" for name in names]


_RANKS: dict[Family, int] = {"llama3": 128_000, "llama4": 200_000}
SPECIAL_NAMES: dict[Family, list[str]] = {"llama3": _llama3_names(), "llama4": _llama4_names()}
# Places, in the lists above, of the names that `train` adds: for text chats and tools, for images.
_CHAT: dict[Family, tuple[int, ...]] = {
    "llama3": (0, 1, 4, 6, 7, 8, 9, 10),
    "llama4": (0, 1, 5, 6, 7, 8, 16, 17, 18),
}
_IMAGES = (80, 81, 84, 85, 90, 92)


def _family_of(special: dict[str, int]) -> Family | None:
    """The family whose header tokens are among `special`, or None."""
    if {"<|header_start|>", "<|header_end|>"} <= special.keys():
        return "llama4"
    return "llama3" if {"<|start_header_id|>", "<|end_header_id|>"} <= special.keys() else None


def _with_meta_names(special: dict[str, int], family: Family | None) -> dict[str, int]:
    """`special`, plus Meta's names for ids that a converted file calls by other names.

    Only a file with the complete block of special ids is touched, as its ids then mean what they
    mean in Meta's tokenizer. Reserved names are left alone: files number them differently.
    """
    first = special.get("<|begin_of_text|>")
    if family is None or first is None:
        return special
    ids = {name: first + i for i, name in enumerate(SPECIAL_NAMES[family])}
    if not set(ids.values()) <= set(special.values()):
        return special
    missing = {name: ids[name] for name in ids if name not in special and "reserved" not in name}
    return special | missing


# --- The tokenizer -------------------------------------------------------------------------------
class Tokenizer:
    """Byte-level BPE with the special tokens of a Llama family. Made by `load` or `train`.

    Attributes:
        vocab_size: Number of ids; every id is below it.
        special: Id of each special token by name. A file converted from Meta's can name an id
            twice, by its own name and by Meta's.
        family: "llama3" or "llama4" by the header tokens present, None without them.
        bos_id: Id of begin_of_text, None where the file has no such token.
        pad_id: Id to fill batches with: the right-pad token, else end_of_text, else 0.
        stop_ids: Ids that end generation, of end_of_text, eom and eot those that exist.
    """

    def __init__(
        self,
        encode_text: Callable[[str], list[int]],
        *,
        pieces: Sequence[bytes],
        special: dict[str, int],
        files: dict[str, bytes],
    ) -> None:
        """Wraps an encoder of plain text; prefer `load` or `train`.

        Args:
            encode_text: Plain text to ids; never returns a special id.
            pieces: The bytes of each id, special ones included.
            special: Id of each special token by name.
            files: Content by file name, for `save`.
        """
        self._encode_text = encode_text
        self._pieces = pieces
        self._files = files
        self.vocab_size = len(pieces)
        self.family: Family | None = _family_of(special)
        self.special = _with_meta_names(special, self.family)
        self._special_ids = frozenset(self.special.values())

        def find(*names: str) -> int | None:
            return next((self.special[n] for n in names if n in self.special), None)

        end, pad = (
            find("<|end_of_text|>"),
            find("<|finetune_right_pad|>", "<|finetune_right_pad_id|>"),
        )
        eom, eot = find("<|eom|>", "<|eom_id|>"), find("<|eot|>", "<|eot_id|>")
        self.bos_id = find("<|begin_of_text|>")
        self.pad_id = next((i for i in (pad, end) if i is not None), 0)
        self.stop_ids = tuple(i for i in (end, eom, eot) if i is not None)

    @cached_property
    def _special_regex(self) -> re.Pattern[str]:
        names = sorted(self.special, key=len, reverse=True)  # the longest of two prefixes wins
        return re.compile("|".join(map(re.escape, names)) or r"(?!)")

    def encode(self, text: str, *, bos: bool = False, allow_special: bool = False) -> list[int]:
        """Token ids of `text`.

        Args:
            text: Any text. Lone surrogates become the replacement character.
            bos: Whether to begin with begin_of_text.
            allow_special: Whether special names inside `text` become their ids. Leave it off for
                text that somebody else wrote.

        Raises:
            ValueError: If `bos` is asked of a tokenizer that has no begin_of_text.
        """
        ids: list[int] = []
        if bos:
            if self.bos_id is None:
                raise ValueError("this tokenizer has no <|begin_of_text|> token; use bos=False")
            ids.append(self.bos_id)
        for chunk in _chunks(text):
            start = 0
            for match in self._special_regex.finditer(chunk) if allow_special else ():
                ids += self._encode_text(chunk[start : match.start()])
                ids.append(self.special[match[0]])
                start = match.end()
            ids += self._encode_text(chunk[start:])
        return ids

    def decode(self, ids: Iterable[SupportsIndex], *, skip_special: bool = False) -> str:
        """Text of `ids`; bytes that are not UTF-8 become the replacement character.

        Args:
            ids: Token ids; integers of any kind, NumPy's and JAX's too.
            skip_special: Whether to leave special tokens out instead of writing their names.

        Raises:
            ValueError: If an id is negative or not below `vocab_size`.
        """
        joined = b"".join(self._piece(i, skip_special) for i in ids)
        return joined.decode("utf-8", errors="replace")

    def stream(self, *, skip_special: bool = False) -> "StreamDecoder":
        """A decoder that takes ids one by one and never yields half a character.

        Decoding each id alone would: an emoji often spans several tokens.

            out = tok.stream()
            for i in generated:
                print(out.push(i), end="", flush=True)
        """
        return StreamDecoder(lambda i: self._piece(i, skip_special))

    def _piece(self, token_id: SupportsIndex, skip_special: bool) -> bytes:
        index = operator.index(token_id)
        if not 0 <= index < self.vocab_size:
            size = self.vocab_size
            raise ValueError(
                f"token id {index} is outside the vocabulary of {size} (0 to {size - 1})"
            )
        return b"" if skip_special and index in self._special_ids else self._pieces[index]

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes the tokenizer where `load(directory)` and transformers' AutoTokenizer find it.

        A Meta rank file is written as it was read; otherwise tokenizer.json is written with a
        tokenizer_config.json that names the begin, end and pad tokens. Each file appears whole or
        not at all.

        Raises:
            ValueError: If a rank file would land next to a tokenizer.json, which `load` prefers.
        """
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        if "tokenizer.json" not in self._files and (folder / "tokenizer.json").exists():
            raise ValueError(
                f"{folder} already has a tokenizer.json, which load() would prefer to the "
                "tokenizer.model to be saved; choose another directory or remove it"
            )
        for name, content in self._files.items():
            _write(folder / name, content)


class StreamDecoder:
    """Turns ids into text as they come; made by `Tokenizer.stream`."""

    def __init__(self, piece: Callable[[SupportsIndex], bytes]) -> None:
        """Starts empty; `piece` gives the bytes of an id."""
        self._piece = piece
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: SupportsIndex) -> str:
        """The text completed by `token_id`, empty while a character is still unfinished."""
        return self._utf8.decode(self._piece(token_id))

    def flush(self) -> str:
        """What an unfinished character leaves, as a replacement character; starts afresh."""
        return self._utf8.decode(b"", final=True)


# --- Making one ----------------------------------------------------------------------------------
def load(path: str | os.PathLike[str]) -> Tokenizer:
    """Tokenizer from a tokenizer.json, a Meta tokenizer.model, or a directory with one of them.

    In a directory tokenizer.json is preferred. A file is read as JSON if its name ends in .json.

    Raises:
        FileNotFoundError: If there is no such file, or nothing to load in the directory.
        ValueError: If `path` is empty or the file is malformed; the message names the file, and
            the line where that is known.
    """
    if not os.fspath(path):
        raise ValueError("path is empty; give a tokenizer file or a directory that holds one")
    file = Path(path)
    if file.is_dir():
        names = ("tokenizer.json", "tokenizer.model")
        found = next((file / name for name in names if (file / name).is_file()), None)
        if found is None:
            raise FileNotFoundError(f"no tokenizer in {file}: looked for {' and '.join(names)}")
        file = found
    elif not file.is_file():
        raise FileNotFoundError(f"no tokenizer at {file}: no such file or directory")
    return _from_json_file(file) if file.suffix == ".json" else _from_rank_file(file)


def train(
    texts: Iterable[str], *, vocab_size: int, family: Family = "llama4", images: bool = False
) -> Tokenizer:
    """Byte-level BPE learned from `texts`, with the chat tokens of a family after it.

    Equal texts give an equal tokenizer, in whatever order they come. A small corpus runs out of
    pairs to merge: `Tokenizer.vocab_size` is then below what is asked for.

    Args:
        texts: Documents to learn from.
        vocab_size: Number of ids, 256 bytes and the special tokens included.
        family: Whose way to split text and whose special names to use.
        images: Whether to add Llama 4's tokens for images.

    Raises:
        ValueError: If `vocab_size` has no room for bytes and special tokens, `family` is unknown,
            or `texts` is a single string.
    """
    if family not in SPECIAL_NAMES:
        raise ValueError(f"unknown family {family!r}; use one of {', '.join(get_args(Family))}")
    if isinstance(texts, str):
        raise ValueError(f"texts is one string ({texts[:20]!r}...); give a list of documents")
    names = [SPECIAL_NAMES[family][x] for x in _CHAT[family] + (_IMAGES if images else ())]
    least = 256 + len(names)
    if vocab_size < least:
        raise ValueError(
            f"vocab_size {vocab_size} is too small: bytes and special names need {least}"
        )
    model = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(SPLIT_PATTERNS[family]), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(names),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator((c for text in texts for c in _chunks(text)), trainer)
    model.add_special_tokens([tokenizers.AddedToken(name, normalized=False) for name in names])
    bos = names[0]  # transformers adds it through this; `Tokenizer.encode` does not use it
    model.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, model.token_to_id(bos))]
    )
    return _from_json(model.to_str(), source="the trained tokenizer", companions={})


# --- Meta rank files -----------------------------------------------------------------------------
def _from_rank_file(file: Path) -> Tokenizer:
    content = file.read_bytes()
    family, pieces = read_ranks(content, file)
    encoding = tiktoken.Encoding(
        name=family,
        pat_str=SPLIT_PATTERNS[family],
        mergeable_ranks={piece: rank for rank, piece in enumerate(pieces)},
        special_tokens={},
    )
    return Tokenizer(
        encoding.encode_ordinary,
        special={name: len(pieces) + i for i, name in enumerate(SPECIAL_NAMES[family])},
        pieces=pieces + [name.encode() for name in SPECIAL_NAMES[family]],
        files={"tokenizer.model": content},
    )


def read_ranks(content: bytes, file: Path) -> tuple[Family, list[bytes]]:
    """The family whose rank file this is, and the bytes of each rank in order."""
    ranks: dict[int, bytes] = {}
    seen: set[bytes] = set()
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            token, digits = line.split()
            piece, rank = base64.b64decode(token, validate=True), int(digits)
        except ValueError:
            what = f"expected base64 bytes, a space and a rank, but found {line[:40]!r}"
            raise ValueError(f"{where}: {what}") from None
        if rank in ranks or piece in seen:
            twice = f"rank {rank}" if rank in ranks else f"token {piece!r}"
            raise ValueError(f"{where}: {twice} was given before; each may come once")
        ranks[rank] = piece
        seen.add(piece)
    missing = next((r for r in range(len(ranks)) if r not in ranks), None)
    if missing is not None:
        raise ValueError(f"{file}: rank {missing} is missing; ranks must run from 0 without a gap")
    _check_bytes(seen, str(file))
    family = next((f for f, count in _RANKS.items() if count == len(ranks)), None)
    if family is None:
        known = " or ".join(f"{count} ({f})" for f, count in _RANKS.items())
        raise ValueError(f"{file} has {len(ranks)} ranks, which no known family has: {known}")
    return family, [ranks[r] for r in range(len(ranks))]


# --- tokenizer.json ------------------------------------------------------------------------------
# Kept as found when a tokenizer is saved again, for what else they hold (chat template, limits).
_COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def _from_json_file(file: Path) -> Tokenizer:
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 at byte {error.start}") from None
    paths = [file.with_name(name) for name in _COMPANIONS]
    companions = {path.name: path.read_bytes() for path in paths if path.is_file()}
    return _from_json(text, source=str(file), companions=companions)


def _from_json(text: str, *, source: str, companions: dict[str, bytes]) -> Tokenizer:
    try:
        spec = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{source}, line {error.lineno}: not JSON ({error.msg})") from None
    if not isinstance(spec, dict) or not isinstance(spec.get("model"), dict):
        raise ValueError(f"{source} has no 'model' object; expected a Hugging Face tokenizer.json")
    # Without its added tokens the encoder cannot turn a special name in a text into an id.
    plain = spec | {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
    try:
        added = {str(t["content"]): int(t["id"]) for t in spec.get("added_tokens") or ()}
        encoder = tokenizers.Tokenizer.from_str(json.dumps(plain))
    except Exception as error:  # the library raises bare Exception on whatever it does not know
        raise ValueError(f"{source} is not a valid tokenizer.json: {error!r}") from None
    vocab = encoder.get_vocab(with_added_tokens=False)
    return Tokenizer(
        lambda chunk: encoder.encode(chunk, add_special_tokens=False).ids,
        pieces=_pieces(vocab, added, source),
        special=added,
        files={"tokenizer.json": text.encode(), "tokenizer_config.json": config_json(added)}
        | companions,
    )


def _pieces(vocab: dict[str, int], added: dict[str, int], source: str) -> list[bytes]:
    """The bytes of each id; an id that no token has gets none."""
    to_byte = byte_symbols()
    pieces = [b""] * (1 + max((*vocab.values(), *added.values()), default=-1))
    for token, index in vocab.items():
        try:
            pieces[index] = bytes(to_byte[symbol] for symbol in token)
        except KeyError:
            if token not in added:
                what = f"token {token!r} (id {index}) is not spelled in byte symbols"
                raise ValueError(f"{source}: {what}; only byte-level BPE is supported") from None
    _check_bytes(set(pieces), source)
    for token, index in added.items():
        pieces[index] = token.encode()
    return pieces


def byte_symbols() -> dict[str, int]:
    """The byte that each printable symbol of a byte-level vocabulary stands for.

    Visible Latin-1 characters stand for themselves; the other bytes take, in order, the characters
    from U+0100 on, so that no token contains a space or a control character.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    symbols = {chr(byte): byte for byte in visible}
    return symbols | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def config_json(special: dict[str, int]) -> bytes:
    """A tokenizer_config.json with the names that transformers wants to know."""
    roles = {
        "bos_token": ("<|begin_of_text|>",),
        "eos_token": ("<|eot|>", "<|eot_id|>", "<|end_of_text|>"),
        "pad_token": ("<|finetune_right_pad|>", "<|finetune_right_pad_id|>"),
    }
    found = {role: next((n for n in names if n in special), None) for role, names in roles.items()}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    return json.dumps(config | {r: n for r, n in found.items() if n}, indent=2).encode()


# --- Helpers -------------------------------------------------------------------------------------
def _chunks(text: str) -> Iterator[str]:
    """`text` in parts short enough to encode, cut where Meta's tokenizers cut it."""
    if not text.isascii() and any("\ud800" <= symbol <= "\udfff" for symbol in set(text)):
        # UTF-8 cannot spell lone surrogates. Through UTF-16 paired ones become the character meant.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    for start in range(0, len(text), _MAX_CHARS):
        part = text[start : start + _MAX_CHARS]
        done = 0
        for run in _LONG_RUN.finditer(part) if len(part) > _MAX_RUN else ():
            for cut in range(run.start() + _MAX_RUN, run.end(), _MAX_RUN):
                yield part[done:cut]
                done = cut
        yield part[done:]


def _check_bytes(pieces: set[bytes], source: str) -> None:
    missing = [byte for byte in range(256) if bytes([byte]) not in pieces]
    if missing:
        raise ValueError(
            f"{source} has no token for byte {missing[0]:#04x} ({len(missing)} bytes lack one); "
            "a byte-level tokenizer needs all 256"
        )


def _write(path: Path, content: bytes) -> None:
    """Writes `path` in one step, so that a reader never sees half of it."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
