"""What tests of `add` look at: the numbers of a report, the sources of a store, the bytes of a file."""

from fwd2bot.pipelines.store import IndexReport


def counts(report: IndexReport) -> tuple[int, int, int, int, int]:
    return report.added, report.updated, report.duplicates, report.skipped, len(report.failed)


def sources(store) -> set[str]:
    return {row["source"] for row in store.get(list(store))}


def png(path) -> bytes:
    return path.read_bytes()
