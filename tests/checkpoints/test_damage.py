"""Damage never passes in silence: every verb that reads weights compares them with what was written."""

from __future__ import annotations

import json
import os
import pickle
import shutil

import pytest
import torch
from torch.distributed.checkpoint import metadata

from nemo_pvs.checkpoints.convert import convert, read_through, verify_checkpoint, verify_or_read
from nemo_pvs.checkpoints.files.torch_dist import TorchDistReader
from nemo_pvs.checkpoints.fingerprint import fingerprint
from nemo_pvs.checkpoints.manifest import MANIFEST
from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.cli import verbs
from nemo_pvs.errors import UserError
from tests.conftest import make_tiny_llama, save_tiny_tokenizer

CHANGED = r"^model\.\S+ in \S+ does not match pvs_manifest\.json there: .* pass --ignore-manifest\.$"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Checkpoints that we wrote, text, scores and token files; never changed."""
    folder = tmp_path_factory.mktemp("written")
    save_tiny_tokenizer(make_tiny_llama(folder / "parent"))
    for to in ("hf", "nemo"):
        convert(folder / "parent", folder / to, to=to)
    (folder / "text.txt").write_text("w2 w3 w4 w5 w6 w7 w8 w9 " * 400)
    return folder


def flip_a_bit_of_a_weight(checkpoint, name="model.layers.1.mlp.up_proj.weight"):
    """Flip a bit of one weight wherever it is in the files; size and time of change stay as they were."""
    value = open_source(checkpoint).read(name)[-1].contiguous().numpy().tobytes()
    path = next(path for path in checkpoint.rglob("*") if path.suffix in {".safetensors", ".distcp"})
    content, status = bytearray(path.read_bytes()), path.stat()
    assert content.count(value) == 1
    content[content.index(value)] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.fixture(params=["hf", "nemo"])
def damaged(request, written, tmp_path):
    """One of them with one bit flipped."""
    shutil.copytree(written / request.param, tmp_path / "model")
    flip_a_bit_of_a_weight(tmp_path / "model")
    return tmp_path / "model"


VERBS = {
    "convert to hf": lambda model, text, out, **more: verbs.convert(str(model), str(out), to="hf", **more),
    "convert to nemo": lambda model, text, out, **more: verbs.convert(str(model), str(out), to="nemo", **more),
    "calibrate": lambda model, text, out, **more: verbs.calibrate(
        str(model), str(out), data=str(text), samples=2, sequence_length=16, device="cpu", **more
    ),
    "prune": lambda model, text, out, **more: verbs.prune(
        str(model), str(out), "magnitude", sparsity="2:4", device="cpu", **more
    ),
    "prune by scores": lambda model, text, out, **more: verbs.prune(
        str(model),
        str(out),
        "minitron-width",
        target="hidden=32",
        data=str(text),
        samples=2,
        sequence_length=16,
        device="cpu",
        **more,
    ),
    "evaluate": lambda model, text, out, **more: verbs.evaluate(
        [str(model)], perplexity=[str(text)], samples=2, sequence_length=16, out=str(out), device="cpu", **more
    ),
    "inspect --sparsity": lambda model, text, out, **more: verbs.inspect(str(model), sparsity=True, **more),
}


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_that_reads_weights_stops_with_the_tensors_name(verb, damaged, written, tmp_path):
    before = {path for path in tmp_path.rglob("*") if "measured" not in path.parts}
    with pytest.raises(UserError, match=CHANGED) as refused:
        VERBS[verb](damaged, written / "text.txt", tmp_path / "out")
    assert "model.layers.1.mlp.up_proj.weight" in str(refused.value)
    assert set(tmp_path.rglob("*")) == before
    if (damaged / "weights").is_dir():  # a program that changes it on purpose writes PyTorch's checksum, too
        with pytest.raises(UserError, match="does not match its checksum"):
            VERBS[verb](damaged, written / "text.txt", tmp_path / "out", ignore_manifest=True)
    else:
        VERBS[verb](damaged, written / "text.txt", tmp_path / "out", ignore_manifest=True)


def test_what_was_changed_on_purpose_gets_a_manifest_of_its_own(written, tmp_path):
    shutil.copytree(written / "hf", tmp_path / "model")
    flip_a_bit_of_a_weight(tmp_path / "model")
    with pytest.raises(UserError, match=CHANGED):
        verbs.inspect(str(tmp_path / "model"), verify=True)
    verbs.convert(str(tmp_path / "model"), str(tmp_path / "out"), to="nemo", ignore_manifest=True)
    verify_checkpoint(tmp_path / "out")
    assert fingerprint(open_source(tmp_path / "out")) != fingerprint(open_source(written / "hf"))


def test_masks_are_compared_too(written, tmp_path):
    verbs.prune(str(written / "hf"), str(tmp_path / "sparse"), "magnitude", sparsity="2:4", device="cpu")
    [masks] = tmp_path.rglob("*masks*")
    content = bytearray(masks.read_bytes())
    content[-1] ^= 1
    masks.write_bytes(content)
    with pytest.raises(UserError, match=rf"{masks.name} in \S+ does not match pvs_manifest\.json there"):
        verbs.convert(str(tmp_path / "sparse"), str(tmp_path / "out"), to="nemo")


def test_inspect_verifies_as_far_as_that_is_possible(written, tmp_path):
    for to, tensors in (("hf", 39), ("nemo", 39)):
        assert verify_or_read(open_source(written / to)).startswith(f"all {tensors} tensors and ")
        shutil.copytree(written / to, tmp_path / to)
        (tmp_path / to / MANIFEST).unlink()
    assert verify_or_read(open_source(tmp_path / "hf")).endswith("there is no manifest to compare with")
    assert "checksum of PyTorch's archive" in verify_or_read(open_source(tmp_path / "nemo"))


def without_manifest(written, tmp_path):
    shutil.copytree(written / "nemo", tmp_path / "trained")
    (tmp_path / "trained" / MANIFEST).unlink()
    return tmp_path / "trained"


def test_what_training_left_is_compared_with_pytorchs_own_checksums(written, tmp_path):
    """Checkpoints that Megatron wrote have no manifest, but each chunk is an archive with a CRC-32 of each part."""
    trained = without_manifest(written, tmp_path)
    read_through(open_source(trained))
    flip_a_bit_of_a_weight(trained)
    with pytest.raises(UserError, match=r"mlp\.linear_fc1\.weight from .* does not match its checksum"):
        read_through(open_source(trained))


def test_a_writer_that_left_checksums_out_is_believed(written, tmp_path):
    was = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        convert(written / "parent", tmp_path / "nemo", to="nemo", verify="none")
    finally:
        torch.serialization.set_crc32_options(was)
    (tmp_path / "nemo" / MANIFEST).unlink()
    convert(tmp_path / "nemo", tmp_path / "back", to="hf")
    read = open_source(tmp_path / "back").read("model.norm.weight")
    assert torch.equal(read, open_source(written / "parent").read("model.norm.weight"))


def describe_otherwise(nemo, change):
    """Change the unpickled ``.metadata`` of a checkpoint that we wrote a moment ago."""
    path = nemo / "weights" / ".metadata"
    description = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps(change(description) or description))


def _first_place(description):
    return next(iter(description.storage_data.values()))


def _first_tensor(description):
    stored = description.state_dict_metadata.values()
    return next(one for one in stored if isinstance(one, metadata.TensorStorageMetadata))


METADATA = {
    "another object": lambda description: torch.Size([1]),
    "places of another class": lambda description: description.storage_data.update(
        dict.fromkeys(description.storage_data, torch.Size([1]))
    ),
    "tensors of another class": lambda description: description.state_dict_metadata.update(a=torch.Size([1])),
    "no dictionary of tensors": lambda description: setattr(description, "state_dict_metadata", torch.Size([1])),
    "no dictionary of places": lambda description: setattr(description, "storage_data", None),
    "a file elsewhere": lambda description: setattr(_first_place(description), "relative_path", "../../secret"),
    "a place that is no number": lambda description: setattr(_first_place(description), "offset", None),
    "a place before the file": lambda description: setattr(_first_place(description), "offset", -1),
    "no dtype": lambda description: setattr(_first_tensor(description).properties, "dtype", 7),
    "no size": lambda description: setattr(_first_tensor(description), "size", 7),
    "chunks of another class": lambda description: setattr(_first_tensor(description), "chunks", [1]),
    "more than there are bytes for": lambda description: setattr(
        _first_tensor(description).chunks[0], "sizes", torch.Size([1 << 40, 64])
    ),
}


@pytest.mark.parametrize("what", METADATA)
def test_a_description_of_odd_types_is_refused(what, written, tmp_path):
    trained = without_manifest(written, tmp_path)
    describe_otherwise(trained, METADATA[what])
    with pytest.raises(UserError, match=r"\.metadata does not describe a checkpoint; copy the checkpoint again"):
        TorchDistReader(trained / "weights")


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values.update(tensors=[]),
        lambda values: values.update(files={"config.json": 1}),
        lambda values: values.update(files={"config.json": {"bytes": "many", "sha256": None}}),
        lambda values: values["tensors"].update(a={"dtype": "float32", "size": 3, "digest": "00"}),
        lambda values: values["tensors"].update(a={"dtype": "float32", "size": ["x"], "digest": "00"}),
        lambda values: values["tensors"].update(a={"dtype": "float32", "size": [3]}),
        lambda values: values["tensors"].update(a=None),
        lambda values: values.update(hash=["xxh3_128"]),
        lambda values: values.pop("source"),
    ],
)
def test_a_manifest_with_odd_fields_is_refused(change, written, tmp_path):
    shutil.copytree(written / "hf", tmp_path / "model")
    path = tmp_path / "model" / MANIFEST
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match="is not a manifest of nemo_pvs"):
        open_source(tmp_path / "model")
    path.write_text(json.dumps([values]))
    with pytest.raises(UserError, match="is not a manifest of nemo_pvs"):
        open_source(tmp_path / "model")


def edit_json(path, change):
    values = json.loads(path.read_text())
    path.write_text(json.dumps(change(values) or values))


@pytest.mark.parametrize("layers", [9_000, 2**31])
@pytest.mark.parametrize("kind", ["hf", "nemo", "stock nemo"])
def test_more_layers_than_the_files_can_hold_are_refused_before_anything_is_made_of_them(
    layers, kind, written, tmp_path
):
    place = {"hf": "config.json", "nemo": "context/huggingface_config.json", "stock nemo": "context/io.json"}[kind]
    shutil.copytree(written / kind.split()[-1], tmp_path / "model")
    (tmp_path / "model" / MANIFEST).unlink()
    path = tmp_path / "model" / place
    if kind == "stock nemo":
        (tmp_path / "model" / "context" / "huggingface_config.json").unlink()
        path.write_text(path.read_text().replace('"value": 4,', f'"value": {layers},', 1))
    else:
        edit_json(path, lambda config: config.update(num_hidden_layers=layers))
    with pytest.raises(UserError, match=rf"{layers:,} layers"):
        open_source(tmp_path / "model")


NOT_NUMBERS = (None, "many", True, [4], {"a": 1})
NOT_SIZES = (*NOT_NUMBERS, -1, 0, 1.5)
ODD_FIELDS = [
    *[(field, value) for field in ("num_layers", "hidden_size", "num_attention_heads") for value in NOT_SIZES],
    *[("kv_channels", value) for value in NOT_SIZES if value is not None],  # NeMo may leave it to be worked out
    *[("rotary_base", value) for value in NOT_NUMBERS],
]


@pytest.mark.slow
@pytest.mark.parametrize(("field", "value"), ODD_FIELDS, ids=str)
def test_a_field_of_nemos_context_that_is_no_number_is_refused(field, value, written, tmp_path):
    shutil.copytree(written / "nemo", tmp_path / "model")
    context = tmp_path / "model" / "context"
    (context / "huggingface_config.json").unlink()

    def change(document):
        for stored in document["objects"].values():
            for item in stored["items"]:
                if item[0] == f"Attr(name='{field}')":
                    item[1]["value"] = value

    edit_json(context / "io.json", change)
    with pytest.raises(UserError):
        read_through(open_source(tmp_path / "model"))


@pytest.mark.parametrize("content", ["[]", "null", "3", '"text"', "{}"])
@pytest.mark.parametrize("file", ["huggingface_config.json", "io.json"])
def test_a_context_file_of_another_kind_is_refused(file, content, written, tmp_path):
    shutil.copytree(written / "nemo", tmp_path / "model")
    (tmp_path / "model" / "context" / file).write_text(content)
    if file == "io.json":
        (tmp_path / "model" / "context" / "huggingface_config.json").unlink()
    with pytest.raises(UserError):
        open_source(tmp_path / "model")
