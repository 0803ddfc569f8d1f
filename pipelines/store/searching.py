"""Search in a store: by vector, exact or by an approximate index, and anew by late interaction."""

from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F

from .codecs import decode
from .compressor import Compressor, embed_tokens
from .table import StoreConfig, SummaryTable

EXACT_BELOW = 50_000  # rows, up to which an approximate index is not asked unless the call says so
PROBES = 20  # partitions of the index that an approximate search goes through, and more until it has top_k rows
REFINE = 50  # times top_k rows of an approximate search are compared anew with their own embeddings


def search_table(
    table: SummaryTable,
    compressor: Compressor,
    query: Any,
    top_k: int,
    where: str | None,
    approximate: bool | None,
    rerank: str | None,
    candidates: int,
) -> list[dict[str, Any]]:
    """See `SummaryStore.search`."""
    for name, value in (("top_k", top_k), ("candidates", candidates)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}.")
    if rerank not in (None, "maxsim"):
        raise ValueError(f"rerank={rerank!r} is unknown; choose None or 'maxsim'.")
    if where is not None and not isinstance(where, str):
        raise TypeError(f"where must be an SQL filter as a str, got {type(where).__name__}.")
    indexed = table.index_stats() is not None
    if approximate and not indexed:
        raise ValueError("The store has no approximate index. Make one with build_index(), or leave out approximate.")
    rows = table.count()
    if approximate is None:
        approximate = indexed and rows > EXACT_BELOW
    top_k, candidates = (min(value, max(rows, 1)) for value in (top_k, candidates))
    wanted = max(candidates, top_k) if rerank else top_k
    approximate = approximate and wanted * REFINE < rows  # or as many rows are compared as without the index

    tokens = None
    if _is_vector(query):
        if rerank:
            raise ValueError("rerank='maxsim' compares summary tokens, of which a vector has none. Leave it out.")
        vector = _unit(query, table.config.width)
    else:
        tokens = compressor.query(query)  # (1, k, d)
        vector = embed_tokens(tokens)[0]
    names = list(table.metadata_fields)
    columns = ["id", "source", "page", *names]
    if rerank:
        found = nearest(table, vector, [*columns, "tokens"], wanted, where, approximate)
        scores = maxsim(tokens[0], torch.from_numpy(decode_tokens(found["tokens"], table.config))).tolist()
        order = sorted(range(len(scores)), key=lambda index: -scores[index])[:top_k]
        found, scores = found.take(pa.array(order, pa.int64())), [scores[index] for index in order]
    else:
        found = nearest(table, vector, columns, wanted, where, approximate)
        scores = [min(1 - distance, 1.0) for distance in found["_distance"].to_pylist()]
    return [
        {"id": row["id"], "score": score, "source": row["source"], "page": row["page"]}
        | {"metadata": {name: row[name] for name in names}}
        for row, score in zip(found.to_pylist(), scores, strict=True)
    ]


def nearest(
    table: SummaryTable,
    vector: np.ndarray,
    columns: list[str],
    count: int,
    where: str | None,
    approximate: bool,
    probes: int = PROBES,
    refine: int = REFINE,
) -> pa.Table:
    """The `count` rows of the largest cosine, best first, with `columns` and `_distance`, which is 1 - cosine."""
    builder = table.table.search(vector, vector_column_name="embedding").distance_type("dot")
    # Named, since LanceDB otherwise adds it by itself and says that it will not for ever.
    builder = builder.select([*columns, "_distance"]).limit(count)
    if where is not None:
        builder = builder.where(f"({where})")
    if approximate:
        # No maximum: where a filter leaves few rows, most of the nearest partitions hold none of them.
        builder = builder.minimum_nprobes(probes).maximum_nprobes(0).refine_factor(refine)
    else:
        builder = builder.bypass_vector_index()
    return table.read(builder.to_arrow, where)


def maxsim(query: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Late interaction (ColBERT, arXiv 2004.12832): the mean over the query's tokens of the best cosine.

    Args:
        query: `(q, d)`. tokens: `(N, k, d)`.

    Returns:
        `(N,)`.
    """
    cosines = F.normalize(tokens, dim=-1) @ F.normalize(query, dim=-1).T  # (N, k, q)
    return cosines.amax(1).mean(-1)


def decode_tokens(column: pa.Array | pa.ChunkedArray | list[bytes], config: StoreConfig) -> np.ndarray:
    """A column of tokens as `(n, k, d)` float32."""
    rows = column if isinstance(column, list) else column.to_pylist()
    codes = np.frombuffer(b"".join(rows), np.uint8).reshape(len(rows), config.token_bytes)
    return np.ascontiguousarray(decode(codes, config.codec, config.width))


def _is_vector(query: Any) -> bool:
    if isinstance(query, torch.Tensor):
        return query.ndim == 1 and query.is_floating_point()
    return isinstance(query, np.ndarray) and query.ndim == 1 and np.issubdtype(query.dtype, np.floating)


def _unit(vector: Any, width: int) -> np.ndarray:
    vector = np.asarray(vector.detach().float().cpu() if isinstance(vector, torch.Tensor) else vector, np.float32)
    if vector.shape != (width,):
        raise ValueError(
            f"A query vector must have {width} numbers, as the embeddings of the store, got {len(vector)}."
        )
    norm = float(np.linalg.norm(vector))
    if not np.isfinite(norm) or norm == 0:
        raise ValueError("The query vector holds NaN or infinity, or is all zeros.")
    return vector / norm
