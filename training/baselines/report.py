"""`python -m fwd2bot.training.baselines.report RESULTS DOCS`: tables and plots of the comparison from its JSON files.

Writes `results.md`, and `results-tokens.png` and `results-bytes.png` if there is anything to plot, into DOCS. What the
figures say is written by hand, in DOCS/results-findings.md, and stands on top where that file is. Rows without a file
are listed as not run. A folder in RESULTS is another comparison, of another budget, backbone or data: it has a section
of its own, by its name.
"""

import argparse
import dataclasses
import json
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..run_checks import differences
from ..source_evaluation import counted
from ..tables import table
from .grid import BARE, METHODS, Row, rows
from .judging import PRESENCE
from .run import BUDGET

# What stands in the table: the heading, and where the figure is among those of a setting.
FIGURES = {
    "questions right": ("answers", "all"),
    "mean of the kinds but the field's colour": ("answers", "other kinds"),  # of `_with_means`
    "presence, adversarial F1": ("presence", "adversarial", "f1"),
    "full caption finds picture": ("full_caption_to_image", "recall@1"),
    "picture finds full caption": ("image_to_full_caption", "recall@1"),
    "hard negatives": ("hard_negatives", "mean"),
    "short caption finds picture": ("short_caption_to_image", "recall@1"),
    "field's colour": ("answers", "background"),
    "places": ("answers", "place"),
    "neighbours": ("answers", "neighbour"),
}
# The same of each data set, as far as it has them, after its name. No consistency: the first rows cut groups apart.
OF_SOURCES = {
    "right": ("exact_match",),
    "CIDEr": ("captions", "cider"),
    "caption finds picture, recall@10": ("text_to_image", "recall@10"),
    "picture finds caption, recall@10": ("image_to_text", "recall@10"),
}
# What stands in the file of a row.
PARTS = ("name", "method", "seed", "lengths", "config", "rank", "about", "versions", "steps_done", "loss", "seconds")
PARTS += ("trained_parameters", "figures", "command", "steps", "batch_size", "backbone_sha256", "lora_rank")
PLOTTED = ("fwd2bot", "pooling", "merging", "pruning", "query_transformer", "cache")
LINES = (BARE, "uncompressed_lora")  # of all image tokens, drawn as lines
SHIPPED = "before_norm"  # what the shipped checkpoint is: an ablation, and drawn with the methods
DRAWN = (PLOTTED[0], SHIPPED, *PLOTTED[1:])
FINDINGS = "results-findings.md"
OUTPUT = r"baselines\.run \S+"
MARKERS = dict(zip(DRAWN, "oXs^vDP", strict=True))
COLOURS = dict(zip(DRAWN, ("black", "gray", *(f"C{number}" for number in range(5))), strict=True))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fwd2bot.training.baselines.report", description=__doc__)
    parser.add_argument("results", type=Path, help="folder of the JSON files")
    parser.add_argument("docs", type=Path, help="where results.md and its plots go")
    args = parser.parse_args(arguments)
    if not args.results.is_dir():
        parser.error(f"{args.results} is no folder; give the one that baselines.run wrote its results into")
    try:
        found = read(args.results)
        others = {folder.name: read(folder) for folder in sorted(args.results.iterdir()) if folder.is_dir()}
    except ValueError as error:
        sys.exit(f"error: {error}")
    if args.docs.exists() and not args.docs.is_dir():
        parser.error(f"{args.docs} is no folder; name one for results.md and its plots")
    args.docs.mkdir(parents=True, exist_ok=True)
    others = {name: results for name, results in others.items() if results}
    plots = {"": plot(found, args.docs)}
    plots |= {name: plot(results, args.docs, name) for name, results in others.items()}
    findings = args.docs / FINDINGS
    said = findings.read_text(encoding="utf-8") if findings.exists() else ""
    page = report(found, plots, said, others)
    (args.docs / "results.md").write_text(page, encoding="utf-8")


def read(folder: Path) -> list[dict[str, Any]]:
    """The results of the rows that were run, in the order of the grid, the seeds of a row one after another.

    Raises:
        ValueError: results of different budgets, which do not compare, or of a row that the grid has not; or a
            file that is no result.
    """
    found = [_with_means(_read(file)) for file in sorted(folder.glob("*-seed*.json"))]
    names = list(dict.fromkeys(row.name for row in rows()))
    unknown = sorted({result["name"] for result in found} - set(names))
    if unknown:
        raise ValueError(f"{folder} has results of {', '.join(unknown)}, which is no row of the grid; take them out")
    found.sort(key=lambda result: (names.index(result["name"]), result["seed"]))
    for name in BUDGET:
        values = {str(result.get(name)): f"{result['name']}-seed{result['seed']}.json" for result in found}
        if len(values) > 1:
            differ = ", ".join(f"{value} ({file})" for value, file in sorted(values.items()))
            raise ValueError(f"the results in {folder} have different {name}: {differ}; report them apart")
    recipes = [result["recipe"] for result in found if "recipe" in result]
    for one in recipes:
        differ = differences(recipes[0], one, sorted({**recipes[0], **one}))
        if differ:
            raise ValueError(
                f"the results in {folder} are of different recipes: {'; '.join(differ)}; report them apart"
            )
    return found


