"""The cache of a teacher's answers: exact round trips, shards in any order, and refusal of what does not fit."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nemo_pvs.data import teacher_cache
from nemo_pvs.data.teacher_cache import Answers, CacheContent, TeacherCache
from nemo_pvs.errors import UserError

CONTENT = CacheContent(
    teacher="t" * 12,
    tokenizer="k" * 12,
    data="d" * 12,
    seed=1,
    sequence_length=5,
    first=7,
    end=47,
    vocab=100,
    top_k=3,
)


def _answers(content: CacheContent, sample: int) -> Answers:
    """Return answers that only this sample has; their numbers are exact in fp16."""
    random = np.random.default_rng(sample)
    shape = content.sequence_length, content.top_k
    return Answers(
        random.integers(0, content.vocab, shape),
        -random.random(shape).astype(np.float16).astype(np.float64),
        -random.random(content.sequence_length).astype(np.float16).astype(np.float64),
    )


def _write(folder: Path, content: CacheContent, shards: list[int] | None = None) -> TeacherCache:
    cache = TeacherCache.begin(folder, content)
    for shard in cache.missing() if shards is None else shards:
        cache.write(shard, [_answers(content, sample) for sample in content.shard_samples(shard)])
    return cache


def _read(folder: Path, samples: range) -> None:
    cache = TeacherCache.open(folder)
    for sample in samples:
        cache.read(sample)


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
@pytest.mark.parametrize("vocab", [65536, 65537, 128256], ids=["16-bit ids", "32-bit ids", "Llama 3"])
def test_every_sample_comes_back_bit_for_bit(tmp_path, vocab, precision):
    content = replace(CONTENT, vocab=vocab, precision=precision)
    _write(tmp_path, content)
    cache = TeacherCache.open(tmp_path)
    assert cache.content == content
    for sample in (*range(content.first, content.end), content.first, content.end - 1):
        for found, wanted in zip(cache.read(sample), _answers(content, sample), strict=True):
            np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("samples", [1, 40, 3000])
def test_kept_probability_is_what_the_rest_leaves(tmp_path, samples):
    """The rest has the probability 0.25, and 0 at the last position of each sample."""
    content = replace(CONTENT, end=CONTENT.first + samples)
    cache = TeacherCache.begin(tmp_path, content)
    rest = np.array([np.log(0.25)] * 4 + [-np.inf])
    for shard in cache.missing():
        cache.write(shard, [_answers(content, 0)._replace(rest=rest)] * len(content.shard_samples(shard)))
    assert cache.kept_probability() == pytest.approx(0.8, abs=1e-3)


def test_shards_cover_every_sample_once_whatever_their_number():
    for end in (8, 9, 70, 71, 72, 200, 1000, 12345):
        content = replace(CONTENT, end=end)
        samples = [sample for shard in range(content.shards) for sample in content.shard_samples(shard)]
        assert samples == list(range(content.first, end))
    assert replace(CONTENT, end=1007).shards >= 16


def test_large_samples_have_shards_of_limited_size():
    content = replace(CONTENT, vocab=128256, top_k=32, sequence_length=8192, first=0, end=100_000)
    size = content.samples_per_shard * content.sequence_length * content.bytes_per_token
    assert 0.9 * teacher_cache._SHARD_BYTES < size <= teacher_cache._SHARD_BYTES
    assert replace(content, sequence_length=1 << 24).samples_per_shard == 1


def test_the_size_on_disk_is_what_was_said(tmp_path):
    content = replace(CONTENT, sequence_length=2000, end=23)
    _write(tmp_path, content)
    size = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    headers = 512 * content.shards
    assert content.bytes_per_token * content.tokens <= size <= content.bytes_per_token * content.tokens + headers
    assert content.bytes_per_token == pytest.approx(3 * 4 + 2, abs=0.01)


def test_a_cache_is_completed_by_the_shards_that_are_missing(tmp_path):
    cache = _write(tmp_path, CONTENT, [2, 0])
    assert cache.missing() == [1, *range(3, CONTENT.shards)]
    assert cache.tokens_done == 2 * CONTENT.samples_per_shard * 5
    with pytest.raises(UserError, match=f"lacks {CONTENT.shards - 2} of {CONTENT.shards} shards"):
        TeacherCache.open(tmp_path)
    (tmp_path / ".000001.safetensors.0123.partial").write_bytes(b"left by a killed writer")
    before = (tmp_path / "000002.safetensors").stat().st_mtime_ns
    _write(tmp_path, CONTENT)
    assert (tmp_path / "000002.safetensors").stat().st_mtime_ns == before
    assert not list(tmp_path.glob(".*"))
    cache = TeacherCache.open(tmp_path)
    assert cache.tokens_done == CONTENT.tokens
    np.testing.assert_array_equal(cache.read(40).ids, _answers(CONTENT, 40).ids)


def test_a_teacher_that_computes_nothing_is_noticed_at_the_first_shard(tmp_path):
    cache = TeacherCache.begin(tmp_path, CONTENT)
    for name in ("logprobs", "rest"):
        answers = _answers(CONTENT, 0)
        getattr(answers, name)[-1] = np.nan
        with pytest.raises(UserError, match="answers to samples 7 and later are not numbers"):
            cache.write(0, [answers] * len(CONTENT.shard_samples(0)))
    assert len(cache.missing()) == CONTENT.shards


def test_tensors_without_a_description_do_not_pass_for_shards(tmp_path):
    """Those of a cache of which only the description was removed would be read as answers to another one."""
    cache = _write(tmp_path, CONTENT, [0])
    (tmp_path / teacher_cache.CACHE_FILE).unlink()
    with pytest.raises(UserError, match=r"has 000000\.safetensors but no cache\.json"):
        TeacherCache.begin(tmp_path, replace(CONTENT, seed=2))
    assert [path.name for path in tmp_path.iterdir()] == [cache._path(0).name]


@pytest.mark.parametrize(
    "change",
    [
        {"teacher": "u"},
        {"tokenizer": "u"},
        {"data": "u"},
        {"seed": 2},
        {"sequence_length": 4},
        {"vocab": 99},
        {"top_k": 4},
        {"first": 6},
        {"end": 48},
    ],
    ids=str,
)
def test_a_cache_serves_no_other_training(tmp_path, change):
    _write(tmp_path, CONTENT)
    cache = TeacherCache.open(tmp_path)
    cache.check_serves(CONTENT)
    cache.check_serves(replace(CONTENT, first=10, end=20, top_k=1))
    with pytest.raises(UserError) as refusal:
        cache.check_serves(replace(CONTENT, **change))
    message = str(refusal.value)
    assert str(tmp_path) in message
    assert message.endswith("with pvs teach.")
    words = {"first": "35 to 235", "end": "35 to 235", "top_k": "keeps 3 tokens", "data": "from other data"}
    assert words.get(*change, next(iter(change)).replace("_", " ")) in message
    with pytest.raises(UserError, match="choose another folder"):
        TeacherCache.begin(tmp_path, replace(CONTENT, **change))


def test_damage_is_found_when_the_sample_is_read(tmp_path):
    _write(tmp_path, CONTENT)
    path = tmp_path / "000001.safetensors"
    whole = path.read_bytes()
    samples = CONTENT.shard_samples(1)
    for position in range(len(whole) - 4 * len(samples), len(whole), 2):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(UserError, match=r"000001.safetensors is damaged"):
            _read(tmp_path, samples)
    for damaged in (whole[:-1], whole[:5], b"", b"\xff" * 100):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"remove this file and run the command that made the cache again"):
            TeacherCache.open(tmp_path).read(samples[-1])
    path.unlink()
    _write(tmp_path, CONTENT)
    np.testing.assert_array_equal(TeacherCache.open(tmp_path).read(samples[0]).ids, _answers(CONTENT, samples[0]).ids)


def test_what_is_no_cache_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not a teacher cache"):
        TeacherCache.open(tmp_path)
    (tmp_path / "cache.json").write_text(json.dumps({"teacher": "t"}))
    with pytest.raises(UserError, match="does not describe a teacher cache"):
        TeacherCache.open(tmp_path)
    (tmp_path / "cache.json").write_text("[]")
    with pytest.raises(UserError, match="does not describe a teacher cache"):
        TeacherCache.open(tmp_path)


def test_an_open_cache_can_be_sent_to_a_worker_process(tmp_path):
    _write(tmp_path, CONTENT)
    cache = TeacherCache.open(tmp_path)
    cache.read(7)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(cache)).read(8).ids, _answers(CONTENT, 8).ids)
