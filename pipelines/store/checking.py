"""Is every row of a store readable, and are its tokens and its embedding those of one picture?"""

import numpy as np
import torch
from lancedb.table import Table

from .codecs import decode, error_bound
from .compressor import embed_tokens
from .export import vectors
from .table import StoreConfig, SummaryTable

NAMED = 10  # rows in an error
# Beyond the codec's own error: the bound is made from decoded tokens, whose largest number may be 1/13 smaller, and
# the embedding is in float16.
LARGER, FLOAT16 = 1.1, 2.0**-9


def check_table(table: SummaryTable) -> int:
    """See `SummaryStore.check`."""
    snapshot = table.snapshot()
    columns = snapshot.schema.names
    rows, wrong = 0, []
    try:
        for batch in table.scan(columns, table=snapshot):
            rows += len(batch)
            fits = _fits(batch["tokens"].to_pylist(), vectors(batch["embedding"]), table.config)
            wrong += [one for one, fit in zip(batch["id"].to_pylist(), fits, strict=True) if not fit]
    except OSError as error:
        damaged = [name for name in columns if not _is_readable(table, snapshot, name)]
        raise OSError(f"{error} Columns that cannot be read: {', '.join(damaged) or 'none by itself'}.") from error
    if wrong or rows != snapshot.count_rows():
        named = ", ".join(wrong[:NAMED]) + (f" and {len(wrong) - NAMED:,} more" if len(wrong) > NAMED else "")
        raise OSError(
            f"The store {table.path} is damaged: {rows:,} of {snapshot.count_rows():,} rows were found, and in "
            f"{len(wrong):,} of them tokens and embedding do not fit each other. {named and f'These are {named}. '}"
            "Delete them and add their pictures again, or restore the store from a copy."
        )
    return rows


def _fits(codes: list[bytes], embeddings: np.ndarray, config: StoreConfig) -> np.ndarray:
    """For each row whether its embedding `(n, d)` is that of its tokens, as far as their codec keeps these: `(n,)`.

    If the mean of the tokens is off by a vector of length e at most, its direction is off by 2 e / |mean| at most.
    """
    stored = np.frombuffer(b"".join(codes), np.uint8).reshape(len(codes), config.token_bytes)
    with np.errstate(all="ignore"):  # NaN is what is looked for
        tokens = decode(stored, config.codec, config.width)  # (n, k, d)
        error = LARGER * np.linalg.norm(error_bound(tokens, config.codec), axis=-1).mean(-1)  # (n,)
        mean = np.linalg.norm(tokens.mean(1), axis=-1)
        distance = np.linalg.norm(embed_tokens(torch.from_numpy(tokens)) - embeddings, axis=-1)
        fits = distance * mean <= 2 * error + FLOAT16 * mean
    return fits & ((mean > 0) | ~embeddings.any(-1))


def _is_readable(table: SummaryTable, snapshot: Table, name: str) -> bool:
    try:
        for _ in table.scan([name], table=snapshot):
            pass
    except OSError:
        return False
    return True
