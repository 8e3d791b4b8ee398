"""What is written for Megatron-Bridge and Megatron-LM, and what is read of theirs, without either program."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from nemo_pvs.checkpoints.convert import convert, describe_checkpoint, verify_checkpoint
from nemo_pvs.checkpoints.files.torch_dist import TensorBlock, TorchDistReader, write_torch_dist
from nemo_pvs.checkpoints.fingerprint import fingerprint
from nemo_pvs.checkpoints.huggingface.folder import HuggingFaceSource
from nemo_pvs.checkpoints.manifest import ORIGIN
from nemo_pvs.checkpoints.masks import masks_of
from nemo_pvs.checkpoints.megatron.how_to_load import how_to_load, unrestored_flags
from nemo_pvs.checkpoints.megatron.run_config import read_run_config
from nemo_pvs.checkpoints.megatron.source import MegatronSource
from nemo_pvs.checkpoints.megatron.write import write_megatron
from nemo_pvs.checkpoints.nemo.checkpoint import write_nemo
from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.checkpoints.source import shape_of
from nemo_pvs.data.assets import tokenizer_folder
from nemo_pvs.errors import UserError
from nemo_pvs.ledger.ledger import LEDGER, Ledger
from nemo_pvs.model.layout import layouts
from nemo_pvs.model.shape import LayerSizes
from tests.checkpoints.test_convert import flip_a_bit
from tests.families import CASES, LAYOUTS, save_tiny
from tests.masked_source import MaskedSource
from tests.uneven_model import make_uneven

BRIDGES_OWN = Path(__file__).parent / "megatron_bridge" / "run_config.yaml"
"""What Bridge 0.3.1 wrote for the tiny Llama of ``tests/families.py`` with the scaled rope below."""
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SCALED = {"max_position_embeddings": 16384, "rope_theta": 500000.0, "rope_scaling": LLAMA3_ROPE}
SAME_HEADS = tuple(LayerSizes(ffn, 8, groups) for ffn, groups in ((96, 2), (40, 4), (64, 8), (128, 2)))
BOUNDS = LayerSizes(ffn=128, heads=32, kv_groups=8)
ITERATION = "iter_0000001"


@pytest.fixture
def hf(tmp_path) -> Path:
    return save_tiny(tmp_path / "hf", "llama", **SCALED)


@pytest.fixture
def root(hf, tmp_path) -> Path:
    convert(hf, tmp_path / "root", to="megatron")
    return tmp_path / "root"


@pytest.fixture
def theirs(root) -> Path:
    """A checkpoint as Bridge writes it: nothing but its own files describes the model."""
    (root / ITERATION / "huggingface_config.json").unlink()
    (root / ITERATION / "pvs_manifest.json").unlink()
    shutil.copyfile(BRIDGES_OWN, root / ITERATION / "run_config.yaml")
    return root


def changed(run_config: Path, **fields: Any) -> None:
    content = yaml.safe_load(run_config.read_text())
    content["model"].update(fields)
    run_config.write_text(yaml.safe_dump(content))


# --- writing


def test_a_rotary_base_that_is_not_whole_is_refused(tmp_path):
    folder = save_tiny(tmp_path / "hf", "llama", rope_theta=10000.5)
    with pytest.raises(UserError, match=r"rope_theta 10000\.5, but Megatron-LM's --rotary-base is a whole number"):
        convert(folder, tmp_path / "root", to="megatron")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(case[:2]))
def test_every_family_comes_back_bit_for_bit_and_is_described_in_full(case, tmp_path):
    family, _, settings = case
    folder = save_tiny(tmp_path / "hf", family, torch.bfloat16, **settings)
    there = convert(folder, tmp_path / "root", to="megatron")
    back = convert(tmp_path / "root", tmp_path / "back", to="hf")
    assert there.tensors == back.tensors
    assert there.source == back.source == fingerprint(HuggingFaceSource(folder))
    assert (tmp_path / "back" / "config.json").read_text() == (folder / "config.json").read_text()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "back" / name).read_text() == (folder / name).read_text()
    original = HuggingFaceSource(folder).config
    for described_by in ("run_config.yaml", "common.pt"):
        (tmp_path / "root" / ITERATION / "huggingface_config.json").unlink(missing_ok=True)
        if described_by == "common.pt":
            if family != "llama":  # which the arguments of Megatron-LM are read as
                continue
            (tmp_path / "root" / ITERATION / "run_config.yaml").unlink()
        config = open_source(tmp_path / "root").config
        # What is left out changes nothing that is computed.
        assert {key: original[key] for key in original.keys() - config.keys()}.keys() <= {
            "attention_dropout",
            "bos_token_id",
            "dtype",
            "eos_token_id",
            "layer_types",
            "max_window_layers",
            "pretraining_tp",
            "transformers_version",
            "use_cache",
            "sliding_window",
        }
        assert {key: config[key] for key in original.keys() & config.keys()} == {
            key: original[key] for key in original.keys() & config.keys()
        }
        assert config["torch_dtype"] == original["dtype"]


def test_the_files_are_those_of_a_run_that_has_saved_once(hf, root, tmp_path):
    assert sorted(path.name for path in root.iterdir()) == [
        ITERATION,
        "latest_checkpointed_iteration.txt",
        "latest_train_state.pt",
    ]
    assert (root / "latest_checkpointed_iteration.txt").read_text() == "1"
    iteration = root / ITERATION
    state = torch.load(iteration / "train_state.pt")
    assert int(state["step"]) == 1
    assert len(state) == 8
    assert (iteration / "train_state.pt").read_bytes() == (root / "latest_train_state.pt").read_bytes()
    write_nemo(HuggingFaceSource(hf), tmp_path / "nemo")
    of_nemo, of_megatron = (
        pickle.loads((folder / ".metadata").read_bytes()).state_dict_metadata
        for folder in (tmp_path / "nemo" / "weights", iteration)
    )
    assert {name.removeprefix("module.") for name in of_nemo} == set(of_megatron)
    assert any("_extra_state" in name for name in of_megatron)
    common = torch.load(iteration / "common.pt", weights_only=False)
    assert common["content_metadata"]  # without which Bridge's training stops
    assert (common["iteration"], common["checkpoint_version"]) == (1, 3.0)
    arguments = common["args"]
    assert arguments.norm_epsilon == arguments.layernorm_epsilon == 1e-5  # before and since Megatron-LM 0.16
    assert (arguments.padded_vocab_size, arguments.use_rope_scaling, arguments.params_dtype) == (
        128,
        True,
        torch.float32,
    )
    run_config = yaml.safe_load((iteration / "run_config.yaml").read_text())
    tokenizer = Path(run_config["tokenizer"]["tokenizer_model"])
    assert tokenizer == (iteration / "tokenizer").resolve()
    assert (tokenizer / "tokenizer.json").is_file()
    assert tokenizer_folder(root) == iteration / "tokenizer"
    assert verify_checkpoint(root) == verify_checkpoint(iteration)
    assert describe_checkpoint(root)["format"] == "megatron"


def test_a_window_includes_the_query_itself_in_hugging_face_only(tmp_path):
    convert(save_tiny(tmp_path / "hf", "mistral", sliding_window=64), tmp_path / "root", to="megatron")
    run_config = tmp_path / "root" / ITERATION / "run_config.yaml"
    assert yaml.safe_load(run_config.read_text())["model"]["window_size"] == [63, 0]
    assert read_run_config(run_config, vocab_rows=128, dtype="float32")["sliding_window"] == 64


def test_masks_ledger_and_origin_come_along_both_ways(hf, tmp_path):
    source = MaskedSource(HuggingFaceSource(hf))
    write_nemo(source, tmp_path / "nemo")
    ledger = Ledger()
    ledger.charge("training", 1000, shape_of(source), 16, training=True)
    ledger.save(tmp_path / "nemo" / LEDGER)
    (tmp_path / "nemo" / ORIGIN).write_text("{}")
    convert(tmp_path / "nemo", tmp_path / "root", to="megatron")
    convert(tmp_path / "root", tmp_path / "back", to="nemo")
    for folder in (tmp_path / "root", tmp_path / "back"):
        assert Ledger.of_checkpoint(folder).training.tokens == 1000
        masks = masks_of(open_source(folder))
        assert masks.names == source.masks.names
        assert all(torch.equal(masks.read(name), source.masks.read(name)) for name in masks.names)
    assert (tmp_path / "back" / ORIGIN).read_text() == "{}"
    assert verify_checkpoint(tmp_path / "root").tensors == verify_checkpoint(tmp_path / "nemo").tensors


def test_a_root_can_be_moved_and_the_path_of_its_tokenizer_corrected(root, tmp_path):
    moved = root.rename(tmp_path / "moved")
    run_config = moved / ITERATION / "run_config.yaml"
    run_config.write_text(run_config.read_text().replace(f"{root}/", f"{moved}/"))
    assert str(moved) in run_config.read_text()
    assert describe_checkpoint(moved)["manifest"] == "complete"
    verify_checkpoint(moved)
    config = moved / ITERATION / "huggingface_config.json"
    config.write_text(config.read_text().replace("500000.0", "400000.0"))
    with pytest.raises(UserError, match=r"huggingface_config\.json in .* does not match pvs_manifest\.json there"):
        verify_checkpoint(moved)


def test_a_changed_weight_is_found(root):
    data = root / ITERATION / "__0_0.distcp"
    flip_a_bit(data, data.stat().st_size // 2)
    with pytest.raises(UserError, match=r"weight in .*iter_0000001 does not match pvs_manifest\.json there"):
        verify_checkpoint(root)


def test_a_source_that_breaks_leaves_nothing(hf, tmp_path):
    tensors = load_file(hf / "model.safetensors")
    tensors["lm_head.weight"][3, 5] = torch.nan
    save_file(tensors, hf / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="NaN"):
        convert(hf, tmp_path / "root", to="megatron")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("family", LAYOUTS)
def test_layers_of_different_sizes_come_back(family, tmp_path):
    folder = make_uneven(tmp_path / "hf", sizes=SAME_HEADS, bounds=BOUNDS, family=family)
    there = convert(folder, tmp_path / "root", to="megatron")
    (tmp_path / "root" / ITERATION / "huggingface_config.json").unlink()
    again = open_source(tmp_path / "root")
    assert shape_of(again) == shape_of(HuggingFaceSource(folder))
    assert again.config["model_type"] == f"pruned_{family}"
    assert "Megatron-LM does not load layers of different sizes" in "".join(how_to_load(tmp_path / "root"))
    assert convert(tmp_path / "root", tmp_path / "back", to="hf").tensors == there.tensors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (make_uneven, "have 2 to 12 query heads, but .* pad them with pvs convert --uneven pad"),
        (
            lambda folder: save_tiny(folder, "llama", rope_scaling={**LLAMA3_ROPE, "low_freq_factor": 2.0}),
            "have only llama3 with low_freq_factor 1",
        ),
        (
            lambda folder: save_tiny(folder, "llama", rope_scaling={"rope_type": "linear", "factor": 2.0}),
            r"is linear \(factor 2\.0\), but Megatron-LM and Megatron-Bridge have only llama3",
        ),
        (
            lambda folder: save_tiny(folder, "qwen2", use_sliding_window=True, sliding_window=32, max_window_layers=0),
            "qwen2 has use_sliding_window False, not True",
        ),
    ],
    ids=["query heads", "llama3 rope", "linear rope", "windows of some layers"],
)
def test_what_megatron_cannot_express_is_refused_before_anything_is_written(make, message, tmp_path, monkeypatch):
    folder = make(tmp_path / "hf")
    monkeypatch.setattr("nemo_pvs.checkpoints.megatron.write.whole_folder", None)  # not even begun
    with pytest.raises(UserError, match=message):
        convert(folder, tmp_path / "root", to="megatron")


def test_the_command_says_how_to_load_what_it_wrote_and_what_it_left(pvs, hf, tmp_path):
    write_nemo(HuggingFaceSource(hf), tmp_path / "nemo")
    weights = tmp_path / "nemo" / "weights"
    reader = TorchDistReader(weights)
    names = {name: name for name in reader.names} | {f"optimizer.state.exp_avg.{name}": name for name in reader.names}
    blocks = []
    for name, stored in names.items():
        size = reader.size(stored)
        tensor = reader.read(stored, (0,) * len(size), size)
        blocks.append(TensorBlock(name, size, (0,) * len(size), size, tensor.dtype, lambda tensor=tensor: tensor))
    write_torch_dist(weights, blocks, [])  # as in the middle of a training
    (tmp_path / "nemo" / "pvs_manifest.json").unlink()
    done = pvs("convert", tmp_path / "nemo", tmp_path / "root", "--to", "megatron")
    assert done.code == 0, done.errors
    assert f"the optimizer state of {tmp_path / 'nemo'} ({len(reader.names)} tensors" in done.output
    assert f'pretrained_checkpoint = "{tmp_path / "root"}"' in done.output
    assert "--norm-epsilon 1e-05 --init-method-std 0.03 --use-rope-scaling --rope-scaling-factor 8 " in done.output
    assert open_source(tmp_path / "root").extra_tensors == ()


def test_a_path_is_printed_as_it_is_and_quoted_where_a_shell_reads_it(pvs, hf, tmp_path):
    target = tmp_path / "my model [a]" / "[b] ü"
    done = pvs("convert", hf, target, "--to", "megatron")
    assert done.code == 0, done.errors
    assert done.output.startswith(f"{target}: megatron, ")
    assert f'pretrained_checkpoint = "{target}"' in done.output
    assert f"Megatron-LM: --load '{target}' --use-checkpoint-args" in done.output


@pytest.mark.parametrize(
    ("family", "settings", "expected"),
    [
        ("qwen3", {}, "--qk-layernorm --make-vocab-size-divisible-by 1 --bf16"),
        ("mistral", {"sliding_window": 64}, "--window-size 63,0 --make-vocab-size-divisible-by 1 --bf16"),
        ("llama", {}, "--norm-epsilon 1e-05 --init-method-std 0.03 --make-vocab-size-divisible-by 1 --bf16"),
    ],
)
def test_the_flags_are_those_that_megatron_lm_does_not_restore(family, settings, expected, tmp_path):
    source = HuggingFaceSource(save_tiny(tmp_path, family, torch.bfloat16, **settings))
    assert " ".join(unrestored_flags(source.config)).endswith(expected)


# --- reading


def test_bridges_own_description_is_read(theirs, hf):
    source, original = open_source(theirs), HuggingFaceSource(hf)
    assert type(source) is MegatronSource
    assert shape_of(source) == shape_of(original)
    assert source.config["rope_scaling"] == original.config["rope_scaling"]
    assert fingerprint(source) == fingerprint(original)


def test_a_later_iteration_of_the_run_is_the_one_that_is_read(root):
    later = root / "iter_0000200"
    shutil.copytree(root / ITERATION, later)
    assert open_source(root).folder == root / ITERATION
    (root / "latest_checkpointed_iteration.txt").write_text("200")
    assert open_source(root).folder == later
    assert tokenizer_folder(root) == later / "tokenizer"
    assert open_source(root / ITERATION).folder == root / ITERATION


def test_verbs_take_the_folder_of_a_run(pvs, root, tmp_path):
    done = pvs("prune", root, tmp_path / "small", "--method", "magnitude", "--sparsity", "0.5")
    assert done.code == 0, done.errors
    done = pvs("inspect", root, "--verify")
    assert done.code == 0, done.errors
    assert "megatron, family llama" in done.output
    assert "are as written" in done.output


class Bomb:
    """Touches a file when it is unpickled without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def _bomb_in_metadata(iteration: Path, ran: Path) -> None:
    (iteration / ".metadata").write_bytes(pickle.dumps(Bomb(ran)))


