import pytest
import torch

from nemo_pvs.checkpoints.masks import check_masks
from nemo_pvs.checkpoints.nemo.checkpoint import NemoSource, write_nemo
from nemo_pvs.checkpoints.transforms.random import RandomSource
from nemo_pvs.model.layout import Layout
from nemo_pvs.model.shape import Shape
from tests.conftest import tiny_llama_config
from tests.masked_source import MaskedSource
from tests.state_source import StateSource, tiny_model

CONFIG = tiny_llama_config(hidden_size=128, intermediate_size=512, vocab_size=1000).to_dict()


def test_draws_do_not_depend_on_the_order_of_reading():
    names = list(Layout.for_config(CONFIG).parts(Shape.from_config(CONFIG)))
    forward = {name: RandomSource(CONFIG, 7).read(name) for name in names}
    source = RandomSource(CONFIG, 7)
    for name in reversed(names):
        assert torch.equal(source.read(name), forward[name])


def test_seeds_and_tensors_differ():
    one, other = RandomSource(CONFIG, 1), RandomSource(CONFIG, 2)
    gate, up = "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(one.read(gate), other.read(gate))
    assert not torch.equal(one.read(gate), one.read(up))


@pytest.mark.parametrize(
    ("name", "deviation"),
    [
        ("model.embed_tokens.weight", 0.02),
        ("model.layers.1.mlp.up_proj.weight", 0.02),
        ("model.layers.1.mlp.down_proj.weight", 0.02 / (2 * 4) ** 0.5),
        ("model.layers.3.self_attn.o_proj.weight", 0.02 / (2 * 4) ** 0.5),
    ],
)
def test_deviation_is_megatrons(name, deviation):
    drawn = RandomSource(CONFIG, 0).read(name)
    assert abs(float(drawn.mean())) < 5 * deviation / drawn.numel() ** 0.5
    assert float(drawn.std()) == pytest.approx(deviation, rel=0.02)


def test_norms_are_one_and_dtype_is_kept():
    source = RandomSource(CONFIG, 0, dtype=torch.bfloat16)
    assert torch.equal(source.read("model.norm.weight"), torch.ones(128, dtype=torch.bfloat16))
    assert source.read("lm_head.weight").dtype == torch.bfloat16


def test_the_baseline_of_a_sparse_model_is_zero_under_its_masks_and_drawn_elsewhere(tmp_path):
    sparse = MaskedSource(StateSource(tiny_model()))
    drawn = RandomSource(sparse.config, 3, masks=sparse.masks)
    dense = RandomSource(sparse.config, 3)
    for name in Layout.for_config(sparse.config).parts(Shape.from_config(sparse.config)):
        mask = sparse.masks.masks.get(name, torch.tensor(True))
        assert torch.equal(drawn.read(name), torch.where(mask, dense.read(name), 0.0)), name
    write_nemo(drawn, tmp_path / "nemo")
    check_masks(NemoSource(tmp_path / "nemo"))
    assert set(NemoSource(tmp_path / "nemo").masks.names) == set(sparse.masks.names)


def test_the_published_baseline_keeps_embedding_and_norms():
    parent = StateSource(tiny_model())
    drawn = RandomSource(parent.config, 3, keep=parent)
    for name, (part, _) in Layout.for_config(parent.config).parts(Shape.from_config(parent.config)).items():
        kept = name == "model.embed_tokens.weight" or len(part.axes) == 1
        assert torch.equal(drawn.read(name), parent.read(name)) == kept, name
