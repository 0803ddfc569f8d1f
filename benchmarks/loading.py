"""Loading and the first answer after a cold start, against importing torch and transformers and reading the weights.

    python benchmarks/loading.py [--size tiny|small|1b] [--repetitions 5] [--output FILE.json]

Each way is a fresh interpreter, in turn, the first round not counted (it warms the disk cache). Seconds from the first
import to the end, and of it the import, loading, and the first answer of 8 tokens (or summary, or embedding);
resident memory at the end.

- floor: `import torch, transformers`, the language model's classes, every weight of the file read;
- everything, compress, generate, text: the model with that `stage`, its processor, and its first result. `generate`
  is the cold start of a process that answers: a summary is read from a file, too.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from measuring import draw_parts, drawn_pictures, parser_of, report, set_up

HEAD = """
import json, sys, time
begin = time.perf_counter()
folder, threads = sys.argv[1], int(sys.argv[2])
"""
TAIL = """
end = time.perf_counter()
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
resident = int(status["VmRSS"].split()[0]) * 1024
print(json.dumps({"all": end - begin, "import": imported - begin, "load": loaded - imported, "first": end - loaded,
                  "resident": resident}))
"""
FLOOR = """
import torch
from transformers import AutoModel, AutoProcessor, GenerationMixin, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaForCausalLM
torch.set_num_threads(threads)
imported = time.perf_counter()
from safetensors.torch import load_file
weights = load_file(f"{folder}/model.safetensors")
for value in weights.values():
    value.max()
loaded = time.perf_counter()
"""
OURS = """
import torch
import fwd2bot
from transformers import AutoModel, AutoProcessor
from transformers.utils import logging
fwd2bot.Fwd2BotForConditionalGeneration
torch.set_num_threads(threads)
logging.disable_progress_bar()
imported = time.perf_counter()
model = AutoModel.from_pretrained(folder{stage}).eval()
processor = AutoProcessor.from_pretrained(folder)
loaded = time.perf_counter()
"""
COMPRESS = """
from PIL import Image
summary = model.compress(**processor.process_images(f"{folder}/picture.png"))
"""
EMBED = """
model.embed(**processor.process_texts("a red square"))
"""
ANSWER = """
summary = model.load_summary(f"{folder}/summary.safetensors") if model.stage else summary
chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is at the top?"}]}]
inputs = processor(text=processor.apply_chat_template(chat, add_generation_prompt=True))
ids = model.generate_from_summary(summary, **inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False)
processor.batch_decode(ids)
"""
WAYS = {
    "floor": FLOOR,
    "generate": OURS.replace("{stage}", ", stage='generate'") + ANSWER,
    "compress": OURS.replace("{stage}", ", stage='compress'") + COMPRESS,
    "text": OURS.replace("{stage}", ", stage='text'") + EMBED + ANSWER,
    "everything": OURS.replace("{stage}", "") + COMPRESS + ANSWER,
}


def run(program: str, folder: str, threads: int) -> dict[str, float]:
    command = [sys.executable, "-c", HEAD + program + TAIL, folder, str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tempfile.gettempdir())
    if done.returncode != 0:
        raise RuntimeError(f"The program failed:\n{program}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = parser_of(__doc__, ("tiny", "small", "1b"))
    args = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        model, processor, side = set_up(args)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        [picture] = drawn_pictures(1, side)
        picture.save(Path(folder, "picture.png"))
        model.compress(**processor.process_images(picture)).save_file(Path(folder, "summary.safetensors"))
        del model
        for repetition in range(-1, args.repetitions):
            for way, program in WAYS.items():
                one = run(program, folder, args.threads)
                if repetition >= 0:
                    found[way].append(one)
    rows = []
    for way, taken in found.items():
        row: dict[str, Any] = {"process": way}
        for name in ("all", "import", "load", "first"):
            row[f"{name}, s"] = statistics.median(one[name] for one in taken)
        row["resident, MB"] = statistics.median(one["resident"] for one in taken) / 1e6
        row["all / floor"] = statistics.median(
            one["all"] / floor["all"] for one, floor in zip(taken, found["floor"], strict=True)
        )
        rows.append(row)
    report(args, rows)
    parts = ("import", "load", "first")
    draw_parts(args, {row["process"]: {part: row[f"{part}, s"] for part in parts} for row in rows}, "s")


if __name__ == "__main__":
    main()
