"""Recipes with `data.sources`, and recipes upon a base."""

import dataclasses

import pytest
import yaml

from fwd2bot.training.recipe import load_recipe
from fwd2bot.training.source_recipe import SourcesData

CHAT = {"name": "chat", "format": "llava", "path": "chat.json"}
PHOTOS = {"name": "photos", "format": "captions", "path": "photos.parquet", "weight": 2}


def write(folder, name="recipe.yaml", **values):
    path = folder / name
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def recipe_of(folder, *sources, kind="fwd2bot", overrides=(), **data):
    return load_recipe(write(folder, kind=kind, data={"sources": list(sources), **data}), overrides)


def test_sources_are_read_as_such_for_both_kinds(tmp_path):
    data = recipe_of(tmp_path, CHAT, PHOTOS, contrastive_max_tokens=None).data
    assert isinstance(data, SourcesData)
    assert [(one.name, one.weight, one.use) for one in data.sources] == [
        ("chat", 1.0, "both"),
        ("photos", 2.0, "both"),
    ]
    plain = recipe_of(tmp_path, CHAT, PHOTOS, kind="backbone").data
    assert [one.use for one in plain.sources] == ["ar", "ar"]  # a plain backbone has no contrastive side


def test_recipe_goes_into_json_and_takes_overrides(tmp_path):
    recipe = recipe_of(tmp_path, CHAT, overrides=["data.max_broken=0", "data.seed=3"])
    assert (recipe.data.max_broken, recipe.data.seed) == (0, 3)
    assert recipe.to_dict()["data"]["sources"][0] == dataclasses.asdict(recipe.data.sources[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "csv"}, r"data.sources\['chat'\].format is 'csv'; choose one of llava, messages, captions, vqa"),
        ({"use": "all"}, "use is 'all'; choose one of both, ar, contrastive"),
        ({"use": "contrastive"}, "use is contrastive, which takes captions, but its format is llava"),
        ({"weight": 0}, "weight is 0.0; give a number above 0"),
        ({"weight": "much"}, r"data.sources\[0\].weight is 'much', of type str; it must be float"),
        ({"wieght": 1}, r"unknown key wieght in data.sources\[0\]; the allowed ones are .*weight"),
        ({"path": " "}, "path is empty"),
        ({"shuffle_buffer": 0}, "shuffle_buffer is 0"),
        ({"columns": {"caption": "a"}}, "unknown key caption in .*columns; a source of format llava has id, image"),
        ({"columns": {"image_id": "id"}, "streaming": True}, "columns.image_id joins with a table of images"),
        ({"answers": "all"}, "answers is 'all'; choose one of vote, join"),
    ],
)
def test_source_that_cannot_be_is_fatal(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        recipe_of(tmp_path, CHAT | change)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"sources": []}, "data.sources is empty; list at least one source"),
        ({"sources": [CHAT, CHAT]}, "data.sources has chat more than once"),
        ({"sources": [{"name": "chat"}]}, r"data.sources\[0\] has no format and no path; give name, format, path"),
        ({"sources": ["chat"]}, r"data.sources\[0\] is 'chat'; give keys and values"),
        ({"sources": [CHAT], "max_length": 1}, "data.max_length is 1; give 8 or more"),
        ({"sources": [CHAT], "max_broken": -1}, "data.max_broken is -1; give 0 or more"),
        ({"sources": [CHAT], "contrastive_max_tokens": 0}, "contrastive_max_tokens is 0; give 1 or more, or null"),
        ({"sources": [CHAT], "caption_prompts": []}, "data.caption_prompts is .*at least one"),
        ({"sources": [CHAT], "pictures": 3}, "unknown key pictures in data"),
    ],
)
def test_section_that_cannot_be_is_fatal(tmp_path, data, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(write(tmp_path, kind="fwd2bot", data=data))


def test_contrastive_source_is_refused_for_a_plain_backbone(tmp_path):
    with pytest.raises(ValueError, match="'photos'.*kind backbone has no contrastive side"):
        recipe_of(tmp_path, PHOTOS | {"use": "contrastive"}, kind="backbone")


def test_base_comes_first_and_lists_are_replaced(tmp_path):
    write(
        tmp_path,
        "base.yaml",
        kind="fwd2bot",
        data={"seed": 4, "max_broken": 7, "sources": [CHAT, PHOTOS]},
        training={"max_steps": 5, "output_dir": "a"},
    )
    write(tmp_path, "middle.yaml", base="base.yaml", data={"max_broken": 8})
    top = write(tmp_path, "top.yaml", base="middle.yaml", data={"sources": [CHAT]}, training={"output_dir": "b"})
    recipe = load_recipe(top, ["training.max_steps=6"])
    assert (recipe.kind, recipe.data.seed, recipe.data.max_broken) == ("fwd2bot", 4, 8)
    assert [source.name for source in recipe.data.sources] == ["chat"]
    assert recipe.training == {"max_steps": 6, "output_dir": "b"}


def test_base_may_be_a_recipe_of_the_package(tmp_path):
    recipe = load_recipe(write(tmp_path, base="backbone.yaml", training={"max_steps": 2}))
    assert recipe.kind == "backbone" and recipe.training["max_steps"] == 2 and recipe.training["bf16"] is True


@pytest.mark.parametrize(
    ("base", "error", "message"),
    [
        ("nowhere.yaml", FileNotFoundError, "there is no recipe 'nowhere.yaml'"),
        (["a.yaml"], ValueError, "base is \\['a.yaml'\\]; give the file name of one other recipe"),
        ("recipe.yaml", ValueError, "name each other as their base: recipe.yaml -> recipe.yaml"),
    ],
)
def test_base_that_cannot_be_is_fatal(tmp_path, base, error, message):
    with pytest.raises(error, match=message):
        load_recipe(write(tmp_path, kind="fwd2bot", base=base))


def test_base_is_no_override(tmp_path):
    with pytest.raises(ValueError, match="base cannot be set on the command line"):
        load_recipe("backbone.yaml", ["base=fwd2bot.yaml"])
