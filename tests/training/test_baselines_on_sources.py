"""Rows of the comparison that train on data sets and are judged by others."""

import json

import pytest
import yaml
from tiny_recipes import BACKBONE, TRAINING
from tiny_sources import picture_bytes, write_captions

from fwd2bot.training.backbone import build_backbone, build_processor
from fwd2bot.training.baselines import run
from fwd2bot.training.recipe import BackboneModel
from fwd2bot.training.tokenizer import train_tokenizer

ROWS = ("uncompressed", "fwd2bot", "pooling-k4", "cache")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random LLaVA with 16 image tokens, captions, questions, and a recipe on both."""
    import datasets

    folder = tmp_path_factory.mktemp("world")
    captions = write_captions(folder)
    asked = [
        {"image": content, "question": "What is this?", "answer": f"number {number}", "group": f"{number % 2}"}
        for number, content in enumerate(picture_bytes(4, seed=3))
    ]
    datasets.Dataset.from_list(asked).to_parquet(folder / "asked.parquet")
    sizes = BackboneModel(**{**BACKBONE, "patch_size": 24})
    texts = ["photo number what is this? describe the image. 0 1 2 3 4 5 6 7 8 9"]
    tokenizer = train_tokenizer(texts, sizes.vocab_size, sizes.max_position_embeddings)
    build_backbone(sizes, tokenizer).save_pretrained(folder / "backbone")
    build_processor(sizes, tokenizer).save_pretrained(folder / "backbone")
    photos = {"name": "photos", "format": "captions", "path": captions.path}
    questions = {"name": "questions", "format": "vqa", "path": str(folder / "asked.parquet")}
    values = {
        "kind": "fwd2bot",
        "model": {"backbone": "none", "lora_rank": 4},
        "data": {"sources": [photos, {**questions, "weight": 0.5}], "contrastive_max_tokens": None},
        "validation": {"sources": [{**questions, "columns": {"group": "group"}}, photos], "max_new_tokens": 4},
        "optimizer": {"name": "adamw", "learning_rate": 0.01},
        # of no row, trained or not: they would not go together
        "training": {**TRAINING, "eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    return folder


def command(folder, output, *more):
    given = ["--backbone", str(folder / "backbone"), "--recipe", str(folder / "recipe.yaml"), "--steps", "2"]
    run.main([str(output), *given, "--seeds", "0", "--test-pictures", "3", *more])


@pytest.fixture(scope="module")
def results(folder):
    command(folder, folder / "results", "--rows", *ROWS)
    return {name: json.loads((folder / "results" / f"{name}-seed0.json").read_text()) for name in ROWS}


def test_rows_are_judged_by_the_validation_sources(results):
    figures = results["fwd2bot"]["figures"]
    assert figures["judged"] == {
        "questions": {"rows": 3, "pictures": 3},
        "photos": {"rows": 3, "pictures": 3, "captions": 6},
    }
    for k in (1, 16):
        one = figures[f"k={k}"]
        assert set(one["questions"]) == {"exact_match", "consistency", "bytes_per_image"}
        assert {"captions", "text_to_image", "image_to_text"} <= set(one["photos"])
        assert figures["cost"][f"k={k}"]["bytes_per_image"] == one["photos"]["bytes_per_image"] == 2 * 32 * k
    assert results["fwd2bot"]["steps_done"] == 2 and len(results["fwd2bot"]["loss"]) == 2


def test_what_embeds_nothing_has_captions_and_no_retrieval(results):
    for name, setting in (("uncompressed", "uncompressed"), ("pooling-k4", "k=4"), ("cache", "k=4")):
        figures = results[name]["figures"]
        assert "captions" in figures[setting]["photos"] and "text_to_image" not in figures[setting]["photos"]
    assert set(results["uncompressed"]["figures"]["cost"]) == {"uncompressed"}
    assert results["uncompressed"]["figures"]["cost"]["uncompressed"]["tokens_per_image"] == 16
    kept = results["cache"]["figures"]["k=4"]["photos"]["bytes_per_image"]
    assert kept == 2 * 4 * (2 * 2 * 32)  # keys and values of two layers


def test_rows_of_one_comparison_have_the_same_data(results, folder, tmp_path):
    assert {json.dumps([one["sources"], one["judged"], one["split"]]) for one in results.values()} == {
        json.dumps([{"photos": 1.0, "questions": 0.5}, ["questions", "photos"], None])
    }
    values = yaml.safe_load((folder / "recipe.yaml").read_text())
    values["data"]["sources"] = values["data"]["sources"][:1]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(SystemExit, match="sources was .*questions.* and is {'photos': 1.0}"):
        command(folder, folder / "results", "--recipe", str(tmp_path / "recipe.yaml"), "--rows", "fwd2bot")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optimizer.learning_rate=0.02", "optimizer.learning_rate was 0.01 and is 0.02"),
        ("validation.max_new_tokens=5", "validation.max_new_tokens was 4 and is 5"),
        ("data.contrastive_max_tokens=7", "data.contrastive_max_tokens was None and is 7"),
        ("training.max_grad_norm=9", "training.max_grad_norm was .* and is 9"),
    ],
)
def test_rows_of_another_recipe_do_not_compare(results, folder, override, said):
    with pytest.raises(SystemExit, match=said):
        command(folder, folder / "results", override, "--rows", "fwd2bot")


def test_rows_judged_by_another_file_do_not_compare(results, folder, tmp_path):
    values = yaml.safe_load((folder / "recipe.yaml").read_text())
    (folder / "others.parquet").write_bytes((folder / "asked.parquet").read_bytes())
    values["validation"]["sources"][0]["path"] = str(folder / "others.parquet")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(SystemExit, match="sources.questions.path was 'asked.parquet' and is 'others.parquet'"):
        command(folder, folder / "results", "--recipe", str(tmp_path / "recipe.yaml"), "--rows", "fwd2bot")


def test_what_a_row_may_have_of_its_own_compares(results, folder, capsys):
    more = ("training.disable_tqdm=true", "training.dataloader_num_workers=0", "validation.samples=9")
    command(folder, folder / "results", *more, "--rows", "fwd2bot")
    assert "fwd2bot-seed0.json: done before" in capsys.readouterr().out


def test_recipe_that_rows_cannot_train_on_is_refused(folder, tmp_path):
    with pytest.raises(SystemExit, match="--split is of the drawn scenes"):
        command(folder, tmp_path / "out", "--split", "test")
    with pytest.raises(SystemExit, match="kind fwd2bot, not backbone"):
        command(folder, tmp_path / "out", "--recipe", "backbone.yaml")
    for override, name in (
        ("model.init_from=none", "model.init_from"),
        ("contrastive.loss=sigmoid", "contrastive.loss"),
    ):
        with pytest.raises(SystemExit, match=f"have no {name}; leave it out"):
            command(folder, tmp_path / "out", override)
    values = yaml.safe_load((folder / "recipe.yaml").read_text())
    values["validation"]["sources"][0]["path"] = str(tmp_path / "missing.parquet")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(SystemExit, match="missing.parquet"):
        command(folder, tmp_path / "out", "--recipe", str(tmp_path / "recipe.yaml"))
    values = yaml.safe_load((folder / "recipe.yaml").read_text()) | {"validation": {}}
    values["training"].pop("eval_strategy")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(SystemExit, match="give validation.sources"):
        command(folder, tmp_path / "out", "--recipe", str(tmp_path / "recipe.yaml"))
    assert not (tmp_path / "out").exists()
