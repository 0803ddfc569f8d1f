"""The indexing job: pictures through the model into the table, in commits, so that it may be stopped at any moment."""

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import logging

from .codecs import encode
from .compressor import Compressor, embed_tokens
from .rows import has_same_metadata, make_columns, make_rows
from .sources import Item, hash_bytes, read
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
        commit_every: None for `COMMIT_EVERY`.
        strict: whether a picture that cannot be used stops the job.
    """

    COMMIT_EVERY = 512  # pictures

    def __init__(
        self, table: SummaryTable, compressor: Compressor, batch_size: int, commit_every: int | None, strict: bool
    ):
        self.table, self.compressor = table, compressor
        self.batch_size, self.strict = batch_size, strict
        self.commit_every = self.COMMIT_EVERY if commit_every is None else commit_every
        self.report = IndexReport()
        self.started = datetime.now(UTC)
        self.pending: dict[str, tuple[Item, bytes, np.ndarray]] = {}  # by id: what the next commit writes
        self.replaced: dict[str, str] = {}  # source by id of the rows that the next commit deletes
        self.is_committing = False

    def run(self, items: Iterable[Item], total: int | None = None, progress: bool | None = None) -> IndexReport:
        """Go through all items. When it is interrupted, what has been compressed is committed first."""
        start = time.perf_counter()
        bar = logging.tqdm(
            total=total, desc="index", unit=" pictures", delay=0 if progress else BAR_DELAY, disable=progress is False
        )
        try:
            self._index(self._not_indexed(_counted(items, bar)))
            self._commit()
        except BaseException as error:
            # A disk that stopped a commit would stop it again; Ctrl-C in the midst of one would not.
            if not (self.is_committing and isinstance(error, OSError)):
                self._commit()
            raise
        finally:
            bar.close()
        self.report.seconds = time.perf_counter() - start
        return self.report

    def _index(self, items: Iterator[Item]) -> None:
        """Read, compress and commit what is not in the store; a rest may be left to the last commit.

        While one batch goes through a model on an accelerator, the next is looked up and made into tensors by another
        thread. A model on the CPU uses all cores itself, and would only take turns with that thread.
        """
        readers, preparer = ThreadPoolExecutor(THREADS), ThreadPoolExecutor(1)
        load_image = self.compressor.processor.load_image
        is_on_cpu = self.compressor.is_on_cpu
        try:
            opened = _ahead(readers, lambda item: read(item, load_image), items, self.batch_size + THREADS)
            current = None
            parts = batches(opened, self.batch_size)
            while (batch := self._next(parts, current)) is not None:
                readable = [item for item in batch if item.error is None]
                ids = {one for item in readable for one in (item.key, *item.replaces)}
                # It matters what becomes of pictures that both have.
                if current is not None and (is_on_cpu or ids & current.ids):
                    self._finish(current)
                    current = None
                following = _Batch(batch, ids, preparer.submit(self._prepare, readable))
                if current is not None:
                    self._finish(current, following)
                current = following
            if current is not None:
                self._finish(current)
        finally:
            for pool in (readers, preparer):
                pool.shutdown(wait=True, cancel_futures=True)

    def _next(self, parts: Iterator[list[Item]], current: "_Batch | None") -> list[Item] | None:
        """The next batch; where the source of pictures breaks, the one before is finished first."""
        try:
            return next(parts, None)
        except Exception:
            if current is not None:
                self._finish(current)
            raise

    def _prepare(self, items: Sequence[Item]) -> tuple[list[Item], Any]:
        """Those that are to be compressed, and what the model reads of them: None for what `compress_items` makes."""
        new = self._not_stored(items)
        needed = {id(item) for item in new}
        for item in items:
            if id(item) not in needed:  # its pixels are of no use any more
                item.picture = None
        try:
            return new, self.compressor.prepare([item.picture for item in new]) if new else None
        except ValueError:  # of one of them
            return new, None

    def _finish(self, batch: "_Batch", following: "_Batch | None" = None) -> None:
        """Compress a batch, and commit if it is time; `following` is prepared meanwhile."""
        new, inputs = batch.prepared.result()
        done = []
        try:
            for one in compress_items(self.compressor, new, inputs):
                done.append(one)
            if following is not None:  # which looks into the store, and at what is pending
                wait([following.prepared])
        finally:  # when it is interrupted in the midst of pictures that go one by one, those that are done stay
            for item, code, embedding in done:
                self.pending[item.key] = (item, code, embedding)
                self._replace(item)
            self._settle_copies(new)
        self._fail(batch.items)
        if len(self.pending) + len(self.replaced) >= self.commit_every:
            self._commit()

    def _fail(self, items: Iterable[Item]) -> None:
        """Put those that cannot be used into the report; with `strict` raise the first."""
        for item in items:
            if item.error is not None and self.strict:
                raise ValueError(f"{item.name}: {item.error}")
            if item.error is not None:
                self.report.failed.append((item.name, item.error))

    def _not_indexed(self, items: Iterable[Item]) -> Iterator[Item]:
        """Leave out the files that are in the store as they are on the disk, without reading them."""
        for part in self._look_ups(items):
            make_columns(self.table, part)
            known: dict[str, list[dict[str, Any]]] = {}
            sources = [item.source for item in part if item.stamp]
            own = self.table.metadata_fields if sources else {}
            columns = ["id", "hash", "source", "size", "mtime_ns", *own]
            for row in self.table.find("source", sources, columns):
                known.setdefault(row["source"], []).append(row)
            for item in part:
                if item.error is not None:  # before a file in the store hides it
                    yield item
                    continue
                rows = known.get(item.source, []) if item.stamp else []
                rows = [row for row in rows if item.id in (None, row["id"])]
                if any((row["size"], row["mtime_ns"]) == item.stamp and has_same_metadata(item, row) for row in rows):
                    self.report.skipped += 1
                    continue
                if item.id is None:  # rows whose ids the user chose are left alone, and those of pictures in memory
                    rows = [row for row in rows if row["id"] == (row["hash"] or "")[:32] and row["size"] is not None]
                    item.replaces = [row["id"] for row in rows]
                    for row in rows:
                        item.metadata = {name: row[name] for name in own} | item.metadata
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
        """Of items that were read, leave out those that are in the store by their content."""
        columns = ["id", "hash", "source", "size", "mtime_ns", "added", *self._names(items)]
        ids = [one for item in items for one in (item.key, *item.replaces)]
        known = {row["id"]: row for row in self.table.find("id", ids, columns, is_rare=True)}
        new: dict[str, Item] = {}
        leaving = set(self.replaced)
        for item in items:
            # Another file of that content may have taken the row over meanwhile.
            older = [known[one] for one in item.replaces if one != item.key and one in known]
            item.replaces = [row["id"] for row in older if row["source"] == item.source]
            row = None if item.key in leaving else known.get(item.key)
            first, waiting = new.get(item.key), self.pending.get(item.key, [None])[0]
            if first is not None and first.hash == item.hash:
                first.copies.append(item)  # whose old row may go once the first one is compressed
            elif waiting is not None and waiting.hash == item.hash:
                self._add_copy(waiting, item)
            elif item.id is not None and self._is_taken(item, first or waiting, row):
                item.error = (
                    f"The id {item.id!r} was given to another picture since this call began. Give each one of its own."
                )
            elif row is not None and row["hash"] == item.hash and self._is_there(item, row):
                self._replace(item)
            else:  # what it replaces goes once it is compressed
                item.is_update = row is not None or bool(item.replaces)
                new[item.key] = item
            leaving.update(item.replaces)
        return list(new.values())

    def _is_taken(self, item: Item, waiting: Item | None, row: dict[str, Any] | None) -> bool:
        """Whether a given id has come before in this call, with another picture."""
        return waiting is not None or (row is not None and row["hash"] != item.hash and row["added"] >= self.started)

    def _is_there(self, item: Item, row: dict[str, Any]) -> bool:
        """Count a picture whose content is in the store; False where its row is to be written anew."""
        if item.id is not None or (item.stamp and item.source == row["source"]):
            is_same = has_same_metadata(item, row)  # first: the other thread counts meanwhile
            self.report.skipped += is_same
            return is_same
        if item.stamp and _has_changed(row):
            return False  # this file takes the row over, which the other one will leave
        is_other = item.stamp is not None or row["added"] >= self.started
        self.report.duplicates += is_other
        self.report.skipped += not is_other
        return True

    def _replace(self, item: Item) -> None:
        self.replaced.update(dict.fromkeys(item.replaces, item.source))

    def _add_copy(self, waiting: Item, copy: Item) -> None:
        """A picture of the content of one that waits for the commit, and so went through the model."""
        self.report.duplicates += 1
        self._replace(copy)

    def _settle_copies(self, items: Iterable[Item]) -> None:
        """The fate of pictures that went through the model is that of their copies in the same batch."""
        for item in items:
            stored = self.pending.get(item.key, [None])[0] is item and item.error is None
            for copy in item.copies:
                copy.error = item.error
                if stored:
                    self.report.duplicates += 1
                    self._replace(copy)

    def _commit(self) -> None:
        if not self.pending and not self.replaced:
            return
        self.is_committing = True
        # An interruption may have come between a picture and what it replaces.
        for item, _, _ in self.pending.values():
            self._replace(item)
        items, codes, embeddings = zip(*self.pending.values(), strict=True) if self.pending else ((), (), ())
        rows = make_rows(self.table, items, codes, np.stack(embeddings)) if items else None
        self.table.upsert(rows, self.replaced)  # of changed files the old rows go as the new ones come
        self._count(items)
        self.pending.clear()
        self.replaced.clear()
        self.is_committing = False
        self._tidy_up()

    def _count(self, items: Sequence[Item]) -> None:
        """Put what a commit has written into the report."""
        updated = sum(item.is_update for item in items)
        self.report.updated += updated
        self.report.added += len(items) - updated

    def _tidy_up(self) -> None:
        try:
            if self.table.num_small_files() >= SMALL_FILES:
                self.table.optimize()
        except OSError as error:  # another process changed the same files; nothing is lost, the next time does it
            logging.get_logger(__name__).warning(f"The store was not tidied up: {error}")

    def _names(self, items: Sequence[Item]) -> list[str]:
        given = dict.fromkeys(name for item in items for name in item.metadata)
        known = self.table.metadata_fields if given else ()  # which asks the disk
        return [name for name in given if name in known]


@dataclass
class _Batch:
    """Pictures that were read.

    Args:
        ids: those that its rows may have, or replace.
        prepared: what `IndexingJob._prepare` says to it.
    """

    items: list[Item]
    ids: set[str]
    prepared: Future[tuple[list[Item], Any]]


def compress_items(
    compressor: Compressor, items: list[Item], inputs: Any = None
) -> Iterator[tuple[Item, bytes, np.ndarray]]:
    """A batch through the model; if one of it is refused, each by itself.

    Args:
        inputs: what `compressor.prepare` gave, if that has been done.

    Yields:
        `(item, tokens in the store's codec, embedding (d,))` of those that were not; the others have an `error`.
    """
    if not items:
        return
    try:
        if inputs is None:
            inputs = compressor.prepare([item.picture for item in items])
        tokens = compressor.compress(inputs)
        codes = encode(tokens.numpy(), compressor.config.codec)
    except ValueError as error:
        if len(items) == 1:
            items[0].error = str(error)
        else:
            for item in items:
                yield from compress_items(compressor, [item])
        return
    for item, code, embedding in zip(items, codes, embed_tokens(tokens), strict=True):
        item.picture = None  # the pixels are no longer needed
        yield item, code.tobytes(), embedding


def _has_changed(row: dict[str, Any]) -> bool:
    """Whether the file of a row has other content by now. One that is gone has not: a store outlives its pictures."""
    if row["size"] is None:  # no file
        return False
    try:
        found = os.stat(row["source"])
        if (row["size"], row["mtime_ns"]) == (found.st_size, found.st_mtime_ns):
            return False
        return row["size"] != found.st_size or hash_bytes(Path(row["source"]).read_bytes()) != row["hash"]
    except OSError:
        return False


def _counted(items: Iterable[Item], bar: Any) -> Iterator[Item]:
    for item in items:
        bar.update()
        yield item


def batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of up to `size` items."""
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
