"""Padding and image placeholders, against tensors worked out by hand."""

import pytest
import torch

from fwd2bot.placeholders_fwd2bot import (
    check_placeholders,
    count_placeholders,
    expand_placeholders,
    position_ids_from_mask,
)

IMAGE, PAD = 9, 0


def test_position_ids_count_tokens_and_not_padding():
    assert position_ids_from_mask(torch.tensor([[0, 0, 1, 1], [1, 1, 0, 1]])).tolist() == [[0, 0, 0, 1], [0, 1, 1, 2]]


def test_count_placeholders_ignores_padding():
    ids = torch.tensor([[IMAGE, IMAGE, 1], [IMAGE, 1, 2]])
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    assert count_placeholders(ids, mask, IMAGE).tolist() == [1, 1]


def test_check_placeholders_prints_both_counts():
    with pytest.raises(ValueError, match=r"3 image placeholder.*\[1, 2\] per row.*but 2 "):
        check_placeholders(torch.tensor([1, 2]), 2)


def test_expand_placeholders_of_different_lengths_and_rows_without_any():
    ids = torch.tensor([[IMAGE, 5, IMAGE, 6], [7, PAD, PAD, PAD], [PAD, PAD, IMAGE, 8]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 1, 1]])
    labels = torch.tensor([[IMAGE, 5, IMAGE, 6], [7, -100, -100, -100], [-100, -100, IMAGE, 8]])
    segments = torch.tensor([[0, 1, 1, 2], [0, 0, 0, 0], [0, 0, 0, 1]])
    expanded = expand_placeholders(ids, mask, torch.tensor([1, 3, 2]), IMAGE, PAD, labels, segments)
    nothing = -100
    assert expanded["input_ids"].tolist() == [
        [IMAGE, 5, IMAGE, IMAGE, IMAGE, 6],
        [PAD, PAD, PAD, PAD, PAD, 7],
        [PAD, PAD, PAD, IMAGE, IMAGE, 8],
    ]
    assert expanded["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1], [0, 0, 0, 1, 1, 1]]
    assert expanded["slots"].int().tolist() == [[1, 0, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 0]]
    assert expanded["labels"].tolist() == [
        [nothing, 5, nothing, nothing, nothing, 6],
        [nothing, nothing, nothing, nothing, nothing, 7],
        [nothing, nothing, nothing, nothing, nothing, 8],
    ]
    assert expanded["segment_ids"].tolist() == [[0, 1, 1, 1, 1, 2], [0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1]]


def test_expand_placeholders_does_not_count_a_placeholder_in_the_padding():
    ids = torch.tensor([[IMAGE, IMAGE, 5]])
    expanded = expand_placeholders(ids, torch.tensor([[0, 1, 1]]), torch.tensor([2]), IMAGE, PAD)
    assert expanded["input_ids"].tolist() == [[IMAGE, IMAGE, 5]]
    assert expanded["slots"].int().tolist() == [[1, 1, 0]]


def test_expand_placeholders_without_summary_for_each_is_an_error():
    with pytest.raises(ValueError, match="1 image placeholder.*but 2 "):
        expand_placeholders(torch.tensor([[IMAGE, 5]]), torch.ones(1, 2), torch.tensor([1, 1]), IMAGE, PAD)
