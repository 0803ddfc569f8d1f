"""The indexing job on a Ray cluster: many workers compress and write, and each round is one commit.

A round is `commit_every` pictures. The calling process decides, as the job on one machine does, which are new; Ray
Data hands them to workers that hold the model; lance-ray lets workers write the rows as fragments of the table and
commits them all at once. Tensors never pass through the calling process.
"""

import json
import math
import os
import platform
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from transformers.utils import logging

try:
    import lance
    import ray
    from lance.fragment import FragmentMetadata
    from lance_ray.fragment import write_fragment
    from ray.data import ActorPoolStrategy, DataContext, Dataset
except ImportError as error:
    raise ImportError('engine="ray" needs Ray and lance-ray. Install them: pip install "fwd2bot[ray]"') from error

from .compressor import Compressor
from .errors import store_errors
from .indexing import THREADS, IndexingJob, batches, compress_items
from .rows import describe_items, embedding_column
from .sources import Item, hash_bytes, read
from .table import ATTEMPTS, LOOKUP, TABLE, SummaryTable, is_in, is_replaced

IN_MEMORY = 2**29  # bytes of pictures without an address of their own that a round may hold
FRAGMENT = 4096  # rows that a worker writes into one fragment at least
logger = logging.get_logger(__name__)
# What a worker reads: the address of a file or URL, or the picture's bytes and their hash.
READS = pa.schema({"position": pa.int64(), "address": pa.string(), "content": pa.large_binary(), "hash": pa.string()})


@dataclass(frozen=True)
class RayEngine:
    """How `SummaryStore.add(engine=…)` uses a Ray cluster.

    A cluster that the process is connected to is used; else the one of the environment variable RAY_ADDRESS; else one
    is started on this machine. Every node needs this package with its extra "ray", and must reach the pictures by the
    same paths or URLs and the store by the same path or URI.

    Args:
        workers: processes that each hold the model. Default: one for each GPU of the cluster, or without any one for
            each CPU but one, which is left for reading and writing.
        cpus_per_worker, gpus_per_worker: what each reserves. Default: one CPU, and a GPU if the cluster has any.
    """

    workers: int | None = None
    cpus_per_worker: float = 1
    gpus_per_worker: float | None = None

    def __post_init__(self):
        wrong = not isinstance(self.workers, int) or isinstance(self.workers, bool) or self.workers < 1
        if self.workers is not None and wrong:
            raise ValueError(f"workers must be an integer of at least 1, or None, got {self.workers!r}.")
        if not self.cpus_per_worker > 0:
            raise ValueError(f"cpus_per_worker must be above 0, got {self.cpus_per_worker!r}.")
        if self.gpus_per_worker is not None and not self.gpus_per_worker >= 0:
            raise ValueError(f"gpus_per_worker must be 0 or more, or None, got {self.gpus_per_worker!r}.")

    def connect(self) -> tuple[int, float]:
        """Connect to the cluster, or start one; returns the number of workers and the GPUs of each."""
        if not ray.is_initialized():
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            options = {}
            if not os.environ.get("RAY_ADDRESS"):  # a cluster of this machine's own: as many CPUs as are asked for
                needed = math.ceil((self.workers or 1) * self.cpus_per_worker) + 1
                options = {"address": "local", "num_cpus": max(os.cpu_count() or 1, needed)}
            ray.init(log_to_driver=False, **options)
        found = ray.cluster_resources()
        gpus = found.get("GPU", 0)
        per_worker = self.gpus_per_worker if self.gpus_per_worker is not None else float(gpus >= 1)
        if self.workers is not None:
            for what, needed, there in (
                ("CPUs", self.workers * self.cpus_per_worker + 1, found.get("CPU", 0)),
                ("GPUs", self.workers * per_worker, gpus),
            ):
                if needed > there:
                    logger.warning(
                        f"{self.workers} workers need {needed:g} {what}, the Ray cluster has {there:g}: Ray waits "
                        "until it has grown. Ask for fewer workers if it does not grow by itself."
                    )
            return self.workers, per_worker
        fitting = gpus / per_worker if per_worker else (found.get("CPU", 1) - 1) / self.cpus_per_worker
        return max(1, int(fitting)), per_worker