def _bomb_in_target(iteration: Path, ran: Path) -> None:
    changed(iteration / "run_config.yaml", _target_="os.system", _args_=[f"touch {ran}"])


def _bomb_in_field(iteration: Path, ran: Path) -> None:
    changed(iteration / "run_config.yaml", activation_func={"_target_": "os.system", "_args_": [f"touch {ran}"]})


def _bomb_in_yaml(iteration: Path, ran: Path) -> None:
    (iteration / "run_config.yaml").write_text(f"model: !!python/object/apply:os.system ['touch {ran}']")


def _bomb_in_common(iteration: Path, ran: Path) -> None:
    (iteration / "run_config.yaml").unlink()
    torch.save({"args": Bomb(ran)}, iteration / "common.pt")


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (_bomb_in_metadata, r"names \w+\.system, which does not belong"),
        (_bomb_in_target, r"has the model class os\.system, which no table in conversions/ lists"),
        (_bomb_in_field, "has activation_func=.*os.system"),
        (_bomb_in_yaml, "is not valid YAML"),
        (_bomb_in_common, r"asks for \w+\.system"),
    ],
)
def test_nothing_of_a_strangers_checkpoint_runs(place, message, theirs, tmp_path, pvs):
    place(theirs / ITERATION, tmp_path / "ran")
    done = pvs("convert", theirs, tmp_path / "out", "--to", "hf")
    assert done.code == 2
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=message):
        open_source(theirs)


