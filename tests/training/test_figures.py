"""Figures on data sets, by hand and on a tiny random model."""

import json

import pytest
import tiny
import torch
import yaml
from source_recipes import sources, write_data

from fwd2bot.training.evaluate import main
from fwd2bot.training.figures import caption_recall, source_figures
from fwd2bot.training.recipe import load_sources
from fwd2bot.training.source_evaluation import with_cost
from fwd2bot.training.source_reader import SourceReader
from fwd2bot.training.source_recipe import SourceRecipe, SourcesData
from fwd2bot.training.sources import Source, UnusableRowsError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("figures")
    write_data(folder, pictures=6)
    return folder


@pytest.fixture(scope="module")
def parts():
    return tiny.tiny_fwd2bot(), tiny.tiny_processor()


def reader(recipe, processor, **fields):
    data = SourcesData(sources=[recipe], **fields)
    return SourceReader(Source(recipe), data, processor)


def write_rows(folder, name, rows):
    path = folder / name
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_any_caption_of_a_picture_is_a_hit_and_a_shared_caption_is_one_for_each():
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    words = ["a", "b", "both"]
    texts = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])  # "b" is nearer to the first picture, which is wrong
    figures = caption_recall(images, texts, [["a", "both"], ["b", "both"]], words)
    assert figures["text_to_image"] == {"recall@1": pytest.approx(2 / 3)}
    assert figures["image_to_text"] == {"recall@1": 1.0}


def test_rows_of_one_picture_are_one_picture_with_all_their_captions(folder, parts):
    rows = [{"image": f"{number % 3}.png", "caption": f"caption {number}"} for number in range(6)]
    recipe = SourceRecipe("x", "captions", write_rows(folder, "twice.jsonl", rows), images=str(folder / "images"))
    figures = source_figures(*parts, reader(recipe, parts[1]), [1, 4], batch_size=4, max_new_tokens=4)
    assert (figures["rows"], figures["pictures"]) == (6, 3)
    assert set(figures["k=4"]) == {"captions", "text_to_image", "image_to_text", "bytes_per_image"}
    assert set(figures["uncompressed"]) == {"captions", "bytes_per_image"}
    assert figures["uncompressed"]["bytes_per_image"] == 16 * 32 * 2
    assert figures["k=4"]["bytes_per_image"] == 4 * figures["k=1"]["bytes_per_image"]


def test_figures_do_not_depend_on_the_batch_size(folder, parts):
    recipe = SourceRecipe("x", "captions", str(folder / "captions.jsonl"), images=str(folder / "images"))
    one, six = (
        source_figures(*parts, reader(recipe, parts[1]), [2], batch_size=size, max_new_tokens=6) for size in (1, 6)
    )
    assert one == six


def test_answers_that_the_model_gives_are_right(folder, parts):
    """What it says itself is taken as the truth, in another case and with a full stop."""
    model, processor = parts
    image = str(folder / "images" / "0.png")
    inputs = processor(
        images=image,
        text=processor.apply_chat_template(tiny.conversation("Which?"), add_generation_prompt=True),
    )
    ids = model.generate(**inputs, num_summary_tokens=2, max_new_tokens=4, do_sample=False)
    said = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
    rows = [{"image": image, "question": "Which?", "answer": answer} for answer in (f"{said.upper()}.", f"{said}no")]
    recipe = SourceRecipe("x", "vqa", write_rows(folder, "questions.jsonl", rows))
    figures = source_figures(*parts, reader(recipe, processor), [2], max_new_tokens=4, uncompressed=False)
    assert figures["k=2"]["exact_match"] == 0.5
    assert "uncompressed" not in figures


def test_broken_rows_are_left_out_up_to_the_limit(folder, parts):
    rows = [{"image": f"{number}.png", "caption": "x"} for number in (0, 77, 1, 78)]
    recipe = SourceRecipe("x", "captions", write_rows(folder, "broken.jsonl", rows), images=str(folder / "images"))
    read = reader(recipe, parts[1])
    assert len(list(read())) == 2 and read.num_broken == 2
    assert len(list(reader(recipe, parts[1])(limit=1))) == 1
    with pytest.raises(UnusableRowsError, match="2 rows of 'x' are broken, more than max_broken=1"):
        list(reader(recipe, parts[1], max_broken=1)())


def test_sources_of_a_recipe_are_those_of_its_validation(folder, tmp_path):
    chat, captions = sources(folder)
    path = tmp_path / "recipe.yaml"
    values = {"kind": "fwd2bot", "data": {"sources": [chat], "max_broken": 3}, "validation": {"sources": [captions]}}
    path.write_text(yaml.safe_dump(values))
    data = load_sources(path)
    assert [source.name for source in data.sources] == ["captions"] and data.max_broken == 3
    path.write_text(yaml.safe_dump({"sources": [chat]}))
    assert [source.name for source in load_sources(path).sources] == ["chat"]
    path.write_text(yaml.safe_dump({"kind": "fwd2bot", "data": {"sources": [chat]}}))
    with pytest.raises(ValueError, match="has no validation.sources"):
        load_sources(path)


@pytest.mark.parametrize("name", ["nowhere", "no/such/folder"])
def test_checkpoint_that_is_not_there_is_one_line(tmp_path, capsys, name):
    with pytest.raises(SystemExit):
        main([str(tmp_path / name) if name == "nowhere" else name])
    told = capsys.readouterr().err
    assert "There is no folder" in told
    assert f"{name}', and an id on the Hub has the form owner/name" in told


def test_command_line_writes_figures_of_every_source(folder, tmp_path, capsys):
    checkpoint = tmp_path / "checkpoint"
    tiny.tiny_fwd2bot().save_pretrained(checkpoint)
    tiny.tiny_processor().save_pretrained(checkpoint)
    (tmp_path / "judged.yaml").write_text(yaml.safe_dump({"sources": sources(folder)}))
    options = [
        "--rows",
        "4",
        "--lengths",
        "2",
        "2",
        "--max-new-tokens",
        "4",
        "--output",
        str(tmp_path / "figures.json"),
    ]
    main([str(checkpoint), "--data", str(tmp_path / "judged.yaml"), *options])
    results = json.loads((tmp_path / "figures.json").read_text())
    assert set(results["sources"]) == {"chat", "captions"}
    assert results["sources"]["chat"]["k=2"]["exact_match"] == 0.0
    assert results["command"].startswith("python -m fwd2bot.training.evaluate checkpoint --data judged.yaml --rows 4")
    said = capsys.readouterr().out
    assert "text_to_image recall@1" in said and "checkpoint on captions: 4 rows, 4 pictures, 4 captions" in said
    assert "checkpoint on chat: 4 rows, 4 pictures; in per cent, CIDEr times 100\n" in said
    with pytest.raises(SystemExit, match="there is no recipe"):
        main([str(checkpoint), "--data", "typo.yaml"])


def test_mean_over_all_pictures_stands_in_the_table_and_not_the_cost_of_the_first():
    cost = {"k=2": {"tokens_per_image": 2, "bytes_per_image": 90, "cache_bytes": 7}}
    table = with_cost({"k=2": {"exact_match": 0.5, "bytes_per_image": 60}, "cost": cost})
    assert table == {"k=2": {"exact_match": 0.5, "bytes_per_image": 60, "tokens_per_image": 2, "cache_bytes": 7}}
