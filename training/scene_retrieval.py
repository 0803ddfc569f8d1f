"""What sentences find among drawn scenes, and what they prefer: the retrieval figures of the drawn world."""

from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

from .answering import scene_rng, slices
from .metrics import preference, recall_at_k
from .scenes import HARD_NEGATIVE_SORTS, Scene, describe, hard_negatives, short_caption, truth_table


def draw_captions(scenes: Sequence[Scene]) -> dict[str, Any]:
    """The texts of the retrieval figures, drawn anew from each scene alone."""
    short = [short_caption(one, scene_rng("short", one)) for one in scenes]
    pairs: dict[str, list[tuple[int, str, str]]] = {sort: [] for sort in HARD_NEGATIVE_SORTS}
    for index, one in enumerate(scenes):
        for sort, (caption, negative) in hard_negatives(one, scene_rng("negative", one)).items():
            pairs[sort].append((index, caption.text, negative))
    return {
        "full": [describe(one, scene_rng("full", one)) for one in scenes],
        "short": [caption.text for caption in short],
        "short_is_true": torch.from_numpy(truth_table(short, scenes)),  # (N, M)
        "pairs": {sort: values for sort, values in pairs.items() if values},
    }


def text_tokens(model: Any, processor: Any, captions: dict[str, Any], batch_size: int) -> dict[str, torch.Tensor]:
    """Summary tokens `(M, k_max, d)` of every text that is needed, by its own words."""
    texts = [*captions["full"], *captions["short"]]
    texts += [text for values in captions["pairs"].values() for _, *both in values for text in both]
    unique = sorted(set(texts), key=len)
    tokens = torch.cat(
        [
            model.compress(**processor.process_texts(unique[part]).to(model.device)).tokens
            for part in tqdm(list(slices(len(unique), batch_size)), desc="texts", leave=False)
        ]
    )
    return dict(zip(unique, tokens, strict=True))


def retrieval_figures(
    model: Any, summary: Any, captions: dict[str, Any], tokens: dict[str, torch.Tensor], k: int
) -> dict:
    """Recall both ways with full and with short captions, and preference over each sort of hard negative."""

    def embed(texts: Sequence[str]) -> torch.Tensor:
        return model.embed(summary=torch.stack([tokens[text] for text in texts]), num_summary_tokens=k)

    images = model.embed(summary=summary, num_summary_tokens=k)  # (N, e)
    full, short = images @ embed(captions["full"]).T, images @ embed(captions["short"]).T  # (N, N)
    own, true = torch.eye(len(images), dtype=torch.bool), captions["short_is_true"]
    ks = [k for k in (1, 5, 10) if k <= len(images)]
    sorts = {
        sort: preference(
            images[[index for index, _, _ in pairs]],
            embed([caption for _, caption, _ in pairs]),
            embed([negative for _, _, negative in pairs]),
        )
        for sort, pairs in captions["pairs"].items()
    }
    return {
        "full_caption_to_image": recall_at_k(full.T.cpu(), own, ks),
        "image_to_full_caption": recall_at_k(full.cpu(), own, ks),
        "short_caption_to_image": recall_at_k(short.T.cpu(), true.T, ks),
        "image_to_short_caption": recall_at_k(short.cpu(), true, ks),
        "hard_negatives": {**sorts, "mean": sum(sorts.values()) / len(sorts)},
    }
