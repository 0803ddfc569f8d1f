"""The indexing job: pictures through the model into the table, in commits, so that it may be stopped at any moment."""

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from transformers.utils import logging

from .codecs import encode
from .compressor import Compressor, embed_tokens
from .sources import Item, read
from .table import LOOKUP, SummaryTable

THREADS = min(4, os.cpu_count() or 1)  # that read and decode pictures ahead of the model
SMALL_FILES = 50  # joined when there are so many, or look-ups would become slower with every commit
BAR_DELAY = 2.0  # seconds before a progress bar appears


@dataclass
class IndexReport:
    """What an `add` did.

    Args:
        added, updated: pictures that are new in the store, and those that replaced a row: of the same id, or of the
            same file with another content.
        duplicates: pictures whose content is in the store already, under another source or from earlier in this call.
        skipped: pictures that were in the store before.
        failed: `(source, reason)` of each picture that could not be used.
        seconds: wall clock.
    """

    added: int = 0
    updated: int = 0
    duplicates: int = 0
    skipped: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Pictures per second that went through the model."""
        return (self.added + self.updated) / self.seconds if self.seconds else 0.0


class IndexingJob:
    """One call of `SummaryStore.add`.

    Args:
        strict: whether a picture that cannot be used stops the job.
    """

    def __init__(self, table: SummaryTable, compressor: Compressor, batch_size: int, commit_every: int, strict: bool):
        self.table, self.compressor = table, compressor
        self.batch_size, self.commit_every, self.strict = batch_size, commit_every, strict
        self.report = IndexReport()
        self.started = datetime.now(UTC)
        self.pending: dict[str, tuple[Item, bytes, np.ndarray]] = {}  # by id: what the next commit writes
        self.replaced: set[str] = set()  # ids that the next commit deletes

    def run(self, items: Iterable[Item], total: int | None = None, progress: bool | None = None) -> IndexReport:
        """Go through all items. When it is interrupted, what has been compressed is committed first."""
        start = time.perf_counter()
        bar = logging.tqdm(
            total=total, desc="index", unit=" pictures", delay=0 if progress else BAR_DELAY, disable=progress is False
        )
        pool, load_image = ThreadPoolExecutor(THREADS), self.compressor.processor.load_image
        try:
            counted = _counted(items, bar)
            fresh = self._not_indexed(counted)
            opened = _ahead(pool, lambda item: read(item, load_image), fresh, self.batch_size + THREADS)
            for batch in _batches(opened, self.batch_size):
                self._compress(self._not_stored(batch))
                if len(self.pending) + len(self.replaced) >= self.commit_every:
                    self._commit()
            self._commit()
        except OSError:  # which a commit would meet again
            raise
        except BaseException:
            self._commit()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            bar.close()
        self.report.seconds = time.perf_counter() - start
        return self.report

    def _fail(self, item: Item, reason: str) -> None:
        if self.strict:
            raise ValueError(f"{item.name}: {reason}")
        self.report.failed.append((item.name, reason))

    def _not_indexed(self, items: Iterable[Item]) -> Iterator[Item]:
        """Leave out the files that are in the store as they are on the disk, without reading them."""
        for part in self._look_ups(items):
            _make_columns(self.table, part)
            known: dict[str, list[dict[str, Any]]] = {}
            columns = ["id", "hash", "source", "size", "mtime_ns", *self._names(part)]
            for row in self.table.find("source", (item.source for item in part if item.stamp), columns):
                known.setdefault(row["source"], []).append(row)
            for item in part:
                rows = known.get(item.source, []) if item.stamp else []
                rows = [row for row in rows if item.id in (None, row["id"])]
                if any((row["size"], row["mtime_ns"]) == item.stamp and _same_metadata(item, row) for row in rows):
                    self.report.skipped += 1
                    continue
                if item.id is None:  # rows whose ids the user chose are left alone
                    item.replaces = [row["id"] for row in rows if row["id"] == (row["hash"] or "")[:32]]
                yield item

    def _look_ups(self, items: Iterable[Item]) -> Iterator[list[Item]]:
        """Many files at once, but only as many pictures that are in memory already as go through the model."""
        part, in_memory = [], 0
        for item in items:
            part.append(item)
            in_memory += item.stamp is None
            if len(part) == LOOKUP or in_memory == self.batch_size:
                yield part
                part, in_memory = [], 0
        if part:
            yield part

    def _not_stored(self, items: Sequence[Item]) -> list[Item]:
        """Leave out what could not be read, and what is in the store by its content."""
        readable = []
        for item in items:
            if item.error is None:
                readable.append(item)
            else:
                self._fail(item, item.error)
        columns = ["id", "hash", "source", "added", *self._names(readable)]
        known = {row["id"]: row for row in self.table.find("id", (item.key for item in readable), columns)}
        new: dict[str, Item] = {}
        leaving = set(self.replaced)
        for item in readable:
            item.replaces = [one for one in item.replaces if one != item.key]
            row = None if item.key in leaving else known.get(item.key)
            waiting = new.get(item.key) or self.pending.get(item.key, [None])[0]
            if waiting is not None and waiting.hash == item.hash:
                self.report.duplicates += 1
            elif row is not None and row["hash"] == item.hash and self._is_there(item, row):
                continue
            else:
                item.is_update = row is not None or bool(item.replaces)
                new[item.key] = item
                leaving.update(item.replaces)
        return list(new.values())

    def _is_there(self, item: Item, row: dict[str, Any]) -> bool:
        """Count a picture whose content is in the store; False where its metadata are to be written anew."""
        if item.id is not None or (item.stamp and item.source == row["source"]):
            self.report.skipped += _same_metadata(item, row)
            return _same_metadata(item, row)
        is_other = item.stamp is not None or row["added"] >= self.started
        self.report.duplicates += is_other
        self.report.skipped += not is_other
        return True

    def _compress(self, items: list[Item]) -> None:
        """A batch through the model; if one of it is refused, each by itself."""
        if not items:
            return
        try:
            tokens = self.compressor.pictures([item.picture for item in items])
            codes = encode(tokens.numpy(), self.table.config.codec)
        except ValueError as error:
            if len(items) > 1:
                for item in items:
                    self._compress([item])
            else:
                self._fail(items[0], str(error))
            return
        for item, code, embedding in zip(items, codes, embed_tokens(tokens), strict=True):
            item.picture = None  # the pixels are no longer needed
            self.pending[item.key] = (item, code.tobytes(), embedding)
            self.replaced.update(item.replaces)

    def _commit(self) -> None:
        if not self.pending and not self.replaced:
            return
        # First the old rows of changed files, so that a kill in between leaves a file without a row, which a re-run
        # indexes, and never one with two.
        self.table.delete(sorted(self.replaced))
        self.replaced.clear()
        if self.pending:
            items, codes, embeddings = zip(*self.pending.values(), strict=True)
            self.table.upsert(_make_rows(self.table, items, codes, np.stack(embeddings)))
            updated = sum(item.is_update for item in items)
            self.report.updated += updated
            self.report.added += len(items) - updated
            self.pending.clear()
        try:
            if self.table.num_small_files() >= SMALL_FILES:
                self.table.optimize()
        except OSError as error:  # another process changed the same files; nothing is lost, the next time does it
            logging.get_logger(__name__).warning(f"The store was not tidied up: {error}")

    def _names(self, items: Sequence[Item]) -> list[str]:
        given = dict.fromkeys(name for item in items for name in item.metadata)
        known = self.table.metadata_fields if given else ()  # which asks the disk
        return [name for name in given if name in known]


def write_summaries(table: SummaryTable, items: Sequence[Item], tokens: torch.Tensor) -> None:
    """One commit of summaries `(N, k, d)` that are there already.

    Raises:
        ValueError: for NaN, or metadata that do not fit their columns.
    """
    codes = encode(tokens.numpy(), table.config.codec)
    _make_columns(table, items)
    for item in items:
        if item.error is not None:
            raise ValueError(f"{item.id}: {item.error}")
    table.upsert(_make_rows(table, items, [code.tobytes() for code in codes], embed_tokens(tokens)))


def _make_columns(table: SummaryTable, items: Sequence[Item]) -> None:
    """Make the columns that the items' metadata need, and mark the items whose values do not fit theirs."""
    if not any(item.metadata for item in items):
        return
    known = table.metadata_fields
    new: dict[str, pa.DataType] = {}
    for item in items:
        for name, value in item.metadata.items():
            if value is None:
                continue
            kind = known.get(name) or new.get(name)
            try:
                if kind is None:
                    new[name] = _metadata_type(value)
                else:
                    pa.scalar(value, kind)
            except (pa.ArrowInvalid, pa.ArrowTypeError, TypeError, ValueError, OverflowError) as error:
                found = f"is {kind} in the store, got {value!r:.80}" if kind else str(error)
                item.error = f"Metadata {name!r} {found}."
    table.add_columns(new)


