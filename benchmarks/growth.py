"""How time and memory grow: over k, image tokens, pictures in a prompt, turns of a chat, and the size of a store.

    python benchmarks/growth.py [--size small|1b|7b] [--layers 4] [--repetitions 5] [--plot FILE.png]

The layers of a size with random weights, `--layers` of them, so that the longest rows fit; one picture, one row. The
exponent is the slope of a line through the logarithms: 1 is in proportion, 0 none. What is expected stands beside it:
of time over tokens, 1 where products of matrices take it, towards 2 where attention does.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers
from measuring import (
    SIZES,
    draw,
    drawn_pictures,
    exponent,
    interleaved,
    load,
    medians,
    parser_of,
    peak_memory,
    prompts,
    report,
    stages_of,
)

IMAGE_TOKENS = (64, 256, 576, 1024, 2916)  # squares: 8, 16, 24, 32, 54 patches a side
KS = (1, 4, 16, 64)
PICTURES = (1, 4, 16, 32)
TURNS = (1, 2, 4, 8)
ROWS = (1_000, 10_000, 100_000)
ONE = {"max_new_tokens": 1, "min_new_tokens": 1, "do_sample": False}


def grown(what: str, expected: str, runs: dict[int, Callable[[], Any]], repetitions: int) -> dict[str, Any]:
    """A row: milliseconds and bytes at each size, and both exponents."""
    seconds = medians(interleaved({str(size): run for size, run in runs.items()}, repetitions))
    sizes, times = list(runs), list(seconds.values())
    peaks = [peak_memory(run) for run in runs.values()]
    return {
        "what": what,
        "sizes": " ".join(map(str, sizes)),
        "ms": " ".join(f"{1000 * value:.1f}" for value in times),
        "MB": " ".join(f"{value / 1e6:.1f}" for value in peaks),
        "time exponent": exponent(sizes, times),
        "memory exponent": exponent(sizes, peaks),
        "expected": expected,
    }


def chat(processor: Any, turns: int) -> Any:
    """The prompt of the last of so many turns about one picture."""
    messages: list[dict[str, Any]] = []
    for turn in range(turns):
        content: list[dict[str, str]] = [{"type": "image"}] if turn == 0 else []
        messages.append({"role": "user", "content": [*content, {"type": "text", "text": "What is at the top left?"}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": "a small red square"}]})
    return processor(text=processor.apply_chat_template(messages[:-1], add_generation_prompt=True))


def search(rows: int, width: int) -> Callable[[], Any]:
    """Exact search of one embedding among so many, as a matrix product; the store's own: store_scale.py."""
    random = np.random.RandomState(0)
    kept = torch.from_numpy(random.standard_normal((rows, width)).astype(np.float32))
    asked = kept[:1]
    return lambda: (kept @ asked.T).flatten().topk(10)


def main() -> None:
    parser = parser_of(__doc__, tuple(SIZES))
    parser.set_defaults(size="small", repetitions=5)
    parser.add_argument("--layers", type=int, default=4, help="of vision and language model each (default: 4)")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    layers, patch = {"num_hidden_layers": args.layers}, SIZES[args.size]["vision"]["patch_size"]
    begin, rows = time.perf_counter(), []

    def made(tokens: int) -> tuple[Any, Any, int]:
        sizes = {"vision": {**layers, "image_size": patch * round(tokens**0.5)}, "text": layers}
        return load(args.size, max(KS), args.device, getattr(torch, args.dtype), **sizes)

    with torch.inference_mode():
        compressing = {}
        for tokens in IMAGE_TOKENS:
            model, processor, side = made(tokens)
            [alone] = stages_of(model, "compress")
            inputs = processor.process_images(drawn_pictures(1, side)).to(model.device, model.dtype)
            compressing[tokens] = lambda alone=alone, inputs=inputs: alone.compress(**inputs, num_summary_tokens=16)
        rows.append(grown("compress, over image tokens", "1 to 2", compressing, args.repetitions))
        model, processor, side = made(576)
        alone, answerer = stages_of(model, "compress", "generate")
        inputs = processor.process_images(drawn_pictures(1, side)).to(model.device, model.dtype)
        runs = {k: lambda k=k: alone.compress(**inputs, num_summary_tokens=k) for k in KS}
        rows.append(grown("compress at 576 image tokens, over k", "near 0", runs, args.repetitions))
        summary = model.compress(**inputs)

        def answer(shown: Any, asked: Any) -> Callable[[], Any]:
            return lambda: answerer.generate_from_summary(shown, **asked, **ONE)

        asked = processor(text=prompts(processor, 1)).to(model.device)
        runs = {k: answer(summary.truncate(k), asked) for k in KS}
        rows.append(grown("first token, over k", "below 1", runs, args.repetitions))
        short = summary.truncate(16)
        runs = {
            count: answer(short[[0] * count], processor(text=prompts(processor, 1, count)).to(model.device))
            for count in PICTURES
        }
        rows.append(grown("first token at k=16, over pictures in a prompt", "to 1", runs, args.repetitions))
        runs = {turns: answer(short, chat(processor, turns).to(model.device)) for turns in TURNS}
        rows.append(grown("first token at k=16, over turns of a chat", "below 1", runs, args.repetitions))
        runs = {count: search(count, model.summary_projector.out_features) for count in ROWS}
        rows.append(grown("exact search, over rows", "1", runs, args.repetitions))
    report(args, rows, seconds=time.perf_counter() - begin)
    lines = {
        row["what"]: ([float(one) for one in row["sizes"].split()], [float(one) for one in row["ms"].split()])
        for row in rows
    }
    draw(args, lines, "image tokens, k, pictures, turns or rows", "ms")


if __name__ == "__main__":
    main()
