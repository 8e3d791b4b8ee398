"""GGUF files that we write: the tensors and keys of an independent writer, ids of the tokenizer, or a sentence."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from gguf import GGMLQuantizationType, GGUFReader, dequantize, quantize
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig, Qwen2Config, Qwen3Config

from nemo_pvs.checkpoints.fetch import dequantize_gguf
from nemo_pvs.checkpoints.gguf import write
from nemo_pvs.checkpoints.gguf.file import GgufFile
from nemo_pvs.checkpoints.gguf.names import gguf_name, is_rotated, pairs_to_halves
from nemo_pvs.checkpoints.gguf.quantise import quantise_q8_0
from nemo_pvs.checkpoints.gguf.tokenizer import build_tokenizer
from nemo_pvs.checkpoints.gguf.write import Written
from nemo_pvs.checkpoints.gguf.write import write_gguf as write_ours
from nemo_pvs.checkpoints.huggingface.folder import HuggingFaceSource
from nemo_pvs.checkpoints.source import WeightSource, shape_of
from nemo_pvs.checkpoints.transforms.random import RandomSource
from nemo_pvs.errors import UserError
from nemo_pvs.model.layout import Layout
from nemo_pvs.model.shape import LayerSizes
from nemo_pvs.system.direct_io import StreamedWriter
from tests.checkpoints.gguf_writer import MERGING_TOKENIZER, randomise
from tests.checkpoints.gguf_writer import write_gguf as write_theirs
from tests.checkpoints.test_gguf_model import SCALING, factors, llama, logits, qwen
from tests.checkpoints.test_gguf_tokenizer import AWKWARD, PIECES, of_spm, spm, tokenizer_of  # noqa: F401 (a fixture)
from tests.uneven_model import make_uneven


def saved(folder: Path, network: Any, **keys: Any) -> Path:
    """Save a model with the tokenizer that these GGUF keys describe; return the folder."""
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer_of(Path(scratch), **keys or MERGING_TOKENIZER).save_pretrained(folder)
    network.config.eos_token_id = network.generation_config.eos_token_id = keys.get("eos_token_id", 256)
    network.save_pretrained(folder)
    return folder


def written(folder: Path, **settings: Any) -> Written:
    return write_ours(HuggingFaceSource(folder), folder.parent / "ours.gguf", **settings)


def mistral(**settings: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "vocab_size": 260, "head_dim": 16}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 256}
    return randomise(AutoModelForCausalLM.from_config(MistralConfig(**sizes, **heads, **settings)))


MODELS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "llama": (llama, {}),
    "llama with a tied head": (lambda: llama(tie_word_embeddings=True), {}),
    "llama with biases": (lambda: llama(attention_bias=True, mlp_bias=True), {}),
    "llama 3.1": (lambda: llama(rope_scaling=SCALING, rope_theta=100.0), {}),
    "llama, linear": (
        lambda: llama(rope_scaling={"rope_type": "linear", "factor": 4.0}),
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
    ),
    "qwen2": (lambda: qwen(Qwen2Config), {}),
    "qwen3": (lambda: qwen(Qwen3Config, head_dim=32, tie_word_embeddings=True), {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", MODELS)
def test_a_file_has_the_tensors_and_sizes_of_an_independent_writer(case: str, tmp_path: Path) -> None:
    make, keys = MODELS[case]
    model = make()
    ours = written(saved(tmp_path / "model", model), dtype="f32")
    extra = {"rope_freqs.weight": factors(model)} if case == "llama 3.1" else {}
    theirs = GgufFile(write_theirs(tmp_path / "theirs.gguf", model, keys=keys, tensors=extra))
    file = GgufFile(ours.path)
    assert {*file.tensors} == {*theirs.tensors}
    for name in theirs.tensors:
        assert file.size(name) == theirs.size(name)
        tolerance = 1e-6 if name == "rope_freqs.weight" else 0
        assert torch.allclose(file.read(name), theirs.read(name), rtol=tolerance, atol=0), name
    sizes = [key for key in theirs.keys if key.startswith(f"{ours.architecture}.")]
    assert len(sizes) > 8
    assert {key: file.get(key) for key in sizes} == {key: theirs.get(key) for key in sizes}
    again = AutoModelForCausalLM.from_pretrained(dequantize_gguf(ours.path, tmp_path / "again"))
    assert torch.equal(logits(again), logits(model))


@pytest.mark.slow
def test_mistral_is_a_llama_if_its_window_is_the_context(tmp_path: Path) -> None:
    model = mistral(sliding_window=256)
    ours = written(saved(tmp_path / "model", model), dtype="f32")
    assert ours.architecture == "llama"
    again = AutoModelForCausalLM.from_pretrained(dequantize_gguf(ours.path, tmp_path / "again"))
    assert torch.equal(logits(again), logits(model))


def _same_tensors(ours: Written, source: WeightSource) -> None:
    file, shape = GgufFile(ours.path), shape_of(source)
    parts = Layout.for_config(source.config).parts(shape)
    assert len(file.tensors) == len(parts)
    for name in parts:
        tensor = file.read(gguf_name(name))
        if is_rotated(name) and ours.architecture != "qwen2":
            tensor = pairs_to_halves(tensor, shape.head_dim)
        assert torch.equal(tensor, source.read(name)), name


def test_layers_of_different_sizes_are_for_the_graph_that_has_them(tmp_path: Path) -> None:
    folder = make_uneven(tmp_path / "model", vocab_size=260, attention_bias=True, mlp_bias=True)
    tokenizer_of(tmp_path, **MERGING_TOKENIZER).save_pretrained(folder)
    ours = written(folder)
    file, source = GgufFile(ours.path), HuggingFaceSource(folder)
    assert (ours.architecture, ours.dtype) == ("deci", "f32")
    sizes = shape_of(source).layer_sizes
    assert file.get("deci.feed_forward_length") == [size.ffn for size in sizes]
    assert file.get("deci.attention.head_count") == [size.heads for size in sizes]
    assert file.get("deci.attention.head_count_kv") == [size.kv_groups for size in sizes]
    _same_tensors(ours, source)


@pytest.mark.parametrize(
    "settings",
    [
        {"attention_bias": True, "mlp_bias": True},
        {"rope_scaling": SCALING, "rope_theta": 100.0},
        {"family": "mistral", "sliding_window": 256},
        {"family": "qwen2"},
    ],
)
def test_layers_of_different_sizes_are_read_back(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = make_uneven(tmp_path / "model", vocab_size=260, **settings)
    tokenizer_of(tmp_path, **MERGING_TOKENIZER).save_pretrained(folder)
    again = dequantize_gguf(written(folder).path, tmp_path / "again")
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (folder, again))
    assert shape_of(HuggingFaceSource(again)) == shape_of(HuggingFaceSource(folder))
    assert torch.equal(logits(after), logits(before))


def test_layers_that_differ_in_groups_and_in_heads_of_a_group_are_read_back(tmp_path: Path) -> None:
    """No layer has as many heads as all layers together fit into: 3 groups of 4."""
    sizes = (LayerSizes(96, 8, 2), LayerSizes(96, 6, 3))
    folder = make_uneven(tmp_path / "model", sizes=sizes, bounds=LayerSizes(96, 12, 3), vocab_size=260)
    tokenizer_of(tmp_path, **MERGING_TOKENIZER).save_pretrained(folder)
    again = dequantize_gguf(written(folder).path, tmp_path / "again")
    assert shape_of(HuggingFaceSource(again)) == shape_of(HuggingFaceSource(folder))


def test_a_layer_without_attention_is_refused(tmp_path: Path) -> None:
    """llama.cpp has deci for Nemotron, whose layers may lack attention; these models are another family."""
    keys = {
        f"deci.{name}": value for name, value in (("feed_forward_length", [96, 48]), ("attention.head_count", [8, 0]))
    }
    model = llama()
    model.config.model_type = "deci"
    file = write_theirs(tmp_path / "theirs.gguf", model, keys=keys)
    with pytest.raises(UserError, match=r"deci\.attention\.head_count in .* is not one size for each of 2 layers"):
        dequantize_gguf(file, tmp_path / "again")


def test_a_narrower_qwen2_is_a_llama_with_biases(tmp_path: Path) -> None:
    """The graph of qwen2 takes heads of hidden / heads channels, and pruning by width keeps the heads' channels."""
    whole = saved(tmp_path / "whole", qwen(Qwen2Config))
    assert written(whole).architecture == "qwen2"
    config = {**HuggingFaceSource(whole).config, "hidden_size": 48, "head_dim": 16}
    narrow = RandomSource(config, 0, HuggingFaceSource(whole).assets, torch.float32)
    ours = write_ours(narrow, tmp_path / "narrow.gguf")
    assert ours.architecture == "llama"
    assert "blk.0.attn_q.bias" in GgufFile(ours.path).tensors
    _same_tensors(ours, narrow)
    again = HuggingFaceSource(dequantize_gguf(ours.path, tmp_path / "again"))
    assert shape_of(again) == shape_of(narrow)
    for name in Layout.for_config(config).parts(shape_of(narrow)):
        assert torch.equal(again.read(name), narrow.read(name)), name


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0"])
def test_matrices_are_cast_and_vectors_are_not(dtype: str, tmp_path: Path) -> None:
    model = llama()
    ours = written(saved(tmp_path / "model", model), dtype=dtype)
    kind = GGMLQuantizationType[dtype.upper()]
    stored = {tensor.name: tensor for tensor in GGUFReader(ours.path).tensors}
    name = "model.layers.1.mlp.down_proj.weight"
    assert np.array_equal(stored["blk.1.ffn_down.weight"].data, quantize(model.state_dict()[name].numpy(), kind))
    assert stored["blk.1.ffn_norm.weight"].tensor_type == GGMLQuantizationType.F32
    assert not ours.notes
    assert np.allclose(
        dequantize(stored["blk.1.ffn_down.weight"].data, kind), model.state_dict()[name].numpy(), atol=0.01
    )


