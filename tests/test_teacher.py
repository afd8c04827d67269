"""What frozen models add to batches is theirs, wherever they lie, and comes back from disk."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
from conftest import build
from flax import nnx
from objective_toys import VOCABULARY, Table, packed, segment_sums

from l4jax import presets, sharding
from l4jax.training import objectives, teacher, trainer

LENGTHS = [(5, 7, 9, 3), (12, 11), (8,), (), (4, 1, 6, 8)]
WIDTH, SEGMENTS, K = 29, 4, 7


def batches_of(count=3):
    return [packed(LENGTHS, WIDTH, seed=seed) for seed in range(count)]


def test_a_teacher_names_its_likeliest_tokens():
    model, batch = Table(1), batches_of(1)[0]
    found = teacher.top_tokens(model, K)(batch)
    scores = model.log_probs(batch["tokens"])
    best = np.argsort(-scores, axis=-1)[..., :K]
    assert found.keys() == batch.keys() | {"teacher_ids", "teacher_log_probs"}
    assert all(found[name] is batch[name] for name in batch)
    np.testing.assert_array_equal(found["teacher_ids"], best)
    expected = np.take_along_axis(scores, best, axis=-1)
    np.testing.assert_allclose(found["teacher_log_probs"], expected, rtol=1e-5)
    assert found["teacher_ids"].dtype == np.int32
    with pytest.raises(ValueError, match=f"top 41 must be .* at most the vocabulary, {VOCABULARY}"):
        teacher.top_tokens(model, VOCABULARY + 1)(batch)


def test_a_reference_tells_its_log_probabilities():
    model, batch = Table(1), batches_of(1)[0]
    found = teacher.reference(model, SEGMENTS)(batch)["reference"]
    expected, _ = segment_sums(model.log_probs(batch["tokens"]), batch, SEGMENTS)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


CONFIG = presets.tiny(presets.llama4_scout())
CONFIG = dataclasses.replace(CONFIG, num_layers=2, pattern=CONFIG.pattern[-2:])


@pytest.mark.slow
def test_a_teacher_on_its_own_devices_teaches_a_student_on_others():
    """Of eight devices the teacher has four and the student two; nothing is said of either."""
    batch = packed([(9, 8, 7), (12, 11)] * 4, 32, vocabulary=CONFIG.vocab_size)
    del batch["loss_mask"]
    graph, state = nnx.split(build(CONFIG))
    expected = teacher.top_tokens(nnx.merge(graph, state), 5)(batch)
    large = sharding.make_mesh(jax.devices()[:4], tensor=2, fsdp=2)
    small = sharding.make_mesh(jax.devices()[4:], fsdp=2)
    with sharding.use(large):
        placed = nnx.merge(graph, jax.device_put(state, sharding.shardings(state)))
    teach = teacher.top_tokens(placed, 5, mesh=large)
    with sharding.use(small):
        student = Table(0, CONFIG.vocab_size)
        state = nnx.state(student)
        nnx.update(student, jax.device_put(state, sharding.shardings(state)))
        on_two = {
            name: jax.device_put(x, trainer.batch_sharding(*x.shape)) for name, x in batch.items()
        }
        found = teach(on_two)
        assert isinstance(found["teacher_ids"], np.ndarray)
        loss, metrics = jax.jit(objectives.distill())(student, found)
    np.testing.assert_array_equal(found["teacher_ids"], expected["teacher_ids"])
    np.testing.assert_allclose(
        found["teacher_log_probs"], expected["teacher_log_probs"], rtol=1e-5, atol=1e-5
    )
    plain = objectives.distill()(Table(0, CONFIG.vocab_size), dict(expected))
    assert float(loss) == pytest.approx(float(plain[0]), rel=1e-5)
    assert int(metrics["count"]) == int(plain[1]["count"])


# --- On disk -------------------------------------------------------------------------------------
def test_what_was_saved_comes_back_for_the_same_rows_in_any_order(tmp_path):
    teach, batches = teacher.top_tokens(Table(1), K), batches_of()
    different = len(LENGTHS) * 3 - 2  # The row of padding is the same in all.
    assert teacher.save(tmp_path / "cache", teach, [*batches, batches[0]]) == different
    cache = teacher.Cache(tmp_path / "cache")
    order = np.random.default_rng(0).permutation(len(LENGTHS))
    for batch in reversed(batches):
        mixed = {name: x[order] for name, x in batch.items()}
        expected, found = teach(mixed), cache(jax.tree.map(jax.numpy.asarray, mixed))
        assert found.keys() == expected.keys()
        for name in ("teacher_ids", "teacher_log_probs"):
            assert found[name].dtype == expected[name].dtype
            np.testing.assert_array_equal(found[name], expected[name])


def test_caches_of_several_runs_are_one(tmp_path):
    tell, batches = teacher.reference(Table(1), SEGMENTS), batches_of()
    for number, batch in enumerate(batches):
        teacher.save(tmp_path / str(number), tell, [batch])
    cache = teacher.Cache(*(tmp_path / str(number) for number in range(3)))
    for batch in batches:
        np.testing.assert_array_equal(cache(batch)["reference"], tell(batch)["reference"])
    teacher.save(tmp_path / "other", teacher.top_tokens(Table(1), K), batches[:1])
    with pytest.raises(ValueError, match="other has .*teacher_ids.*0 has .*reference"):
        teacher.Cache(tmp_path / "0", tmp_path / "other")


@pytest.mark.parametrize("name", ["tokens", "segment_ids", "positions", "loss_mask"])
def test_other_rows_are_not_taken_for_those_saved(tmp_path, name):
    """Whatever changes: the same tokens cut otherwise have other answers."""
    batch = batches_of(1)[0]
    teacher.save(tmp_path / "cache", teacher.reference(Table(1), SEGMENTS), [batch])
    other = {key: x.copy() for key, x in batch.items()}
    other[name][2, 3] = ~other[name][2, 3] if name == "loss_mask" else other[name][2, 3] + 1
    with pytest.raises(ValueError, match=r"row 2 of the batch is not in the cache of 5 rows"):
        teacher.Cache(tmp_path / "cache")(other)


def test_a_cache_appears_whole_or_not_at_all(tmp_path):
    teach, batches = teacher.top_tokens(Table(1), K), batches_of(2)

    def failing():
        yield batches[0]
        raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError, match="gone"):
        teacher.save(tmp_path / "cache", teach, failing())
    with pytest.raises(ValueError, match="no batches to save"):
        teacher.save(tmp_path / "cache", teach, [])
    shorter = {name: x[:, :20] for name, x in batches[1].items()}
    with pytest.raises(ValueError, match="rows give .*20.* those before gave .*29"):
        teacher.save(tmp_path / "cache", teach, [batches[0], shorter])
    assert list(tmp_path.iterdir()) == []
    teacher.save(tmp_path / "cache", teach, batches)
    with pytest.raises(FileExistsError):
        teacher.save(tmp_path / "cache", teach, batches)


def test_a_damaged_cache_is_refused(tmp_path):
    batch = batches_of(1)[0]
    teacher.save(tmp_path / "cache", teacher.top_tokens(Table(1), K), [batch])
    file = tmp_path / "cache" / "teacher_ids.bin"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"teacher_ids.bin has \d+ bytes, \d+ are expected"):
        teacher.Cache(tmp_path / "cache")
    about = json.loads((tmp_path / "cache" / "about.json").read_text())
    assert about["rows"] == len(LENGTHS)
    with pytest.raises(FileNotFoundError):
        teacher.Cache(tmp_path / "elsewhere")
