"""Stock NeMo reads what we write: needs NeMo's import (half a minute), so everything is in one test module."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from nemo_pvs.checkpoints.fingerprint import fingerprint
from nemo_pvs.checkpoints.huggingface.folder import HuggingFaceSource
from nemo_pvs.checkpoints.nemo.checkpoint import NemoSource, write_nemo
from nemo_pvs.checkpoints.nemo.context import read_context

pytestmark = pytest.mark.slow

ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.5,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def nemo():
    from nemo.lightning import io

    return io


@pytest.fixture
def checkpoint(make_tiny_llama, tmp_path):
    """A pruned-looking bfloat16 Llama 3.1 with a tokenizer that transformers can load."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    folder = make_tiny_llama(
        tmp_path / "hf", dtype=torch.bfloat16, rope_scaling=ROPE, tie_word_embeddings=True, rms_norm_eps=1e-5
    )
    words = {f"w{index}": index for index in range(120)}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), eos_token="w1", pad_token="w1"
    ).save_pretrained(folder)
    write_nemo(HuggingFaceSource(folder), tmp_path / "nemo", pad_vocab_to_multiple=100)
    return tmp_path / "nemo"


def test_stock_nemo_reads_the_model(nemo, checkpoint):
    model = nemo.load_context(checkpoint / "context", subpath="model", build=False)
    assert model.__fn_or_cls__.__name__ == "LlamaModel"
    config = model.config
    assert config.__fn_or_cls__.__name__ == "Llama31Config"
    assert (config.num_layers, config.hidden_size, config.ffn_hidden_size) == (4, 64, 96)
    assert (config.num_attention_heads, config.num_query_groups, config.kv_channels) == (8, 2, 16)
    assert (config.seq_length, config.vocab_size, config.rotary_base) == (256, 200, 10000.0)
    assert (config.layernorm_epsilon, config.init_method_std) == (1e-5, 0.02)
    assert (config.scale_factor, config.low_freq_factor, config.high_freq_factor) == (32.0, 1.5, 3.0)
    assert config.old_context_len == 64
    assert config.share_embeddings_and_output_weights is True
    assert (config.bf16, config.fp16, config.params_dtype) == (True, False, torch.bfloat16)


def test_stock_nemo_builds_the_config_and_the_tokenizer(nemo, checkpoint):
    import fiddle

    tokenizer = nemo.load_context(checkpoint / "context", subpath="model.tokenizer")
    assert tokenizer.vocab_size == 120
    assert tokenizer.text_to_ids("w7") == [7]
    config = nemo.load_context(checkpoint / "context", subpath="model.config", build=False)
    config.apply_rope_fusion = False  # which needs Transformer Engine
    built = fiddle.build(config)
    assert built.gated_linear_unit is True
    assert built.normalization == "RMSNorm"
    assert (built.kv_channels, built.old_context_len) == (16, 64)
    whole = nemo.load_context(checkpoint / "context", build=False)
    assert (whole.trainer, whole.extra) == (None, {})
    assert whole.model.config.hidden_size == 64


def test_our_json_means_what_fiddles_own_means(nemo, checkpoint):
    from fiddle.experimental import serialization

    ours = json.loads((checkpoint / "context" / "io.json").read_text())
    assert ours["version"] == json.loads(serialization.dump_json({}))["version"]
    loaded = serialization.load_json(json.dumps(ours))
    (checkpoint / "context" / "io.json").write_text(serialization.dump_json(loaded))
    again = nemo.load_context(checkpoint / "context", subpath="model", build=False)
    (checkpoint / "context" / "io.json").write_text(json.dumps(ours))
    assert again == nemo.load_context(checkpoint / "context", subpath="model", build=False)


@pytest.mark.parametrize("keep_ours", [True, False])
def test_we_read_the_context_that_nemo_dumps(nemo, checkpoint, tmp_path, keep_ours):
    """A model built and dumped by NeMo, as its training loop does, is read back with the values it was built from."""
    from nemo.collections.llm.gpt.model.llama import Llama31Config, LlamaModel
    from nemo.lightning.io.pl import TrainerContext

    before = NemoSource(checkpoint).config
    kept = (checkpoint / "context" / "huggingface_config.json").read_text()
    fields = nemo.load_context(checkpoint / "context", subpath="model.config", build=False).__arguments__
    tokenizer = nemo.load_context(checkpoint / "context", subpath="model.tokenizer")
    model = LlamaModel(Llama31Config(**fields, apply_rope_fusion=False), tokenizer=tokenizer)
    TrainerContext(model=model, trainer=None, extra={}).io_dump(tmp_path / "dumped", yaml_attrs=[])
    if keep_ours:
        (tmp_path / "dumped" / "huggingface_config.json").write_text(kept)
    after = read_context(tmp_path / "dumped", vocab_rows=200, dtype="bfloat16")
    if keep_ours:
        assert after == before
    else:
        common = {*before} & {*after} - {"vocab_size"}
        assert {key: after[key] for key in common} == {key: before[key] for key in common}
        assert after["vocab_size"] == 200
        assert after["rope_scaling"] == ROPE


def test_megatrons_own_description_of_a_checkpoint_is_read(checkpoint):
    """Megatron pickles classes of its own, and its saving plan, into .metadata."""
    from megatron.core.dist_checkpointing.strategies.torch import MCoreMetadata, MCoreSavePlan
    from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

    path = checkpoint / "weights" / ".metadata"
    plain = pickle.loads(path.read_bytes())
    described = MCoreMetadata(**vars(plain), mcore_data={"a": {"nd_reformulated_orig_global_shape": (1, 2)}})
    items = [
        WriteItem(
            MetadataIndex(name, stored.chunks[0].offsets, 0),
            WriteItemType.SHARD,
            tensor_data=TensorWriteData(stored.chunks[0], stored.properties, stored.size),
        )
        for name, stored in plain.state_dict_metadata.items()
        if isinstance(stored, TensorStorageMetadata)
    ]
    described.all_local_plans = [MCoreSavePlan(items=items, mcore_data={})]
    expected = fingerprint(NemoSource(checkpoint))
    path.write_bytes(pickle.dumps(described))
    assert fingerprint(NemoSource(checkpoint)) == expected