def test_the_state_of_modelopt_is_not_opened(theirs, tmp_path, capsys):
    state = theirs / ITERATION / "modelopt_state"
    state.mkdir()
    torch.save({"modelopt_state_dict": Bomb(tmp_path / "ran")}, state / "common.pt")
    convert(theirs, tmp_path / "out", to="hf")
    assert not (tmp_path / "ran").exists()
    assert "has a modelopt_state, which is ignored" in capsys.readouterr().out


def _without(field: str) -> Callable[[Path], None]:
    def change(run_config: Path) -> None:
        content = yaml.safe_load(run_config.read_text())
        del content["model"][field]
        run_config.write_text(yaml.safe_dump(content))

    return change


# Fields whose defaults are GPT-2's in Megatron's own class, and the family's in the class of a family.
OF_GPT_2 = ("activation_func", "add_bias_linear", "gated_linear_unit", "normalization", "position_embedding_type")


def _with(**fields: Any) -> Callable[[Path], None]:
    return lambda run_config: changed(run_config, **fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            _with(_target_="megatron.bridge.models.deepseek.deepseek_provider.DeepSeekV3ModelProvider"),
            "DeepSeekV3ModelProvider, which no table in conversions/ lists",
        ),
        (_with(num_moe_experts=8), "has num_moe_experts=8, which a llama .* cannot have"),
        (_with(qk_l2_norm=True), "has qk_l2_norm=True"),
        (_with(position_embedding_type="yarn"), "has position_embedding_type=yarn"),
        (_with(num_layers="3"), "has num_layers='3', which is not a size"),
        (_with(rope_scaling_factor="8"), "has '8' for its rope scaling factor"),
        (_with(window_size=[7, 7]), r"has window_size=\[7, 7\], which is not a window of keys before a query"),
        (_with(num_layers=4), "is .*3, .*but its context implies .*4"),
        (_without("layernorm_epsilon"), "does not state layernorm_epsilon"),
        *[(_without(field), f"does not state {field}, and GPTModelProvider's defaults") for field in OF_GPT_2],
        (_with(heterogeneous_layers_config_encoded_json="{"), "that does not describe layers"),
        (lambda path: path.write_text("- 1"), "does not describe a model"),
        (lambda path: path.write_text("model: 1"), "does not describe a model"),
        (lambda path: path.write_text("a: {"), "is not valid YAML"),
    ],
)
def test_what_is_no_model_of_ours_is_one_sentence(change, message, theirs):
    change(theirs / ITERATION / "run_config.yaml")
    with pytest.raises(UserError, match=message):
        open_source(theirs)


