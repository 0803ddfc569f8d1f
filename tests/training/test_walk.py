"""docs/training-real.md, walked on small data with a random backbone: every command that it says is run here."""

import json
import re
import shlex
from pathlib import Path

import pytest
import tiny
from huggingface_hub import ModelCard
from source_recipes import write_data
from tiny_sources import write_captions

from fwd2bot import Fwd2BotForConditionalGeneration, Fwd2BotProcessor
from fwd2bot.training import evaluate, export, train

PAGE = (Path(__file__).parents[2] / "docs" / "training-real.md").read_text(encoding="utf-8")
MODULES = {"train": train.main, "evaluate": evaluate.main, "export": export.main}
SMALL = {
    "model.dtype": "float32",
    "model.num_summary_tokens": "4",
    "model.summary_lengths": "[2,4]",
    "contrastive.chunk_size": "2",
    "training.per_device_train_batch_size": "4",
    "training.max_steps": "2",
    "training.warmup_steps": "0",
    "training.bf16": "false",
    "training.use_cpu": "true",
    "training.dataloader_num_workers": "0",
    "training.dataloader_persistent_workers": "false",
    "training.gradient_checkpointing": "false",
    "training.report_to": "none",
    "training.logging_steps": "1",
    "training.disable_tqdm": "true",
    "training.eval_steps": "2",
    "validation.samples": "4",
    "validation.max_new_tokens": "4",
}
PHOTOS = {
    "validation.samples": "6",
    "model.lora_rank": "4",
    "training.save_steps": "2",
    "training.eval_strategy": "steps",
}
PHOTOS_BACKBONE = {
    "model.vision_layers": "1",
    "model.layers": "1",
    "model.vocab_size": "400",
    "training.save_steps": "2",
}


def commands() -> list[list[str]]:
    blocks = re.findall(r"<!-- run by tests/training/test_walk.py -->\n```bash\n(.*?)```", PAGE, re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


def block(mark: str, language: str) -> str:
    return re.search(rf"<!-- {re.escape(mark)} -->\n```{language}\n(.*?)```", PAGE, re.DOTALL)[1]


def run(command: list[str], overrides: dict[str, str]) -> None:
    """A command of the page, made small: the CPU, float32, few tokens, few steps."""
    assert command[:2] == ["python", "-m"], command
    name = command[2].removeprefix("fwd2bot.training.")
    arguments = [{"bfloat16": "float32", "cuda": "cpu"}.get(one, one) for one in command[3:]]
    if name == "train":
        arguments += [f"{key}={value}" for key, value in overrides.items()]
    if name == "evaluate":
        arguments += ["--max-new-tokens", "4"]
    MODULES[name](arguments)


@pytest.fixture
def walk(tmp_path, monkeypatch):
    """An empty folder to work in, as the user's."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_walk_from_a_backbone_and_two_data_sets_to_what_would_be_pushed(walk, capsys):
    write_data(walk / "data")
    (walk / "data" / "chat.json").rename(walk / "data" / "llava_v1_5_mix665k.json")
    (walk / "data" / "captions.jsonl").rename(walk / "data" / "validation_captions.jsonl")
    asked = [{"image": f"{number}.png", "question": "Which colour?", "answer": "red"} for number in range(3)]
    (walk / "data" / "validation_questions.jsonl").write_text("\n".join(map(json.dumps, asked)))
    (walk / "data" / "captions").mkdir()
    write_captions(walk / "data" / "captions")
    backbone = walk / "models" / "llava-1.5-7b-hf"
    tiny.tiny_backbone().save_pretrained(backbone)
    tiny.tiny_backbone_processor().save_pretrained(backbone)
    (walk / "mine.yaml").write_text(block("mine.yaml of tests/training/test_walk.py", "yaml"))

    mine = [command for command in commands() if "photos" not in " ".join(command)]
    assert [command[2].rpartition(".")[2] for command in mine] == ["train", "train", "evaluate", "export", "export"]
    for command in mine:
        run(command, SMALL)
    assert "would go to" in capsys.readouterr().out

    card = ModelCard.load(walk / "hub" / "mine" / "README.md")
    assert card.data.base_model == "llava-hf/llava-1.5-7b-hf" and card.data.license == "llama2"
    assert {result.dataset_name for result in card.data.eval_results} == {"held-out captions", "held-out questions"}
    assert "cc-by-4.0" in card.text and "training.per_device_train_batch_size=1024" in card.text
    assert "--data runs/mine/recipe.json" in card.text
    assert str(walk) not in card.content

    loaded = Fwd2BotForConditionalGeneration.from_pretrained(walk / "hub" / "mine", backbone=str(backbone))
    trained = Fwd2BotForConditionalGeneration.from_pretrained(walk / "runs" / "mine" / "final")
    assert loaded.fingerprint == trained.fingerprint
    assert isinstance(Fwd2BotProcessor.from_pretrained(walk / "hub" / "mine"), Fwd2BotProcessor)


@pytest.mark.slow
def test_walk_from_nothing_on_photos(walk):
    folder = walk / "data" / "flickr8k"
    (folder / "images").mkdir(parents=True)
    lines = ["image,caption"]
    for number, picture in enumerate(tiny.pictures(18)):
        picture.save(folder / "images" / f"{number}.png")
        lines += [f"{number}.png,A dog number {number} runs {word} ." for word in ("fast", "away")]
    (folder / "captions.txt").write_text("\n".join(lines))
    exec(compile(block("run by tests/training/test_walk.py", "python"), "docs", "exec"), {})
    splits = [
        {json.loads(row)["image"] for row in (folder / f"{name}.jsonl").read_text().splitlines()}
        for name in ("train", "validation", "test")
    ]
    assert [len(split) for split in splits] == [6, 6, 6] and len(set.union(*splits)) == 18
    (walk / "photos_test.yaml").write_text(block("photos_test.yaml of tests/training/test_walk.py", "yaml"))

    backbone, fwd2bot, judged = [command for command in commands() if "photos" in " ".join(command)]
    training = {key: value for key, value in SMALL.items() if key.startswith("training") and "eval" not in key}
    run(backbone, training | PHOTOS_BACKBONE)
    run(fwd2bot, {key: value for key, value in SMALL.items() if key != "model.dtype"} | PHOTOS)
    run(judged, {})
    results = json.loads((walk / "runs" / "photos" / "evaluation.json").read_text())
    assert {name: source["pictures"] for name, source in results["sources"].items()} == {"flickr8k test": 6}
