"""Figures of the evaluation, worked out by hand."""

import pytest
import torch

from fwd2bot.training.metrics import exact_match, preference, recall_at_k


def test_exact_match_by_kind_and_over_all():
    figures = exact_match(["yes", "no", "2", "dog"], ["yes", "yes", "2", "Dog"], ["a", "a", "b", "c"])
    assert figures == {"a": 0.5, "b": 1.0, "c": 0.0, "all": 0.5}


def test_exact_match_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="at least one"):
        exact_match([], [], [])


def test_recall_counts_a_query_once_any_relevant_candidate_is_found():
    scores = torch.tensor([[0.9, 0.5, 0.1], [0.9, 0.5, 0.1], [0.9, 0.5, 0.1]])
    relevant = torch.tensor([[True, True, False], [False, False, True], [False, False, False]])
    assert recall_at_k(scores, relevant, (1, 2, 3)) == pytest.approx(
        {"recall@1": 1 / 3, "recall@2": 1 / 3, "recall@3": 2 / 3}
    )


def test_recall_beyond_the_candidates_is_an_error():
    with pytest.raises(ValueError, match="must agree"):
        recall_at_k(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool), (5,))


def test_preference_is_the_share_of_rows_closer_to_the_true_caption():
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    true, false = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    assert preference(images, true, false) == 0.5