def test_the_class_of_a_family_has_the_familys_defaults(theirs):
    config = open_source(theirs).config
    run_config = theirs / ITERATION / "run_config.yaml"
    changed(run_config, _target_="megatron.bridge.models.llama.llama_provider.LlamaModelProvider")
    for field in OF_GPT_2:
        _without(field)(run_config)
    assert open_source(theirs).config == config


@pytest.mark.parametrize("part", ["attention", "mlp"])
@pytest.mark.parametrize(("how", "what"), [("no_op", "has no"), ("replace_with_linear", "a linear layer in place of")])
def test_layers_without_attention_or_mlp_are_refused(part, how, what, theirs):
    blocks = [{"attention": {"num_query_groups": 2}, "mlp": {"ffn_hidden_size": 96}} for _ in range(3)]
    blocks[1][part] = {how: True}
    changed(
        theirs / ITERATION / "run_config.yaml",
        heterogeneous_layers_config_encoded_json=json.dumps({"block_configs": blocks}),
    )
    with pytest.raises(UserError, match=f"Layer 1 of the model in .* {what}"):
        open_source(theirs)


def test_nemotrons_spelling_of_layer_sizes_is_read(tmp_path):
    """Heads per group, and the FFN width as a multiple of the hidden size that is rounded up to 256."""
    sizes = (LayerSizes(256, 8, 2), LayerSizes(512, 8, 4))
    folder = make_uneven(tmp_path / "hf", sizes=sizes, bounds=LayerSizes(512, 16, 4))
    convert(folder, tmp_path / "root", to="megatron")
    (tmp_path / "root" / ITERATION / "huggingface_config.json").unlink()
    blocks = [
        {"attention": {"n_heads_in_group": 4}, "ffn": {"ffn_mult": 5.9}},  # 2 * 5.9 * 64 / 3 = 251
        {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 6.1}},  # 260
    ]
    changed(
        tmp_path / "root" / ITERATION / "run_config.yaml",
        heterogeneous_layers_config_encoded_json=json.dumps({"block_configs": blocks}),
    )
    assert shape_of(open_source(tmp_path / "root")).uneven == sizes


