"""A Fwd2Bot judged on data sets: `python -m fwd2bot.training.evaluate CHECKPOINT --data FILE`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from fwd2bot import Fwd2BotForConditionalGeneration, Fwd2BotProcessor

from .commands import without_folders
from .compositional import compositional_figures
from .cost import costs
from .figures import UNCOMPRESSED, source_figures
from .provenance import provenance
from .source_reader import Judged, SourceReader
from .source_recipe import SourcesData
from .sources import Source
from .sources.tables import has_splits

COMPOSITIONAL = ("sugarcrepe", "winoground")
COUNTS = ("tokens_per_image", "bytes_per_image", "cache_bytes")


def evaluate_sources(
    checkpoint: str | Path,
    data: SourcesData,
    sources: Sequence[Source],
    *,
    lengths: Sequence[int] | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 64,
    uncompressed: bool = True,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> dict[str, Any]:
    """Figures of a Fwd2Bot on each source, see `source_figures` and `compositional_figures`, with what they are of.

    The first picture of each source, with its prompt, is what `costs` are measured on.

    Args:
        lengths: default: the checkpoint's `summary_lengths`.

    Raises:
        ValueError: a length that the model does not have, or a source that has nothing to judge by.
    """
    config = AutoConfig.from_pretrained(checkpoint)
    lengths = list(dict.fromkeys(config.summary_lengths if lengths is None else lengths))
    check_lengths(config, lengths)
    model = Fwd2BotForConditionalGeneration.from_pretrained(checkpoint, dtype=dtype).eval().to(device)
    processor = Fwd2BotProcessor.from_pretrained(checkpoint)
    results: dict[str, Any] = {
        **provenance(checkpoint, model),
        "fingerprint": model.fingerprint,
        "max_new_tokens": max_new_tokens,
        "sources": {},
    }
    for source in sources:
        reader = SourceReader(source, data, processor)
        if source.recipe.format in COMPOSITIONAL:
            figures = compositional_figures(model, processor, reader, lengths, limit=limit, batch_size=batch_size)
        else:
            figures = source_figures(
                model,
                processor,
                reader,
                lengths,
                limit=limit,
                batch_size=batch_size,
                max_new_tokens=max_new_tokens,
                uncompressed=uncompressed,
            )
            first = next(SourceReader(source, data, processor)(1))
            figures["cost"] = cost_of(model, processor, first, lengths, uncompressed)
        about = {"format": source.recipe.format, "path": without_folders(source.recipe.path)}
        about["split"] = source.recipe.split if has_splits(source.recipe.path) else None
        about["broken"] = reader.num_broken
        results["sources"][source.recipe.name] = about | figures
    return results


def cost_of(
    model: Any, processor: Any, one: Judged, lengths: Sequence[int], uncompressed: bool
) -> dict[str, dict[str, float | int]]:
    """`costs` of the first picture of a row, with its prompt."""
    if len(one.images) > 1:  # as if it were asked about its first picture alone
        one.messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
    prompt = processor.backbone_processor.apply_chat_template(one.messages, add_generation_prompt=True)
    return costs(model, processor, one.images[0], prompt, lengths, uncompressed)


def check_lengths(config: Any, lengths: Sequence[int]) -> None:
    """Raise `ValueError` for lengths that a Fwd2Bot does not have."""
    k_max = config.num_summary_tokens
    if not lengths or not all(1 <= k <= k_max for k in lengths):
        raise ValueError(f"lengths must be in 1..{k_max} (the model's summary queries), got {list(lengths)}.")


def settings_of(figures: dict[str, Any]) -> list[str]:
    """ "uncompressed" and the lengths "k=..." of one source's figures, as far as they are there."""
    return [name for name in figures if name == UNCOMPRESSED or name.startswith("k=")]


def figure_rows(figures: dict[str, Any]) -> list[tuple[str, list[float | int | None]]]:
    """The figures of one source by name, with a value for each of `settings_of`; None where one has none."""
    flat = with_cost(figures)
    names = dict.fromkeys(name for values in flat.values() for name in values)
    return [(name, [values.get(name) for values in flat.values()]) for name in names]


def counted(figures: dict[str, Any]) -> str:
    """How much one source's figures are of, in words."""
    return ", ".join(f"{figures[what]:,} {what}" for what in ("rows", "pictures", "captions") if what in figures)


def with_cost(figures: dict[str, Any]) -> dict[str, dict[str, float | int]]:
    """The figures of each setting as one level, their costs at the end but for what the figures have as a mean."""
    flat = {}
    for setting in settings_of(figures):
        own, cost = figures[setting], figures.get("cost", {}).get(setting, {})
        flat[setting] = flatten(own | {name: value for name, value in cost.items() if name not in own})
    return flat


def shown(name: str, value: float | int | None) -> str:
    """A figure as it stands in a table: times 100, as is usual for CIDEr (0..10) as well; costs as they are."""
    if value is None:
        return ""
    if name in COUNTS:
        return f"{value:,}"
    if name == "first_token_ms":
        return f"{value:.1f}"
    return f"{100 * value:.1f}"


def format_source_results(results: dict[str, Any]) -> str:
    """The results as plain tables, one for each source."""
    lines = []
    for name, figures in results["sources"].items():
        lines.append(f"{results['checkpoint']} on {name}: {counted(figures)}; in per cent, CIDEr times 100")
        lines.append(" " * 44 + "".join(f"{setting:>14}" for setting in settings_of(figures)))
        lines += [
            f"{figure:<44}" + "".join(f"{shown(figure, value):>14}" for value in values)
            for figure, values in figure_rows(figures)
        ]
    return "\n".join(lines)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, float | int]:
    """Nested figures as one level, their names joined by spaces."""
    flat: dict[str, float | int] = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name} ") if isinstance(value, dict) else {prefix + name: value}
    return flat
