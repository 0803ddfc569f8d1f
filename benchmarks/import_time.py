"""How long `import fwd2bot` takes beside `import transformers` with the classes that it builds on.

    python benchmarks/import_time.py [--repeats 7] [--output import_time.json]

Each import is timed in a fresh interpreter, start-up of the interpreter not counted. The two take turns, so that a
busy moment of the machine falls on both; the first pair warms the disk cache and is not counted. Prints one line for
people and one of JSON. Nothing fails by the clock: the aim is a ratio below 1.3.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

# The second names its classes too, so that a lazy `import fwd2bot` is not flattered.
STATEMENTS = {
    "transformers": (
        "from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, "
        "GenerationMixin, Pipeline, PreTrainedConfig, PreTrainedModel, ProcessorMixin"
    ),
    "fwd2bot": (
        "import fwd2bot; fwd2bot.Fwd2BotConfig; fwd2bot.Fwd2BotForConditionalGeneration; fwd2bot.Fwd2BotProcessor"
    ),
}
PROGRAM = "import time; begin = time.perf_counter(); {statement}; print(time.perf_counter() - begin)"


def seconds_to_run(statement: str) -> float:
    """Seconds that `statement` takes in a new interpreter, outside the checkout and without network access."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(statement=statement)],
        capture_output=True,
        text=True,
        cwd=tempfile.gettempdir(),
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    if done.returncode != 0:
        raise RuntimeError(f"`{statement}` failed:\n{done.stderr}")
    return float(done.stdout.splitlines()[-1])


def measure(repeats: int) -> dict:
    """Times every statement `repeats` times in turn; medians and all single times in seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in STATEMENTS}
    for repeat in range(-1, repeats):
        for name, statement in STATEMENTS.items():
            elapsed = seconds_to_run(statement)
            if repeat >= 0:
                seconds[name].append(round(elapsed, 4))
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "ratio": round(medians["fwd2bot"] / medians["transformers"], 3),
        "median_seconds": medians,
        "seconds": seconds,
        "statements": STATEMENTS,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not a number of repeats; give 1 or more")
    return number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=positive, default=7, help="timed runs of each import (default: 7)")
    parser.add_argument("--output", type=Path, help="write the JSON to this file too")
    arguments = parser.parse_args()
    result = measure(arguments.repeats)
    medians = result["median_seconds"]
    print(
        f"import fwd2bot {medians['fwd2bot']:.2f} s, transformers with the same classes "
        f"{medians['transformers']:.2f} s: {result['ratio']:.2f} times (medians of {arguments.repeats})"
    )
    print(json.dumps(result))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
