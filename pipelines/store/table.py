"""The LanceDB table below a store: schema, commits, look-ups. What is on disk is LanceDB's own format, no more."""

import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from itertools import islice
from pathlib import Path, PurePath
from typing import Any

import lancedb
import numpy as np
import pyarrow as pa
from lancedb.index import BTree, HnswSq, IvfPq
from lancedb.table import Table

from .codecs import check_codec, token_bytes
from .errors import filter_reason, store_errors

FORMAT_VERSION = 1
TABLE = "summaries"
METADATA_KEY = b"fwd2bot"
# LanceDB finds two writers that insert the same key at once by this mark; without it both rows would stay.
PRIMARY_KEY = {b"lance-schema:unenforced-primary-key:position": b"1"}
COLUMNS = (
    "id", "hash", "source", "page", "size", "mtime_ns", "length", "added", "embedding", "tokens"
)  # fmt: skip
# Beside our own: names that LanceDB gives to columns of its results.
RESERVED = (*COLUMNS, "_distance", "_score", "_relevance_score", "_rowid", "_rowaddr", "query_index")
INDEX, INDEX_TYPES = "embedding_idx", {"ivf_pq": IvfPq, "hnsw_sq": HnswSq}
ITERATIONS = 10  # of k-means; LanceDB's 50 take over twice the time and found no more (docs/scale.md)
PQ_NUMBERS = 8  # of an embedding in one byte of "ivf_pq"; with LanceDB's 16 far less is found (docs/scale.md)
MIN_INDEXED = 256  # rows that product quantisation needs to learn from
LOOKUP = 1000  # ids or sources in one question to the table
ATTEMPTS = 5  # to make columns beside other writers
SCAN = 4096  # rows in memory while a store is gone through
INDEXED_ROWS = 10_000  # from here on `optimize` sees to it that a look-up by id or source reads no whole column
OLD = timedelta(hours=1)  # versions of the table that are kept, for readers and writers that are in the midst of one


@dataclass(frozen=True)
class StoreConfig:
    """What the rows of a store have in common; it lies in the table's own metadata.

    Args:
        model, revision, fingerprint, prompt, dtype: of the summaries, see `Fwd2BotSummary.metadata`.
        text_prompt: of the model; sentences embedded with another do not compare.
        num_summary_tokens, width: k and d of every row.
        codec: of the tokens.
    """

    model: str | None
    revision: str | None
    fingerprint: str | None
    prompt: str | None
    text_prompt: str | None
    dtype: str | None
    num_summary_tokens: int
    width: int
    codec: str
    format_version: int = FORMAT_VERSION

    @property
    def token_bytes(self) -> int:
        """Bytes of one picture's tokens."""
        return self.num_summary_tokens * token_bytes(self.codec, self.width)

    @property
    def schema(self) -> pa.Schema:
        columns = {
            "id": pa.string(),
            "hash": pa.string(),
            "source": pa.string(),
            "page": pa.int32(),
            "size": pa.int64(),
            "mtime_ns": pa.int64(),
            "length": pa.int32(),
            "added": pa.timestamp("us", "UTC"),
            "embedding": pa.list_(pa.float16(), self.width),
            "tokens": pa.binary(self.token_bytes),
        }
        known = {name: pa.field(name, kind) for name, kind in columns.items()}
        known["id"] = pa.field("id", pa.string(), nullable=False, metadata=PRIMARY_KEY)
        return pa.schema(list(known.values()), metadata={METADATA_KEY: json.dumps(asdict(self))})

    @classmethod
    def from_schema(cls, schema: pa.Schema, path: Any) -> "StoreConfig":
        """Raise `ValueError` for a table that is no store, or one of another format version."""
        try:
            values = json.loads((schema.metadata or {})[METADATA_KEY])
            version = values["format_version"]
        except (KeyError, ValueError, TypeError) as error:
            raise ValueError(f"{path} holds a table {TABLE!r} that is no store of summaries.") from error
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{path} has store format {version!r}; this version of fwd2bot reads {FORMAT_VERSION!r}. Use the "
                "version that wrote it, or make the store anew."
            )
        missing = {field.name for field in fields(cls)} - set(values)
        if missing or set(COLUMNS) - set(schema.names):
            raise ValueError(f"{path} is no whole store: its table lacks {sorted(missing) or 'columns'}.")
        check_codec(values["codec"])
        return cls(**values)