def test_q8_0_has_the_bits_of_another_implementation() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(700, 1024, generator=generator)  # several pieces, and a last one that is smaller
    weight[0, :32] = 0
    weight[1, :32] = 1e-30  # the scale is 0 in fp16
    halves = torch.randint(-254, 255, (64, 1024), generator=generator) / 2
    halves[:, ::32] = 127  # the scale is 1, so that the others are rounded
    weight[2:66] = halves
    weight[66, 1:32] = torch.nextafter(torch.tensor(0.5), torch.tensor(0.0))
    weight[66, 0] = -127
    for cast in (weight, weight.half(), weight.bfloat16()):
        expected = quantize(cast.float().numpy(), GGMLQuantizationType.Q8_0)
        assert np.array_equal(quantise_q8_0(cast), expected)


def test_rows_that_q8_0_cannot_hold_are_f16_and_that_is_said(tmp_path: Path) -> None:
    ours = written(saved(tmp_path / "model", llama(intermediate_size=72)), dtype="q8_0")
    stored = {tensor.name: tensor.tensor_type for tensor in GGUFReader(ours.path).tensors}
    assert stored["blk.0.ffn_down.weight"] == GGMLQuantizationType.F16
    assert stored["blk.0.ffn_up.weight"] == GGMLQuantizationType.Q8_0
    assert "no multiple of 32 weights are stored as f16" in ours.notes[0]


