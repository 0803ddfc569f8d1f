"""`python -m fwd2bot.training.baselines.report RESULTS DOCS`: tables and plots of the comparison from its JSON files.

Writes `results.md`, and `results-tokens.png` and `results-bytes.png` if there is anything to plot, into DOCS. Rows
without a file are listed as not run.
"""

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..tables import table
from .grid import BARE, METHODS, Row, rows
from .run import BUDGET

# What stands in the table: the heading, and where the figure is among those of a setting.
FIGURES = {
    "questions right": ("answers", "all"),
    "presence, adversarial F1": ("presence", "adversarial", "f1"),
    "full caption finds picture": ("full_caption_to_image", "recall@1"),
    "hard negatives": ("hard_negatives", "mean"),
}
PLOTTED = ("fwd2bot", "pooling", "merging", "pruning", "query_transformer", "cache")
LINES = (BARE, "uncompressed_lora")  # of all image tokens, drawn as lines


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fwd2bot.training.baselines.report", description=__doc__)
    parser.add_argument("results", type=Path, help="folder of the JSON files")
    parser.add_argument("docs", type=Path, help="where results.md and its plots go")
    args = parser.parse_args(arguments)
    found = read(args.results)
    args.docs.mkdir(parents=True, exist_ok=True)
    plots = plot(found, args.docs)
    (args.docs / "results.md").write_text(report(found, plots), encoding="utf-8")


def read(folder: Path) -> list[dict[str, Any]]:
    """The results of the rows that were run, in the order of the grid.

    Raises:
        ValueError: results of different budgets, which do not compare.
    """
    found = [json.loads((folder / row.file).read_text()) for row in rows() if (folder / row.file).exists()]
    for name in BUDGET:
        values = {str(result.get(name)) for result in found}
        if len(values) > 1:
            raise ValueError(f"the results in {folder} have different {name}, {sorted(values)}; report them apart")
    return found


def report(found: list[dict[str, Any]], plots: Sequence[str]) -> str:
    """The page as Markdown."""
    run = {(result["name"], result["seed"]) for result in found}
    open_rows = [row for row in rows() if (row.name, row.seed) not in run]
    lines = ["# Comparison with what else could be done with as many tokens", ""]
    lines += ["<!-- written by python -m fwd2bot.training.baselines.report; not to be edited by hand -->", ""]
    lines += [f"{len(found)} of {len(rows())} rows were run. [evaluation.md](evaluation.md) says how to run them.", ""]
    if found:
        lines += [*_about(found[0], found), "", *_table(found), ""]
    for name, words in zip(plots, ("tokens", "bytes of a picture, 2 bytes a number"), strict=False):
        lines += [f"![Questions right against {words}]({name})", ""]
    if found:
        lines += ["## The rows", "", *_methods(found), ""]
    if open_rows:
        lines += ["## Not run", "", *_not_run(open_rows), ""]
    return "\n".join(lines).rstrip() + "\n"


def figure(values: dict[str, Any], path: Sequence[str]) -> float | None:
    """A nested figure, None where there is none."""
    for name in path:
        if name not in values:
            return None
        values = values[name]
    return values


def settings(result: dict[str, Any]) -> list[str]:
    """The settings that a row was judged in."""
    return [name for name in result["figures"] if name == "uncompressed" or name.startswith("k=")]


def _about(first: dict[str, Any], found: list[dict[str, Any]]) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    cut = sorted({result["name"] for result in found if 0 < result["steps_done"] < result["steps"]})
    lines = [
        f"One frozen backbone (weights {first['backbone_sha256'][:12]}), {first['pictures']:,} drawn pictures, "
        f"{first['steps']:,} steps of {first['batch_size']} rows of {first['row_length']} tokens, LoRA rank "
        f"{first['lora_rank']} for each of two stages or twice that for one. "
        f"Judged on {first['test_pictures']:,} held-out pictures ({first['split']}), in per cent; "
        "with several seeds the mean and the range. `tokens` is what the language model reads for a picture, `cache` "
        "its keys and values, `first token` the time to it at batch size 1, in milliseconds.",
        "",
        f"Command: `{first['command']}` ({versions}).",
    ]
    if cut:
        lines += ["", f"Stopped by `--minutes` before their last step: {', '.join(cut)}."]
    return lines


