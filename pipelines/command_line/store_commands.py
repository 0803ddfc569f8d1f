"""Commands that fill, keep and export a store."""

import glob
import json
import math
import os
import re
import sys
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .models import ModelOptions, load, open_store
from .options import BatchSize, Debug, Device, Dtype, Json, Model, Revision, Store, Tokens, TrustRemoteCode, is_url
from .printing import pictures_of, print_fields, print_json, print_table, say, size

PICTURES_FAILED = 3  # exit code
LISTED = 20  # pictures that failed, in the text
FORMATS = {".parquet": "parquet", ".jsonl": "jsonl"}
AGES = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def index(
    ctx: typer.Context,
    pictures: Annotated[
        list[str],
        typer.Argument(metavar="PICTURES", help="Folders, globs, files, URLs, parquet files with a column 'image'."),
    ],
    store: Annotated[str, typer.Option("--store", "-s", metavar="STORE", help="Made when it is not there.")],
    num_summary_tokens: Tokens = None,
    codec: Annotated[
        Literal["fp16", "int8", "int4"] | None, typer.Option(help="How the summaries of a new store are written.")
    ] = None,
    metadata: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Kept with each of these pictures, for --where; may be repeated."),
    ] = None,
    batch_size: BatchSize = 16,
    commit_every: Annotated[
        int | None,
        typer.Option(min=1, help="Pictures after which what was done is kept for good: 512, with Ray 65,536."),
    ] = None,
    engine: Annotated[
        Literal["local", "ray"], typer.Option(help="ray: workers of the cluster of RAY_ADDRESS, or of this machine.")
    ] = "local",
    workers: Annotated[int | None, typer.Option(min=1, help="Of Ray; one for each GPU, or CPU but one.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first picture that cannot be used.")] = False,
    model: Model = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Put pictures into a store. Stopped anyhow, the same command goes on where it was.

    A file that is in the store is skipped unread; one that has changed, or comes with other metadata, replaces its
    row. Pictures that cannot be used are listed with the reason, and the exit code is 3 then.

    Metadata values are numbers, true or false, lists of these or of texts ('tags=["a", "b"]'), and texts otherwise;
    quotes make a text of a number ('zip="01234"').

    \b
    fwd2bot index photos/ --store photos.store
    fwd2bot index photos/2024/ --store photos.store --metadata year=2024 --metadata place=Lisbon
    fwd2bot index 'scans/**/*.jpg' more/ rows.parquet --store all.store -k 8
    fwd2bot index photos/ --store photos.store --model you/your-fwd2bot --device cuda --batch-size 64
    fwd2bot index /shared/photos --store /shared/photos.store --engine ray --workers 8
    """
    if engine == "ray":
        if device not in (None, "cpu"):
            raise typer.BadParameter("is for --engine local; Ray's workers choose their own.", param_hint="--device")
        device = "cpu"  # from where it travels to the workers
    elif workers is not None:
        raise typer.BadParameter("is for --engine ray.", param_hint="--workers")
    sources, values = _expand(pictures), _metadata(metadata or [])
    from fwd2bot.pipelines.store import IndexReport, SummaryStore
    from fwd2bot.pipelines.store.table import check_metadata_name, exists

    for name in values:
        try:
            check_metadata_name(name)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--metadata") from error
    options = ModelOptions(model, revision, trust_remote_code, device, dtype)
    if exists(store):
        existing = SummaryStore.open(store)
        config = existing.config
        for name, found, asked in (
            ("-k", config.num_summary_tokens, num_summary_tokens),
            ("--codec", config.codec, codec),
        ):
            if asked not in (None, found):
                raise ValueError(
                    f"{store} was made with {name} {found}, not {asked}. Leave {name} out, or make a new store."
                )
        if unfit := existing.unfit_metadata(values):
            raise typer.BadParameter(unfit, param_hint="--metadata")
        opened = SummaryStore.open(store, *load(options.or_of_store(config), "compress"))
    else:
        failed = _unreadable(_expand(pictures), strict)
        if failed is not None:  # no store is made for them
            _report(store, IndexReport(failed=failed), None, as_json)
            raise typer.Exit(PICTURES_FAILED)
        given = {} if codec is None else {"codec": codec}
        loaded = load(options.or_embedded(), "compress")
        opened = SummaryStore.create(store, *loaded, num_summary_tokens=num_summary_tokens, exist_ok=True, **given)
    how: Any = engine
    if engine == "ray":
        from fwd2bot.pipelines.store.ray_engine import RayEngine

        how = RayEngine(workers)
    job = {"batch_size": batch_size, "commit_every": commit_every, "strict": strict, "engine": how}
    ctx.meta["interrupted"] = "What was committed stays in the store; the same command goes on from there."
    report = opened.add(sources, metadata=values or None, progress=_progress(), **job)
    _report(store, report, len(opened), as_json)
    if report.failed:
        raise typer.Exit(PICTURES_FAILED)


def _unreadable(pictures: Any, strict: bool) -> list[tuple[str, str]] | None:
    """Source and reason of each picture, if none of them can be read; None as soon as one can.

    Raises:
        ValueError: for what holds no picture at all; with `strict` for one that cannot be read, if none that can comes
            before it.
    """
    from fwd2bot import Fwd2BotProcessor
    from fwd2bot.pipelines.store.sources import each_item, read

    failed = []
    for item in each_item(pictures):
        item = item if item.error else read(item, Fwd2BotProcessor.load_image)
        if item.error is None:
            return None
        if strict:
            raise ValueError(f"{item.name}: {item.error}")
        failed.append((item.name, item.error))
    return failed


def _report(store: str, report: Any, rows: int | None, as_json: bool) -> None:
    """Print what an `IndexReport` has.

    Args:
        rows: of the store; None where none was made.
    """
    counts = {name: getattr(report, name) for name in ("added", "updated", "duplicates", "skipped")}
    if as_json:
        failed = [{"source": source, "reason": reason} for source, reason in report.failed]
        figures = {"seconds": report.seconds, "rate": report.rate}
        print_json({"store": store, **counts, "failed": failed, "rows": rows or 0, **figures})
    else:
        done = ", ".join(f"{count:,} {name}" for name, count in counts.items())
        rate = f" ({report.rate:.1f} pictures/s)" if report.rate else ""
        print(f"{done}, {len(report.failed):,} failed in {report.seconds:.1f} s{rate}.")
        print(f"{store} was not made." if rows is None else f"{store} holds {pictures_of(rows)}.")
    for source, reason in report.failed[:LISTED]:
        say(f"failed: {source}: {reason}")
    if len(report.failed) > LISTED:
        say(f"failed: {len(report.failed) - LISTED:,} more; --json lists all.")


def stats(
    store: Store,
    check: Annotated[
        bool, typer.Option("--check", help="Read every row first; the exit code is 1 if any is damaged.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """What a store holds, how large it is and what made it.

    These figures look at few bytes of the store. With --check all of it is read, and tokens and embeddings are
    compared.

    \b
    fwd2bot stats photos.store
    fwd2bot stats photos.store --check
    fwd2bot stats photos.store --json | jq .rows
    """
    opened = open_store(store)
    checked = {"checked_rows": opened.check()} if check else {}
    found = opened.stats() | checked
    if as_json:
        print_json(found)
        return
    sizes = {"bytes": size(found["bytes"]), "bytes_per_image": size(found["bytes_per_image"])}
    parts = {
        name: ", ".join(f"{key} {value}" for key, value in (found[name] or {}).items())
        for name in ("bytes_by_column", "metadata", "index")
    }
    print_fields({name: value for name, value in (found | sizes | parts).items() if value != ""})


def delete(
    store: Store,
    ids: Annotated[list[str], typer.Argument(metavar="ID", help="As search and --json print them.")],
    purge: Annotated[bool, typer.Option("--purge", help="Free the bytes at once; readers may get an error.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Delete pictures from a store.

    The files that they were made of are not touched.

    \b
    fwd2bot delete photos.store 0c5ab3d1 77aa0912
    fwd2bot delete photos.store 0c5ab3d1 --purge --yes
    """
    opened = open_store(store)
    ids = list(dict.fromkeys(ids))
    # What an interrupted --purge deleted is not in the store any more, but its bytes may be.
    found = [one for one in ids if one in opened] if purge else ids
    rows = opened.get(found) if found else []
    if not yes:
        if not as_json:
            print_table(["id", "source"], [(row["id"], row["source"] or "") for row in rows])
        typer.confirm(f"Delete {len(found)} picture(s) from {store}?", abort=True, err=True)
    opened.delete(ids, purge=purge)
    if as_json:
        print_json({"store": store, "deleted": found, "purged": purge, "rows": len(opened)})
    else:
        print(f"{len(found):,} deleted; {store} holds {pictures_of(len(opened))}.")


