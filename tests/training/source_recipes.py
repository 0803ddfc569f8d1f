"""Recipes on data sets of real formats, for a tiny backbone, all written into a folder."""

import json
from pathlib import Path
from typing import Any

import chunked_batches as made
import tiny
import yaml

COLOURS = ("red", "blue", "green", "grey", "white")


def write_backbone(folder: Path, **overrides: Any) -> Path:
    """The tiny LLaVA with its processor, as it would lie on a disk."""
    path = folder / "backbone"
    tiny.tiny_backbone(**overrides).save_pretrained(path)
    tiny.tiny_backbone_processor().save_pretrained(path)
    return path


def write_data(folder: Path, pictures: int = 12) -> None:
    """`chat.json` in LLaVA's format, `captions.jsonl`, and the pictures of both."""
    (folder / "images").mkdir(parents=True)
    for number, picture in enumerate(tiny.pictures(pictures)):
        picture.save(folder / "images" / f"{number}.png")
    chat = [
        {
            "id": str(number),
            "image": f"{number}.png",
            "conversations": [
                {"from": "human", "value": "<image>\nWhich colour?"},
                {"from": "gpt", "value": COLOURS[number % len(COLOURS)]},
            ],
        }
        for number in range(pictures)
    ]
    (folder / "chat.json").write_text(json.dumps(chat), encoding="utf-8")
    rows = [
        {"image": f"{number}.png", "captions": [made.CAPTIONS[number % len(made.CAPTIONS)]]}
        for number in range(pictures)
    ]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def sources(folder: Path) -> list[dict[str, Any]]:
    shared = {"images": str(folder / "images")}
    return [
        {"name": "chat", "format": "llava", "path": str(folder / "chat.json"), "use": "ar", **shared},
        {"name": "captions", "format": "captions", "path": str(folder / "captions.jsonl"), **shared},
    ]


def write_source_recipe(folder: Path, output_dir: Path, sections: dict[str, Any] | None = None, **training) -> Path:
    """A recipe on a mixture of both; `sections` are merged into it, one level deep."""
    if not (folder / "chat.json").exists():
        write_data(folder)
    if not (folder / "backbone").exists():
        write_backbone(folder)
    values: dict[str, Any] = {
        "kind": "fwd2bot",
        "model": {
            "backbone": str(folder / "backbone"),
            "lora_rank": 4,
            "num_summary_tokens": 4,
            "summary_lengths": [1, 2, 4],
        },
        "data": {"sources": sources(folder)},
        "contrastive": {"chunk_size": 2},
        "optimizer": {"name": "adamw", "learning_rate": 0.003, "matrix_learning_rate": 0.003},
        "training": {
            "output_dir": str(output_dir),
            "max_steps": 6,
            "per_device_train_batch_size": 4,
            "logging_steps": 1,
            "save_steps": 2,
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
        },
    }
    for name, section in (sections or {}).items():
        values[name] = {**values.get(name, {}), **section} if isinstance(section, dict) else section
    values["training"] |= training
    path = folder / f"{output_dir.name}.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path
