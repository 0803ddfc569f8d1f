"""A synthetic store of any number of rows, in the real table format, to measure or try things at scale.

    python benchmarks/synthetic_store.py FOLDER --rows 100000 [--width 4096] [--codec int4] [--seeds FILE.npz]

The embedded checkpoint compresses drawn scenes (`--pictures`), the seeds. A row's embedding is a seed's, moved by a
draw from the normal distribution of its 20 nearest neighbours, so rows crowd where pictures do and differ in the
directions in which pictures differ. How far they are moved is chosen such that rows are as near to the nearest seed as
held-out pictures are (median cosine; both are told). The tokens are those of at most 20,000 rows made in the same
way, over and over: they cost what others do. With `--width` other than the checkpoint's the seeds are turned into so
many dimensions, which leaves cosines as they are (fewer ones: about): disk and time are then those of such embeddings,
recall is that of the checkpoint's.

Queries are half sentences (of these half full descriptions), half pictures, all held out. Seeds and queries are kept
in `--seeds` and made only once. Prints one line of JSON: the times, and bytes of a row. Linux only.
"""

import argparse
import json
import random
import tempfile
import time
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import pyarrow as pa
import torch
from transformers import AutoModel, AutoProcessor

from fwd2bot.pipelines.embedded import default_checkpoint
from fwd2bot.pipelines.store.codecs import CODECS, encode
from fwd2bot.pipelines.store.compressor import new_config
from fwd2bot.pipelines.store.table import StoreConfig, SummaryTable
from fwd2bot.summary_fwd2bot import pool_summary
from fwd2bot.training.scenes import describe, render, scene, short_caption

NEIGHBOURS = 20  # of a seed, whose differences are the directions in which rows differ from it
SPREADS = [step / 10 for step in range(2, 31)]
POOL, POOL_NUMBERS = 20_000, 2**28  # rows that have tokens of their own, and of how many numbers at most
PART = 50_000  # rows of a commit


