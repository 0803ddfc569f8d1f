"""A mixture of sources as a data set whose every position is known from the seed alone."""

import itertools
import os
import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from datasets import IterableDataset
from torch.utils.data import get_worker_info
from transformers.utils import logging

from ..source_recipe import SourceRecipe, SourcesData
from .rows import MalformedRowError, RowReader
from .tables import first_row, open_images, open_table, rows_of

logger = logging.get_logger(__name__)

BLOCK = 4096  # positions whose sources are drawn at once
MOST_REFUSED = 100_000  # rows one after the other without use, after which a source has none
MAX_WORKERS = 1024  # counters of broken rows, one for each worker of a process

BROKEN = (MalformedRowError, ValueError, OSError)  # what a row raises that is left out

Prepare = Callable[[dict[str, Any], random.Random], dict[str, Any] | None]


class UnusableRowsError(RuntimeError):
    """Too many rows are broken, or a source has nothing for its use."""


class Source:
    """One opened data set: its rows as samples, by number or as a stream.

    Raises:
        FileNotFoundError, ValueError: naming the source, when it cannot be opened, is empty or lacks a column.
    """

    def __init__(self, recipe: SourceRecipe):
        self.recipe = recipe
        self.table = open_table(recipe)
        self.read = RowReader(recipe, open_images(recipe))
        self.read.check(first_row(self.table, recipe))

    @property
    def streamed(self) -> bool:
        return isinstance(self.table, IterableDataset)

    def __len__(self) -> int:
        """Rows of a table; a stream has no length."""
        if self.streamed:
            raise TypeError(f"data.sources[{self.recipe.name!r}] is streamed and has no length")
        return len(self.table)

    def in_order(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """The rows once, with their numbers, as they stand in the data."""
        rows = rows_of(self.table) if self.streamed else map(self.table.__getitem__, range(len(self)))
        yield from enumerate(rows)

    def rows(self, seed: int, part: int = 0, parts: int = 1) -> Iterator[tuple[int, dict[str, Any]]]:
        """The rows of one part of a stream with their numbers, epoch after epoch, each in an order of its own.

        Parts are whole files if there are enough of them, else every so many-th row.
        """
        epoch = 0
        while True:
            number = None
            for number, row in self.epoch(_seed(seed, epoch), part, parts):
                yield number, row
            if number is None:
                raise ValueError(f"data.sources[{self.recipe.name!r}]: part {part} of {parts} of the stream is empty")
            epoch += 1

    def epoch(self, seed: int, part: int = 0, parts: int = 1) -> Iterator[tuple[int, dict[str, Any]]]:
        """The rows of one part once, with their numbers, in the order of a seed."""
        if not self.streamed:
            for number in _permutation(len(self), seed)[part::parts].tolist():
                yield number, self.table[number]
            return
        stream, by_files = self.table, self.table.num_shards >= parts
        if by_files and parts > 1:
            stream = stream.shard(num_shards=parts, index=part)
        # with parts by row all parts must see one order, so the seed does not depend on the part
        stream = stream.shuffle(seed=seed, buffer_size=self.recipe.shuffle_buffer)
        for number, row in enumerate(rows_of(stream)):
            if by_files or number % parts == part:
                yield number, row


class SourceMixture(torch.utils.data.Dataset):
    """Sample `i` of a run, for `0 <= i < len`: which source it comes from and which row are drawn from the seed.

    A table's rows come once an epoch, in a new order each time. A sample of a table is a pure function of `(seed, i)`,
    so a DataLoader may skip what a resumed run has seen without reading it. A stream must be read in order, by a
    sequential sampler: as accelerate gives the batches to the processes of a run (batch `b` to `b % processes`), there
    one after the other to its workers), each worker reads a part of the stream, and one that starts later skips
    forward in its part without decoding pictures.

    A broken picture or a malformed row is logged with its key and reason, counted (once per worker), and the row after
    it, in the epoch's order, stands in for it. A row that has nothing for its source's use (`prepare` gives None) is
    passed over in the same way, uncounted.

    Args:
        sources: in the order of `data.sources`.
        prepare: of a sample as read, and a source of chance, makes the one for the collator, or None, or raises.
        length: samples of the whole run, over all processes.
        batch_size: samples of one process in one batch. processes: of the run; default: the environment's WORLD_SIZE.

    Raises:
        UnusableRowsError: in use, when more than `data.max_broken` rows of this process were broken, or a whole source
            has nothing for its use.
    """

    def __init__(
        self,
        sources: list[Source],
        data: SourcesData,
        prepare: Prepare,
        length: int,
        batch_size: int = 1,
        processes: int | None = None,
    ):
        self.sources, self.data, self.prepare = sources, data, prepare
        self.length, self.batch_size = length, batch_size
        self.processes = processes or int(os.environ.get("WORLD_SIZE", 1))
        self.broken = torch.zeros(MAX_WORKERS, len(sources), dtype=torch.int64).share_memory_()
        weights = np.array([source.recipe.weight for source in sources])
        self._bounds = np.cumsum(weights / weights.sum())
        blocks = -(-length // BLOCK)
        drawn = np.zeros((blocks + 1, len(sources)), dtype=np.int64)
        for block in range(blocks):
            drawn[block + 1] = np.bincount(self._choices(block), minlength=len(sources))
        self._before = drawn.cumsum(0)  # samples of each source before each block
        self._streams: dict[tuple[int, int, int], _StreamPosition] = {}
        self._orders: dict[int, tuple[int, np.ndarray]] = {}  # of each table the epoch that is read, and its order
        self._reported: set[tuple[int, str]] = set()

    def check_sources(self) -> None:
        """Look at the first rows of each source, until one is sound.

        Raises:
            UnusableRowsError: all of them are broken, more than `data.max_broken`.
        """
        for index, source in enumerate(self.sources):
            refused = _Refused()
            rows = source.in_order()
            for number, row in itertools.islice(rows, self.data.max_broken + 1):
                try:
                    self.prepare(source.read(row, number), random.Random(self.data.seed))
                    break
                except BROKEN as error:
                    refused.broken[number] = f"{source.read.key(row, number)}: {error}"
            else:
                raise self._nothing(index, refused)
            rows.close()

    def close(self) -> None:
        """Stop reading streams. Otherwise their threads complain when the interpreter ends."""
        for at in self._streams.values():
            at.rows.close()
        self._streams.clear()

    @property
    def num_broken(self) -> dict[str, int]:
        """Broken rows of this process by source, of all its workers."""
        counts = self.broken.sum(0).tolist()
        return {source.recipe.name: count for source, count in zip(self.sources, counts, strict=True)}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, position: int) -> dict[str, Any]:
        if not 0 <= position < self.length:
            raise IndexError(f"position {position} is not in 0..{self.length - 1}")
        index = self.source_of(position)
        source = self.sources[index]
        if source.streamed:
            candidates = self._stream(index, position)
        else:
            candidates = self._rows(index, self._ordinal(index, position))
        # twice as many as the table has: so that one epoch at least is among them as a whole
        most = MOST_REFUSED if source.streamed else min(MOST_REFUSED, 2 * len(source))
        refused = _Refused()
        sample = self._first_of_use(index, itertools.islice(candidates, most), position, refused)
        if sample is None:
            raise self._nothing(index, refused)
        return sample

    def each_row_once(self, limit: int) -> list[dict[str, Any]]:
        """At most so many samples, none of the same row as another: of all sources by weight, as far as they have any.

        Which rows, and in which order, follows from `data.seed`.

        Raises:
            UnusableRowsError: when a source has nothing for its use, or too many rows are broken.
        """
        weights = [source.recipe.weight for source in self.sources]
        rows = {index: source.epoch(_seed(self.data.seed, index)) for index, source in enumerate(self.sources)}
        refused = [_Refused() for _ in self.sources]
        taken, samples = [0] * len(weights), []
        while rows and len(samples) < limit:
            index = min(rows, key=lambda index: (taken[index] + 1) / weights[index])  # furthest behind its share
            sample = self._first_of_use(index, rows[index], len(samples), refused[index])
            if sample is not None:
                taken[index] += 1
                samples.append(sample)
                continue
            del rows[index]
            if not taken[index]:
                raise self._nothing(index, refused[index])
        for unread in rows.values():
            unread.close()
        return samples

    def source_of(self, position: int) -> int:
        """Index of the source of a position."""
        block, offset = divmod(position, BLOCK)
        return int(self._choices(block)[offset])

    def _choices(self, block: int) -> np.ndarray:
        return _draw(self.data.seed, block, tuple(self._bounds))

    def _ordinal(self, index: int, position: int) -> int:
        """How many samples of a source come before a position."""
        block, offset = divmod(position, BLOCK)
        return int(self._before[block, index] + np.count_nonzero(self._choices(block)[:offset] == index))

    def _rows(self, index: int, ordinal: int) -> Iterator[tuple[int, dict[str, Any]]]:
        source = self.sources[index]
        while True:
            epoch, place = divmod(ordinal, len(source))
            if self._orders.get(index, (None, None))[0] != epoch:
                self._orders[index] = epoch, _permutation(len(source), _seed(self.data.seed, index, epoch))
            number = int(self._orders[index][1][place])
            yield number, source.table[number]
            ordinal += 1

    def _stream(self, index: int, position: int) -> Iterator[tuple[int, dict[str, Any]]]:
        worker = get_worker_info()
        workers = 1 if worker is None else worker.num_workers
        parts, part = self.processes * workers, self._part(position, workers)
        if (index, part, parts) not in self._streams:
            rows = self.sources[index].rows(_seed(self.data.seed, index), part, parts)
            self._streams[index, part, parts] = _StreamPosition(rows)
        at = self._streams[index, part, parts]
        if position <= at.position:
            raise RuntimeError(
                f"position {position} of the streamed source {self.sources[index].recipe.name!r} was asked for after "
                f"{at.position}; a stream is read in order. Use a sequential sampler, or streaming: false"
            )
        at.skip(self._drawn_between(index, max(at.position, 0), position, part, workers))
        at.position = position
        return at.from_here()

    def _part(self, position: int | np.ndarray, workers: int) -> Any:
        """Which process and worker a position belongs to."""
        batch = position // self.batch_size
        return batch % self.processes * workers + batch // self.processes % workers

    def _drawn_between(self, index: int, first: int, last: int, part: int, workers: int) -> int:
        """Samples of a source at positions first..last-1 that belong to the same part."""
        drawn = 0
        for block in range(first // BLOCK, -(-last // BLOCK)):
            positions = np.arange(max(first, block * BLOCK), min(last, (block + 1) * BLOCK))
            mine = self._part(positions, workers) == part
            drawn += np.count_nonzero(mine & (self._choices(block)[positions - block * BLOCK] == index))
        return drawn

    def _first_of_use(
        self, index: int, rows: Iterator[tuple[int, dict[str, Any]]], position: int, refused: "_Refused"
    ) -> dict[str, Any] | None:
        """The sample of the first row that gives one, None at the end of the rows; those before it are noted."""
        source = self.sources[index]
        for number, row in rows:
            try:
                sample = self.prepare(source.read(row, number), random.Random(f"{self.data.seed}/{position}"))
            except BROKEN as error:
                key = source.read.key(row, number)
                refused.broken[number] = f"{key}: {error}"
                self._count(index, key, error)
                continue
            if sample is not None:
                return sample
            refused.left_out.add(number)
        return None

    def _nothing(self, index: int, refused: "_Refused") -> UnusableRowsError:
        """What is to be said of a source none of whose rows can be used."""
        recipe, reasons, remedies = self.sources[index].recipe, [], []
        if refused.broken:
            reasons.append(f"{len(refused.broken)} are broken, the last is {list(refused.broken.values())[-1]}")
            remedies.append("mend the data, or path and images of the source")
        if refused.left_out:
            reasons.append(
                f"{len(refused.left_out)} have nothing for use: {recipe.use} with "
                f"contrastive_max_tokens={self.data.contrastive_max_tokens} and max_length={self.data.max_length}"
            )
            remedies.append("change these")
        remedy = f"{', '.join(remedies)}, or leave the source out"
        rows = len(refused.broken) + len(refused.left_out)
        return UnusableRowsError(
            f"data.sources[{recipe.name!r}]: none of {rows} rows can be used: {'; '.join(reasons)}. "
            f"{remedy[0].upper()}{remedy[1:]}"
        )

    def _count(self, index: int, key: str, error: Exception) -> None:
        if (index, key) in self._reported:
            return
        self._reported.add((index, key))
        worker = get_worker_info()
        self.broken[0 if worker is None else worker.id % MAX_WORKERS, index] += 1
        name, broken = self.sources[index].recipe.name, int(self.broken.sum())
        logger.warning(f"data.sources[{name!r}], {key}: {error} ({broken} of at most {self.data.max_broken} broken)")
        if broken > self.data.max_broken:
            raise UnusableRowsError(
                f"{broken} rows are broken, more than data.max_broken={self.data.max_broken} "
                f"({', '.join(f'{name}: {count}' for name, count in self.num_broken.items() if count)}). The last was "
                f"{key} of {name!r}: {error}. Mend the data, or raise max_broken"
            ) from error


@dataclass
class _Refused:
    """Rows of a source that gave no sample, by their numbers."""

    broken: dict[int, str] = field(default_factory=dict)  # key and reason
    left_out: set[int] = field(default_factory=set)  # have nothing for the source's use


class _StreamPosition:
    """Where a worker stands in its part of a stream; rows that were looked at in place of broken ones come again."""

    def __init__(self, rows: Iterator[tuple[int, dict[str, Any]]]):
        self.rows = rows
        self.position = -1
        self.ahead: deque[tuple[int, dict[str, Any]]] = deque()

    def skip(self, drawn: int) -> None:
        """Go on by so many rows; the row of the last sample counts among them."""
        for _ in range(drawn):
            self.ahead.popleft() if self.ahead else next(self.rows)

    def from_here(self) -> Iterator[tuple[int, dict[str, Any]]]:
        place = 0
        while True:
            if place == len(self.ahead):
                self.ahead.append(next(self.rows))
            yield self.ahead[place]
            place += 1


def _seed(*numbers: int) -> int:
    """One seed of several numbers, which no sum of others equals."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@lru_cache(maxsize=64)
def _draw(seed: int, block: int, bounds: tuple[float, ...]) -> np.ndarray:
    """Source index of each position of a block."""
    chance = np.random.default_rng([seed, block]).random(BLOCK)
    return np.searchsorted(bounds, chance, side="right").clip(max=len(bounds) - 1)


def _permutation(length: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(length)
