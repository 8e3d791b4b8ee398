"""The rectangles of a range of a flattened matrix, against every range of a small one."""

from __future__ import annotations

import torch

from nemo_pvs.megatron.pruning.unit_tensors import rectangles


def test_rectangles_cover_every_range_once_and_in_its_order() -> None:
    rows, width = 3, 4
    matrix = torch.arange(rows * width).view(rows, width)
    for start in range(rows * width):
        for end in range(start + 1, rows * width + 1):
            pieces = rectangles(start, end - start, width)
            assert len(pieces) <= 3
            own = torch.full((end - start,), -1)
            for these, columns, place in pieces:
                assert (own[place] == -1).all()
                own[place] = matrix[these, columns].flatten()
            assert own.tolist() == list(range(start, end))