def optimize(
    store: Store,
    index: Annotated[
        Literal["ivf_pq", "hnsw_sq"] | None,
        typer.Option(help="Build an approximate index anew: ivf_pq is small, hnsw_sq faster to search."),
    ] = None,
    older_than: Annotated[
        str,
        typer.Option(metavar="AGE", help="Versions of the table that go, such as 90s, 30m, 12h or 7d; 0 for all."),
    ] = "1h",
    leftovers: Annotated[
        bool,
        typer.Option(
            "--leftovers", help="Remove what killed processes left half written. Only while nobody else writes!"
        ),
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Make a store small and fast: join its files, free what was deleted, build an index.

    Versions of the table that are younger than --older-than stay for processes that still read them, and with them
    the bytes of what was deleted since. An index is brought up to date; --index builds one, which searches ask once
    the store has more than 50,000 pictures.

    \b
    fwd2bot optimize photos.store
    fwd2bot optimize photos.store --index ivf_pq
    fwd2bot optimize photos.store --older-than 0
    """
    age = _age(older_than)
    opened = open_store(store)
    before = opened.stats()
    if index is not None:
        opened.build_index(index)
    opened.optimize(older_than=age, leftovers=leftovers)
    after = opened.stats()
    if as_json:
        figures = {name: after[name] for name in ("rows", "bytes", "fragments", "index")}
        print_json({"store": store, **figures, "bytes_before": before["bytes"]})
        return
    print(
        f"{store} holds {pictures_of(after['rows'])} in {size(after['bytes'])}; it had {size(before['bytes'])} before."
    )
    if after["index"]:
        print(f"The index {after['index']['type']} knows {after['index']['indexed_rows']:,} of them.")


def export(
    store: Store,
    to: Annotated[Path, typer.Option("--to", metavar="FILE", help="What to write; a folder for numpy.")],
    format: Annotated[
        Literal["parquet", "jsonl", "numpy"] | None, typer.Option(help="Default: by the ending of --to.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a store for other programs.

    Ids, vectors and metadata, as vector databases import them.

    \b
    fwd2bot export photos.store --to photos.parquet
    fwd2bot export photos.store --to photos.jsonl
    fwd2bot export photos.store --to photos-arrays --format numpy
    """
    chosen = format or FORMATS.get(to.suffix)
    if chosen is None:
        raise typer.BadParameter(
            f"{str(to)!r} ends in none of {', '.join(FORMATS)}. Choose with --format; numpy writes a folder.",
            param_hint="--to",
        )
    opened = open_store(store)
    rows = len(opened)
    opened.export(to, chosen, overwrite=overwrite)
    if as_json:
        print_json({"store": store, "file": str(to), "format": chosen, "rows": rows})
    else:
        print(f"{pictures_of(rows)} written to {to}.")


def _metadata(pairs: list[str]) -> dict[str, Any]:
    """`KEY=VALUE` as metadata: a value that is a number, true, false, a quoted text or a list in JSON is that."""
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not (name and equals):
            raise typer.BadParameter(f"{pair!r} is not of the form KEY=VALUE.", param_hint="--metadata")
        if name in found:
            raise typer.BadParameter(f"{name!r} is given twice.", param_hint="--metadata")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        is_other = value is None or isinstance(value, dict) or (isinstance(value, float) and not math.isfinite(value))
        found[name] = text if is_other else value
    return found


def _age(text: str) -> timedelta:
    if text == "0":
        return timedelta(0)
    found = re.fullmatch(r"(\d{1,5})([smhd])", text)
    if not found:
        raise typer.BadParameter(
            f"{text!r} is no age. Give a number with s, m, h or d, such as 90s, 30m, 12h or 7d; or 0.",
            param_hint="--older-than",
        )
    return timedelta(**{AGES[found[2]]: int(found[1])})


def _expand(pictures: list[str]) -> Any:
    """The sources as `SummaryStore.add` takes them: globs become their files; what is not there is an error."""
    sources: list[str] = []
    for one in pictures:
        if is_url(one) or os.path.lexists(one):
            sources.append(one)
            continue
        found = sorted(glob.glob(one, recursive=True)) if glob.has_magic(one) else []
        if not found:
            raise FileNotFoundError(f"{one!r} does not exist, and no file fits it as a pattern.")
        sources += found
    if len(sources) == 1:
        return sources[0]
    # A list has a known length, which its progress bar shows; folders and parquet files hold more than one picture.
    if all(os.path.isfile(one) and not one.endswith(".parquet") for one in sources):
        return sources
    return iter(sources)


def _progress() -> bool | None:
    """A progress bar after two seconds where somebody watches."""
    return None if sys.stderr.isatty() else False