def _read(file: Path) -> dict[str, Any]:
    """One result; of earlier versions, which had no other learning rates, the usual one."""
    remedy = "take it out, or run its row again"
    try:
        result = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is no result of a row ({error}); {remedy}") from error
    missing = [name for name in PARTS if not isinstance(result, dict) or name not in result]
    if missing or not isinstance(result["figures"], dict):
        raise ValueError(f"{file} is no result of a row (no {', '.join(missing) or 'figures'}); {remedy}")
    name = f"{result['name']}-seed{result['seed']}.json"
    if file.name != name:
        raise ValueError(f"{file} is the result of {name}; a copy counts as another seed, so {remedy}")
    return {"rate": 1.0, **result}


def _with_means(result: dict[str, Any]) -> dict[str, Any]:
    """With the plain mean over all kinds of question but the field's colour, which rows learn all at once or not."""
    for setting in settings(result):
        answers = result["figures"][setting].get("answers", {})
        others = [value for kind, value in answers.items() if kind not in ("all", "background")]
        if "background" in answers and others:
            answers["other kinds"] = statistics.mean(others)
    return result


def report(
    found: list[dict[str, Any]],
    plots: dict[str, list[str]],
    findings: str = "",
    others: dict[str, list[dict[str, Any]]] | None = None,
) -> str:
    """The page as Markdown, `findings` between what was compared and its figures.

    Args:
        plots: the files of `plot`, of `found` under "".
        others: the results of further comparisons, by the headings of their sections.
    """
    run = {(result["name"], result["seed"]) for result in found}
    planned = rows()
    open_rows = [row for row in planned if (row.name, row.seed) not in run]
    done = len(planned) - len(open_rows)
    further = f", and further seeds ({len(found) - done})" if len(found) > done else ""
    lines = ["# Comparison with what else could be done with as many tokens", ""]
    lines += ["<!-- written by python -m fwd2bot.training.baselines.report; not to be edited by hand -->", ""]
    lines += [f"{done} of {len(planned)} rows were run{further}. [evaluation.md](evaluation.md) says how.", ""]
    if found:
        lines += [*_about(found[0], found), ""]
    if findings.strip():
        lines += [findings.strip(), ""]
    lines += _shown(plots.get("", []))
    methods = [result for result in found if _is_method(result)]
    slowed = [result for result in found if result["rate"] != 1]
    changed = [result for result in found if not _is_method(result) and result["rate"] == 1]
    groups = {"Methods": methods, "With lower learning rates": slowed, "Fwd2Bot with one thing changed": changed}
    for heading, group in groups.items():
        if group:
            lines += [f"## {heading}", "", *_table(group), ""]
    if found:
        lines += ["## The rows", "", *_methods(found), ""]
    if open_rows:
        lines += ["## Not run", "", *_not_run(open_rows), ""]
    for name, results in (others or {}).items():
        lines += [f"## Apart: {name.replace('-', ' ')}", "", *_about(results[0], results), ""]
        lines += [*_shown(plots.get(name, [])), *_table(results), "", *_methods(results), ""]
        lines += ["The other rows of the grid were not run here.", ""]
    return "\n".join(lines).rstrip() + "\n"


def _shown(plots: Sequence[str]) -> list[str]:
    """Lines of Markdown."""
    lines = []
    for file in plots:
        words = "tokens" if file.endswith("tokens.png") else "bytes of a picture, 2 bytes a number"
        lines += [f"![Questions right against {words}]({file})", ""]
    return lines


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
    cut = sorted({result["name"] for result in found if 0 < result["steps_done"] < result["steps"]})
    lines = [
        f"One frozen backbone (weights {first['backbone_sha256'][:12]}), {_data(first)}, "
        f"LoRA rank {first['lora_rank']} for each of two stages or twice that for one. {_judged(first)}, in per cent; "
        "with several seeds the mean and the range. `tokens` is what the language model reads for a picture, `bytes` "
        "what is kept of it, and `cache bytes` its keys and values while an answer is made, both at two bytes a "
        "number. Rows share their cores with other work, so times are measured elsewhere: "
        "[performance.md](performance.md).",
        "",
        f"Command, folders by their last name: {_made_by(first)}.",
    ]
    others = defaultdict(list)
    for result in found:
        others[_made_by(result, first)].append(result["name"])
    others.pop(_made_by(first), None)
    for made_by, names in others.items():
        lines += ["", f"Otherwise {', '.join(sorted(set(names)))}: {made_by}."]
    if cut:
        lines += ["", f"Stopped by `--minutes` before their last step: {', '.join(cut)}."]
    return lines


