"""What commands print: one JSON document or text for people on stdout; messages on stderr."""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

LONGEST = 60  # characters of one value of metadata in a table


def say(message: str) -> None:
    """A message to people, on stderr."""
    print(printable(message), file=sys.stderr)


def printable(text: Any) -> str:
    """Text on one line, without what a terminal would take as a command: ids and sources are other people's."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in str(text))


def print_json(value: Any) -> None:
    from fwd2bot.pipelines.plain_json import without_nan  # help and usage errors do without that package

    # ASCII, so that it is the same in every locale.
    print(json.dumps(without_nan(value), indent=2, default=str, allow_nan=False))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table on a terminal, tab-separated lines elsewhere."""
    rows = [[printable(cell) for cell in row] for row in rows]
    if not sys.stdout.isatty():
        for row in [columns, *rows]:
            print("\t".join(row))
        return
    table = Table(box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, no_wrap=column == "id")  # which is copied from there
    for row in rows:
        table.add_row(*(Text(cell, overflow="fold") for cell in row))
    Console().print(table)


def short(text: Any) -> str:
    """The beginning of a long text."""
    text = printable(text)
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def print_fields(fields: Mapping[str, Any]) -> None:
    """One `name: value` a line; what is not known is left out."""
    width = max(map(len, fields)) + 1
    for name, value in fields.items():
        if value is not None:
            print(f"{name + ':':{width}} {printable(value)}")


def pictures_of(count: int) -> str:
    return f"{count:,} picture{'' if count == 1 else 's'}"


def size(num_bytes: float) -> str:
    """Bytes as people read them."""
    if num_bytes < 1000:
        return f"{num_bytes:.0f} bytes"
    for unit in ("kB", "MB", "GB"):
        num_bytes /= 1000
        if num_bytes < 1000:
            return f"{num_bytes:.1f} {unit}"
    return f"{num_bytes / 1000:.1f} TB"