def test_a_run_without_a_finished_iteration_is_one_sentence(pvs, root, tmp_path):
    (root / "latest_checkpointed_iteration.txt").unlink()
    done = pvs("convert", root, tmp_path / "out", "--to", "hf")
    assert done.code == 2
    assert "so none of its iterations is known to be finished; give the folder of one" in " ".join(done.errors.split())
    assert not (tmp_path / "out").exists()
    open_source(root / ITERATION)
    for named in ("7", "../hf", "", "release"):
        (root / "latest_checkpointed_iteration.txt").write_text(named)
        with pytest.raises(UserError, match="which does not exist; give the checkpoint's folder"):
            open_source(root)


def test_every_family_that_nemo_has_bridge_has_too():
    assert all("bridge" in layout.table for layout in layouts() if "nemo" in layout.table)


def test_writing_needs_the_source_once_and_in_order(hf, tmp_path):
    """The writer is the one of NeMo checkpoints, so it streams: no tensor is read twice."""
    source = HuggingFaceSource(hf)
    reads: list[str] = []

    class Counting:
        config, assets = source.config, source.assets

        def read(self, name: str) -> torch.Tensor:
            reads.append(name)
            return source.read(name)

    write_megatron(Counting(), tmp_path / "root")
    assert len(reads) == len(set(reads))
