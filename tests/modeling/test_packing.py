"""The mask and positions of packed rows, against tensors worked out by hand."""

import torch

from fwd2bot.packing_fwd2bot import packed_attention_mask


def test_every_segment_sees_the_prefix_and_itself_causally():
    visible, position_ids = packed_attention_mask(torch.tensor([[0, 0, 1, 1, 2]]), torch.ones(1, 5))
    assert visible.shape == (1, 1, 5, 5)
    assert visible[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]
    assert position_ids.tolist() == [[0, 1, 2, 3, 2]]


def test_padding_on_the_left_is_seen_by_itself_alone():
    visible, position_ids = packed_attention_mask(torch.tensor([[0, 0, 1, 2]]), torch.tensor([[0, 1, 1, 1]]))
    assert visible[0, 0].int().tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 0, 1]]
    assert position_ids.tolist() == [[0, 0, 1, 1]]


def test_padding_on_the_right_is_seen_by_itself_alone():
    visible, position_ids = packed_attention_mask(torch.tensor([[0, 1, 2, 0]]), torch.tensor([[1, 1, 1, 0]]))
    assert visible[0, 0].int().tolist()[:3] == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0]]
    assert bool(visible[0, 0, 3].any())
    assert position_ids[0, :3].tolist() == [0, 1, 1]