def test_the_dtype_is_that_of_the_weights_by_default(tmp_path: Path) -> None:
    assert written(saved(tmp_path / "model", llama().bfloat16())).dtype == "bf16"


@pytest.mark.parametrize("pre", PIECES)
def test_a_tokenizer_has_its_ids_again(pre: str, tmp_path: Path) -> None:
    keys = {**MERGING_TOKENIZER, "pre": pre, "add_bos_token": pre == "tekken"}
    folder = saved(tmp_path / "model", llama(), **keys)
    ours = written(folder)
    file = GgufFile(ours.path)
    assert file.get("tokenizer.ggml.pre") == pre
    assert len(file.get("tokenizer.ggml.tokens")) == 260
    before, after = AutoTokenizer.from_pretrained(folder), build_tokenizer(file)
    for text in (AWKWARD, "abx ab x<|end|>ab", ""):
        assert after(text)["input_ids"] == before(text)["input_ids"], text
    assert after.eos_token == "<|end|>"
    said = {"qwen2": ["form NFC"], "tekken": ["combining marks"]}.get(pre, [])
    assert len(ours.notes) == len(said)
    assert all(words in note for words, note in zip(said, ours.notes, strict=True))


def test_sentencepiece_merges_have_scores(
    spm: sentencepiece.SentencePieceProcessor,  # noqa: F811
    tmp_path: Path,
) -> None:
    folder = saved(tmp_path / "model", llama(), bos_token_id=1, unknown_token_id=0, **of_spm(spm))
    source = HuggingFaceSource(folder)
    wider = RandomSource({**source.config, "vocab_size": 384}, 0, source.assets)
    file = GgufFile(write_ours(wider, tmp_path / "ours.gguf").path)
    assert file.get("tokenizer.ggml.model") == "llama"
    tokenizer = build_tokenizer(file)
    for text in (AWKWARD, "In 1999 the boat", " a  b ", "ab" * 20):
        assert tokenizer(text)["input_ids"] == [1, *spm.encode(text)], text


