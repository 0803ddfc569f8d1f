"""A store for other programs: parquet, JSON lines, numpy. Streamed, one version of the table, whole or not at all."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..plain_json import without_nan
from .searching import decode_tokens
from .table import SummaryTable

FORMATS = ("parquet", "numpy", "jsonl")
NUMPY_FILES = {"embeddings.npy", "tokens.npy", "rows.jsonl"}
PAYLOAD = ("hash", "source", "page", "length", "added")


def export_store(table: SummaryTable, path: Path, format: str, overwrite: bool) -> None:
    """See `SummaryStore.export`."""
    if format not in FORMATS:
        raise ValueError(f"format={format!r} is unknown; choose one of {', '.join(map(repr, FORMATS))}.")
    if format != "numpy" and path.is_dir():
        raise IsADirectoryError(f"{path} is a folder. Give the name of a file.")
    if format == "numpy" and path.is_file():
        raise NotADirectoryError(f"{path} is a file. Give the name of a folder.")
    if format == "numpy" and path.is_dir() and not {file.name for file in path.iterdir()} <= NUMPY_FILES:
        raise FileExistsError(f"{path} holds other files than those of an export. Choose another folder.")
    if path.exists() and not overwrite:
        raise FileExistsError(
            f"{path} exists. Choose another name, or replace it: overwrite=True, on the command line --overwrite."
        )
    if not path.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {str(path.parent)!r} to export to. Make it first.")
    write = {"parquet": _write_parquet, "jsonl": _write_lines, "numpy": _write_numpy}[format]
    with _draft(path) as draft:
        write(table, draft)


def vectors(column: pa.Array) -> np.ndarray:
    """A column of embeddings as `(n, d)` float32."""
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1).astype(np.float32)


@contextmanager
def _draft(path: Path) -> Iterator[Path]:
    """A path beside `path` that becomes it when all went well, and is gone when not."""
    draft = path.with_name(f".{path.name}.{uuid4().hex}")
    older = draft.with_name(f"{draft.name}.old")
    try:
        yield draft
        try:
            if path.is_dir():  # of an older export: no other folder can take its place, and it goes last
                os.replace(path, older)
            os.replace(draft, path)
        except BaseException:
            if older.is_dir() and not path.exists():
                os.replace(older, path)
            raise
        shutil.rmtree(older, ignore_errors=True)
    except (OSError, pa.ArrowException) as error:
        reason = str(getattr(error, "strerror", None) or error).removesuffix(".")
        raise OSError(f"The export to {path} failed, and nothing was written there: {reason}.") from error
    finally:
        if draft.is_dir():
            shutil.rmtree(draft, ignore_errors=True)
        with suppress(OSError):  # it is gone when all went well
            draft.unlink()


def _payload_names(table: SummaryTable) -> list[str]:
    return [*PAYLOAD, *table.metadata_fields]


def _write_parquet(table: SummaryTable, draft: Path) -> None:
    names, width = _payload_names(table), table.config.width
    types = {field.name: field.type for field in table.table.schema}
    payload = pa.struct([pa.field(name, types[name]) for name in names])
    schema = pa.schema([("id", pa.string()), ("vector", pa.list_(pa.float32(), width)), ("payload", payload)])
    with pq.ParquetWriter(draft, schema) as writer:
        for batch in table.scan(["id", "embedding", *names], table=table.snapshot()):
            vector = pa.FixedSizeListArray.from_arrays(pa.array(vectors(batch["embedding"]).reshape(-1)), width)
            values = pa.StructArray.from_arrays([batch[name] for name in names], fields=list(payload))
            writer.write_batch(pa.record_batch([batch["id"], vector, values], schema=schema))


def _write_lines(table: SummaryTable, draft: Path) -> None:
    names = _payload_names(table)
    with draft.open("w", encoding="utf-8") as file:
        for batch in table.scan(["id", "embedding", *names], table=table.snapshot()):
            rows = batch.select(["id", *names]).to_pylist()
            for row, vector in zip(rows, vectors(batch["embedding"]).tolist(), strict=True):
                file.write(_json({"id": row.pop("id"), "vector": vector, "payload": row}))


def _write_numpy(table: SummaryTable, draft: Path) -> None:
    draft.mkdir()
    config, names, snapshot = table.config, _payload_names(table), table.snapshot()
    count = snapshot.count_rows()
    # Written as a stream: a memory map would end the process when the disk is full.
    with (
        _npy(draft / "embeddings.npy", np.float16, (count, config.width)) as embeddings,
        _npy(draft / "tokens.npy", np.float32, (count, config.num_summary_tokens, config.width)) as tokens,
        (draft / "rows.jsonl").open("w", encoding="utf-8") as file,
    ):
        for batch in table.scan(["id", "embedding", "tokens", *names], table=snapshot):
            embeddings.write(vectors(batch["embedding"]).astype(np.float16).tobytes())
            tokens.write(decode_tokens(batch["tokens"], config).tobytes())
            for row in batch.select(["id", *names]).to_pylist():
                file.write(_json({"id": row.pop("id"), "payload": row}))


def _npy(path: Path, dtype: Any, shape: tuple[int, ...]) -> BinaryIO:
    """A .npy file, open behind its header."""
    file = path.open("wb")
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file


def _json(row: dict[str, Any]) -> str:
    return json.dumps(without_nan(row), ensure_ascii=False, default=_text, allow_nan=False) + "\n"


def _text(value: Any) -> str:
    return value.isoformat() if hasattr(value, "isoformat") else str(value)  # dates and times
