"""What commands print: one JSON document or text for people on stdout; messages on stderr."""

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text


def say(message: str) -> None:
    """A message to people, on stderr."""
    print(printable(message), file=sys.stderr)


def printable(text: Any) -> str:
    """Text on one line, without what a terminal would take as a command: ids and sources are other people's."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in str(text))


def print_json(value: Any) -> None:
    # ASCII, so that it is the same in every locale.
    print(json.dumps(_plain(value), indent=2, default=str, allow_nan=False))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table on a terminal, tab-separated lines elsewhere."""
    rows = [[printable(cell) for cell in row] for row in rows]
    if not sys.stdout.isatty():
        for row in [columns, *rows]:
            print("\t".join(row))
        return
    table = Table(*columns, box=box.SIMPLE_HEAD)
    for row in rows:
        table.add_row(*(Text(cell, overflow="fold") for cell in row))
    Console().print(table)


def print_fields(fields: Mapping[str, Any]) -> None:
    """One `name: value` a line; what is not known is left out."""
    width = max(map(len, fields)) + 1
    for name, value in fields.items():
        if value is not None:
            print(f"{name + ':':{width}} {printable(value)}")


def size(num_bytes: float) -> str:
    """Bytes as people read them."""
    if num_bytes < 1000:
        return f"{num_bytes:.0f} bytes"
    for unit in ("kB", "MB", "GB"):
        num_bytes /= 1000
        if num_bytes < 1000:
            return f"{num_bytes:.1f} {unit}"
    return f"{num_bytes / 1000:.1f} TB"


def _plain(value: Any) -> Any:
    """NaN and infinity, which JSON does not have, as null."""
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