@pytest.fixture
def of_sentencepiece(spm: sentencepiece.SentencePieceProcessor, tmp_path: Path) -> Path:  # noqa: F811
    """A model with 370 tokens whose tokenizer is like Llama 2's."""
    model = llama(vocab_size=spm.vocab_size())
    return saved(tmp_path / "model", model, bos_token_id=1, unknown_token_id=0, **of_spm(spm))


def metaspace(**changes: Any) -> Callable[[dict[str, Any]], None]:
    """Describe spaces as Transformers 5 does (``tests/data/transformers_5/llama``)."""
    step = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False, **changes}
    return lambda file: file.update(normalizer=None, pre_tokenizer=step)


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_the_spaces_of_transformers_5_are_those_of_sentencepiece_up_to_one(
    scheme: str, of_sentencepiece: Path, tmp_path: Path
) -> None:
    edit(of_sentencepiece, "tokenizer.json", metaspace(prepend_scheme=scheme))
    ours = written(of_sentencepiece)
    before, after = AutoTokenizer.from_pretrained(of_sentencepiece), build_tokenizer(GgufFile(ours.path))
    for text in (AWKWARD, "In 1999 the boat", "a  b ", "ab" * 20, ""):
        assert after(text)["input_ids"] == before(text)["input_ids"], text
    same = [after(text)["input_ids"] == before(text)["input_ids"] for text in (" the boat", "x</s>the boat")]
    assert same == {"first": [False, False], "always": [False, True], "never": [True, True]}[scheme]
    said = ["A text that begins with a space" in note for note in ours.notes]
    assert said == [True] * (scheme != "never")
    assert ["special tokens with text after them" in note for note in ours.notes] == said[: scheme == "first"] + [
        False
    ] * (scheme == "always")


