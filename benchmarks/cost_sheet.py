"""What a store of 1 million, 100 million and 10 billion pictures costs: disk, memory and time, from measured figures.

    python benchmarks/store_scale.py --output store_scale.json
    python benchmarks/cost_sheet.py store_scale.json [--rows-per-machine 100000000] [--dollars-per-gb-month PRICE]

The first table is for the setting that was measured, the second for embeddings of d=4096, as those of a backbone of 7
billion parameters are, which were not measured. Nothing above the largest measured store was run. The model:

- Disk: bytes of a row times rows. Tokens and embedding of another setting by the format; what else a row costs
  (source, metadata, look-up indices) as measured. Of an index, `d / 8` bytes of a row ("ivf_pq") or `d` ("hnsw_sq")
  grow with the width, the rest is as measured.
- Machines: rows are split evenly, at most `--rows-per-machine` on each, all search at once, and time on the network is
  left out. Memory and times are those of one machine.
- Memory: what importing and exact searches took at most, and the whole index, which stays in memory once all its parts
  were asked. (With less, LanceDB reads parts from the disk again; its cache takes 6 GB by default.)
- Exact search: linear in rows, through the two largest measured stores, and in the width.
- "ivf_pq": the search goes through a fixed number of partitions of some 8,192 rows, so it takes what it took in the
  largest measured store, times the width, and compares one more centroid for each further 8,192 rows, at the exact
  search's time of a row. Recall at a fixed number of partitions falls with the rows, which was not measured.
- "hnsw_sq": what it took in the largest measured store, times the width and the partitions of some 1,048,576 rows that
  it goes through, of which there are as many as are searched in "ivf_pq", at most.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from fwd2bot.pipelines.store.codecs import token_bytes
from fwd2bot.pipelines.store.table import PQ_NUMBERS

IMAGES = [1_000_000, 100_000_000, 10_000_000_000]
WIDE = [(k, 4096, codec) for codec in ("int4", "fp16") for k in (8, 16)]
PARTITION = {"ivf_pq": 8192, "hnsw_sq": 2**20}  # rows, LanceDB's defaults


def cost(
    result: dict[str, Any], images: int, k: int, width: int, codec: str, rows_per_machine: int
) -> dict[str, float | int]:
    """Costs of a store: bytes of all machines together, bytes of memory and milliseconds of one.

    Args:
        result: what `store_scale.py` wrote, with at least two sizes.
        k, width, codec: of the store.

    Raises:
        ValueError: where the exact search of the larger store was not slower.
    """
    sizes = sorted(result["sizes"], key=lambda size: size["rows"])
    before, largest = sizes[-2], sizes[-1]
    measured, wider = result["config"]["width"], width / result["config"]["width"]
    machines = -(-images // rows_per_machine)
    rows = images / machines
    parts = largest["bytes_per_row"]
    found = {
        "machines": machines,
        "tokens": images * k * token_bytes(codec, width),
        "embedding": images * 2 * width,
        "rest": images * (parts["rest"] + parts["look_up_indices"]),
    }
    times = [{one["name"]: one for one in size["searches"]} for size in (before, largest)]
    base = max(one["exact"]["import"] + one["exact"]["peak"] for one in times)
    slope = (times[1]["exact"]["median_ms"] - times[0]["exact"]["median_ms"]) / (largest["rows"] - before["rows"])
    if slope <= 0:
        raise ValueError(
            f"Exact search took no longer in {largest['rows']:,} rows than in {before['rows']:,}, so nothing can be "
            "extrapolated. Measure larger stores, on a machine with nothing else to do."
        )
    found["exact_memory"] = base
    found["exact_ms"] = times[1]["exact"]["median_ms"] + wider * slope * rows - slope * largest["rows"]
    for kind, index in largest["indices"].items():
        of_row = index["bytes_per_row"] + (width - measured) / (PQ_NUMBERS if kind == "ivf_pq" else 1)
        found[f"{kind}_bytes"] = images * of_row
        found[f"{kind}_memory"] = base + rows * of_row
        milliseconds = wider * times[1][kind]["median_ms"]
        if kind == "ivf_pq":
            milliseconds += wider * slope * max(0, rows - largest["rows"]) / PARTITION[kind]
        else:
            probes = result["search"]["nprobes"]
            searched = [min(probes, max(1, round(count / PARTITION[kind]))) for count in (rows, largest["rows"])]
            milliseconds *= searched[0] / searched[1]
        found[f"{kind}_ms"] = milliseconds
    return found


def table(result: dict[str, Any], settings: list[tuple[int, int, str]], rows_per_machine: int, price: Any) -> str:
    """Markdown, a line for each setting (k, width, codec) and number of pictures."""
    kinds = list(result["sizes"][0]["indices"])
    names = ["images", "k", "d", "codec", "machines", "tokens", "embedding", "rest"]
    names += [*(f"{kind} index" for kind in kinds), "memory, exact", *(f"memory, {kind}" for kind in kinds)]
    names += ["exact, ms", *(f"{kind}, ms" for kind in kinds)]
    if price is not None:
        names.append(f"disk with {kinds[0]}, $ a month" if kinds else "disk, $ a month")
    lines = ["| " + " | ".join(names) + " |", "|" + "---:|" * len(names)]
    for k, width, codec in settings:
        for images in IMAGES:
            found = cost(result, images, k, width, codec, rows_per_machine)
            cells = [f"{images:,}", str(k), str(width), codec, str(found["machines"])]
            cells += [readable(found[name]) for name in ("tokens", "embedding", "rest")]
            cells += [readable(found[f"{kind}_bytes"]) for kind in kinds]
            cells += [readable(found[f"{name}_memory"]) for name in ("exact", *kinds)]
            cells += [f"{found[f'{name}_ms']:,.0f}" for name in ("exact", *kinds)]
            if price is not None:
                stored = ["tokens", "embedding", "rest", *(f"{kind}_bytes" for kind in kinds[:1])]
                cells.append(f"{sum(found[name] for name in stored) / 1e9 * price:,.2f}")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def readable(size: float) -> str:
    """Bytes in MB, GB or TB of powers of ten."""
    for unit, least in (("TB", 1e12), ("GB", 1e9)):
        if size >= least:
            return f"{size / least:,.1f} {unit}"
    return f"{size / 1e6:,.0f} MB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "figures", type=Path, metavar="FILE.json", help="written by store_scale.py, of two sizes or more"
    )
    parser.add_argument("--rows-per-machine", type=int, default=100_000_000, metavar="N", help="(default: 10^8)")
    parser.add_argument("--dollars-per-gb-month", type=float, metavar="PRICE", help="adds what the disk costs")
    args = parser.parse_args()
    result = json.loads(args.figures.read_text())
    if len(result["sizes"]) < 2 or args.rows_per_machine < 1:
        parser.error("figures of at least two sizes are needed, and at least one row per machine")
    config, price = result["config"], args.dollars_per_gb_month
    measured = [(config["num_summary_tokens"], config["width"], config["codec"])]
    largest = max(size["rows"] for size in result["sizes"])
    print(f"From stores of up to {largest:,} rows ({result['machine']}).\n")
    print(table(result, measured, args.rows_per_machine, price))
    print()
    print(table(result, WIDE, args.rows_per_machine, price))


if __name__ == "__main__":
    main()
