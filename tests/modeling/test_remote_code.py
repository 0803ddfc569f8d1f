"""Law 7: the Hub folder alone is enough, in processes that cannot import `fwd2bot`."""

import os
import subprocess
import sys

import pytest
import tiny
import torch
from safetensors.torch import load_file

PROGRAM = """
import sys

class NoFwd2Bot:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "fwd2bot":
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, NoFwd2Bot())
folder, next_folder, pictures, results = sys.argv[1:]

import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
assert config.model_type == "fwd2bot", config.model_type
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
assert type(processor).__name__ == "Fwd2BotProcessor"
images = [Image.open(f"{pictures}/{index}.png") for index in range(2)]
prompts = [
    processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}], add_generation_prompt=True
    )
    for text in ("What is it?", "Why?")
]
tensors = {}
for auto_class, options in (
    (AutoModel, {}),
    (AutoModelForImageTextToText, {}),
    (AutoModel, {"stage": "text", "dtype": torch.float32, "device_map": "cpu", "attn_implementation": "sdpa"}),
):
    model = auto_class.from_pretrained(folder, trust_remote_code=True, **options)
    name = f"{auto_class.__name__}-{model.stage}"
    tensors[f"{name}-texts"] = model.embed(**processor.process_texts(["a dog", "two cats"]))
    if model.stage is None:
        summary = model.compress(**processor.process_images(images), num_summary_tokens=3)
        tensors[f"{name}-summary"] = summary.tokens
        tensors[f"{name}-direct"] = model.generate(**processor(images=images, text=prompts), max_new_tokens=6)
        model.save_pretrained(next_folder)
        summary.save_file(f"{results}.summary")
        read = type(summary).load_file(f"{results}.summary")
    ids = model.generate_from_summary(read, **processor(text=prompts), max_new_tokens=6)
    tensors[f"{name}-answer"] = ids
processor.save_pretrained(next_folder)
assert not any(name.partition(".")[0] == "fwd2bot" for name in sys.modules)
save_file({name: value.contiguous() for name, value in tensors.items()}, results)
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What this process gives, what one gives that has only its folder, and one that has only the folder of that."""
    base = tmp_path_factory.mktemp("law7")
    pictures = tiny.pictures(2)
    for index, picture in enumerate(pictures):
        picture.save(base / f"{index}.png")
    model, processor = tiny.tiny_fwd2bot(), tiny.tiny_processor()
    model.save_pretrained(base / "first")
    processor.save_pretrained(base / "first")
    prompts = tiny.prompts(processor, ["What is it?", "Why?"])
    expected = {
        "texts": model.embed(**processor.process_texts(["a dog", "two cats"])),
        "summary": model.compress(**processor.process_images(pictures), num_summary_tokens=3).tokens,
        "direct": model.generate(**processor(images=pictures, text=prompts), max_new_tokens=6),
    }
    summary = model.compress(**processor.process_images(pictures), num_summary_tokens=3)
    expected["answer"] = model.generate_from_summary(summary, **processor(text=prompts), max_new_tokens=6)

    found = []
    for folder, next_folder in (("first", "second"), ("second", "third")):
        cwd = base / f"cwd-{folder}"
        cwd.mkdir()
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment["HF_MODULES_CACHE"] = str(base / f"modules-{folder}")
        output = base / f"{folder}.safetensors"
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, base / folder, base / next_folder, base, output],
            cwd=cwd,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        (base / folder).rename(base / f"{folder}-gone")  # the next one must not need it
        found.append((done.stderr, load_file(output)))
    return expected, found


@pytest.mark.parametrize("generation", [0, 1])
@pytest.mark.parametrize("kind", ["texts", "summary", "direct", "answer"])
def test_outputs_are_identical_without_the_package(results, generation, kind):
    expected, found = results
    _, tensors = found[generation]
    same_kind = {name: value for name, value in tensors.items() if name.endswith(f"-{kind}")}
    assert len(same_kind) == (3 if kind in ("texts", "answer") else 2)
    for name, value in same_kind.items():
        assert torch.equal(value, expected[kind]), name


@pytest.mark.parametrize("generation", [0, 1])
def test_loading_without_the_package_warns_of_no_weight(results, generation):
    stderr, _ = results[1][generation]
    assert not any(word in stderr for word in ("MISSING", "UNEXPECTED", "MISMATCH", "newly initialized"))
