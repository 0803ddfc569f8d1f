"""Twenty scripted visitors at once for a minute: errors, mixed-up answers, times, memory.

    python benchmarks/space_load.py

Starts the Space in a process of its own on 127.0.0.1, and asks it what each visitor alone was answered before. Every
visitor adds a picture, the same file as one other visitor, searches and asks, over and over, with a new session each
time. Prints one JSON document.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from typing import Any

import psutil
from gradio_client import Client, handle_file

from fwd2bot.pipelines.embedded import gallery

STARTED = re.compile(r"http://127\.0\.0\.1:\d+/")


def visit(url: str, number: int, times: dict[str, list[float]] | None = None) -> dict[str, Any]:
    """One visit with a session of its own: compress, search, ask and follow up; what came back."""

    def timed(name: str, *arguments: Any) -> Any:
        begin = time.perf_counter()
        result = client.predict(*arguments, api_name=f"/{name}")
        if times is not None:
            times[name].append(time.perf_counter() - begin)
        return result

    picture = gallery()[number // 2]  # two visitors each bring the same file
    client = Client(url, verbose=False)
    try:
        made = timed("compress", handle_file(str(picture.path)), 8)
        hits = timed("search", picture.captions[0], 8, 3)
        first = timed("ask", picture.questions[0].text, [made["id"]], 0, 8, True)
        second = timed("ask", picture.questions[1].text, [made["id"]], 0, 8, True)
    finally:
        client.close()
    return {
        "id": made["id"],
        "hits": [hit["title"] for hit in hits],
        "answers": [one["answer"] for one in (first, second)],
        "uncompressed": [one["uncompressed"]["answer"] for one in (first, second)],
    }


def megabytes(process: psutil.Process) -> float:
    return process.memory_info().rss / 1e6


def load(
    url: str, expected: dict[int, dict[str, Any]], seconds: float, process: psutil.Process
) -> tuple[dict[str, list[float]], Counter[str], list[str], float]:
    """All visitors at once for so many seconds: times of calls, outcomes of visits, errors, most megabytes."""
    times: dict[str, list[float]] = {"compress": [], "search": [], "ask": []}
    outcome: Counter[str] = Counter()
    errors: list[str] = []
    end = time.monotonic() + seconds

    def run(number: int) -> None:
        while time.monotonic() < end:
            try:
                same = visit(url, number, times) == expected[number]
                outcome["right" if same else "mixed up"] += 1
            except Exception as error:
                outcome["failed"] += 1
                errors.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=run, args=(number,)) for number in expected]
    for thread in threads:
        thread.start()
    most = megabytes(process)
    while any(thread.is_alive() for thread in threads):
        most = max(most, megabytes(process))
        time.sleep(0.2)
    return times, outcome, errors, most


def measure(visitors: int, seconds: float, warm_up: float, settle: float) -> dict[str, Any]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "fwd2bot_cli", "demo", "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
        try:
            url = next(found[0] for line in server.stdout if (found := STARTED.search(line)))
            process = psutil.Process(server.pid)
            expected = {number: visit(url, number) for number in range(visitors)}  # alone, one after the other
            load(url, expected, warm_up, process)  # what the libraries fetch and keep once is no leak
            time.sleep(settle)
            before = megabytes(process)
            times, outcome, errors, most = load(url, expected, seconds, process)
            time.sleep(settle)
            after = megabytes(process)
        finally:
            server.terminate()
    return {
        "visitors": visitors,
        "seconds": seconds,
        "visits": {name: outcome[name] for name in ("right", "mixed up", "failed")},
        "errors": errors[:5],
        "seconds_per_call": {
            name: {
                "calls": len(values),
                "median": round(statistics.median(values), 2),
                "95%": round(statistics.quantiles(values, n=20)[-1], 2),
            }
            for name, values in times.items()
            if len(values) > 1
        },
        "megabytes": {"before": round(before), "most": round(most), "after": round(after)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--visitors", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--warm-up", type=float, default=30.0, help="seconds of the same load before that")
    parser.add_argument("--settle", type=float, default=20.0, help="seconds before memory is read")
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.visitors, arguments.seconds, arguments.warm_up, arguments.settle), indent=2))


if __name__ == "__main__":
    main()