def _data(first: dict[str, Any]) -> str:
    """What the rows were trained on, in words."""
    steps = f"{first['steps']:,} steps of {first['batch_size']}"
    if not first.get("sources"):
        return f"{first['pictures']:,} drawn pictures, {steps} rows of {first['row_length']} tokens"
    whole = sum(first["sources"].values())
    shares = ", ".join(f"{name} {100 * weight / whole:.0f}%" for name, weight in first["sources"].items())
    return f"{steps} samples of data sets ({shares})"


def _judged(first: dict[str, Any]) -> str:
    """What the rows were judged on, in words."""
    if not first.get("sources"):
        pictures = first["test_pictures"]
        presence = f", presence on {PRESENCE} of them" if pictures > PRESENCE else ""
        return f"Judged on {pictures:,} held-out pictures ({first['split']}; five questions about each{presence})"
    of_each = "; ".join(f"{name}: {counted(counts)}" for name, counts in first["figures"]["judged"].items())
    return f"Judged on held-out rows ({of_each}; CIDEr times 100)"


def _columns(found: list[dict[str, Any]]) -> dict[str, tuple[str, ...]]:
    """The headings of a comparison's figures, and where each is among those of a setting."""
    judged = found[0].get("judged")
    if not judged:
        return FIGURES
    named = {f"{name}: {words}": (name, *path) for name in judged for words, path in OF_SOURCES.items()}
    every = [result["figures"][setting] for result in found for setting in settings(result)]
    return {words: path for words, path in named.items() if any(figure(one, path) is not None for one in every)}


def _made_by(result: dict[str, Any], first: dict[str, Any] | None = None) -> str:
    """The command of a row, without what chose it, and versions; that of `first` where only the folder is another."""
    command = _of_all_rows(result["command"])
    if first and re.sub(OUTPUT, "", command) == re.sub(OUTPUT, "", _of_all_rows(first["command"])):
        command = _of_all_rows(first["command"])
    return f"`{command}` ({', '.join(f'{name} {version}' for name, version in result['versions'].items())})"


def _of_all_rows(command: str) -> str:
    """A command without the names and seeds of the rows that one of its calls was for."""
    return re.sub(r" --(rows|seeds)( (?!--)\S+)+", "", command)


def _is_method(result: dict[str, Any]) -> bool:
    """Whether a result is of a method as it is, and no ablation."""
    plain = not result["config"] and result["rank"] == result["rate"] == 1 and "fixed" not in result["name"]
    return plain and result["method"] in (*PLOTTED, *LINES)