def make_seeds(path: Path, pictures: int, queries: int, k: int, width: int | None, codec: str) -> None:
    """Compress drawn scenes and sentences, and write them with the store's config and what the spread looks like."""
    model = AutoModel.from_pretrained(default_checkpoint(), dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(default_checkpoint())
    config = new_config(model, processor, k, codec)
    turn = np.eye(config.width, dtype=np.float32)
    if width not in (None, config.width):
        turn = np.random.default_rng(0).standard_normal((config.width, width)).astype(np.float32)
        # Orthonormal rows keep all cosines; into fewer dimensions they are kept about.
        turn = np.linalg.qr(turn.T)[0].T.copy() if width > config.width else turn / width**0.5
        config = replace(config, width=width)

    def compress(items: list[Any], process: Any) -> np.ndarray:
        parts = [process(items[start : start + 50]) for start in range(0, len(items), 50)]
        tokens = torch.cat([model.compress(**part, num_summary_tokens=k).tokens for part in parts]).numpy()
        return tokens @ turn

    held_out = [scene("test", index) for index in range(queries)]
    texts = [
        (describe, short_caption)[index % 2](one, random.Random(index)) for index, one in enumerate(held_out[::2])
    ]
    seeds = compress([render(scene("train", index)) for index in range(pictures)], processor.process_images)
    shown = compress([render(one) for one in held_out[1::2]], processor.process_images)
    told = compress([getattr(text, "text", text) for text in texts], processor.process_texts)
    vectors = pooled(seeds)
    wanted = nearest_cosine(pooled(shown), vectors)
    found = {spread: nearest_cosine(Rows(seeds, spread).embeddings(2000, 0), vectors) for spread in SPREADS}
    spread = min(found, key=lambda spread: abs(found[spread] - wanted))
    data = {
        "seeds": pictures,
        "sentences": len(told),
        "pictures": len(shown),
        "spread": spread,
        "nearest_seed_of_held_out_pictures": wanted,
        "nearest_seed_of_rows": found[spread],
        "nearest_seed_of_sentences": nearest_cosine(pooled(told), vectors),
    }
    both = np.concatenate([told, shown])
    np.savez(path, seeds=seeds, queries=both, config=json.dumps(asdict(config)), data=json.dumps(data))


def nearest_cosine(vectors: np.ndarray, seeds: np.ndarray) -> float:
    """Median of the cosines of `(N, d)` to the nearest of `(M, d)`."""
    return float(np.median((vectors @ seeds.T).max(1)))


def pooled(tokens: np.ndarray) -> np.ndarray:
    """Tokens `(N, k, d)` to embeddings `(N, d)`."""
    return pool_summary(torch.from_numpy(np.ascontiguousarray(tokens)), tokens.shape[1]).numpy()


class Rows:
    """Rows around seeds `(N, k, d)`, the same ones for the same part."""

    def __init__(self, seeds: np.ndarray, spread: float):
        self.seeds, self.vectors, self.spread = seeds, pooled(seeds), spread
        self.near = np.argsort(-(self.vectors @ self.vectors.T), axis=1)[:, 1 : NEIGHBOURS + 1]

    def draw(self, values: np.ndarray, count: int, part: int) -> np.ndarray:
        """Seeds' values `(N, …)`, moved in the directions in which their neighbours' differ, `(count, …)`."""
        rng = np.random.default_rng(part)
        which = np.sort(rng.integers(0, len(self.seeds), count))
        values = values.reshape(len(values), -1)
        moved = values[which]
        for seed, start in zip(*np.unique(which, return_index=True), strict=True):
            rows = moved[start : np.searchsorted(which, seed, "right")]
            differences = values[self.near[seed]] - values[self.near[seed]].mean(0)
            weights = rng.standard_normal((len(rows), len(differences)), dtype=np.float32)
            rows += self.spread / (len(differences) - 1) ** 0.5 * weights @ differences
        return rng.permutation(moved)

    def embeddings(self, count: int, part: int) -> np.ndarray:
        moved = self.draw(self.vectors, count, part)
        return moved / np.linalg.norm(moved, axis=1, keepdims=True)


def write(store: Path, seeds: Path, rows: int) -> dict[str, Any]:
    """Write a store of so many rows, and tidy it up as a user would."""
    with np.load(seeds) as file:
        tokens, data = file["seeds"], json.loads(str(file["data"]))
        config = StoreConfig(**json.loads(str(file["config"])))
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    table = SummaryTable.create(store, config)
    table.add_columns({"year": pa.int32(), "album": pa.string()})
    drawn = Rows(tokens, data["spread"])
    own = min(POOL, rows, POOL_NUMBERS // tokens[0].size)
    codes = encode(drawn.draw(tokens, own, 0).reshape(-1, *tokens.shape[1:]), config.codec)
    seconds = 0.0
    for start in range(0, rows, PART):
        count = min(PART, rows - start)
        batch = arrow_rows(config, start, drawn.embeddings(count, 1 + start // PART), codes)
        begin = time.perf_counter()
        table.upsert(batch)
        seconds += time.perf_counter() - begin
    begin = time.perf_counter()
    table.optimize(timedelta(0))
    optimize_seconds, peak = time.perf_counter() - begin, memory("VmHWM")
    alone = {name: column_bytes(batch, name) for name in ("tokens", "embedding")}
    whole, indices = folder_bytes(store), folder_bytes(next(store.glob("*.lance")) / "_indices")
    return {
        "rows": rows,
        "data": data,
        "write_seconds": seconds,
        "optimize_seconds": optimize_seconds,
        "write_peak": peak,
        "bytes_per_row": {
            **alone,
            "rest": (whole - indices) / rows - sum(alone.values()),
            "look_up_indices": indices / rows,
        },
    }


def arrow_rows(config: StoreConfig, start: int, vectors: np.ndarray, codes: np.ndarray) -> pa.Table:
    """Rows of pictures in files, as `add` writes them, with two columns of metadata."""
    count = len(vectors)
    numbers = np.arange(start, start + count)
    now = datetime.now(UTC)
    values = {
        "id": [f"{number * 0x9E3779B97F4A7C15 % 2**64:016x}{number:016x}" for number in numbers.tolist()],
        "hash": [f"{number * 0xC2B2AE3D27D4EB4F % 2**64:064x}" for number in numbers.tolist()],
        "source": [f"/pictures/{number // 1000:06}/{number:09}.jpg" for number in numbers.tolist()],
        "page": [None] * count,
        "size": 100_000 + numbers % 9973,
        "mtime_ns": 1_700_000_000_000_000_000 + numbers * 7919,
        "length": np.full(count, config.num_summary_tokens),
        "added": [now] * count,
        "tokens": [code.tobytes() for code in codes[numbers % len(codes)]],
        "year": (2000 + numbers * 7 % 10),
        "album": [f"album {number % 100}" for number in numbers.tolist()],
    }
    kinds = {field.name: field.type for field in config.schema} | {"year": pa.int32(), "album": pa.string()}
    columns = {name: pa.array(column, kinds[name]) for name, column in values.items()}
    flat = pa.array(vectors.astype(np.float16).reshape(-1))
    columns["embedding"] = pa.FixedSizeListArray.from_arrays(flat, config.width)
    return pa.table(columns)


def column_bytes(rows: pa.Table, name: str) -> float:
    """Bytes of a row of one column, written alone."""
    with tempfile.TemporaryDirectory() as folder:
        lancedb.connect(folder).create_table(name, rows.select([name]))
        return folder_bytes(Path(folder)) / len(rows)


def memory(name: str) -> int:
    """Bytes of this process: "VmRSS" now, "VmHWM" at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status does not tell {name}.")


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of the store, not there yet")
    parser.add_argument("--rows", type=int, default=10_000, metavar="N", help="(default: 10000)")
    parser.add_argument("--num-summary-tokens", type=int, default=8, metavar="K", help="(default: 8)")
    parser.add_argument("--width", type=int, metavar="D", help="default: the embedded checkpoint's")
    parser.add_argument("--codec", choices=CODECS, default="int4", help="(default: int4)")
    parser.add_argument("--pictures", type=int, default=1000, help="that are compressed as seeds (default: 1000)")
    parser.add_argument("--queries", type=int, default=200, help="that are kept beside the seeds (default: 200)")
    parser.add_argument("--seeds", type=Path, metavar="FILE.npz", help="seeds and queries; made when it is not there")
    args = parser.parse_args()
    if args.rows < 1 or args.pictures <= NEIGHBOURS or args.queries < 2:
        parser.error(f"at least 1 row, {NEIGHBOURS + 1} pictures and 2 queries are needed")
    with tempfile.TemporaryDirectory() as temporary:
        seeds = args.seeds or Path(temporary, "seeds.npz")
        if not seeds.exists():
            make_seeds(seeds, args.pictures, args.queries, args.num_summary_tokens, args.width, args.codec)
        print(json.dumps(write(args.folder, seeds, args.rows)))


if __name__ == "__main__":
    main()
