"""`evaluate --data` on data in the formats of the field's benchmarks, with a tiny random model."""

import hashlib
import json

import pytest
import tiny
import torch
import yaml
from source_recipes import write_backbone

from fwd2bot.training.compositional import compositional_figures
from fwd2bot.training.evaluate import main
from fwd2bot.training.provenance import weights_hash
from fwd2bot.training.recipe import load_recipe
from fwd2bot.training.source_reader import SourceReader
from fwd2bot.training.source_recipe import SourceRecipe, SourcesData
from fwd2bot.training.sources import Source


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmarks")
    (folder / "images").mkdir()
    for number, picture in enumerate(tiny.pictures(6)):
        picture.save(folder / "images" / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def parts():
    return tiny.tiny_fwd2bot(), tiny.tiny_processor()


@pytest.fixture(scope="module")
def checkpoint(parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    for part in parts:
        part.save_pretrained(folder)
    return folder


def source(folder, name, values, lines=True, **fields):
    """A source of a file that holds rows, or of one JSON value."""
    path = folder / name
    path.write_text("\n".join(map(json.dumps, values)) if lines else json.dumps(values))
    return {"name": path.stem, "path": str(path), "images": str(folder / "images"), **fields}


def evaluated(checkpoint, folder, sources, *options):
    (folder / "judged.yaml").write_text(yaml.safe_dump({"sources": sources}))
    output = folder / "figures.json"
    short = ["--lengths", "1", "4", "--max-new-tokens", "3"]
    main([str(checkpoint), "--data", str(folder / "judged.yaml"), *short, "--output", str(output), *options])
    return json.loads(output.read_text())


def nearer(parts, folder, k):
    """`(6 pictures, 2 captions)` cosines, and the captions."""
    model, processor = parts
    images = [folder / "images" / f"{number}.png" for number in range(6)]
    embeds = model.embed(**processor.process_images(images), num_summary_tokens=k)
    return embeds @ model.embed(**processor.process_texts(["a red dog", "two cats"]), num_summary_tokens=k).T


def test_sugarcrepe_files_give_the_share_of_each_sort_and_their_mean(parts, folder):
    scores = nearer(parts, folder, 4)
    texts = ["a red dog", "two cats"]
    best = scores.argmax(1).tolist()
    crepe = folder / "crepe"
    crepe.mkdir()
    wrong_way_round = {"add_obj": 0, "swap_att": 3}  # rows whose true caption is the one further away
    for sort, wrong in wrong_way_round.items():
        rows = {}
        for number, first in enumerate(best):
            true = first if number >= wrong else 1 - first
            pair = {"caption": texts[true], "negative_caption": texts[1 - true]}
            rows[str(number)] = {"filename": f"{number}.png", **pair}
        (crepe / f"{sort}.json").write_text(json.dumps(rows))
    recipe = SourceRecipe("crepe", "sugarcrepe", str(crepe), images=str(folder / "images"))
    data = SourcesData(sources=[recipe])
    figures = compositional_figures(*parts, SourceReader(Source(recipe), data, parts[1]), [1, 4], batch_size=4)
    assert (figures["rows"], figures["pictures"]) == (12, 6)
    assert figures["k=4"]["preference"] == {"add_obj": 1.0, "swap_att": 0.5, "mean": 0.75}
    assert figures["k=1"]["bytes_per_image"] == 1 * 32 * 2
    [only] = sorted(crepe.glob("add_*"))
    one_file = SourceRecipe("crepe", "sugarcrepe", str(only), images=str(folder / "images"))
    figures = compositional_figures(*parts, SourceReader(Source(one_file), data, parts[1]), [4])
    assert set(figures["k=4"]["preference"]) == {"add_obj", "mean"}


def test_winoground_rows_score_as_their_embeddings_say(parts, folder):
    scores = nearer(parts, folder, 4)
    rows = []
    for i in range(0, 6, 2):
        pair = {"image_0": f"{i}.png", "image_1": f"{i + 1}.png", "caption_0": "a red dog", "caption_1": "two cats"}
        rows.append({"id": i, **pair, "tag": "first" if i == 0 else "rest"})
    fields = {"format": "winoground", "columns": {"category": "tag"}}
    recipe = SourceRecipe(**source(folder, "wino.jsonl", rows, **fields))
    reader = SourceReader(Source(recipe), SourcesData(sources=[recipe]), parts[1])
    figures = compositional_figures(*parts, reader, [4], batch_size=2)
    assert (figures["rows"], figures["pictures"]) == (3, 6)
    found = figures["k=4"]["winoground"]
    text, image = [], []
    for i in range(0, 6, 2):
        (a, b), (c, d) = scores[i : i + 2].tolist()  # picture i with both captions, then picture i + 1
        text.append(a > b and d > c)
        image.append(a > c and d > b)
    assert found["text"] == pytest.approx(sum(text) / 3) and found["image"] == pytest.approx(sum(image) / 3)
    assert found["group"] == pytest.approx(sum(t and i for t, i in zip(text, image, strict=True)) / 3)
    assert found["by_category"]["first"]["text"] == float(text[0])


def test_questions_of_benchmarks_get_the_figures_that_their_columns_allow(checkpoint, folder, capsys):
    pope = [
        {"question_id": n, "image": f"{n}.png", "text": "Is there a dog in the image?", "label": label, "sort": sort}
        for n, (label, sort) in enumerate([("yes", "random"), ("no", "random"), ("yes", "popular"), ("no", "popular")])
    ]
    names = {"question": "text", "answer": "label", "category": "sort"}
    nlvr = [
        {"image": f"{n}.png", "sentence": "There is a dog.", "label": label, "group": n // 2}
        for n, label in enumerate(["true", "false", "true", "true"])
    ]
    vqa = [{"image": "0.png", "question": "What?", "answers": [{"answer": "cat"}] * 7 + [{"answer": "dog"}] * 3}]
    sources = [
        source(folder, "pope.jsonl", pope, format="vqa", columns=names),
        source(
            folder,
            "nlvr.jsonl",
            nlvr,
            format="vqa",
            columns={"question": "sentence", "answer": "label", "group": "group"},
        ),
        source(folder, "vqav2.jsonl", vqa, format="vqa"),
    ]
    results = evaluated(checkpoint, folder, sources)
    for setting in ("uncompressed", "k=1", "k=4"):
        yes_no = results["sources"]["pope"][setting]["yes_no"]
        assert yes_no["neither"] == 1.0 and yes_no["f1"] == 0.0  # random bytes
        assert set(results["sources"]["pope"][setting]["by_category"]) == {"random", "popular"}
        assert results["sources"]["nlvr"][setting]["consistency"] == 0.0
        assert results["sources"]["vqav2"][setting]["vqa_accuracy"] == 0.0
    table = capsys.readouterr().out
    for row in ("yes_no f1", "consistency", "vqa_accuracy", "tokens_per_image", "cache_bytes", "first_token_ms"):
        assert row in table
    assert "by_category popular yes_no accuracy" in table


def test_an_answer_that_the_model_gives_is_right_for_vqa_and_for_its_group(checkpoint, folder, parts):
    model, processor = parts
    prompt = processor.apply_chat_template(tiny.conversation("What?"), add_generation_prompt=True)
    inputs = processor(images=folder / "images" / "0.png", text=prompt)
    ids = model.generate(**inputs, num_summary_tokens=4, max_new_tokens=3, do_sample=False)
    said = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
    rows = [
        {"image": "0.png", "question": "What?", "answers": [said] * 2 + ["cat"], "g": "a"},
        {"image": "0.png", "question": "What?", "answers": ["cat"] * 2 + ["dog"], "g": "b"},
    ]
    results = evaluated(checkpoint, folder, [source(folder, "own.jsonl", rows, format="vqa", columns={"group": "g"})])
    figures = results["sources"]["own"]["k=4"]
    assert figures["exact_match"] == figures["consistency"] == 0.5
    assert 0 < figures["vqa_accuracy"] <= 0.5


def test_annotated_objects_are_asked_about_with_three_sorts_of_absent_things(checkpoint, folder):
    rows = [{"image": f"{n}.png", "objects": names} for n, names in enumerate([["dog", "car"], ["car"], ["Owl"]])]
    rows.append({"image": "3.png", "objects": "dog"})  # no list: left out and counted
    found = evaluated(checkpoint, folder, [source(folder, "objects.jsonl", rows, format="objects")])["sources"]
    assert found["objects"]["broken"] == 1 and found["objects"]["pictures"] == 3
    assert set(found["objects"]["k=1"]["by_category"]) == {"random", "popular", "adversarial"}
    assert found["objects"]["rows"] == 3 * ((2 + 1) + (1 + 1) + (1 + 1))  # only an owl is absent from the first
    found = evaluated(checkpoint, folder, [source(folder, "objects.jsonl", rows, format="objects")], "--rows", "1")
    assert found["sources"]["objects"]["pictures"] == 1


def test_cost_of_a_setting_is_that_of_its_tokens(checkpoint, folder):
    rows = [{"image": "0.png", "question": "What?", "answer": "cat"}]
    cost = evaluated(checkpoint, folder, [source(folder, "one.jsonl", rows, format="vqa")])["sources"]["one"]["cost"]
    per_token = 2 * 2 * 1 * 16 * 4  # keys and values of two layers, one head of 16, float32
    assert {setting: one["tokens_per_image"] for setting, one in cost.items()} == {
        "uncompressed": 16,
        "k=1": 1,
        "k=4": 4,
    }
    for one in cost.values():
        assert one["cache_bytes"] == per_token * one["tokens_per_image"]
        assert one["bytes_per_image"] == 32 * 2 * one["tokens_per_image"]
        assert one["first_token_ms"] > 0


def test_result_names_the_weights_by_their_hash_the_seed_and_the_versions(checkpoint, folder):
    rows = [{"image": "0.png", "question": "What?", "answer": "cat"}]
    results = evaluated(checkpoint, folder, [source(folder, "one.jsonl", rows, format="vqa")])
    content = b"model.safetensors\0" + (checkpoint / "model.safetensors").read_bytes()
    assert results["sha256"] == hashlib.sha256(content).hexdigest()
    assert results["seed"] == 0
    assert torch.__version__.startswith(results["versions"]["torch"])
    assert set(results["versions"]) == {"fwd2bot", "torch", "transformers", "peft", "python"}


def test_a_folder_without_weights_has_no_hash(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no safetensors file"):
        weights_hash(tmp_path)


@pytest.mark.parametrize("section", ["data", "validation"])
def test_recipe_that_would_learn_from_a_format_of_evaluation_is_refused(section, tmp_path):
    rows = [{"image_0": "0.png", "image_1": "1.png", "caption_0": "a", "caption_1": "b"}]
    wino = source(tmp_path, "wino.jsonl", rows, format="winoground")
    chat = {"name": "chat", "format": "llava", "path": "chat.json"}
    values = {"kind": "fwd2bot", "model": {"backbone": str(write_backbone(tmp_path))}, "data": {"sources": [chat]}}
    values |= {section: {"sources": [wino]}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError, match=rf"{section}.sources\['wino'\].format is winoground, which is for"):
        load_recipe(tmp_path / "recipe.yaml")


def test_false_captions_are_needed_for_a_preference(parts, folder):
    rows = [{"filename": "0.png", "caption": "a dog"}]
    recipe = SourceRecipe(**source(folder, "alone.jsonl", rows, format="sugarcrepe"))
    with pytest.raises(ValueError, match="has no column negative_caption for negatives"):
        Source(recipe)
