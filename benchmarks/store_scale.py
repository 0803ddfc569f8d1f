"""The store's search at 10 thousand, 100 thousand and 1 million rows: disk, time, recall and memory.

    python benchmarks/store_scale.py [--rows 10000 100000 1000000] [--output store_scale.json] [--plot FILE.png]

The rows are synthetic, around embeddings of real drawn scenes: see `benchmarks/synthetic_store.py`, which makes them.
Half of the queries are sentences, half pictures, held out and embedded beforehand: the model's time is not in the
figures.

Each step is a fresh process. "First" is the first search of a process after the store's files were dropped from the
system's cache (what the system grants), the others follow in the same process, one at a time. Memory is what the
process holds at most, beyond what it held before the store was opened (importing alone takes what "import" says).
Recall is that of the index against the exact search of the same store. Linux only. Prints tables in markdown and
writes JSON, which `benchmarks/cost_sheet.py` reads.
"""

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import torch

from fwd2bot.pipelines.store import SummaryStore, searching
from fwd2bot.pipelines.store.codecs import CODECS
from fwd2bot.pipelines.store.table import INDEX_TYPES, SummaryTable
from fwd2bot.summary_fwd2bot import pool_summary

WHERE = "year = 2003"  # true of one row in ten
TOP_K = 10
FEW = 50  # searches with a filter, and with late interaction
SWEEP = {"ivf_pq": [(5, 50), (20, 50), (50, 50), (20, 1), (20, 10), (20, 200)], "hnsw_sq": [(1, 1), (1, 10), (1, 50)]}


