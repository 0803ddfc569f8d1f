"""Rows of the table from items: columns for metadata, and what is written beside tokens and embedding."""

from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from .codecs import encode
from .compressor import embed_tokens
from .sources import Item
from .table import SummaryTable

UNFIT = (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, TypeError, ValueError, OverflowError)


def write_summaries(table: SummaryTable, items: Sequence[Item], tokens: torch.Tensor) -> None:
    """One commit of summaries `(N, k, d)` that are there already.

    Raises:
        ValueError: for NaN, or metadata that do not fit their columns.
    """
    codes = encode(tokens.numpy(), table.config.codec)
    make_columns(table, items)
    for item in items:
        if item.error is not None:
            raise ValueError(f"{item.id}: {item.error}")
    table.upsert(make_rows(table, items, [code.tobytes() for code in codes], embed_tokens(tokens)))


def make_columns(table: SummaryTable, items: Sequence[Item]) -> None:
    """Make the columns that the items' metadata need, give the values the columns' types, and mark the items whose
    values do not fit."""
    if not any(item.metadata for item in items):
        return
    new: dict[str, pa.DataType] = {}
    known = table.metadata_fields
    for name, value in ((name, value) for item in items for name, value in item.metadata.items()):
        if value is not None and name not in known and name not in new:
            with suppress(*UNFIT):
                new[name] = _metadata_type(value)
    table.add_columns(new)
    known = table.metadata_fields  # another process may have made one of the columns, of another type
    for item in items:
        stored, unfit = as_stored(item.metadata, known)
        item.error = unfit or item.error
        item.metadata = {name: stored.get(name) for name in item.metadata}


def as_stored(metadata: dict[str, Any], known: dict[str, pa.DataType]) -> tuple[dict[str, Any], str]:
    """Metadata as their columns give them back, and what is wrong with those that do not fit."""
    stored, unfit = {}, []
    for name, value in metadata.items():
        kind = known.get(name)
        if value is None or (kind is None and isinstance(value, (list, tuple)) and not value):
            continue  # of what an empty list is one, the first full one tells
        try:
            stored[name] = _stored(value, kind or _metadata_type(value))
        except UNFIT as error:
            found = f"is {kind} in the store, got {value!r:.80}" if kind else str(error)
            unfit.append(f"Metadata {name!r} {found}.")
    return stored, " ".join(unfit)


def make_rows(table: SummaryTable, items: Sequence[Item], codes: Sequence[bytes], embeddings: np.ndarray) -> pa.Table:
    """Rows with all columns of the table; embeddings `(N, d)`."""
    rows, config = describe_items(table, items), table.config
    rows = rows.append_column("tokens", pa.array(codes, config.schema.field("tokens").type))
    return rows.append_column("embedding", embedding_column(embeddings))


def describe_items(table: SummaryTable, items: Sequence[Item]) -> pa.Table:
    """Rows with all columns of the table but tokens and embedding."""
    config, count, stamps = table.config, len(items), [item.stamp or (None, None) for item in items]
    values = {
        "id": [item.key for item in items],
        "hash": [item.hash for item in items],
        "source": [item.source for item in items],
        "page": [None] * count,
        "size": [size for size, _ in stamps],
        "mtime_ns": [changed for _, changed in stamps],
        "length": [config.num_summary_tokens] * count,
        "added": [datetime.now(UTC)] * count,
    }
    columns = {name: pa.array(column, config.schema.field(name).type) for name, column in values.items()}
    for name, kind in table.metadata_fields.items():
        columns[name] = pa.array([item.metadata.get(name) for item in items], kind)
    return pa.table(columns)


def embedding_column(embeddings: np.ndarray) -> pa.Array:
    """Embeddings `(N, d)` as a column of float16."""
    flat = pa.array(embeddings.astype(np.float16).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, embeddings.shape[1])


def _metadata_type(value: Any) -> pa.DataType:
    """Arrow type of the column for a value; `ValueError` for what a filter could not read."""
    kind = pa.scalar(value).type
    inner = kind.value_type if pa.types.is_list(kind) else kind
    if pa.types.is_nested(inner) or pa.types.is_null(inner) or pa.types.is_binary(inner):
        raise ValueError(
            f"is a {type(value).__name__}, and metadata are str, numbers, bool, dates or lists of these. Leave it out"
        )
    return kind


def _stored(value: Any, kind: pa.DataType) -> Any:
    """A value as its column gives it back; `ValueError` where that is another one, as 2 for 2.7."""
    stored = pa.scalar(value, kind).as_py()
    given = list(value) if isinstance(stored, list) else [value]
    for one, other in zip(stored if isinstance(stored, list) else [stored], given, strict=True):
        if one != other and one == one:  # NaN is NaN
            raise ValueError(f"{kind} cannot hold {value!r}")
    return stored


def has_same_metadata(item: Item, row: dict[str, Any]) -> bool:
    """Whether a row has the metadata that are given; NaN equals NaN."""
    pairs = [(row.get(name), value) for name, value in item.metadata.items()]
    return all(found == value or (found != found and value != value) for found, value in pairs)
