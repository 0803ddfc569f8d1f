"""Which caption belongs to which picture, by embeddings: SugarCrepe's false captions and Winoground's pairs."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

from .figures import batches, embed_texts
from .metrics import preference, winoground_scores
from .source_reader import Judged, SourceReader
from .sources import content_hash


@torch.no_grad()
def compositional_figures(
    model: Any,
    processor: Any,
    reader: SourceReader,
    lengths: Sequence[int],
    *,
    limit: int | None = None,
    batch_size: int = 16,
) -> dict[str, Any]:
    """Figures of a Fwd2Bot on a source of format sugarcrepe or winoground: "rows", "pictures", and a dict per "k=...".

    Of sugarcrepe: `preference`, the share of false captions to which the picture is less near than to its true one
    (the first of several), for each category (of SugarCrepe's own files the sort), and their mean. Of winoground:
    `text`, `image` and `group`, see `winoground_scores`, over all rows and by category. Uncompressed a backbone embeds
    nothing.

    Args: see `source_figures`.

    Raises:
        ValueError: the source has no row to judge by. UnusableRowsError: too many broken rows.
    """
    rows: list[Judged] = []
    embeds: dict[int, list[torch.Tensor]] = {k: [] for k in lengths}
    pictures = set()
    for part in batches(tqdm(reader(limit), desc=reader.source.recipe.name, leave=False), batch_size):
        inputs = processor.process_images([image for one in part for image in one.images]).to(model.device)
        summary = model.compress(**inputs, num_summary_tokens=max(lengths))
        for k in lengths:
            embeds[k] += model.embed(summary=summary, num_summary_tokens=k).cpu()
        for one in part:
            pictures.update(map(content_hash, one.images))
            one.images = []  # of which only the embeddings are needed from here on
        rows += part
    if not rows:
        raise ValueError(f"sources[{reader.source.recipe.name!r}] has no row with pictures and captions to judge by")
    texts = sorted({text for one in rows for text in (*one.captions, *one.negatives)}, key=len)
    place = {text: index for index, text in enumerate(texts)}
    text_embeds = embed_texts(model, processor, texts, lengths, batch_size)
    figures: dict[str, Any] = {"rows": len(rows), "pictures": len(pictures)}
    width = model.config.get_text_config().hidden_size
    for k in lengths:
        images, words = torch.stack(embeds[k]), text_embeds[f"k={k}"]
        pairs = reader.source.recipe.format == "winoground"
        scored = _winoground(rows, images, words, place) if pairs else _preference(rows, images, words, place)
        figures[f"k={k}"] = scored | {"bytes_per_image": 2 * width * k}
    return figures


def _preference(
    rows: Sequence[Judged], images: torch.Tensor, texts: torch.Tensor, place: dict[str, int]
) -> dict[str, Any]:
    sorts = defaultdict(list)
    for index, one in enumerate(rows):
        for negative in one.negatives:
            sorts[one.category or "all"].append((index, place[one.captions[0]], place[negative]))
    if not sorts:
        raise ValueError("no row has a false caption; give the column in columns: {negatives: ...}")
    found = {}
    for sort, triples in sorted(sorts.items()):
        image, caption, negative = torch.tensor(triples).T
        found[sort] = preference(images[image], texts[caption], texts[negative])
    return {"preference": found | {"mean": sum(found.values()) / len(found)}}


def _winoground(
    rows: Sequence[Judged], images: torch.Tensor, texts: torch.Tensor, place: dict[str, int]
) -> dict[str, Any]:
    captions = torch.tensor([[place[caption] for caption in one.captions] for one in rows])  # (N, 2)
    scores = texts[captions] @ images.view(len(rows), 2, -1).transpose(1, 2)  # (N, 2 captions, 2 images)
    figures: dict[str, Any] = winoground_scores(scores)
    categories = sorted({one.category for one in rows if one.category is not None})
    if categories:
        of = [one.category for one in rows]
        figures["by_category"] = {
            name: winoground_scores(scores[[index for index, other in enumerate(of) if other == name]])
            for name in categories
        }
    return {"winoground": figures}
