"""Figures of the evaluation, as pure functions."""

from collections import defaultdict
from collections.abc import Sequence

import torch


def exact_match(answers: Sequence[str], expected: Sequence[str], kinds: Sequence[str]) -> dict[str, float]:
    """Share of answers that equal the expected one to the letter: per kind of question, and over all under "all"."""
    if not len(answers) == len(expected) == len(kinds) or not answers:
        raise ValueError(f"Need as many answers as questions, at least one; got {len(answers)} for {len(expected)}.")
    hits = defaultdict(list)
    for answer, truth, kind in zip(answers, expected, kinds, strict=True):
        hits[kind].append(answer == truth)
        hits["all"].append(answer == truth)
    return {kind: sum(values) / len(values) for kind, values in sorted(hits.items())}


def recall_at_k(scores: torch.Tensor, relevant: torch.Tensor, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Share of queries with at least one relevant candidate among the k best.

    Args:
        scores: `(Q, C)` similarity of each query to each candidate.
        relevant: `(Q, C)` bool; a query without any relevant candidate counts as missed.
    """
    if scores.shape != relevant.shape or max(ks) > scores.shape[1]:
        raise ValueError(
            f"scores {tuple(scores.shape)} and relevant {tuple(relevant.shape)} must agree and hold {max(ks)}."
        )
    best = scores.topk(max(ks), dim=1).indices  # (Q, max k), best first
    found = relevant.gather(1, best).cumsum(1) > 0  # (Q, max k)
    return {f"recall@{k}": found[:, k - 1].float().mean().item() for k in ks}


def preference(images: torch.Tensor, captions: torch.Tensor, negatives: torch.Tensor) -> float:
    """Share of images whose cosine to the true caption is larger than to the false one (SugarCrepe's score).

    Args: all `(N, e)`, unit norm, row by row.
    """
    return ((images * captions).sum(1) > (images * negatives).sum(1)).float().mean().item()


def winoground_scores(scores: torch.Tensor) -> dict[str, float]:
    """Shares of rows in which both pictures find their caption (`text`), both captions their picture (`image`), and
    both of that (`group`); equal scores are no hit. By chance 1/4, 1/4 and 1/6.

    Args:
        scores: `(N, 2, 2)` similarity of caption i to picture j, of which i = j belong together.

    Source: Winoground, Thrush et al., CVPR 2022 (arXiv 2204.03162), section 4.
    """
    if scores.ndim != 3 or scores.shape[1:] != (2, 2) or not len(scores):
        raise ValueError(f"scores must have shape (N, 2, 2) with N of at least 1, got {tuple(scores.shape)}.")
    own = scores.diagonal(dim1=1, dim2=2)  # (N, 2)
    other = scores.flip(1).diagonal(dim1=1, dim2=2)  # (N, 2): caption 1-j with picture j
    text = (own > other).all(1)
    image = (own > scores.flip(2).diagonal(dim1=1, dim2=2)).all(1)  # caption i with picture 1-i
    return {
        name: hits.float().mean().item() for name, hits in (("text", text), ("image", image), ("group", text & image))
    }
