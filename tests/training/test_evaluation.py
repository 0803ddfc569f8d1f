"""Evaluation and export of a tiny random model: what they measure, and what they write."""

import json
import re

import pytest
import tiny
import torch
from tokenizers.processors import TemplateProcessing

from fwd2bot import Fwd2BotForConditionalGeneration, Fwd2BotProcessor
from fwd2bot.training.answering import answer, answer_uncompressed
from fwd2bot.training.evaluate import _ask_several, evaluate, format_results, main
from fwd2bot.training.export import export
from fwd2bot.training.scenes import HARD_NEGATIVE_SORTS, QUESTION_KINDS, SEVERAL_KINDS, Question, scene

SIZES = {"pictures": 12, "questions": 8, "retrieval": 12, "several": 16, "batch_size": 40, "shapes_only": True}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    save(tiny.tiny_fwd2bot(), folder)
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


def test_several_pictures_have_figures_by_kind_and_by_number_in_every_setting(results):
    assert results["several_questions"] == 16
    for setting in ("uncompressed", "k=1", "k=2", "k=4"):
        assert set(results[setting]["several"]) <= {*SEVERAL_KINDS, "all"}
        assert list(results[setting]["several_by_pictures"]) == ["2", "3", "4", "5"]
    assert "several_by_pictures 3" in format_results(results)


def test_each_prompt_shows_its_pictures_in_their_order():
    """What reaches the model: the question in a prompt with as many placeholders as pictures."""
    processor = tiny.tiny_processor()
    asked = [((4, 1, 2), Question("which", "Which?", "none")), ((0, 3), Question("which", "Which?", "1"))]
    read = []

    def generate(shown, prompts):
        read.append((shown, [prompt.count("<image>") for prompt in prompts]))
        return processor(text=["yes", "1"])["input_ids"]

    assert answer(asked, processor, 10, generate) == ["yes", "1"]
    assert read == [([(4, 1, 2), (0, 3)], [3, 2])]


def test_prompts_of_every_number_of_pictures_are_drawn_and_the_same_each_time():
    scenes = [scene("test", index) for index in range(40)]
    asked = _ask_several(scenes, 80)
    assert asked == _ask_several(scenes, 80)
    assert [len(shown) for shown, _ in asked].count(3) == 20
    assert {len(shown) for shown, _ in _ask_several(scenes[:3], 8)} == {2, 3}
    assert _ask_several(scenes[:1], 5) == []


def test_card_has_the_figures_of_several_pictures_where_there_are_some(checkpoint, results, tmp_path):
    without = json.loads(json.dumps(results))
    del without["several_questions"]  # as in an evaluation of an older version
    for name, figures in (("with", results), ("without", without)):
        (tmp_path / "figures.json").write_text(json.dumps(figures))
        export(checkpoint, tmp_path / name, tmp_path / "figures.json")
    assert "pictures in one prompt" not in (tmp_path / "without" / "README.md").read_text()
    card = (tmp_path / "with" / "README.md").read_text()
    [row] = re.findall(r"^\| 4 pictures \|.*$", card, re.MULTILINE)
    shares = [results[name]["several_by_pictures"]["4"] for name in ("uncompressed", "k=1", "k=2", "k=4")]
    assert row == "| 4 pictures | " + " | ".join(f"{100 * share:.1f}" for share in shares) + " |"


def test_figures_do_not_depend_on_the_batch_size(checkpoint, results):
    other = evaluate(checkpoint, **{**SIZES, "batch_size": 7})
    assert other["k=2"] == results["k=2"]
    assert other["uncompressed"] == results["uncompressed"]


def test_plain_backbone_is_evaluated_on_questions_alone(tmp_path):
    tiny.tiny_backbone().save_pretrained(tmp_path)
    tiny.tiny_backbone_processor().save_pretrained(tmp_path)
    results = evaluate(tmp_path, **{**SIZES, "pictures": 3, "retrieval": None})
    assert "uncompressed" in results and not any(name.startswith("k=") for name in results)


def test_command_line_writes_the_figures(checkpoint, tmp_path, capsys):
    sizes = [
        "--pictures",
        "12",
        "--questions",
        "1",
        "--retrieval",
        "12",
        "--several",
        "4",
        "--shapes-only",
        "--lengths",
        "2",
    ]
    main([str(checkpoint), *sizes, "--output", str(tmp_path / "new" / "figures.json")])
    assert "k=2" in json.loads((tmp_path / "new" / "figures.json").read_text())
    assert "hard_negatives mean" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lengths", "2", "32"], r"lengths must be in 1..4 (the model's summary queries), got [2, 32]."),
        (["--retrieval", "0"], "retrieval must be in 1..12 (pictures), got 0."),
        (["--retrieval", "13"], "retrieval must be in 1..12 (pictures), got 13."),
        (["--several", "-1"], "several must be at least 0, got -1."),
        (["--questions", "0"], "questions must be at least 1, got 0."),
        (["--pictures", "0"], "pictures must be at least 1, got 0."),
        (["--batch-size", "0"], "batch size must be at least 1, got 0."),
        (["--output", "."], "--output . cannot be written (Is a directory)"),
    ],
)
def test_command_line_refuses_a_bad_option_before_the_model_is_loaded(
    checkpoint, options, message, capsys, monkeypatch
):
    monkeypatch.setattr("fwd2bot.training.evaluate.AutoModelForImageTextToText", None)
    with pytest.raises(SystemExit):
        main([str(checkpoint), "--pictures", "12", "--shapes-only", *options])
    assert message in capsys.readouterr().err


