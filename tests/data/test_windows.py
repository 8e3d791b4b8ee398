import pytest
import torch

from nemo_pvs.data.token_set import read_token_file
from nemo_pvs.data.tokenize import write_token_file
from nemo_pvs.data.windows import validation_windows, write_validation_document
from nemo_pvs.errors import UserError


def test_every_token_after_the_first_is_predicted_once(tmp_path):
    write_token_file(tmp_path / "text", [list(range(50)), list(range(50, 100))], 128)
    windows = validation_windows(tmp_path / "text", samples=6, sequence_length=8)
    assert windows.ids.shape == (6, 9)
    assert windows.ids[:, 1:].flatten().tolist() == list(range(1, 49))
    assert windows.ids[:, 0].tolist() == [0, 8, 16, 24, 32, 40]


def test_the_document_for_megatron_holds_exactly_these_tokens(tmp_path):
    write_token_file(tmp_path / "text", [list(range(100))], 128)
    windows = validation_windows(tmp_path / "text", samples=6, sequence_length=8)
    write_validation_document(windows, tmp_path / "windows", 128)
    assert read_token_file(tmp_path / "windows").tolist() == list(range(49))
    again = validation_windows(tmp_path / "windows", samples=6, sequence_length=8)
    assert torch.equal(again.ids, windows.ids)


def test_too_little_text(tmp_path):
    write_token_file(tmp_path / "text", [list(range(48))], 128)
    with pytest.raises(UserError, match="has 48 tokens, but 6 validation samples of 8 need 49"):
        validation_windows(tmp_path / "text", samples=6, sequence_length=8)