def _make_rows(table: SummaryTable, items: Sequence[Item], codes: Sequence[bytes], embeddings: np.ndarray) -> pa.Table:
    """Rows with all columns of the table; embeddings `(N, d)`."""
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
        "tokens": list(codes),
    }
    columns = {name: pa.array(column, config.schema.field(name).type) for name, column in values.items()}
    flat = pa.array(embeddings.astype(np.float16).reshape(-1))
    columns["embedding"] = pa.FixedSizeListArray.from_arrays(flat, config.width)
    for name, kind in table.metadata_fields.items():
        columns[name] = pa.array([item.metadata.get(name) for item in items], kind)
    return pa.table(columns)


def _metadata_type(value: Any) -> pa.DataType:
    """Arrow type of the column for a value; `ValueError` for what a filter could not read."""
    kind = pa.scalar(value).type
    inner = kind.value_type if pa.types.is_list(kind) else kind
    if pa.types.is_nested(inner) or pa.types.is_null(inner) or pa.types.is_binary(inner):
        raise ValueError(
            f"is a {type(value).__name__}, and metadata are str, numbers, bool, dates or lists of these. Leave it out"
        )
    return kind


def _same_metadata(item: Item, row: dict[str, Any]) -> bool:
    return all(row.get(name) == value for name, value in item.metadata.items())


def _counted(items: Iterable[Item], bar: Any) -> Iterator[Item]:
    for item in items:
        bar.update()
        yield item


def _batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch


def _ahead(pool: ThreadPoolExecutor, function: Callable[[Item], Item], items: Iterable[Item], window: int) -> Any:
    """`function` of each item, in order, up to `window` of them ahead of the reader."""
    waiting: deque[Any] = deque()
    for item in items:
        waiting.append(pool.submit(function, item) if item.error is None else item)
        if len(waiting) >= window:
            yield _result(waiting.popleft())
    while waiting:
        yield _result(waiting.popleft())


def _result(waiting: Any) -> Item:
    return waiting if isinstance(waiting, Item) else waiting.result()
