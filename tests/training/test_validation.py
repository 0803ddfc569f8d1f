"""A run is judged by what it answers and finds, keeps its best checkpoint, stops early and shows samples."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image
from source_recipes import sources, write_data, write_source_recipe
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fwd2bot.training.recipe import load_recipe
from fwd2bot.training.samples import retrieval_sheet
from fwd2bot.training.train import build_trainer, run, train
from fwd2bot.training.trainer import load_strictly
from fwd2bot.training.validation import Answered, Seen, Validation, figure_names, question_of

JUDGED = {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_recall@1",
    "greater_is_better": True,
}


@pytest.fixture
def recipe(tmp_path):
    write_data(tmp_path)
    sections = {"validation": {"sources": sources(tmp_path), "samples": 10, "max_new_tokens": 4, "show_steps": 3}}
    return write_source_recipe(tmp_path, tmp_path / "run", sections, **JUDGED)


def test_answer_is_right_whatever_its_case_and_final_stop():
    assert Answered("", "Red", " red. ").right
    assert not Answered("", "red", "red dog").right


def test_question_is_all_before_the_last_answer():
    told = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "b"}]},
        {"role": "user", "content": [{"type": "text", "text": "c?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "d"}]},
    ]
    assert question_of({"messages": told, "images": ["x"]}) == (told[:3], "d")
    assert question_of({"messages": told, "images": []}) is None
    assert question_of({"messages": None, "images": ["x"]}) is None


def test_caption_is_no_question_whatever_it_is_learnt_for(recipe):
    validation = build_trainer(load_recipe(recipe, ["data.contrastive_max_tokens=null"])).validation
    captions = [sample for sample in validation.samples if sample["source"] == "captions"]
    assert captions and all(sample["messages"] for sample in captions)  # they are learnt word by word, too
    assert not any(question_of(sample) for sample in captions)
    assert "accuracy" not in figure_names(captions) and "accuracy" in figure_names(validation.samples)


def test_every_validation_row_counts_once(recipe, tmp_path):
    chat = tmp_path / "chat.json"
    chat.write_text(json.dumps(json.loads(chat.read_text())[:2]))
    validation = build_trainer(load_recipe(recipe, ["validation.samples=12"])).validation
    found = [(sample["source"], sample["key"]) for sample in validation.samples]
    assert len(set(found)) == len(found) == 12
    assert [source for source, _ in found].count("chat") == 2


def test_equal_pictures_count_as_one_in_retrieval():
    seen = Seen(
        image_embeds=[torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])],
        image_groups=[7, 7, 9],
        captions=["a", "b"],
        caption_embeds=[torch.tensor([0.8, 0.6]), torch.tensor([0.6, 0.8])],
        caption_groups=[7, 9],
    )
    scores, own = seen.scores()
    assert torch.equal(scores, torch.tensor([[0.8, 0.6], [0.6, 0.8]]))
    assert torch.equal(own, torch.eye(2, dtype=torch.bool))


def test_evaluation_has_accuracy_and_recall_of_the_public_methods(recipe):
    trainer = build_trainer(load_recipe(recipe))
    metrics = trainer.evaluate()
    samples, processor, model = trainer.validation.samples, trainer.processing_class, trainer.model.eval()
    assert {f"eval_{name}" for name in figure_names(samples)} <= metrics.keys()
    right = []
    for sample in samples:
        if question_of(sample) is None:
            continue
        told, expected = question_of(sample)
        inputs = processor(text=processor.apply_chat_template(told, add_generation_prompt=True))
        ids = model.generate_from_summary(
            model.compress(**processor.process_images(sample["images"])), **inputs, max_new_tokens=4
        )
        answer = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
        right.append(Answered("", expected, answer).right)
    assert metrics["eval_accuracy"] == sum(right) / len(right)
    found = Validation(processor, samples, 1)(model)
    assert found["recall@1"] == metrics["eval_recall@1"]


def test_best_checkpoint_is_the_one_that_is_loaded_in_the_end(recipe):
    loaded = load_recipe(recipe)
    trainer = build_trainer(loaded)
    assert run(trainer, loaded) is not None
    by_step = {
        entry["step"]: entry["eval_recall@1"] for entry in trainer.state.log_history if "eval_recall@1" in entry
    }
    best = max(by_step.values())
    assert trainer.state.best_metric == best
    steps = json.loads((Path(trainer.args.output_dir) / "final" / "steps.json").read_text())
    assert steps == {"steps": 6, "weights_of_step": trainer.state.best_global_step}
    assert by_step[trainer.state.best_global_step] == best
    found = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    load_strictly(trainer.model, Path(trainer.state.best_model_checkpoint))
    assert all(torch.equal(found[name], value) for name, value in trainer.model.state_dict().items())


NOTHING_LEARNT = ["optimizer.learning_rate=0.0", "optimizer.matrix_learning_rate=0.0", "training.max_steps=20"]


def test_run_stops_where_nothing_gets_better(recipe):
    trainer = build_trainer(load_recipe(recipe, ["validation.patience=1", *NOTHING_LEARNT]))
    trainer.train()
    assert trainer.state.global_step == 4  # the second evaluation is no better than the first


def checkpoints(folder):
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-*"))


@pytest.mark.parametrize("save_steps", [2, 6])
def test_run_that_stopped_early_is_finished_and_does_not_train_on(recipe, tmp_path, save_steps):
    overrides = ["validation.patience=3", f"training.save_steps={save_steps}", *NOTHING_LEARNT]
    final = train(load_recipe(recipe, overrides))
    assert final == tmp_path / "run" / "final"
    assert checkpoints(tmp_path / "run")[-1] == 8
    shutil.rmtree(final)
    assert train(load_recipe(recipe, overrides)) == final
    assert (final / "model.safetensors").is_file()
    assert checkpoints(tmp_path / "run")[-1] == 8
    train(load_recipe(recipe, [*overrides, "validation.patience=4"]))
    assert checkpoints(tmp_path / "run")[-1] == 10


def test_connector_that_trains_inside_a_backbone_in_half_precision_is_judged_and_shown(recipe, tmp_path):
    loaded = load_recipe(recipe, ["model.dtype=bfloat16", "training.bf16=true", "model.train_connector=true"])
    trainer = build_trainer(loaded)
    assert run(trainer, loaded) is not None
    assert [entry["step"] for entry in trainer.state.log_history if "eval_recall@1" in entry] == [2, 4, 6]
    assert (tmp_path / "run" / "samples" / "step-000003.txt").is_file()


def test_samples_are_shown_every_so_many_steps(recipe, tmp_path):
    build_trainer(load_recipe(recipe, ["training.report_to=tensorboard"])).train()
    shown = tmp_path / "run" / "samples"
    assert sorted(path.name for path in shown.iterdir()) == [
        f"step-00000{step}.{kind}" for step in (3, 6) for kind in ("png", "txt")
    ]
    text = (shown / "step-000003.txt").read_text()
    assert "Which colour?" in text and "expected: " in text and "answered: " in text
    assert Image.open(shown / "step-000003.png").size[0] > 260
    [events] = (tmp_path / "run").rglob("events.out.tfevents*")
    board = EventAccumulator(str(events)).Reload()
    assert "samples/retrieval" in board.Tags()["images"]
    assert "samples/answers/text_summary" in board.Tags()["tensors"]


def test_captions_are_shown_too(recipe, tmp_path):
    """They are no question of the validation, but what the model says of a picture is worth a look."""
    trainer = build_trainer(
        load_recipe(
            recipe,
            ["data.contrastive_max_tokens=null", "training.eval_strategy=no", "training.load_best_model_at_end=false"],
        )
    )
    trainer.train()
    text = (tmp_path / "run" / "samples" / "step-000003.txt").read_text()
    captions = [sample for sample in trainer.validation.samples[:8] if sample["source"] == "captions"]
    assert captions and text.count("Describe the image.") == len(captions)
    assert "Which colour?" in text


def test_similarities_are_not_rounded_in_a_run_in_bfloat16():
    one, other = torch.tensor([1.0, 0.0]), torch.tensor([0.999, 0.04])
    seen = Seen([], [], [one, other], [1, 2], ["a"], [torch.tensor([0.9995, 0.03])], [2])
    expected = seen.scores()[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(seen.scores()[0], expected)


def test_own_picture_has_a_green_frame():
    white, black = (Image.new("RGB", (10, 10), colour) for colour in ("white", "black"))
    sheet = retrieval_sheet(
        Seen(
            images=[white, black],
            image_embeds=[torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])],
            image_groups=[1, 2],
            captions=["white"],
            caption_embeds=[torch.tensor([1.0, 0.0])],
            caption_groups=[1],
        )
    )
    assert sheet.getpixel((261, 1)) == (30, 160, 60)
    assert sheet.getpixel((260 + 96 + 1, 1)) == (200, 200, 200)
    assert sheet.getpixel((300, 48)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["training.metric_for_best_model=eval_bleu"],
            "sources give eval_loss, eval_accuracy, eval_recall@1",
        ),
        (["training.greater_is_better=false"], "better when it is greater"),
        (["validation.sources=[]"], "give validation.sources"),
        (["validation.patience=2", "training.load_best_model_at_end=false"], "validation.patience needs"),
        (["validation.samples=0"], "validation.samples is 0"),
        (["validation.num_summary_tokens=64"], "num_summary_tokens is 64, but the model has 4 .*or null"),
        (
            [
                "training.eval_strategy=no",
                "training.load_best_model_at_end=false",
                "training.metric_for_best_model=null",
                "validation.show_steps=null",
            ],
            "validation.sources are never read: set training.eval_strategy=steps",
        ),
    ],
)
def test_validation_that_cannot_be_is_an_error_before_the_first_step(recipe, overrides, message):
    with pytest.raises(ValueError, match=message):
        build_trainer(load_recipe(recipe, overrides))


def test_validation_leaves_the_mode_of_the_model_alone(tiny_processor):
    model = tiny.tiny_fwd2bot().train()
    Validation(tiny_processor, [], 2).look(model, [])
    assert model.training
