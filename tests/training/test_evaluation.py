"""Evaluation and export of a tiny random model: what they measure, and what they write."""

import json

import pytest
import tiny
import torch

from fwd2bot import Fwd2BotForConditionalGeneration
from fwd2bot.training.evaluate import evaluate, format_results, main
from fwd2bot.training.export import export
from fwd2bot.training.scenes import HARD_NEGATIVE_SORTS, QUESTION_KINDS

SIZES = {"pictures": 12, "questions": 8, "retrieval": 12, "batch_size": 40, "shapes_only": True}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny.tiny_fwd2bot().save_pretrained(folder)
    tiny.tiny_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def results(checkpoint):
    return evaluate(checkpoint, **SIZES)


def test_every_figure_is_there_for_every_length(results):
    assert [name for name in results if name.startswith("k=")] == ["k=1", "k=2", "k=4"]
    assert set(results["uncompressed"]["answers"]) <= {*QUESTION_KINDS, "all"}
    assert set(results["k=4"]["hard_negatives"]) <= {*HARD_NEGATIVE_SORTS, "mean"}
    assert set(results["k=1"]["short_caption_to_image"]) == {"recall@1", "recall@5", "recall@10"}
    assert results["k=4"]["bytes_per_image"] == 4 * results["k=1"]["bytes_per_image"] == 4 * 32 * 2
    assert "short caption" in format_results(results).replace("_", " ")


def test_figures_do_not_depend_on_the_batch_size(checkpoint, results):
    other = evaluate(checkpoint, **{**SIZES, "batch_size": 7})
    assert other["k=2"] == results["k=2"]
    assert other["uncompressed"] == results["uncompressed"]


def test_plain_backbone_is_evaluated_on_questions_alone(tmp_path):
    tiny.tiny_backbone().save_pretrained(tmp_path)
    tiny.tiny_backbone_processor().save_pretrained(tmp_path)
    results = evaluate(tmp_path, **{**SIZES, "pictures": 3})
    assert "uncompressed" in results and not any(name.startswith("k=") for name in results)


def test_command_line_writes_the_figures(checkpoint, tmp_path, capsys):
    sizes = ["--pictures", "12", "--questions", "1", "--retrieval", "12", "--shapes-only", "--lengths", "2"]
    main([str(checkpoint), *sizes, "--output", str(tmp_path / "new" / "figures.json")])
    assert "k=2" in json.loads((tmp_path / "new" / "figures.json").read_text())
    assert "hard_negatives mean" in capsys.readouterr().out


def test_export_stores_half_precision_that_loads_in_float32(checkpoint, results, tmp_path):
    (tmp_path / "figures.json").write_text(json.dumps(results))
    export(checkpoint, tmp_path / "hub", tmp_path / "figures.json")
    trained = Fwd2BotForConditionalGeneration.from_pretrained(checkpoint)
    exported = Fwd2BotForConditionalGeneration.from_pretrained(tmp_path / "hub")
    assert exported.dtype == torch.float32
    assert exported.fingerprint == trained.fingerprint
    for name, value in trained.state_dict().items():
        assert torch.equal(exported.state_dict()[name], value.half().float()), name
    stored, full = ((folder / "model.safetensors").stat().st_size for folder in (tmp_path / "hub", checkpoint))
    assert stored < 0.7 * full


def test_card_shows_the_figures_and_no_path(checkpoint, results, tmp_path):
    (tmp_path / "figures.json").write_text(json.dumps(results))
    export(checkpoint, tmp_path / "hub", tmp_path / "figures.json")
    card = (tmp_path / "hub" / "README.md").read_text()
    assert f"{100 * results['k=2']['answers']['all']:.1f}" in card
    assert json.loads((tmp_path / "hub" / "evaluation.json").read_text()) == results
    for file in (tmp_path / "hub").glob("*.json"):
        assert str(checkpoint) not in file.read_text(), file.name


def test_export_without_figures_removes_those_of_an_earlier_model(checkpoint, results, tmp_path):
    (tmp_path / "figures.json").write_text(json.dumps(results))
    export(checkpoint, tmp_path / "hub", tmp_path / "figures.json")
    export(checkpoint, tmp_path / "hub")
    assert not (tmp_path / "hub" / "README.md").exists()
    assert not (tmp_path / "hub" / "evaluation.json").exists()


def test_export_refuses_the_figures_of_another_model(checkpoint, results, tmp_path):
    (tmp_path / "figures.json").write_text(json.dumps({**results, "fingerprint": "another"}))
    with pytest.raises(ValueError, match="is of the model another"):
        export(checkpoint, tmp_path / "hub", tmp_path / "figures.json")