class SummaryTable:
    """Rows on disk. Every method is one commit or one look-up, and sees what other processes have committed."""

    def __init__(self, table: Table, path: str):
        self.table = table
        self.path = path
        self.config = StoreConfig.from_schema(table.schema, path)

    @classmethod
    def create(cls, path: str | os.PathLike, config: StoreConfig) -> "SummaryTable":
        """Raise `FileExistsError` where a store is, `NotADirectoryError` where a file is."""
        path = _place(path)
        if exists(path):
            raise FileExistsError(f"{path} holds a store. Open it with SummaryStore.open, or choose another place.")
        if _is_local(path) and os.path.exists(path) and not os.path.isdir(path):
            raise NotADirectoryError(f"{path} is a file. Give a folder for the store.")
        try:
            with store_errors(path):
                return cls(_connect(path).create_table(TABLE, schema=config.schema), path)
        except ValueError as error:  # LanceDB's, where another process was faster
            if not exists(path):
                raise
            raise FileExistsError(f"{path} holds a store, which another process has just made. Open it.") from error

    @classmethod
    def open(cls, path: str | os.PathLike) -> "SummaryTable":
        """Raise `FileNotFoundError` where no store is."""
        path = _place(path)
        if not exists(path):
            raise FileNotFoundError(f"{path} holds no store. Make one with SummaryStore.create.")
        with store_errors(path):
            return cls(_connect(path).open_table(TABLE), path)

    @property
    def metadata_fields(self) -> dict[str, pa.DataType]:
        """Name and type of the users' own columns."""
        with store_errors(self.path):
            return {field.name: field.type for field in self.table.schema if field.name not in COLUMNS}

    def count(self) -> int:
        with store_errors(self.path):
            return self.table.count_rows()

    def scan(
        self, columns: Sequence[str], where: str | None = None, table: Table | None = None
    ) -> Iterator[pa.RecordBatch]:
        """Rows in batches of bounded size, of one version of the table, however long it takes."""
        with store_errors(self.path):
            query = (self.table if table is None else table).search().select(list(columns)).limit(None)
            if where is not None:
                query = query.where(where)
            yield from query.to_batches(batch_size=SCAN)

    def snapshot(self) -> Table:
        """The table as it is now; later commits do not change it."""
        with store_errors(self.path):
            table = _connect(self.path).open_table(TABLE)
            table.checkout(table.version)
            return table

    def find(
        self, column: str, values: Iterable[str], columns: Sequence[str], is_rare: bool = False
    ) -> list[dict[str, Any]]:
        """The rows in which `column` has one of `values`, without order.

        Args:
            is_rare: mostly there is none, so that it is quicker to count them first, in a third of the time.
        """
        values = iter(dict.fromkeys(values))
        found = []
        while part := list(islice(values, LOOKUP)):
            condition = is_in(column, part)
            with store_errors(self.path):
                if is_rare and not self.table.count_rows(condition):
                    continue
            for batch in self.scan(columns, condition):
                found += batch.to_pylist()
        return found

    def add_columns(self, new: Mapping[str, pa.DataType]) -> None:
        """Columns for metadata, empty in the rows that are there. Another process may have been faster."""
        for attempt in range(ATTEMPTS):
            fields = [pa.field(name, kind) for name, kind in new.items() if name not in self.metadata_fields]
            if not fields:
                return
            try:
                with store_errors(self.path):
                    self.table.add_columns(fields)
            except (OSError, ValueError):  # LanceDB does not try again after a conflict here
                if attempt == ATTEMPTS - 1:
                    raise

    def upsert(self, rows: pa.Table | None, replaced: Mapping[str, str] | None = None) -> None:
        """One commit: rows of known ids are replaced, the others are new, and those that are replaced go.

        After a conflict with another writer LanceDB tries again. Columns that another writer has made are left empty.

        Args:
            rows: None for none.
            replaced: the source by id of rows that are deleted, unless `rows` has the id. A row that another writer
                has given to another source meanwhile stays.
        """
        with store_errors(self.path):
            merge = self.table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
            if replaced:
                merge = merge.when_not_matched_by_source_delete(is_replaced(replaced))
            schema = self.table.schema
            if rows is None:
                rows = schema.empty_table()
            for field in schema:
                if field.name not in rows.column_names:
                    rows = rows.append_column(field, pa.nulls(len(rows), field.type))
            merge.execute(rows.select(schema.names).cast(schema))

    def delete(self, ids: Sequence[str]) -> None:
        """One commit for up to `LOOKUP` ids; more take several."""
        with store_errors(self.path):
            for start in range(0, len(ids), LOOKUP):
                self.table.delete(is_in("id", ids[start : start + LOOKUP]))

    def purge(self, ids: Sequence[str]) -> None:
        """Delete, and free the bytes: no version of the table and no file holds the rows any more, nor older rows of
        the same ids.

        Compaction alone rewrites a file only when a tenth of its rows are gone. So the other rows of each file with
        deleted ones are moved into a new one first. When it is interrupted, the same call goes on.
        """
        self.delete(ids)
        with store_errors(self.path):
            for rows in self._rows_beside_deleted():
                self.table.update(where=rows, values_sql={"page": "page"})
            # The commit that deletes names the ids. With this one after it, which deletes nothing, it goes, too.
            self.table.delete("id IS NULL")
        for attempt in range(ATTEMPTS):
            try:
                self.optimize(timedelta(0))
                return
            except OSError as error:  # another process changed the same files meanwhile
                if "conflict" not in str(error) or attempt == ATTEMPTS - 1:
                    raise

    def _rows_beside_deleted(self) -> list[str]:
        """Conditions for the rows of each file of which others are deleted; on object storage for those of all files,
        whose names LanceDB does not tell."""
        if _is_local(self.path):
            # Lance calls them FRAGMENT-VERSION-NUMBER.arrow or .bin.
            names = Path(self.path, f"{TABLE}.lance", "_deletions").glob("*-*-*.*")
            fragments = {int(name.name.split("-")[0]) for name in names}
        else:
            addresses = (batch["_rowaddr"].to_numpy() for batch in self.scan(["_rowaddr"]))
            fragments = {int(one) for part in addresses for one in np.unique(part >> 32)}
        return [
            f"_rowaddr >= {fragment << 32} AND _rowaddr < {(fragment + 1) << 32}" for fragment in sorted(fragments)
        ]

    def build_index(self, kind: str, settings: Mapping[str, Any]) -> None:
        """See `SummaryStore.build_index`."""
        if kind not in INDEX_TYPES:
            raise ValueError(f"kind={kind!r} is unknown; choose one of {', '.join(map(repr, INDEX_TYPES))}.")
        rows = self.count()
        if rows < MIN_INDEXED:
            raise ValueError(f"An approximate index needs at least {MIN_INDEXED} rows to learn from, not {rows}.")
        chosen = {"max_iterations": ITERATIONS, **settings}
        if kind == "ivf_pq" and self.config.width % PQ_NUMBERS == 0:
            chosen.setdefault("num_sub_vectors", self.config.width // PQ_NUMBERS)
        config = INDEX_TYPES[kind](distance_type="dot", **chosen)
        with store_errors(self.path):
            self.table.create_index("embedding", config=config, name=INDEX)

    def index_stats(self) -> dict[str, Any] | None:
        """The approximate index: its type, and how many rows it knows and does not know; None without one."""
        with store_errors(self.path):
            if all(index.name != INDEX for index in self.table.list_indices()):
                return None
            found = self.table.index_stats(INDEX)
            return {
                "type": found.index_type,
                "indexed_rows": found.num_indexed_rows,
                "unindexed_rows": found.num_unindexed_rows,
            }

    def read(self, query: Callable[[], pa.Table], where: str | None) -> pa.Table:
        """The result of `query`; `ValueError` for a filter that LanceDB cannot read."""
        try:
            with store_errors(self.path):
                return query()
        except (ValueError, OSError) as error:
            # A filter may be a condition, and yet be impossible for a row, as a division by zero.
            if where is None or (isinstance(error, OSError) and "applying filter" not in str(error)):
                raise
            names = ", ".join(name for name in self.table.schema.names if name not in ("embedding", "tokens"))
            reason = filter_reason(error.__cause__ if isinstance(error, OSError) else error)
            raise ValueError(
                f"The filter {where!r:.300} cannot be used: {reason:.300}. It is a condition in SQL on the "
                f"columns {names}; words stand in single quotes."
            ) from error

    def size(self) -> int:
        """Bytes on the disk; on object storage those of the current version."""
        if not _is_local(self.path):
            with store_errors(self.path):
                return self.table.stats()["total_bytes"]
        total = 0
        for file in Path(self.path).rglob("*"):
            with suppress(FileNotFoundError):  # another process has tidied up meanwhile
                total += file.stat().st_size if file.is_file() else 0
        return total

    def num_fragments(self) -> int:
        with store_errors(self.path):
            return self.table.stats()["fragment_stats"]["num_fragments"]

    def num_small_files(self) -> int:
        """How many fragments `optimize` might join."""
        with store_errors(self.path):
            return self.table.stats()["fragment_stats"]["num_small_fragments"]

    def optimize(self, older_than: timedelta = OLD, leftovers: bool = False) -> None:
        """Join small files, bring the indices up to date, remove versions older than `older_than`.

        Args:
            leftovers: remove what a killed process left half written, too. No other process may be writing.
        """
        with store_errors(self.path), warnings.catch_warnings():
            # It says that readers of older versions fail, as the docstrings of our callers do.
            warnings.filterwarnings("ignore", message="optimize.cleanup_older_than=0", category=UserWarning)
            self.table.optimize()
            if self.table.count_rows() >= INDEXED_ROWS:
                indexed = {column for index in self.table.list_indices() for column in index.columns}
                for column in {"id", "source"} - indexed:
                    self.table.create_index(column, config=BTree())
            self.table.optimize(cleanup_older_than=older_than, delete_unverified=leftovers)


def exists(path: str | os.PathLike) -> bool:
    """Whether a store is there; makes no folder, as LanceDB would."""
    path = _place(path)
    if _is_local(path):
        # The folder alone is what a process leaves that was killed while it made a store.
        return any(Path(path, f"{TABLE}.lance", "_versions").glob("*.manifest"))
    with store_errors(path):
        return TABLE in _connect(path).list_tables().tables


def quoted(value: str) -> str:
    """A string in SQL."""
    return "'" + value.replace("'", "''") + "'"


def is_in(column: str, values: Iterable[str]) -> str:
    return f"({column} IN ({', '.join(map(quoted, values))}))"


def is_replaced(replaced: Mapping[str, str]) -> str:
    """The condition for rows, by id, that still have the source with which they were found."""
    return f"({is_in('id', replaced)} AND {is_in('source', dict.fromkeys(replaced.values()))})"


def check_metadata_name(name: Any) -> str:
    """Raise `ValueError` unless it can be a column that a filter names without quotes."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name) or name.lower() in RESERVED:
        raise ValueError(
            f"{name!r} cannot be the name of metadata: letters, digits and _, beginning with a letter, and none of "
            f"{', '.join(RESERVED)}. Rename it."
        )
    return name


def _place(path: str | os.PathLike) -> str:
    """A path or URI as a str; `ValueError` for a URI that went through `pathlib`, which takes away a slash."""
    place = os.fspath(path)
    if isinstance(path, PurePath) and re.match(r"[a-z][a-z0-9+-]+:/", place):
        raise ValueError(f"{place!r} is no URI, since pathlib makes one slash of two. Give it as a str.")
    return place


def _is_local(path: str) -> bool:
    return "://" not in path


def _connect(path: str) -> Any:
    # Each read looks for a newer version first, so that a reader sees what a writer beside it has committed.
    return lancedb.connect(path, read_consistency_interval=timedelta(0))