def test_evaluate_refuses_a_length_that_the_model_does_not_have(checkpoint):
    with pytest.raises(ValueError, match=r"lengths must be in 1\.\.4 .*got \[5\]"):
        evaluate(checkpoint, **SIZES, lengths=[5])


@pytest.mark.parametrize("template_writes_bos", [True, False])
def test_uncompressed_and_summary_prompts_start_with_one_bos(template_writes_bos):
    """In LLaVA-1.5 the template writes none and the tokenizer adds it."""
    processor = tiny.tiny_backbone_processor()
    tokenizer, bos = processor.tokenizer, processor.tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    if not template_writes_bos:
        processor.chat_template = processor.chat_template.replace("{{ bos_token }}", "")
    fwd2bot_processor = Fwd2BotProcessor(processor)
    prompts = tiny.prompts(fwd2bot_processor, ["Is it?", "What is there?"])
    read = []

    class Reader:
        device, dtype = torch.device("cpu"), torch.float32

        def generate(self, input_ids, **inputs):
            read.append(input_ids)
            return input_ids

    answer_uncompressed(Reader(), processor, [[one] for one in tiny.pictures(2)], prompts)
    assert (read[0] == bos).sum(1).tolist() == [1, 1]
    assert (fwd2bot_processor(text=prompts)["input_ids"] == bos).sum(1).tolist() == [1, 1]


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
    assert "Nothing was measured" in (tmp_path / "hub" / "README.md").read_text()
    assert not (tmp_path / "hub" / "evaluation.json").exists()


def test_export_refuses_the_figures_of_another_model(checkpoint, results, tmp_path):
    (tmp_path / "figures.json").write_text(json.dumps({**results, "fingerprint": "another"}))
    with pytest.raises(ValueError, match="is of the model another"):
        export(checkpoint, tmp_path / "hub", tmp_path / "figures.json")


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def save(model, folder):
    model.save_pretrained(folder)
    tiny.tiny_processor().save_pretrained(folder)


@pytest.fixture
def exported(checkpoint, results, tmp_path):
    """A Hub folder with card and figures, which lie in `figures.json` beside it as well."""
    (tmp_path / "figures.json").write_text(json.dumps(results))
    export(checkpoint, tmp_path / "hub", tmp_path / "figures.json")
    return tmp_path / "hub"


def test_evaluation_that_is_not_there_leaves_the_folder_as_it_was(checkpoint, exported):
    before = contents(exported)
    with pytest.raises(FileNotFoundError, match="no evaluation .*typo.json"):
        export(checkpoint, exported, exported.parent / "typo.json")
    assert contents(exported) == before


def test_export_that_fails_halfway_leaves_the_folder_as_it_was(exported, tmp_path, monkeypatch):
    save(tiny.tiny_fwd2bot(seed=3), tmp_path / "another")
    before = contents(exported)

    def disk_is_full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(Fwd2BotProcessor, "save_pretrained", disk_is_full)
    with pytest.raises(OSError, match="No space left"):
        export(tmp_path / "another", exported)
    assert contents(exported) == before
    assert not any(path.is_dir() for path in exported.iterdir())


@pytest.mark.parametrize(
    "path",
    [
        ("fingerprint",),
        ("versions", "torch"),
        ("retrieval_pictures",),
        ("uncompressed", "bytes_per_image"),
        ("k=2", "hard_negatives", "mean"),
    ],
    ids=" / ".join,
)
def test_export_names_the_entry_that_the_evaluation_lacks(path, checkpoint, results, tmp_path):
    older = json.loads(json.dumps(results))
    *parents, last = path
    entry = older
    for name in parents:
        entry = entry[name]
    del entry[last]
    (tmp_path / "figures.json").write_text(json.dumps(older))
    with pytest.raises(ValueError, match=f"has no entry {' / '.join(path)}:"):
        export(checkpoint, tmp_path / "hub", tmp_path / "figures.json")
    assert not (tmp_path / "hub").exists()


def test_export_refuses_figures_without_any_length(checkpoint, results, tmp_path):
    uncompressed = {name: value for name, value in results.items() if not name.startswith("k=")}
    (tmp_path / "figures.json").write_text(json.dumps(uncompressed))
    with pytest.raises(ValueError, match="has no entry k="):
        export(checkpoint, tmp_path / "hub", tmp_path / "figures.json")
    assert not (tmp_path / "hub").exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "summary_projector.bias holds NaN"),
        (1e6, r"1e\+06 in summary_projector.bias does not fit torch.float16"),
    ],
)
def test_export_names_a_weight_that_cannot_be_stored(value, message, tmp_path):
    model = tiny.tiny_fwd2bot()
    with torch.no_grad():
        model.summary_projector.bias[3] = value
    save(model, tmp_path / "checkpoint")
    with pytest.raises(ValueError, match=message):
        export(tmp_path / "checkpoint", tmp_path / "hub")
    assert not (tmp_path / "hub").exists()