def load_queries(seeds: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens `(N, k, d)` and embeddings `(N, d)`; the first half are sentences."""
    with np.load(seeds) as file:
        tokens = file["queries"]
    return tokens, pool_summary(torch.from_numpy(tokens), tokens.shape[1]).numpy()


def memory(name: str) -> int:
    """Bytes of this process: "VmRSS" now, "VmHWM" at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status does not tell {name}.")


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def build(store: str, kind: str) -> dict[str, Any]:
    """Build an index with the settings that the store has by default."""
    place = next(Path(store).glob("*.lance")) / "_indices"
    before = folder_bytes(place) if place.exists() else 0
    begin, opened = time.perf_counter(), SummaryStore.open(store)
    opened.build_index(kind)
    seconds = time.perf_counter() - begin
    size = folder_bytes(place) - before
    peak = memory("VmHWM")
    opened.optimize(older_than=timedelta(0))  # the index before this one
    return {"build_seconds": seconds, "bytes_per_row": size / len(opened), "peak": peak}


def search(store: str, seeds: str, limit: int | None, truth: str | None, **options: Any) -> dict[str, Any]:
    """Time, memory and ids of searches; recall where the ids of the exact search are given."""
    tokens, vectors = load_queries(seeds)
    asked = list(torch.from_numpy(tokens)[:, None]) if options.get("rerank") else list(vectors)
    asked = asked[:: max(1, len(asked) // limit)] if limit else asked
    drop_from_cache(store)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    begin = memory("VmRSS")
    opened = SummaryStore.open(store)
    seconds, found = [], []
    for query in asked:
        start = time.perf_counter()
        hits = opened.search(query, TOP_K, **options)
        seconds.append(time.perf_counter() - start)
        found.append([hit["id"] for hit in hits])
    result = {
        "searches": len(seconds),
        "first_ms": 1000 * seconds[0],
        "median_ms": 1000 * float(np.median(seconds[1:])),
        "p95_ms": 1000 * float(np.percentile(seconds[1:], 95)),
        "import": begin,
        "peak": memory("VmHWM") - begin,
    }
    if truth is None:
        return result | {"found": found}
    return result | recalls(json.loads(Path(truth).read_text()), found)


def sweep(store: str, seeds: str, truth: str, kind: str) -> list[dict[str, Any]]:
    """Recall and time of other settings of the search than the store's."""
    exact, rows = json.loads(Path(truth).read_text()), []
    table = SummaryTable.open(store)
    for probes, refine in SWEEP[kind]:
        found, seconds = [], []
        for vector in load_queries(seeds)[1]:
            start = time.perf_counter()
            hits = searching.nearest(table, vector, ["id"], TOP_K, None, True, probes, refine)
            seconds.append(time.perf_counter() - start)
            found.append(hits["id"].to_pylist())
        rows.append({"nprobes": probes, "refine_factor": refine, "median_ms": 1000 * float(np.median(seconds))})
        rows[-1] |= recalls(exact, found)
    return rows


def recalls(exact: list[list[str]], found: list[list[str]]) -> dict[str, float]:
    """Share of the best 1 and of the best 10 of the exact search among as many of the others; by sort of query."""
    half, shares = len(exact) // 2, {}
    for name, part in (("", slice(None)), ("_sentences", slice(half)), ("_pictures", slice(half, None))):
        for k in (1, TOP_K):
            right = [len(set(a[:k]) & set(b[:k])) / k for a, b in zip(exact[part], found[part], strict=True)]
            shares[f"recall@{k}{name}"] = float(np.mean(right))
    return shares


def look_up(store: str) -> dict[str, Any]:
    """Time of reading the summaries of 10 pictures by their ids."""
    opened = SummaryStore.open(store)
    ids = [hit["id"] for hit in opened.search(np.ones(opened.config.width, np.float32), 100)]
    seconds = []
    for start in range(0, 100, 10):
        begin = time.perf_counter()
        opened.summary(ids[start : start + 10])
        seconds.append(time.perf_counter() - begin)
    return {"median_ms": 1000 * float(np.median(seconds)), "searches": len(seconds)}


def drop_from_cache(store: str) -> None:
    """Ask the system to forget the files, so that the first search reads the disk."""
    for path in Path(store).rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


STEPS = {step.__name__: step for step in (build, search, sweep, look_up)}


def run(step: str, **options: Any) -> Any:
    """A step in a fresh process."""
    return started(__file__, "--step", json.dumps({"step": step, **options}))


def started(*command: str) -> Any:
    """The last line that a Python program prints, of JSON."""
    command = [sys.executable, *command]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode != 0:
        raise RuntimeError(f"This failed: {' '.join(command)}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(folder: Path, rows: int, kinds: list[str], options: list[str]) -> dict[str, Any]:
    """All figures of one size."""
    store, truth, seeds = str(folder / f"{rows}.store"), str(folder / f"{rows}.json"), str(folder / "seeds.npz")

    def searched(name: str, limit: int | None = None, truth: str | None = None, **options: Any) -> dict[str, Any]:
        print(f"{rows:,} rows: {name}", file=sys.stderr)
        return {"name": name} | run("search", store=store, seeds=seeds, limit=limit, truth=truth, **options)

    print(f"{rows:,} rows: writing", file=sys.stderr)
    writer = str(Path(__file__).with_name("synthetic_store.py"))
    result = started(writer, store, "--rows", str(rows), "--seeds", seeds, *options) | {"indices": {}}
    exact = searched("exact", approximate=False)
    Path(truth).write_text(json.dumps(exact.pop("found")))
    filtered = searched("exact, filter", FEW, approximate=False, where=WHERE)
    Path(truth + ".where").write_text(json.dumps(filtered.pop("found")))
    late = searched("exact, maxsim", FEW, approximate=False, rerank="maxsim")
    late.pop("found")
    result["searches"] = [exact, filtered, late]
    for kind in kinds:
        print(f"{rows:,} rows: building {kind}", file=sys.stderr)
        result["indices"][kind] = run("build", store=store, kind=kind)
        late = searched(f"{kind}, maxsim", FEW, approximate=True, rerank="maxsim")
        late.pop("found")
        result["searches"] += [
            searched(kind, truth=truth, approximate=True),
            searched(f"{kind}, filter", FEW, truth=truth + ".where", approximate=True, where=WHERE),
            late,
        ]
        result["indices"][kind]["sweep"] = run("sweep", store=store, seeds=seeds, truth=truth, kind=kind)
    result["look_up"] = run("look_up", store=store)
    return result


def tables(result: dict[str, Any]) -> str:
    """The figures in markdown."""
    sizes, kinds = result["sizes"], list(result["sizes"][0]["indices"])
    lines = [
        "| rows | tokens, B | embedding, B | rest, B | look-up indices, B | "
        + "".join(f"{kind}, B | " for kind in kinds)
        + "write, s | tidy, s | "
        + "".join(f"build {kind}, s | " for kind in kinds)
        + "summary of 10, ms |",
        "|" + "---:|" * (8 + 2 * len(kinds)),
    ]
    for size in sizes:
        parts = size["bytes_per_row"]
        cells = [f"{size['rows']:,}"]
        cells += [f"{parts[name]:,.0f}" for name in ("tokens", "embedding", "rest", "look_up_indices")]
        cells += [f"{size['indices'][kind]['bytes_per_row']:,.0f}" for kind in kinds]
        cells += [f"{size['write_seconds']:,.1f}", f"{size['optimize_seconds']:,.1f}"]
        cells += [f"{size['indices'][kind]['build_seconds']:,.1f}" for kind in kinds]
        lines.append("| " + " | ".join([*cells, f"{size['look_up']['median_ms']:,.1f}"]) + " |")
    lines += [
        "",
        "| rows | search | first, ms | median, ms | 95th percentile, ms | memory, MB | recall@1, % | recall@10, % | "
        "sentences, recall@10, % | pictures, recall@10, % |",
        "|---:|---|" + "---:|" * 8,
    ]
    for size in sizes:
        for one in size["searches"]:
            cells = [f"{size['rows']:,}", one["name"]]
            cells += [f"{one[name]:,.1f}" for name in ("first_ms", "median_ms", "p95_ms")]
            cells.append(f"{one['peak'] / 1e6:,.0f}")
            for name in ("recall@1", "recall@10", "recall@10_sentences", "recall@10_pictures"):
                cells.append(f"{100 * one[name]:.1f}" if name in one else "")
            lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "| rows | index | nprobes | refine_factor | median, ms | recall@1, % | recall@10, % |",
        "|---:|---|" + "---:|" * 5,
    ]
    for size in sizes:
        for kind in kinds:
            for one in size["indices"][kind]["sweep"]:
                lines.append(
                    f"| {size['rows']:,} | {kind} | {one['nprobes']} | {one['refine_factor']} | "
                    f"{one['median_ms']:,.1f} | {100 * one['recall@1']:.1f} | {100 * one['recall@10']:.1f} |"
                )
    return "\n".join(lines)


def plot(sizes: list[dict[str, Any]], path: Path) -> None:
    """Median milliseconds of a search and megabytes in memory over the rows, a line for each sort of search."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name in dict.fromkeys(one["name"] for size in sizes for one in size["searches"]):
        found = [(size["rows"], one) for size in sizes for one in size["searches"] if one["name"] == name]
        rows = [count for count, _ in found]
        axes[0].plot(rows, [one["median_ms"] for _, one in found], marker="o", label=name)
        axes[1].plot(rows, [one["peak"] / 1e6 for _, one in found], marker="o", label=name)
    axes[0].set(ylabel="a search, median ms")
    axes[1].set(ylabel="memory, MB")
    for axis in axes:
        axis.set(xscale="log", yscale="log", xlabel="rows")
        axis.grid(alpha=0.3, which="both")
    axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], metavar="N")
    parser.add_argument("--num-summary-tokens", type=int, default=8, metavar="K", help="(default: 8)")
    parser.add_argument("--width", type=int, metavar="D", help="default: the embedded checkpoint's")
    parser.add_argument("--codec", choices=CODECS, default="int4", help="(default: int4)")
    parser.add_argument("--kinds", choices=INDEX_TYPES, nargs="+", default=list(INDEX_TYPES), help="of indices")
    parser.add_argument("--pictures", type=int, default=1000, help="that are compressed as seeds (default: 1000)")
    parser.add_argument("--queries", type=int, default=200, help="(default: 200)")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave the stores in this folder, not there yet")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write the figures as JSON, too")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw times and memory over the rows")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        options = json.loads(args.step)
        print(json.dumps(STEPS[options.pop("step")](**options)))
        return
    if min(args.rows) < 1000 or args.queries < 10 or args.queries % 2:
        parser.error("at least 1000 rows and an even number of queries, 10 or more")
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        if args.keep:
            folder.mkdir(parents=True)
        options = ["--num-summary-tokens", str(args.num_summary_tokens), "--codec", args.codec]
        options += ["--pictures", str(args.pictures), "--queries", str(args.queries)]
        options += ["--width", str(args.width)] if args.width else []
        start = time.perf_counter()
        sizes = [measure(folder, rows, args.kinds, options) for rows in args.rows]
        result = {
            "config": asdict(SummaryTable.open(folder / f"{args.rows[0]}.store").config),
            "sizes": sizes,
            "search": {"top_k": TOP_K, "nprobes": searching.PROBES, "refine_factor": searching.REFINE, "where": WHERE},
            "seconds": round(time.perf_counter() - start),
            "versions": {"torch": torch.__version__, "lancedb": lancedb.__version__, "numpy": np.__version__},
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        }
    print(tables(result))
    if args.plot:
        plot(sizes, args.plot)
    print(json.dumps(result))
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