@pytest.mark.parametrize(
    ("said", "change"),
    [
        ("its pre-tokenizer .*Metaspace", metaspace(split=True)),
        ("its pre-tokenizer .*Metaspace", metaspace(replacement="_")),
        ("its pre-tokenizer .*Whitespace", lambda file: file.update(pre_tokenizer={"type": "Whitespace"})),
        (
            "its normalizer is .*tab",
            lambda file: file.update(normalizer={"type": "Replace", "pattern": {"String": "tab"}, "content": "x"}),
        ),
        ("its normalizer is none, its pre-tokenizer none", lambda file: file.update(normalizer=None)),
        (
            "'</s>' .* is looked for after spaces have been replaced",
            lambda file: file["added_tokens"][2].update(normalized=True),
        ),
    ],
)
def test_other_treatment_of_spaces_is_refused(
    said: str, change: Callable[[dict[str, Any]], None], of_sentencepiece: Path
) -> None:
    edit(of_sentencepiece, "tokenizer.json", change)
    with pytest.raises(UserError, match=said):
        written(of_sentencepiece)


def test_named_chat_templates_come_along(tmp_path: Path) -> None:
    templates = {"default": "{{ messages[0].content }}\u00df", "rag": "{{ documents }}\u4e2d", "tools": "{{ tools }}"}
    folder = saved(tmp_path / "model", llama())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = templates
    tokenizer.save_pretrained(folder)
    assert (folder / "additional_chat_templates" / "rag.jinja").is_file()
    assert build_tokenizer(GgufFile(written(folder).path)).chat_template == templates
    for template_file in [folder / "chat_template.jinja", *(folder / "additional_chat_templates").iterdir()]:
        template_file.unlink()
    listed = [{"name": name, "template": text} for name, text in templates.items()]  # as in older versions
    edit(folder, "tokenizer_config.json", lambda config: config.update(chat_template=listed))
    assert build_tokenizer(GgufFile(written(folder, overwrite=True).path)).chat_template == templates


def test_chat_template_and_end_of_text(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", llama())
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    generation = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**generation, "eos_token_id": [256, 3]}))
    file = GgufFile(written(folder).path)
    assert file.get("tokenizer.chat_template") == "{{ messages[0].content }}"
    assert file.get("tokenizer.ggml.eos_token_id") == 256


@pytest.mark.parametrize("stated", [-1, [], None, 999])
def test_what_is_no_token_does_not_count_as_a_special_one(stated: Any, tmp_path: Path) -> None:
    """Old configs have -1; NeMo's and Megatron-LM's have no ids, and llama.cpp would end texts at the token 11."""
    folder = saved(tmp_path / "model", llama())
    (folder / "generation_config.json").unlink()
    edit(folder, "config.json", lambda config: config.update(eos_token_id=stated, pad_token_id=stated))
    ours = written(folder)
    file = GgufFile(ours.path)
    assert file.get("tokenizer.ggml.eos_token_id") == 256, "that of the tokenizer"
    assert "tokenizer.ggml.padding_token_id" not in file.keys
    assert not ours.notes