def _table(found: list[dict[str, Any]]) -> list[str]:
    by_name = defaultdict(list)
    for result in found:
        by_name[result["name"]].append(result)
    body = []
    for name, results in by_name.items():
        for setting in settings(results[0]):
            cost = results[0]["figures"]["cost"][setting]
            cells = [name, f"{cost['tokens_per_image']:,}"]
            for path in FIGURES.values():
                cells.append(spread([figure(result["figures"][setting], path) for result in results]))
            cells += [f"{cost['bytes_per_image']:,}", f"{cost['cache_bytes']:,}", f"{cost['first_token_ms']:.1f}"]
            body.append([*cells, str(len(results))])
    header = ["row", "tokens", *FIGURES, "bytes", "cache bytes", "first token", "seeds"]
    return table(header, body).splitlines()


def spread(values: Sequence[float | None]) -> str:
    """Per cent: one value, or the mean of several with their range; "" where a row has none."""
    numbers = [100 * value for value in values if value is not None]
    if not numbers:
        return ""
    if len(numbers) == 1:
        return f"{numbers[0]:.1f}"
    return f"{statistics.mean(numbers):.1f} ({min(numbers):.1f} to {max(numbers):.1f})"


def _methods(found: list[dict[str, Any]]) -> list[str]:
    body = []
    for result in found:
        changed = ", ".join(f"{name}={value}" for name, value in result["config"].items())
        changed += f"{', ' if changed else ''}rank x{result['rank']:g}" if result["rank"] != 1 else ""
        loss = "" if result["loss"] is None else " to ".join(f"{value:.2f}" for value in result["loss"])
        cells = [result["name"], str(result["seed"]), result["about"], changed]
        cells += [f"{result['trained_parameters']:,}", str(result["steps_done"]), f"{result['seconds']:.0f}", loss]
        body.append([*cells, f"{result.get('fingerprint', '')[:8]}"])
    header = ["row", "seed", "what", "changed", "trained numbers", "steps", "seconds", "loss", "weights"]
    return table(header, body).splitlines()


def _not_run(open_rows: Sequence[Row]) -> list[str]:
    seeds = defaultdict(list)
    for row in open_rows:
        seeds[row.name].append(str(row.seed))
    about = {row.name: METHODS[row.method].about for row in open_rows}
    return [f"- {name} (seed {', '.join(values)}): {about[name]}" for name, values in seeds.items()]


def plot(found: list[dict[str, Any]], folder: Path) -> list[str]:
    """Questions right against tokens and against bytes; the names of the files."""
    points: dict[str, dict[int, tuple[list[float], int]]] = defaultdict(dict)
    for result in found:
        kind = result["method"]
        if kind not in (*PLOTTED, *LINES) or result["config"] or result["rank"] != 1 or "fixed" in result["name"]:
            continue
        for setting in settings(result):
            cost = result["figures"]["cost"][setting]
            right = figure(result["figures"][setting], FIGURES["questions right"])
            values, _ = points[kind].setdefault(cost["tokens_per_image"], ([], cost["bytes_per_image"]))
            values.append(100 * right)
    if not points:
        return []
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = []
    for name, words in (("tokens", "tokens for a picture"), ("bytes", "bytes for a picture")):
        drawing, axes = pyplot.subplots(figsize=(7, 4.5))
        for kind, of_kind in points.items():
            means = {k: (statistics.mean(values), size) for k, (values, size) in sorted(of_kind.items())}
            if kind in LINES:
                [(level, _)] = means.values()
                axes.axhline(level, linestyle="--" if kind == BARE else ":", color="black", label=kind)
                continue
            x = [k if name == "tokens" else size for k, (_, size) in means.items()]
            axes.plot(x, [mean for mean, _ in means.values()], marker="o", label=kind)
        axes.set(xscale="log", xlabel=words, ylabel="questions right, %")
        axes.legend()
        drawing.tight_layout()
        names.append(f"results-{name}.png")
        drawing.savefig(folder / names[-1], dpi=120, metadata={"Software": None})
        pyplot.close(drawing)
    return names


if __name__ == "__main__":
    main()
