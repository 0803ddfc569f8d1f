"""Recipes of both stages that train in seconds: shapes only, a few pictures, models of some thousand parameters."""

from pathlib import Path

import yaml

DATA = {
    "pictures": 12,
    "rounds": 4,
    "row_length": 160,
    "questions": {"presence": 1, "where": 1.5},
    "tokenizer_scenes": 40,
    "shapes_only": True,
}
TRAINING = {
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "save_steps": 2,
    "save_total_limit": 2,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "lr_scheduler_type": "linear",
}
BACKBONE = {
    "image_size": 96,
    "patch_size": 48,
    "vision_hidden_size": 16,
    "vision_layers": 1,
    "vision_heads": 2,
    "vision_intermediate_size": 32,
    "hidden_size": 32,
    "layers": 2,
    "heads": 2,
    "intermediate_size": 48,
    "vocab_size": 400,
}


def write_backbone_recipe(folder: Path, output_dir: Path, **training) -> Path:
    values = {
        "kind": "backbone",
        "model": BACKBONE,
        "data": DATA,
        "training": TRAINING | {"output_dir": str(output_dir)} | training,
    }
    path = folder / "backbone.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def write_several_recipe(folder: Path, init_from: Path, output_dir: Path, **training) -> Path:
    values = {
        "kind": "fwd2bot",
        "model": {"init_from": str(init_from), "summary_lengths": [1, 2, 4]},
        "data": DATA | {"several": {"share": 0.7, "pictures": [2, 3]}},
        "training": TRAINING | {"output_dir": str(output_dir)} | training,
    }
    path = folder / "several.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def write_fwd2bot_recipe(folder: Path, backbone: Path, output_dir: Path, **training) -> Path:
    values = {
        "kind": "fwd2bot",
        "model": {
            "backbone": str(backbone),
            "lora_rank": 4,
            "num_summary_tokens": 4,
            "summary_lengths": [1, 2, 4],
        },
        "data": DATA | {"full_share": 0.5},
        "training": TRAINING | {"output_dir": str(output_dir)} | training,
    }
    path = folder / "fwd2bot.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path