class RayIndexingJob(IndexingJob):
    """One call of `SummaryStore.add` with a `RayEngine`."""

    COMMIT_EVERY = 65_536  # pictures of a round; each round starts the workers anew

    def __init__(self, *arguments: Any, engine: RayEngine, progress: bool | None = None):
        super().__init__(*arguments)
        model = self.compressor.model
        if any(weight.device.type != "cpu" for weight in model.parameters()):
            raise ValueError(
                f"The model is on {model.device}. With Ray it travels to the workers, which put it on devices of "
                "their own: load it on the CPU."
            )
        self.workers, self.gpus = engine.connect()
        self.cpus = engine.cpus_per_worker
        self.progress = progress
        self.shared = ray.put(self.compressor)

    def _index(self, items: Iterator[Item]) -> None:
        context = DataContext.get_current()
        bars, context.enable_progress_bars = context.enable_progress_bars, self.progress is True
        try:
            for part in _rounds(items, self.commit_every):
                self._round(part)
                self._fail(part)
        except ray.exceptions.RayError as error:
            raise RuntimeError(
                f"The Ray job stopped: {error}\nWhat was committed before is in the store; the same call goes on."
            ) from error
        finally:
            context.enable_progress_bars = bars

    def _commit(self) -> None:
        """Nothing: each round commits itself, whole or not at all."""

    def _round(self, part: list[Item]) -> None:
        """Compress the pictures and commit those that are new."""
        in_memory = [item for item in part if item.stamp is None and item.error is None]
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(lambda item: _make_portable(item, self.compressor.processor.load_image), in_memory))
        self._keep(item for item in in_memory if item.error is None)
        kept_before = {id(item) for item, _, _ in self.pending.values()}
        sent = [item for item in part if item.error is None and (item.stamp is not None or id(item) in kept_before)]
        if sent:
            summaries = self._summaries(sent)
            self._keep(item for item in sent if item.stamp is not None and item.error is None)
            self._settle_copies([item for item, _, _ in self.pending.values()])
            kept = {id(item) for item, _, _ in self.pending.values() if item.error is None}
            self._write(summaries, [(index, item) for index, item in enumerate(sent) if id(item) in kept])
        self.pending.clear()
        self.replaced.clear()

    def _keep(self, items: Iterable[Item]) -> None:
        """Of items whose hash is known, note those that are new for the commit."""
        for some in batches(items, LOOKUP):
            for item in self._not_stored(some):
                self.pending[item.key] = (item, b"", None)
                self._replace(item)

    def _add_copy(self, waiting: Item, copy: Item) -> None:
        """Of a round; `_settle_copies` counts it once it is known whether the first one could be used."""
        waiting.copies.append(copy)

    def _summaries(self, items: list[Item]) -> Dataset:
        """Compress on the cluster. What was found out about each item is noted in it; the tensors stay with Ray."""
        blocks = []
        for start in range(0, len(items), self.batch_size):
            some = items[start : start + self.batch_size]
            columns = {
                "position": range(start, start + len(some)),
                "address": [None if isinstance(item.picture, bytes) else str(item.picture) for item in some],
                "content": [item.picture if isinstance(item.picture, bytes) else None for item in some],
                "hash": [item.hash for item in some],
            }
            blocks.append(pa.table(columns, schema=READS))
        pool = ActorPoolStrategy(size=min(self.workers, len(blocks)))
        found = ray.data.from_arrow(blocks).map_batches(
            Worker,
            fn_constructor_args=(self.shared,),
            batch_format="pyarrow",
            batch_size=self.batch_size,
            compute=pool,
            num_cpus=self.cpus,
            num_gpus=self.gpus,
        )
        found = found.materialize()
        for block in ray.get(found.select_columns(["position", "hash", "error"]).to_arrow_refs()):
            for row in block.to_pylist():
                item = items[row["position"]]
                item.picture, item.hash, item.error = None, row["hash"], row["error"]
        return found

    def _write(self, summaries: Dataset, kept: list[tuple[int, Item]]) -> None:
        """Workers write the fragments; then one commit adds them, and deletes what they replace."""
        items, table = [item for _, item in kept], self.table
        fragments, uri, schema = [], _table_uri(table.path), table.table.schema
        if kept:
            known = describe_items(table, items).append_column("position", pa.array([index for index, _ in kept]))
            rows = summaries.map_batches(
                complete_rows, fn_kwargs={"described": ray.put(known), "schema": schema}, batch_format="pyarrow"
            )
            writing = {"uri": uri, "schema": schema, "version": table.table.version}
            size = max(math.ceil(len(kept) / self.workers), FRAGMENT)
            written = rows.map_batches(
                write_fragments, fn_kwargs=writing, batch_format="pyarrow", batch_size=size
            ).take_all()
            errors = [row["error"] for row in written if row["error"] is not None]
            if errors:
                raise OSError(f"{errors[0]}. What was committed before is in the store; the same call goes on.")
            fragments = [FragmentMetadata.from_json(row["fragment"]) for row in written]
        conditions = [is_replaced(self.replaced)] if self.replaced else []
        updates = [item.key for item in items if item.is_update]  # appended, not merged: the row as it was goes, too
        conditions += [is_in("id", part) for part in batches(updates, LOOKUP)]
        with store_errors(table.path):
            _commit_fragments(uri, fragments, conditions)
        self._count(items)


