"""Thirty steps of fine-tuning and of DPO, loss by loss, against a loop in torch.

The same weights, written by transformers; the same rows; AdamW and clipping by torch. Rows are of
odd lengths, cross chunks and the temperature's floor, and end in padding, which torch's side never
sees as a target.
"""

import numpy as np
import optax
import pytest

torch = pytest.importorskip("torch", reason="needs torch: pip install l4jax[parity]")
transformers = pytest.importorskip("transformers", reason="needs transformers: l4jax[parity]")

from l4jax import checkpoints  # noqa: E402
from l4jax.training import objectives, optimizers, teacher, trainer  # noqa: E402

pytestmark = pytest.mark.parity

STEPS, ROWS, LENGTH, VOCABULARY = 30, 4, 53, 96
RATE, DECAY, CLIP, BETA, NLL = 2e-3, 0.1, 1.0, 0.1, 0.2
DRIFT = 2e-4
"""Largest relative difference of a loss: float32 rounding, amplified by thirty steps of Adam, whose
first updates are the signs of gradients however small. Seen: 4e-5."""
SIZES = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SCALING = {"rope_type": "llama3", "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALING |= {"original_max_position_embeddings": 32, "rope_theta": 500_000.0}
FAMILIES = {
    "llama 3": (
        "LlamaForCausalLM",
        "LlamaConfig",
        SIZES | {"intermediate_size": 48, "num_hidden_layers": 2},
    ),
    "scout": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        SIZES
        | {"intermediate_size": 24, "intermediate_size_mlp": 48, "num_hidden_layers": 4}
        | {"head_dim": 8, "num_local_experts": 4, "attention_chunk_size": 16, "floor_scale": 8}
        | {"use_qk_norm": True, "rope_parameters": SCALING, "output_router_logits": False},
    ),
}


@pytest.fixture(params=FAMILIES)
def pair(request, tmp_path):
    """transformers' model, and ours of the same weights."""
    model, config, values = FAMILIES[request.param]
    torch.manual_seed(0)
    theirs = getattr(transformers, model)(getattr(transformers, config)(**values))
    with torch.no_grad():
        for name, x in theirs.named_parameters():
            if "norm" not in name:
                x.mul_(8)  # from 0.02, so that every part matters
    theirs.save_pretrained(tmp_path / "model")
    return theirs.train(), checkpoints.load(tmp_path / "model", dtype="float32")


def rows_of(seed, count):
    """Tokens and masks of answers: a learnable rule, padded at the end."""
    rng = np.random.default_rng(seed)
    tokens = np.zeros((count, LENGTH), np.int32)
    segments, mask = np.zeros_like(tokens), np.zeros(tokens.shape, bool)
    for row in range(count):
        size, prompt = rng.integers(30, LENGTH + 1), rng.integers(5, 20)
        steps = rng.integers(1, 4)
        tokens[row, :size] = 3 + (rng.integers(0, 50) + steps * np.arange(size)) % (VOCABULARY - 3)
        segments[row, :size] = 1
        mask[row, prompt:size] = True
    return tokens, segments, mask


def their_log_probs(model, tokens, mask):
    """Of every token to be predicted, given those before it; 0 elsewhere."""
    ids = torch.tensor(tokens, dtype=torch.long)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    found = torch.log_softmax(logits, -1).gather(2, ids[:, 1:, None])[..., 0]
    return found * torch.tensor(mask[:, 1:])


def their_optimizer(model):
    decays = [x for name, x in model.named_parameters() if "norm" not in name]
    rest = [x for name, x in model.named_parameters() if "norm" in name]
    return torch.optim.AdamW(
        [{"params": decays}, {"params": rest, "weight_decay": 0.0}],
        lr=RATE,
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=DECAY,
    )


def their_curve(model, loss_of, batches):
    optimizer, losses = their_optimizer(model), []
    for batch in batches:
        optimizer.zero_grad(set_to_none=True)
        loss, shown = loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        losses.append(shown.item())
    return np.array(losses)