def test_without_an_end_of_text_llama_cpps_default_is_named(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", llama())
    (folder / "generation_config.json").unlink()
    edit(folder, "config.json", lambda config: config.pop("eos_token_id"))
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        edit(folder, file, lambda config: config.pop("eos_token"))
    ours = written(folder)
    assert "tokenizer.ggml.eos_token_id" not in GgufFile(ours.path).keys
    assert ours.notes[0].startswith("Nothing says which token ends a text (eos_token_id), so llama.cpp takes its de")
    assert "the token 11;" in ours.notes[0]


def edit(folder: Path, file: str, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads((folder / file).read_text())
    change(values)
    (folder / file).write_text(json.dumps(values))


REFUSED: dict[str, tuple[Callable[[], Any], str, Callable[[dict[str, Any]], Any]]] = {
    "a window of 64 tokens, .* context of 256; set max_position_embeddings": (
        lambda: mistral(sliding_window=64),
        "config.json",
        lambda config: None,
    ),
    "no equivalent of the rope scaling dynamic": (
        llama,
        "config.json",
        lambda config: config.update(rope_scaling={"rope_type": "dynamic", "factor": 2.0}),
    ),
    "no equivalent of the rope scaling llama3": (
        lambda: qwen(Qwen3Config, head_dim=32),
        "config.json",
        lambda config: config.update(rope_scaling=SCALING),
    ),
    "has no merges": (llama, "tokenizer.json", lambda file: file["model"].update(merges=[])),
    "is of the kind WordPiece": (llama, "tokenizer.json", lambda file: file["model"].update(type="WordPiece")),
    "'<|end|>' .* has lstrip": (llama, "tokenizer.json", lambda file: file["added_tokens"][0].update(lstrip=True)),
    "splits text in a way that llama.cpp has no known name for": (
        llama,
        "tokenizer.json",
        lambda file: file.update(pre_tokenizer={**file["pre_tokenizer"], "pretokenizers": [{"type": "Punctuation"}]}),
    ),
    r"changes text before it splits it \(Lowercase\)": (
        llama,
        "tokenizer.json",
        lambda file: file.update(normalizer={"type": "Lowercase"}),
    ),
    "adds tokens around texts by RobertaProcessing": (
        llama,
        "tokenizer.json",
        lambda file: file.update(post_processor=roberta()),
    ),
    "begins texts with 2 tokens and ends them with 0": (
        llama,
        "tokenizer.json",
        lambda file: file.update(post_processor=template([256, 257], [])),
    ),
    "begins texts with 0 tokens and ends them with 2": (
        llama,
        "tokenizer.json",
        lambda file: file.update(
            post_processor={"type": "Sequence", "processors": [template([], [257]), template([], [257])]}
        ),
    ),
    "ends texts with the token 257, but llama.cpp ends them with the model's eos_token_id, 256": (
        llama,
        "tokenizer.json",
        lambda file: file.update(post_processor=template([256], [257])),
    ),
}


def roberta() -> dict[str, Any]:
    ends = {"sep": ["<|end|>", 256], "cls": ["<|end|>", 256]}
    return {"type": "RobertaProcessing", **ends, "trim_offsets": True, "add_prefix_space": False}


def template(front: list[int], back: list[int]) -> dict[str, Any]:
    """Return a post-processor that puts tokens around a text; several on a side are one special token."""
    tokens = {"front": front, "back": back}
    known = {name: {"id": name, "ids": ids, "tokens": [str(index) for index in ids]} for name, ids in tokens.items()}
    parts = [{"SpecialToken": {"id": name, "type_id": 0}} for name in tokens]
    single = [parts[0], {"Sequence": {"id": "A", "type_id": 0}}, parts[1]]
    return {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": known}


@pytest.mark.parametrize("said", REFUSED)
def test_what_llama_cpp_would_compute_differently_is_refused(said: str, tmp_path: Path) -> None:
    make, file, change = REFUSED[said]
    folder = saved(tmp_path / "model", make())
    edit(folder, file, change)
    with pytest.raises(UserError, match=said):
        written(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_without_a_tokenizer_there_is_no_file(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", llama())
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"has no tokenizer\.json, without which llama.cpp reads no text"):
        written(folder)


def test_an_error_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    model = llama()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = 1e6  # too large for f16
    folder = saved(tmp_path / "model", model)
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight has NaN or infinite values as f16"):
        written(folder, dtype="f16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize(("share", "what"), [(0.0, "its header"), (0.5, r"blk\.\S+")])
def test_a_file_that_reads_back_differently_is_not_kept(
    share: float, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path / "model", llama())
    before = written(folder).path.read_bytes()

    class Spoiled(StreamedWriter):
        def close(self) -> None:
            super().close()
            partial = tmp_path / ".ours.gguf.partial"
            data = bytearray(partial.read_bytes())
            data[int(len(data) * share)] ^= 1
            partial.write_bytes(data)

    monkeypatch.setattr(write, "StreamedWriter", Spoiled)
    with pytest.raises(UserError, match=rf"ours\.gguf was not kept, since {what} does not read back as written"):
        written(folder, overwrite=True)
    assert (tmp_path / "ours.gguf").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "ours.gguf"]
    written(folder, overwrite=True, verify=False)
    assert (tmp_path / "ours.gguf").read_bytes() != before