def _table(found: list[dict[str, Any]]) -> list[str]:
    """A line for each row and number of tokens; the lines of one method together, its name on the first."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for result in found:
        one = result["method"] if _is_method(result) else result["name"]  # trainings of several k are one method
        for setting in settings(result):
            groups[one, setting].append(result)
    order = list(dict.fromkeys(name for name, _ in groups))
    columns = _columns(found)
    cost = {key: results[0]["figures"]["cost"][key[1]] for key, results in groups.items()}
    body, last = [], None
    for key in sorted(groups, key=lambda key: (order.index(key[0]), cost[key]["tokens_per_image"])):
        name, setting = key
        cells = ["" if name == last else name, f"{cost[key]['tokens_per_image']:,}"]
        for path in columns.values():
            cells.append(spread([figure(result["figures"][setting], path) for result in groups[key]]))
        cache = cost[key]["cache_bytes"] // 2  # rows are judged in float32
        cells += [f"{cost[key]['bytes_per_image']:,}", f"{cache:,}", str(len(groups[key]))]
        body.append(cells)
        last = name
    return table(["row", "tokens", *columns, "bytes", "cache bytes", "seeds"], body).splitlines()


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
        loss = "" if result["loss"] is None else " to ".join(f"{value:.2f}" for value in result["loss"])
        cells = [result["name"], str(result["seed"]), METHODS[result["method"]].about, _changed(result)]
        cells += [f"{result['trained_parameters']:,}", str(result["steps_done"]), loss]
        body.append([*cells, f"{result.get('fingerprint', '')[:8]}"])
    header = ["row", "seed", "what", "changed", "trained numbers", "steps", "loss", "weights"]
    said = (
        "`loss` is the first and the last that was logged, of all that a row trains on: with the weighted contrastive "
        "loss where it embeds, so that it compares among those that do or those that do not."
    )
    return [said, "", *table(header, body).splitlines()]


def _changed(row: dict[str, Any]) -> str:
    """What a row changes of its method."""
    changed = [f"{name}={value}" for name, value in row["config"].items()]
    changed += [
        f"{name} x{row[key]:g}" for name, key in (("rank", "rank"), ("learning rates", "rate")) if row[key] != 1
    ]
    if "fixed" in row["name"]:
        [length] = row["lengths"]
        changed.append(f"for {length} token{'s' if length > 1 else ''} alone")
    return ", ".join(changed)


def _not_run(open_rows: Sequence[Row]) -> list[str]:
    seeds = defaultdict(list)
    for row in open_rows:
        seeds[row.name].append(str(row.seed))
    about = {
        row.name: ", ".join(filter(None, [METHODS[row.method].about, _changed(dataclasses.asdict(row))]))
        for row in open_rows
    }
    return [f"- {name} (seed {', '.join(values)}): {about[name]}" for name, values in seeds.items()]


def plot(found: list[dict[str, Any]], folder: Path, name: str = "") -> list[str]:
    """Questions right against tokens, and of the main comparison (no `name`) against bytes; the names of the files.

    Of a further comparison only where it has two methods, which a plot can compare.
    """
    points = _points(found)
    if len(points) < (2 if name else 1):
        return []
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit("error: the plots need matplotlib; pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, NullLocator

    files = []
    axis_words = {"tokens": "tokens for a picture", "bytes": "bytes for a picture, 2 bytes a number"}
    for axis in ("tokens",) if name else ("tokens", "bytes"):
        drawing, axes = pyplot.subplots(figsize=(8.5, 4.8))
        ticks = set()
        for kind in [kind for kind in DRAWN if kind in points]:
            curve = {(k if axis == "tokens" else size): values for (k, size), values in sorted(points[kind].items())}
            means = [statistics.mean(values) for values in curve.values()]
            down = [mean - min(values) for mean, values in zip(means, curve.values(), strict=True)]
            up = [max(values) - mean for mean, values in zip(means, curve.values(), strict=True)]
            look = {"color": COLOURS[kind], "marker": MARKERS[kind], "linewidth": 2.2 if kind in DRAWN[:2] else 1.4}
            axes.errorbar(list(curve), means, [down, up], capsize=3, label=kind, **look)
            ticks |= set(curve)
        for kind in [kind for kind in LINES if kind in points]:
            [((tokens, size), values)] = points[kind].items()
            level, style = statistics.mean(values), "--" if kind == BARE else ":"
            label = f"{kind}\n({tokens if axis == 'tokens' else size:,} {axis})"
            axes.axhline(level, linestyle=style, color="dimgray", label=label)
        axes.set(xscale="log", xlabel=axis_words[axis], ylabel="questions right, %")
        if ticks:
            axes.set_xticks(sorted(ticks) if axis == "tokens" else _thinned(sorted(ticks)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.3)
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
        drawing.tight_layout()
        files.append("-".join(filter(None, ("results", name, axis))) + ".png")
        drawing.savefig(folder / files[-1], dpi=120, metadata={"Software": None})
        pyplot.close(drawing)
    return files


def _points(found: list[dict[str, Any]]) -> dict[str, dict[tuple[int, int], list[float]]]:
    """Of each method, the questions right in per cent, seed by seed, at each (tokens, bytes)."""
    points: dict[str, dict[tuple[int, int], list[float]]] = defaultdict(lambda: defaultdict(list))
    for result in [one for one in found if _is_method(one) or one["method"] == SHIPPED]:
        for setting in settings(result):
            cost = result["figures"]["cost"][setting]
            right = figure(result["figures"][setting], FIGURES["questions right"])
            if right is None:  # judged on data sets
                continue
            points[result["method"]][cost["tokens_per_image"], cost["bytes_per_image"]].append(100 * right)
    return points


def _thinned(values: Sequence[int]) -> list[int]:
    """Those of sorted values that are at least twice the one before, so that their labels do not touch."""
    kept: list[int] = []
    for value in values:
        if not kept or value >= 2 * kept[-1]:
            kept.append(value)
    return kept


if __name__ == "__main__":
    main()
