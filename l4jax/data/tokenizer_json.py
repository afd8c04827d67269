"""Meta's `tokenizer.model` as the files that transformers' AutoTokenizer reads.

A rank file lists tokens and says nothing of how they are put together; a `tokenizer.json` lists
the merges one by one. They follow from the ranks: of two neighbouring tokens whose concatenation
has a rank, the pair of the lowest rank is merged first, so the pairs of a `tokenizer.json` stand in
the order of the token they make.

    for name, content in from_rank_file(Path("Llama-4-Scout/tokenizer.model")).items():
        (export / name).write_bytes(content)

What the files cannot say: Meta cuts texts above 400,000 characters and runs above 25,000, which
`l4jax.data.tokenizer` does around the encoder and transformers does not; and transformers reads
special names inside a text as special tokens.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from l4jax.data.tokenizer import (
    SPECIAL_NAMES,
    SPLIT_PATTERNS,
    byte_symbols,
    config_json,
    read_ranks,
)


def from_rank_file(file: Path, *, max_length: int | None = None) -> dict[str, bytes]:
    """The content, by file name, of a Hugging Face tokenizer equal to Meta's.

    tokenizer.json has Meta's ids and names, special tokens included, and begins every encoded text
    with begin_of_text; tokenizer_config.json and special_tokens_map.json name the tokens that begin
    a text, end it (the end of a turn, as in Meta's instruction-tuned models) and pad a batch.

    The padding token of Llama 4 is `<|finetune_right_pad|>`, its name in Meta's table, though the
    converter of transformers writes `<|finetune_right_pad_id|>`: that name has no id in the table,
    and transformers would add it behind the last embedding.

    Args:
        file: The rank file.
        max_length: Number of tokens that the model takes, for `model_max_length`. No rank file
            knows it; left out where None.

    Raises:
        ValueError: If the file is malformed, or has the ranks of neither family.
    """
    family, pieces = read_ranks(file.read_bytes(), file)
    names = SPECIAL_NAMES[family]
    symbols = {byte: symbol for symbol, byte in byte_symbols().items()}
    spelled = {piece: "".join(map(symbols.__getitem__, piece)) for piece in pieces}
    bpe = models.BPE(
        vocab={spelled[piece]: rank for rank, piece in enumerate(pieces)},
        merges=[(spelled[left], spelled[right]) for left, right in merges(pieces)],
        # A word that is a token becomes that token, as in tiktoken, even if no merges lead there.
        ignore_merges=True,
    )
    model = tokenizers.Tokenizer(bpe)
    split = pre_tokenizers.Split(tokenizers.Regex(SPLIT_PATTERNS[family]), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    model.decoder = decoders.ByteLevel()
    # Names get ids in the order given, from the first id that is free: where Meta's begin.
    model.add_special_tokens([tokenizers.AddedToken(name, normalized=False) for name in names])
    bos = names[0]
    model.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos}:1 $B:1",
        special_tokens=[(bos, len(pieces))],
    )
    config = json.loads(config_json({name: len(pieces) + i for i, name in enumerate(names)}))
    roles = {role: name for role, name in config.items() if role.endswith("_token")}
    if max_length is not None:
        config["model_max_length"] = max_length
    return {
        "tokenizer.json": model.to_str().encode(),
        "tokenizer_config.json": json.dumps(config, indent=2).encode(),
        "special_tokens_map.json": json.dumps(roles, indent=2).encode(),
    }


def merges(pieces: list[bytes]) -> Iterator[tuple[bytes, bytes]]:
    """Every pair of tokens that makes a token, in the order in which they are merged.

    Most tokens can be cut in two in several ways, but only one of them ever comes up. Until two
    neighbours make a token, whatever was merged inside them was merged as if the token stood alone,
    where merging the lowest ranks first ends in one particular pair. The other ways do no harm, so
    they are listed rather than told apart: transformers' converter lists them too, in this order.

    Args:
        pieces: The bytes of each rank, in order.
    """
    rank = {piece: number for number, piece in enumerate(pieces)}
    for piece in pieces:
        cuts = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        pairs = [(left, right) for left, right in cuts if left in rank and right in rank]
        yield from sorted(pairs, key=lambda pair: (rank[pair[0]], rank[pair[1]]))