def our_curve(model, objective, batches):
    optimizer = optimizers.adamw(
        optax.constant_schedule(RATE), weight_decay=DECAY, clip_norm=CLIP, b1=0.9, b2=0.95
    )
    training = trainer.Training(model, objective, optimizer)
    return np.array([float(line["loss"]) for line in training.run(batches, STEPS)])


@pytest.mark.parametrize(
    "pair", ["scout", pytest.param("llama 3", marks=pytest.mark.slow)], indirect=True
)
def test_supervised_fine_tuning(pair):
    theirs, ours = pair
    batches = []
    for seed in range(STEPS):
        tokens, segments, mask = rows_of(seed, ROWS)
        positions = np.where(segments > 0, np.arange(LENGTH), 0).astype(np.int32)
        batch = {"tokens": tokens, "segment_ids": segments, "positions": positions}
        batches.append(batch | {"loss_mask": mask})

    def loss_of(model, batch):
        found = their_log_probs(model, batch["tokens"], batch["loss_mask"])
        loss = -found.sum() / batch["loss_mask"][:, 1:].sum()
        return loss, loss.detach()

    expected = their_curve(theirs, loss_of, batches)
    found = our_curve(ours, objectives.next_token(), batches)
    assert expected[-5:].mean() < 0.85 * expected[:5].mean()
    np.testing.assert_allclose(found, expected, rtol=DRIFT)


@pytest.mark.parametrize(
    "pair", [pytest.param("scout", marks=pytest.mark.slow), "llama 3"], indirect=True
)
def test_direct_preference_optimization(pair):
    """One pair in a row on our side, one answer in a row on theirs."""
    theirs, ours = pair
    refer, packed, apart = teacher.reference(ours, 2), [], []
    for seed in range(STEPS):
        tokens, segments, mask = rows_of(100 + seed, 2 * ROWS)
        tokens[1::2] = np.where(mask[1::2], 3 + tokens[1::2] % 17, tokens[1::2])
        sizes = segments.sum(axis=1)
        rows = {
            "tokens": np.zeros((ROWS, 2 * LENGTH), np.int32),
            "segment_ids": np.zeros((ROWS, 2 * LENGTH), np.int32),
            "positions": np.zeros((ROWS, 2 * LENGTH), np.int32),
            "loss_mask": np.zeros((ROWS, 2 * LENGTH), bool),
        }
        for row in range(ROWS):
            start = 0
            for side in (0, 1):
                one, size = 2 * row + side, sizes[2 * row + side]
                where = slice(start, start + size)
                rows["tokens"][row, where] = tokens[one, :size]
                rows["segment_ids"][row, where] = side + 1
                rows["positions"][row, where] = np.arange(size)
                rows["loss_mask"][row, where] = mask[one, :size]
                start += size
        packed.append(refer(rows))
        with torch.no_grad():
            reference = their_log_probs(theirs, tokens, mask).sum(1)
        np.testing.assert_allclose(
            np.asarray(packed[-1]["reference"]).reshape(-1), reference.numpy(), rtol=1e-4
        )
        apart.append((tokens, mask, reference))

    def loss_of(model, batch):
        tokens, mask, reference = batch
        found = their_log_probs(model, tokens, mask).sum(1)
        ratios = found - reference
        loss = -torch.nn.functional.logsigmoid(BETA * (ratios[0::2] - ratios[1::2])).mean()
        nll = -(found[0::2] / torch.tensor(mask[0::2, 1:].sum(1))).mean()
        return loss + NLL * nll, loss.detach()

    expected = their_curve(theirs, loss_of, apart)
    found = our_curve(ours, objectives.dpo(BETA, nll=NLL), packed)
    assert expected[-5:].mean() < 0.85 * expected[:5].mean()
    np.testing.assert_allclose(found, expected, rtol=DRIFT, atol=DRIFT)