def _commit_fragments(uri: str, new: list[Any], conditions: list[str]) -> None:
    """One commit that adds fragments and deletes the rows of which one of the conditions is true."""
    for attempt in range(ATTEMPTS):
        dataset = lance.dataset(uri)
        changed: dict[int, Any] = {}
        if conditions:
            condition = " OR ".join(conditions)
            found = dataset.scanner(columns=[], with_row_address=True, filter=condition).to_table()["_rowaddr"]
            for fragment in {address >> 32 for address in found.to_pylist()}:
                changed[fragment] = dataset.get_fragment(fragment).delete(condition)  # None if no row is left
        update = lance.LanceOperation.Update(
            removed_fragment_ids=[fragment for fragment, rest in changed.items() if rest is None],
            updated_fragments=[rest for rest in changed.values() if rest is not None],
            new_fragments=new,
        )
        try:
            lance.LanceDataset.commit(dataset, update, read_version=dataset.version)
            return
        except OSError as error:  # another writer has changed the same fragments
            if "conflict" not in str(error) or attempt == ATTEMPTS - 1:
                raise


class Worker:
    """What Ray starts on the cluster: a model that compresses batches."""

    def __init__(self, compressor: Any):
        import torch

        self.compressor: Compressor = ray.get(compressor) if isinstance(compressor, ray.ObjectRef) else compressor
        device = "cuda" if ray.get_gpu_ids() and torch.cuda.is_available() else "cpu"
        self.compressor.model.to(device).eval()
        self.pool = ThreadPoolExecutor(THREADS)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Rows as `READS` says to their position, hash, and error or tokens and embedding."""
        config, load_image = self.compressor.config, self.compressor.processor.load_image
        items = [Item(row["content"] if row["address"] is None else row["address"]) for row in batch.to_pylist()]
        list(self.pool.map(lambda item: read(item, load_image), items))
        tokens = [bytes(config.token_bytes)] * len(items)
        embeddings = np.zeros((len(items), config.width), np.float32)
        place = {id(item): index for index, item in enumerate(items)}
        for item, code, embedding in compress_items(self.compressor, [item for item in items if item.error is None]):
            tokens[place[id(item)]], embeddings[place[id(item)]] = code, embedding
        hashes = [known or item.hash for known, item in zip(batch["hash"].to_pylist(), items, strict=True)]
        columns = {
            "position": batch["position"],
            "hash": pa.array(hashes, pa.string()),
            "error": pa.array([item.error for item in items], pa.string()),
            "tokens": pa.array(tokens, pa.binary(config.token_bytes)),
            "embedding": embedding_column(embeddings),
        }
        return pa.table(columns)


def complete_rows(batch: pa.Table, described: Any, schema: pa.Schema) -> pa.Table:
    """Rows of the table from what workers found, for the positions that are described; the others are left out."""
    known: pa.Table = ray.get(described) if isinstance(described, ray.ObjectRef) else described
    batch = batch.filter(pc.is_in(batch["position"], known["position"].combine_chunks()))
    rows = known.take(pc.index_in(batch["position"], known["position"].combine_chunks()))
    for name in ("tokens", "embedding"):
        rows = rows.append_column(name, batch[name])
    for field in schema:  # columns that another writer has made meanwhile stay empty
        if field.name not in rows.column_names:
            rows = rows.append_column(field, pa.nulls(len(rows), field.type))
    return rows.select(schema.names).cast(schema)


def write_fragments(batch: pa.Table, uri: str, schema: pa.Schema, version: int) -> pa.Table:
    """Rows as a fragment that is not committed: its description, or the error of the disk, which Ray would bury."""
    try:
        found = lance.dataset(uri).latest_version
    except ValueError:
        found = 0
    try:
        if found < version:
            raise OSError(
                f"The node {platform.node()} does not see the store at {uri}. Put it where every node finds it under "
                "the same path, or on object storage"
            )
        with store_errors(uri):
            written = write_fragment([batch], uri, schema=schema)
    except OSError as error:
        return pa.table({"fragment": [""], "error": [str(error)]})
    fragments = [json.dumps(fragment.to_json()) for fragment, _ in written]
    return pa.table({"fragment": fragments, "error": pa.nulls(len(fragments), pa.string())})


def _table_uri(path: str) -> str:
    """Workers have another working folder."""
    return f"{path.rstrip('/') if '://' in path else os.path.abspath(path)}/{TABLE}.lance"


def _make_portable(item: Item, load_image: Any) -> None:
    """Hash a picture that is in memory, and make it bytes that a worker opens."""
    if isinstance(item.picture, (bytes, bytearray, memoryview)):
        item.picture = bytes(item.picture)
        item.hash = hash_bytes(item.picture)
        return
    read(item, load_image)
    if item.error is None:
        file = BytesIO()
        item.picture.save(file, "PNG", compress_level=1)
        item.picture = file.getvalue()


def _rounds(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of up to `size` items; shorter where pictures in memory come to `IN_MEMORY` bytes."""
    part: list[Item] = []
    weight = 0
    for item in items:
        part.append(item)
        weight += _weight(item) if item.stamp is None else 0
        if len(part) == size or weight >= IN_MEMORY:
            yield part
            part, weight = [], 0
    if part:
        yield part


def _weight(item: Item) -> int:
    """Bytes of a picture in memory."""
    picture = item.picture
    if isinstance(picture, (bytes, bytearray)):
        return len(picture)
    if hasattr(picture, "nbytes"):  # an array or a memoryview
        return picture.nbytes
    return 3 * math.prod(getattr(picture, "size", (0, 0)))


def make_job(
    table: SummaryTable,
    compressor: Compressor,
    batch_size: int,
    commit_every: int | None,
    strict: bool,
    engine: RayEngine | str,
    progress: bool | None,
) -> RayIndexingJob:
    """The job of `SummaryStore.add(engine=…)`; `ValueError` for an engine that there is none of."""
    if engine == "ray":
        engine = RayEngine()
    if not isinstance(engine, RayEngine):
        raise ValueError(f'engine={engine!r} is unknown; choose "local", "ray" or a RayEngine.')
    return RayIndexingJob(table, compressor, batch_size, commit_every, strict, engine=engine, progress=progress)
