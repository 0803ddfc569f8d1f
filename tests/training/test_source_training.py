"""Runs on data sets from recipe to checkpoint, and the look at their data before."""

import io

import pytest
import tiny
import torch
import yaml
from rich.console import Console
from test_source_mixture import write_with_broken
from tiny_recipes import BACKBONE, TRAINING
from tiny_sources import write_captions, write_llava

from fwd2bot.training.check import check
from fwd2bot.training.recipe import load_recipe
from fwd2bot.training.sources import SourceMixture
from fwd2bot.training.train import build_trainer, main


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    # datasets waits 5 s at the end of every stream
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.01)


def as_values(*recipes):
    return [{name: value for name, value in vars(one).items() if value is not None} for one in recipes]


def write_recipe(folder, *sources, kind="backbone", model=None, data=None, contrastive=None, **training):
    values = {} if contrastive is None else {"contrastive": contrastive}
    values |= {
        "kind": kind,
        "model": model or BACKBONE | {"init_from": None},
        "data": {"sources": as_values(*sources), "contrastive_max_tokens": 20} | (data or {}),
        "training": TRAINING | {"output_dir": str(folder / "run")} | training,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def fwd2bot_model(folder):
    tiny.tiny_backbone().save_pretrained(folder / "backbone")
    tiny.tiny_backbone_processor().save_pretrained(folder / "backbone")
    return {"backbone": str(folder / "backbone"), "lora_rank": 2, "num_summary_tokens": 2, "summary_lengths": [1, 2]}


def losses(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def test_loss_of_a_backbone_is_that_of_all_its_logits(tmp_path):
    """Logits before the first learnt token, which are most of a short row with an image, are not made."""
    trainer = build_trainer(load_recipe(write_recipe(tmp_path, write_llava(tmp_path), write_captions(tmp_path, 12))))
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    expected = trainer.model(**batch)
    expected.loss.backward()
    trained = {name: value for name, value in trainer.model.named_parameters() if value.grad is not None}
    gradients = {name: value.grad.clone() for name, value in trained.items()}
    trainer.model.zero_grad()
    loss, output = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    loss.backward()
    assert output["logits"].shape[1] < expected.logits.shape[1]
    torch.testing.assert_close(loss, expected.loss, rtol=1e-6, atol=1e-6)
    for name, value in trained.items():
        torch.testing.assert_close(value.grad, gradients[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("streaming", [False, True])
def test_resumed_run_has_the_losses_of_an_undisturbed_one(tmp_path, streaming):
    sources = [write_llava(tmp_path), write_captions(tmp_path, 12, files=2, streaming=streaming, shuffle_buffer=4)]
    recipe = load_recipe(write_recipe(tmp_path, *sources, dataloader_num_workers=1))
    whole = build_trainer(recipe)
    whole.train()
    assert len(losses(whole)) == 4 and len({entry["loss"] for entry in losses(whole)}) == 4
    resumed = build_trainer(recipe)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert losses(resumed) == losses(whole)


def test_epochs_are_counted_in_rows_and_are_one_epoch_of_the_trainer(tmp_path):
    recipe = write_recipe(tmp_path, write_llava(tmp_path, 10), max_steps=-1, num_train_epochs=2.5)
    trainer = build_trainer(load_recipe(recipe))
    assert isinstance(trainer.train_dataset, SourceMixture)
    assert trainer.args.max_steps == 7 and len(trainer.train_dataset) == 28  # 25 rows in batches of 4


def test_epochs_of_a_stream_are_refused(tmp_path):
    recipe = write_recipe(tmp_path, write_captions(tmp_path, streaming=True), max_steps=-1)
    with pytest.raises(ValueError, match="'photos'.* is streamed.* give training.max_steps"):
        build_trainer(load_recipe(recipe))


def test_tokenizer_of_a_new_backbone_is_trained_on_the_texts_of_the_sources(tmp_path):
    processor = build_trainer(load_recipe(write_recipe(tmp_path, write_captions(tmp_path)))).processing_class
    assert len(processor.tokenizer.tokenize("a long text on")) <= 4


def test_fwd2bot_gets_chunks_and_texts(tmp_path):
    model = fwd2bot_model(tmp_path)
    recipe = write_recipe(tmp_path, write_llava(tmp_path), write_captions(tmp_path), kind="fwd2bot", model=model)
    batch = next(iter(build_trainer(load_recipe(recipe)).get_train_dataloader()))
    assert len(batch["chunks"]) == 1 and len(batch["image_group"]) == 4
    assert batch["text_image_mask"].shape == (4, len(batch["text_image"]))


@pytest.mark.parametrize("workers", [0, 2])
def test_fwd2bot_trains_on_captions_and_conversations_in_chunks_and_resumes(tmp_path, workers):
    sources = [write_llava(tmp_path), write_captions(tmp_path, weight=2.0)]
    options = {"model": fwd2bot_model(tmp_path), "contrastive": {"chunk_size": 2}, "dataloader_num_workers": workers}
    options["per_device_train_batch_size"] = 8  # so that every batch has captions of several pictures
    recipe = load_recipe(write_recipe(tmp_path, *sources, kind="fwd2bot", **options))
    whole = build_trainer(recipe)
    whole.train()
    logged = losses(whole)
    assert len(logged) == 4 and all(entry["contrastive_loss"] > 0 < entry["autoregressive_loss"] for entry in logged)
    resumed = build_trainer(recipe)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert losses(resumed) == logged


def printed(recipe, *overrides, processes=None):
    output = io.StringIO()
    check(load_recipe(recipe, overrides), Console(file=output, width=200, color_system=None), processes)
    return output.getvalue()


def test_check_prints_tokens_an_example_with_what_is_learnt_and_estimates_and_trains_nothing(tmp_path):
    said = printed(write_recipe(tmp_path, write_llava(tmp_path), write_captions(tmp_path)))
    for source in ("chat", "photos"):
        assert f"an example of {source}" in said
    assert "What is number" in said and "ASSISTANT:⟦ It is" in said
    assert "50.0%" in said and "labels" in said and "pixel_values" in said
    assert "optimizer state" in said and "4 steps, bound by" in said
    assert not (tmp_path / "run").exists()


def test_check_of_a_fwd2bot_prints_k_chunks_and_pairs(tmp_path):
    sources = [write_llava(tmp_path), write_captions(tmp_path, streaming=True)]
    options = {"model": fwd2bot_model(tmp_path), "contrastive": {"chunk_size": 2}}
    said = " ".join(printed(write_recipe(tmp_path, *sources, kind="fwd2bot", **options)).split())
    assert "k is one of [1, 2] for each image, at most 2" in said and "images of 16 image tokens" in said
    assert "chunks[1].compress_pixel_values" in said and "text_chunks[0].input_ids" in said
    assert "text_image_mask" in said and "pairs are no negatives" in said
    assert "contrastive: photo" in said and " stream " in said


def test_check_estimates_by_counts_where_the_weights_do_not_fit(tmp_path, monkeypatch):
    recipe = write_recipe(tmp_path, write_llava(tmp_path), kind="fwd2bot", model=fwd2bot_model(tmp_path))
    backbone = tiny.tiny_backbone()
    weights = sum(parameter.numel() for parameter in backbone.parameters())
    assert "one step on cpu" in printed(recipe)
    monkeypatch.setattr("fwd2bot.training.estimates.free_memory", lambda device: 2 * weights)
    (tmp_path / "backbone" / "model.safetensors").unlink()  # it is not loaded
    said = printed(recipe)
    assert f"{weights:,}" in said and "by counts" in said and "ASSISTANT:⟦ It is" in said


def test_check_names_broken_rows(tmp_path):
    said = printed(write_recipe(tmp_path, write_with_broken(tmp_path)))
    assert said.count("broken in chat: id ") == 3
    assert "id missing: " in said and "is not there" in said


def test_check_in_a_narrow_terminal_cuts_no_figure(tmp_path):
    output = io.StringIO()
    recipe = write_recipe(tmp_path, write_llava(tmp_path), write_captions(tmp_path))
    check(load_recipe(recipe), Console(file=output, width=80, color_system=None))
    sources = output.getvalue().split("an example of")[0]
    assert "…" not in sources and "50.0%" in sources and "captions" in sources
    assert max(map(len, sources.splitlines())) <= 80


def test_check_shows_a_chunk_that_has_a_conversation(tmp_path):
    """Samples without one come first in a batch."""
    sources = [write_llava(tmp_path), write_captions(tmp_path, use="contrastive")]
    sources[0].weight = 0.3
    options = {"model": fwd2bot_model(tmp_path), "contrastive": {"chunk_size": 1}, "per_device_train_batch_size": 8}
    said = printed(write_recipe(tmp_path, *sources, kind="fwd2bot", data={"seed": 3}, **options))
    assert "chunks[0].compress_pixel_values" in said and "chunks[0].labels" not in said
    assert "chunks[7].labels" in said


def test_check_prints_its_tables_and_no_log(tmp_path, capfd):
    sources = [write_llava(tmp_path)]
    recipe = write_recipe(tmp_path, *sources, kind="fwd2bot", model=fwd2bot_model(tmp_path))
    main([str(recipe), "--check"])
    said = capfd.readouterr()
    assert "sources, by a sample of their rows" in said.out
    assert "[transformers]" not in said.err and "Loading weights" not in said.err


def test_check_of_a_moving_weight_and_of_compiled_layers_takes_one_step_uncompiled(tmp_path, capfd):
    model = fwd2bot_model(tmp_path) | {"compile_layers": True}
    sources = [write_captions(tmp_path, use="contrastive")]
    recipe = write_recipe(tmp_path, *sources, kind="fwd2bot", model=model, contrastive={"final_weight": 0.5})
    main([str(recipe), "--check"])
    said = capfd.readouterr().out
    assert "model.compile_layers is left out here" in said and "one step" in said.lower()


def test_check_of_the_drawn_world_is_refused():
    with pytest.raises(ValueError, match="the recipe has no data.sources"):
        check(load_recipe("backbone.yaml"))


def test_backbone_that_is_no_vision_language_model_is_one_line(tmp_path):
    model = fwd2bot_model(tmp_path)
    tiny.tiny_backbone().config.text_config.save_pretrained(tmp_path / "backbone")
    recipe = write_recipe(tmp_path, write_llava(tmp_path), kind="fwd2bot", model=model)
    with pytest.raises(SystemExit, match="^error: model.backbone: .* is no vision-language model"):
        main([str(recipe)])


def test_command_reports_a_source_that_is_not_there_in_one_line(tmp_path):
    recipe = write_recipe(tmp_path, write_llava(tmp_path))
    (tmp_path / "chat.json").unlink()
    for arguments in ([str(recipe), "--check"], [str(recipe)]):
        with pytest.raises(SystemExit, match=r"^error: data.sources\['chat'\].path is .*where no file is"):
            main(arguments)
