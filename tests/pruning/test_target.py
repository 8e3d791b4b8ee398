"""Targets as a user types them."""

from __future__ import annotations

import pytest

from nemo_pvs.errors import UserError
from nemo_pvs.pruning.target import parse_target
from nemo_pvs.shape import Shape

PARENT = Shape(layers=30, hidden=576, ffn=1536, heads=9, kv_groups=3, head_dim=64, vocab=49152, tied=True)


def test_named_sizes_change_and_query_heads_follow_their_groups() -> None:
    target = parse_target("hidden=384, ffn=1024,kv_groups=2", PARENT)
    assert target == PARENT.replace(hidden=384, ffn=1024, kv_groups=2, heads=6)
    assert parse_target("layers=14", PARENT) == PARENT.replace(layers=14)
    assert parse_target("hidden=576", PARENT) == PARENT


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hiden=384", r"unknown size 'hiden'; did you mean hidden\?"),
        ("kv_group=2", r"did you mean kv_groups\?"),
        ("xyz=2", "choose among layers, hidden, ffn, kv_groups"),
        ("hidden=577", "asks for hidden=577, but the model has 576"),
        ("layers=0", "leaves nothing of layers; choose from 1 to 30"),
        ("ffn=1e3", "needs a whole number for ffn, not '1e3'"),
        ("ffn=-5", "needs a whole number"),
        ("ffn=", "needs a whole number"),
        ("hidden", "'hidden' where size=number is needed"),
        ("hidden=384,", "'' where size=number is needed"),
        ("", "'' where size=number is needed"),
        ("ffn=512,ffn=256", "gives ffn twice"),
    ],
)
def test_mistakes_get_one_sentence(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        parse_target(text, PARENT)
    assert "\n" not in str(caught.value)
