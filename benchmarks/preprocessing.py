"""Large pictures made into tensors: all of a batch at once, or in groups, as the processor does by itself.

    python benchmarks/preprocessing.py [--side 3464] [--pictures 16] [--repetitions 3] [--output FILE.json]

JPEG files of coarse random colours are decoded first, which is not counted. Each way is a fresh process with the
embedded checkpoint's processor, in turn: the processor's time (user and system) for a picture, and by how much the
largest resident memory grows beside the decoded pictures. The pixels must be the same.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from measuring import drawn_pictures, parser_of, report

WAYS = {"at once": "sys.maxsize", "in groups": "picture_groups_fwd2bot.PIXELS_AT_ONCE"}
PROGRAM = """
import hashlib, json, resource, sys, time
from pathlib import Path
import torch
from fwd2bot import Fwd2BotProcessor, picture_groups_fwd2bot
from fwd2bot.pipelines.embedded import default_checkpoint
folder, threads = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(threads)
picture_groups_fwd2bot.PIXELS_AT_ONCE = {pixels}
processor = Fwd2BotProcessor.from_pretrained(default_checkpoint())
pictures = [processor.load_image(file) for file in sorted(Path(folder).iterdir())]
memory, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
pixels = processor.process_images(pictures)["pixel_values"]
seconds, grown = time.process_time() - begin, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
digest = hashlib.sha256(pixels.numpy().tobytes()).hexdigest()
print(json.dumps({"ms a picture": 1e3 * seconds / len(pictures), "MB more": grown / 1024, "pixels": digest}))
"""


def run(way: str, folder: str, threads: int) -> dict[str, float | str]:
    program = PROGRAM.replace("{pixels}", WAYS[way])
    done = subprocess.run([sys.executable, "-c", program, folder, str(threads)], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"The program failed:\n{program}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = parser_of(__doc__, ("tiny",))
    parser.add_argument("--side", type=int, default=3464, help="of a square picture; 3464 makes 12 megapixels")
    parser.add_argument("--pictures", type=int, default=16)
    args = parser.parse_args()
    found: dict[str, list[dict]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        for number, picture in enumerate(drawn_pictures(args.pictures, args.side)):
            picture.save(Path(folder, f"{number:04d}.jpg"), quality=90)
        for _ in range(args.repetitions):
            for way in WAYS:
                found[way].append(run(way, folder, args.threads))
    if len({one["pixels"] for taken in found.values() for one in taken}) != 1:
        raise AssertionError("The two ways gave other pixels.")
    measured = ("ms a picture", "MB more")
    rows = [
        {"way": way, **{name: statistics.median(one[name] for one in taken) for name in measured}}
        for way, taken in found.items()
    ]
    report(args, rows)


if __name__ == "__main__":
    main()
