"""Published sizes."""

from __future__ import annotations

import pytest

from nemo_pvs.errors import UserError
from nemo_pvs.pruning.presets import find_preset, target_presets
from tests.model.test_shape import LLAMA_8B

# Sizes and counts of the paper's configurations, written down a second time: layers, hidden, ffn, heads, parameters.
PUBLISHED = {
    "llama31_8b/4b-depth": (16, 4096, 14336, 32, 4_540_469_248),
    "llama31_8b/3b-depth": (8, 4096, 14336, 32, 2_795_573_248),
    "llama31_8b/2b-depth": (4, 4096, 14336, 32, 1_923_125_248),
    "llama31_8b/1.5b-depth": (2, 4096, 14336, 32, 1_486_901_248),
    "llama31_8b/4b-width": (32, 3072, 9216, 32, 4_512_746_496),
    "llama31_8b/3b-width": (32, 2432, 6144, 32, 2_855_364_992),
    "llama31_8b/2b-width": (32, 1792, 6016, 32, 2_081_933_056),
    "llama31_8b/1.5b-width": (32, 1536, 4736, 32, 1_595_770_368),
    "llama31_8b/4b-flap": (32, 4096, 6528, 20, 4_456_714_240),
    "llama31_8b/4b-shear": (32, 3456, 7808, 32, 4_609_699_200),
    "llama2_7b/2.7b-shear": (32, 2560, 6912, 20, None),
    "llama2_7b/1.3b-shear": (24, 2048, 5504, 16, None),
    "llama2_7b/370m-shear": (24, 1024, 2816, 8, None),
}


@pytest.mark.parametrize("name", [*PUBLISHED])
def test_sizes_and_exact_counts(name: str) -> None:
    preset = target_presets()[name]
    shape = preset.target
    layers, hidden, ffn, heads, parameters = PUBLISHED[name]
    assert (shape.layers, shape.hidden, shape.ffn, shape.heads) == (layers, hidden, ffn, heads)
    by_hand = (
        2 * shape.vocab * hidden
        + layers * (hidden * 128 * 2 * (heads + shape.kv_groups) + 3 * hidden * ffn + 2 * hidden)
        + hidden
    )
    assert shape.parameters == preset.parameters == by_hand == (parameters or by_hand)
    assert shape.heads_per_group == preset.parent.heads_per_group


def test_there_are_no_others_and_names_say_the_size() -> None:
    assert target_presets().keys() == PUBLISHED.keys()
    ratios = {name: preset.ratio for name, preset in target_presets().items() if name.endswith(("depth", "width"))}
    assert sorted(ratios.values()) == [0.5, 0.5, 0.65, 0.65, 0.75, 0.75, 0.8, 0.8]


def test_by_full_and_by_short_name() -> None:
    assert find_preset("4b-depth", LLAMA_8B) is find_preset("llama31_8b/4b-depth", LLAMA_8B)
    with pytest.raises(UserError, match=r"no preset '4b-deph'; did you mean 4b-depth\?"):
        find_preset("4b-deph", LLAMA_8B)
    with pytest.raises(UserError, match="known are llama31_8b/4b-depth, "):
        find_preset("zzz", LLAMA_8B)
    with pytest.raises(UserError, match=r"llama2_7b/1\.3b-shear is for a model of .* give --ratio or --target"):
        find_preset("1.3b-shear", LLAMA_8B)
