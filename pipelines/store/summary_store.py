"""`SummaryStore`: what a user of the store calls."""

import os
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from fwd2bot import Fwd2BotSummary
from fwd2bot.summary_fwd2bot import METADATA_KEYS, summary_from

from .checking import check_table
from .compressor import Compressor, check_summary, new_config
from .export import export_store, vectors
from .indexing import IndexingJob, IndexReport
from .rows import as_stored, write_summaries
from .searching import decode_tokens, search_table
from .sources import count_items, each_item, summary_items
from .table import OLD, StoreConfig, SummaryTable, exists

DEFAULT_CODEC = "int4"  # of fewest bytes that keeps 99% of the right answers: benchmarks/codecs.py


class SummaryStore:
    """Summaries, embeddings and metadata of pictures on disk, in a LanceDB table.

    ```python
    store = SummaryStore.create("pictures.store", model, processor, num_summary_tokens=8)
    report = store.add("photos/")                                  # the same call goes on after a kill
    store.search("two snowmen on a blue field", top_k=3)           # [{"id": …, "score": …, "source": …, …}]
    model.generate_from_summary(store.summary([hits[0]["id"]]), …)
    ```

    Make it with `create` or `open`.
    """

    def __init__(self, table: SummaryTable, model: Any = None, processor: Any = None):
        self._table = table
        self._compressor = Compressor(model, processor, table.config, table.path)

    @classmethod
    def create(
        cls,
        path: str | os.PathLike,
        model: Any,
        processor: Any,
        *,
        num_summary_tokens: int | None = None,
        codec: str = DEFAULT_CODEC,
        exist_ok: bool = False,
    ) -> "SummaryStore":
        """An empty store.

        Args:
            path: a folder that does not exist or is no store yet, or the URI of one on object storage.
            model, processor: those that compress; a model loaded with `stage="compress"` suffices.
            num_summary_tokens: length k of every summary. Default: the largest that the model has.
            codec: how the tokens are written, "fp16", "int8" or "int4"; see docs/store.md.
            exist_ok: open a store that is there, of the same model, length and codec.

        Raises:
            FileExistsError: where a store is. ValueError: for a length or codec that there is none of. OSError: for a
                folder that cannot be written.
        """
        config = new_config(model, processor, num_summary_tokens, codec)
        if not (exist_ok and exists(path)):
            try:
                return cls(SummaryTable.create(path, config), model, processor)
            except FileExistsError:
                if not exist_ok:
                    raise
        store = cls.open(path, model, processor)
        for name in ("num_summary_tokens", "codec"):
            found, asked = getattr(store.config, name), getattr(config, name)
            if found != asked:
                raise ValueError(f"{store.path} was made with {name}={found!r}, not {asked!r}.")
        return store

    @classmethod
    def open(cls, path: str | os.PathLike, model: Any = None, processor: Any = None) -> "SummaryStore":
        """A store that is there.

        Args:
            model, processor: needed to add pictures (`stage="compress"` suffices) and to search by sentences
                (`stage="text"` suffices) or pictures; not to read, delete, export or search by vectors.

        Raises:
            FileNotFoundError: where there is none. ValueError: for a model that did not make it, or a store of another
                format version. OSError: for one that is damaged.
        """
        return cls(SummaryTable.open(path), model, processor)

    @property
    def path(self) -> str:
        return self._table.path

    @property
    def config(self) -> StoreConfig:
        """What all rows have in common: model, fingerprint, prompt, k, codec, width."""
        return self._table.config

    def __len__(self) -> int:
        return self._table.count()

    def __iter__(self) -> Iterator[str]:
        """The ids, without order."""
        for batch in self._table.scan(["id"]):
            yield from batch["id"].to_pylist()

    def __contains__(self, id: Any) -> bool:
        return isinstance(id, str) and bool(self._table.find("id", [id], ["id"]))

    def __repr__(self) -> str:
        config = self.config
        return (
            f"SummaryStore({self.path!r}, rows={len(self)}, k={config.num_summary_tokens}, codec={config.codec!r}, "
            f"model={config.model!r})"
        )

    # Writing

    def add(
        self,
        images: Any,
        *,
        ids: Any = None,
        metadata: Any = None,
        batch_size: int = 16,
        commit_every: int | None = None,
        strict: bool = False,
        progress: bool | None = None,
        engine: Any = "local",
    ) -> IndexReport:
        """Compress pictures and put them into the store. Stopped anyhow, the same call goes on where it was.

        Args:
            images: a picture (path, URL, bytes, `PIL.Image`, uint8 array); a parquet file with a column "image"; a
                folder, with those in it, of pictures or else of parquet files; a glob of pictures and parquet files; a
                `datasets.Dataset` or an iterable of rows with "image", of which "id" is the id and other columns are
                metadata; or an iterable of pictures. It is read as a stream.
            ids: a str for each picture. A row of the same id is replaced. Default: from the content, so that equal
                content is in the store once.
            metadata: a dict for each picture, or one for all. Each name becomes a column that filters can name.
            batch_size: pictures that go through the model at once.
            commit_every: pictures after which what was done is in the store for good. Default: 512; with Ray 65,536.
            strict: whether a picture that cannot be read stops the call; otherwise it is listed in the report.
            progress: True for a progress bar, False for none, None for one after two seconds.
            engine: "local"; or "ray", or a `fwd2bot.pipelines.store.ray_engine.RayEngine`, to compress and write with
                the workers of a Ray cluster. See docs/ray.md.

        A file that is in the store with the same path, size and time of change is skipped unread; one that has changed
        replaces its row. Of several frames or pages the first is taken; the column "page" stays empty.

        Raises:
            ValueError: for an empty folder or list, ids or metadata that do not fit, names of metadata that are
                reserved; with `strict` for a picture that cannot be used. FileNotFoundError: for a path that is not
                there. OSError: when the store cannot be written; what was committed before stays.
        """
        self._compressor.require("add pictures", "compress")
        for name, value in (("batch_size", batch_size), ("commit_every", commit_every)):
            is_default = name == "commit_every" and value is None
            if not is_default and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}.")
        arguments = (self._table, self._compressor, batch_size, commit_every, strict)
        if engine == "local":
            job = IndexingJob(*arguments)
        else:
            from .ray_engine import make_job  # Ray is optional

            job = make_job(*arguments, engine, progress)
        return job.run(each_item(images, ids, metadata), count_items(images), progress)

    def add_summary(self, summary: Any, *, ids: Iterable[str], metadata: Any = None, sources: Any = None) -> None:
        """Put summaries that were made elsewhere into the store, in one commit; rows of the same ids are replaced.

        Args:
            summary: a `Fwd2BotSummary` of this store's model, at least as long as the store's; the rest is left out.
            ids: one for each picture.
            metadata: a dict for each picture, or one for all.
            sources: a str for each picture, or None.

        Raises:
            ValueError: for a summary of another model, one that is too short, or ids that differ in number.
        """
        summary = summary_from(summary)
        check_summary(summary, self.config)
        items = summary_items(len(summary), ids, metadata, sources)
        write_summaries(self._table, items, summary.truncate(self.config.num_summary_tokens).tokens.float().cpu())

    def delete(self, ids: str | Iterable[str], *, purge: bool = False) -> None:
        """Delete rows.

        Args:
            purge: free their bytes at once, and those of everything that was deleted or replaced before: files with
                deleted rows are rewritten (on object storage all files), and all older versions of the table are
                removed. Processes that read the store meanwhile may get an error. Interrupted, the same call goes on;
                so ids that are not in the store are no error here, but a warning. Without it a later `optimize` frees
                the bytes, but not in files of which less than a tenth is deleted.

        Raises:
            ValueError: for ids that are not in the store, listing them; nothing is deleted then.
        """
        ids = _id_list(ids)
        try:
            self._rows(ids, ["id"])
        except ValueError as error:
            if not purge:
                raise
            logging.get_logger(__name__).warning(f"{error} Bytes of what was deleted before are freed.")
        if purge:
            self._table.purge(ids)
        else:
            self._table.delete(ids)

    def optimize(self, *, older_than: timedelta = OLD, leftovers: bool = False) -> None:
        """Join small files, bring the indices up to date, and remove old versions of the table.

        Args:
            older_than: versions that are younger stay, for processes that still read them.
            leftovers: remove what killed processes left half written, too. Only while no other process writes: it
                would lose its files, and the store with them.
        """
        self._table.optimize(older_than, leftovers)

    def build_index(self, kind: str = "ivf_pq", **settings: Any) -> None:
        """Build, or build anew, an approximate index of the embeddings; worth it from some 100,000 rows on.

        Args:
            kind: "ivf_pq" (small) or "hnsw_sq" (faster to search, larger).
            settings: of `lancedb.index.IvfPq` or `lancedb.index.HnswSq`, such as `num_partitions`. Where LanceDB would
                choose otherwise: 10 iterations of k-means, and a byte for each 8 numbers (where the width allows it).

        Rows that are added later are searched exactly until `optimize` has taken them in.

        Raises:
            ValueError: for an unknown kind, or fewer than 256 rows.
        """
        self._table.build_index(kind, settings)

    # Reading

    def get(self, ids: str | Iterable[str]) -> list[dict[str, Any]]:
        """Rows without their tensors, in the order of `ids`: id, hash, source, page, length, added, metadata.

        Raises:
            ValueError: for ids that are not in the store, listing them.
        """
        ids = _id_list(ids)
        names = list(self._table.metadata_fields)
        own = ["id", "hash", "source", "page", "length", "added"]
        found = self._rows(ids, own + names)
        rows = (found[one] for one in ids)
        return [{name: row[name] for name in own} | {"metadata": {name: row[name] for name in names}} for row in rows]

    def summary(self, ids: str | Iterable[str]) -> Fwd2BotSummary:
        """The summaries of pictures, decoded to float32, in the order of `ids`.

        Raises:
            ValueError: for ids that are not in the store, listing them.
        """
        ids = _id_list(ids)
        found = self._rows(ids, ["id", "tokens"])
        tokens = torch.from_numpy(decode_tokens([found[one]["tokens"] for one in ids], self.config))
        return Fwd2BotSummary(tokens, metadata={name: getattr(self.config, name) for name in METADATA_KEYS})

    def embeddings(self, ids: str | Iterable[str] | None = None) -> Iterator[tuple[list[str], np.ndarray]]:
        """`(ids, (n, d) float32)` of all pictures, or of some, in parts of bounded size; without order for all.

        Raises:
            ValueError: for ids that are not in the store, listing them.
        """
        if ids is not None:
            ids = _id_list(ids)
            found = self._rows(ids, ["id", "embedding"])
            yield ids, np.stack([np.asarray(found[one]["embedding"], np.float32) for one in ids])
            return
        for batch in self._table.scan(["id", "embedding"]):
            yield batch["id"].to_pylist(), vectors(batch["embedding"])

    def search(
        self,
        query: Any,
        top_k: int = 5,
        *,
        where: str | None = None,
        approximate: bool | None = None,
        rerank: str | None = None,
        candidates: int = 50,
    ) -> list[dict[str, Any]]:
        """The pictures whose embeddings have the largest cosine with that of the query.

        Args:
            query: a sentence (a `str` is always one); a picture (`pathlib.Path`, bytes, `PIL.Image`, uint8 array or
                `{"image": …}`); a summary of one picture; or a vector `(d,)`.
            where: an SQL filter on the columns, those of metadata among them: "year > 2020 AND camera = 'X100'".
            approximate: True to ask the index of `build_index`, False to compare with every row. Default: the index
                if there is one and the store has more than 50,000 rows.
            rerank: "maxsim" to order the best `candidates` anew by late interaction: the mean, over the query's
                summary tokens, of the largest cosine with one of the picture's.
            candidates: how many are ordered anew; at least `top_k`.

        Returns:
            `[{"id", "score", "source", "page", "metadata"}, …]`, best first.

        Raises:
            TypeError, ValueError: for a query of another sort, a sentence that is longer than the model reads, a
                filter that does not parse, or a missing model or index.
        """
        return search_table(self._table, self._compressor, query, top_k, where, approximate, rerank, candidates)

    def unfit_metadata(self, metadata: dict[str, Any]) -> str:
        """What is wrong with metadata that do not fit the store's columns; empty if they all do."""
        return as_stored(metadata, self._table.metadata_fields)[1]

    def export(self, path: str | os.PathLike, format: str = "parquet", *, overwrite: bool = False) -> None:
        """Write all rows, as they are now, for other programs; whole or not at all.

        Args:
            format: "parquet" or "jsonl": a file of id, vector and payload (source, hash, time and metadata), as vector
                databases import them. "numpy": a folder with `embeddings.npy` `(N, d)` float16, `tokens.npy`
                `(N, k, d)` float32 and `rows.jsonl` with id and payload.
            overwrite: replace a file or folder that is there.

        Raises:
            ValueError: for another format. FileExistsError: for what is there. OSError: when it cannot be written.
        """
        export_store(self._table, Path(path), format, overwrite)

    def check(self) -> int:
        """Read every row, compare its tokens with its embedding, and return how many there are.

        Opening and `stats` look at few bytes, and LanceDB keeps no checksums: only this finds all that has been
        overwritten in tokens and embeddings. Text and numbers that were exchanged for others are not found.

        Raises:
            OSError: that names the rows or columns that are damaged.
        """
        return check_table(self._table)

    def stats(self) -> dict[str, Any]:
        """Rows, bytes on disk, bytes per picture by column, and what made them."""
        config, rows, size = self.config, len(self), self._table.size()
        return {
            "path": self.path,
            "rows": rows,
            "bytes": size,
            "bytes_per_image": size / rows if rows else 0.0,
            "bytes_by_column": {"embedding": 2 * config.width, "tokens": config.token_bytes},
            "num_summary_tokens": config.num_summary_tokens,
            "width": config.width,
            "codec": config.codec,
            "model": config.model,
            "revision": config.revision,
            "fingerprint": config.fingerprint,
            "metadata": {name: str(kind) for name, kind in self._table.metadata_fields.items()},
            "fragments": self._table.num_fragments(),
            "index": self._table.index_stats(),
        }

    def _rows(self, ids: list[str], columns: list[str]) -> dict[str, dict[str, Any]]:
        """Rows by id; `ValueError` that lists the ids that are not there."""
        found = {row["id"]: row for row in self._table.find("id", ids, columns)}
        missing = [one for one in dict.fromkeys(ids) if one not in found]
        if missing:
            more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
            raise ValueError(f"Not in the store {self.path}: {', '.join(map(repr, missing[:10]))}{more}.")
        return found


def _id_list(ids: str | Iterable[str]) -> list[str]:
    ids = [ids] if isinstance(ids, str) else list(ids)
    if not ids:
        raise ValueError("No id was given: the list is empty.")
    wrong = next((one for one in ids if not isinstance(one, str)), None)
    if wrong is not None:
        raise TypeError(f"An id is a str, got {wrong!r}.")
    return ids
