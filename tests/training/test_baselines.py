"""The baselines of the comparison: that each trains, and the grid row by row."""

import dataclasses
import json
import shutil

import pytest
import tiny
import torch
from baseline_models import made
from tiny_recipes import BACKBONE, DATA, TRAINING
from transformers import LlamaConfig

from fwd2bot import Fwd2BotForConditionalGeneration, Fwd2BotProcessor
from fwd2bot.training.answering import image_tokens
from fwd2bot.training.backbone import build_backbone, build_processor
from fwd2bot.training.baselines import grid, row_training, run
from fwd2bot.training.baselines.cache_model import CacheCompression, SingleForward
from fwd2bot.training.baselines.grid import METHODS, Row
from fwd2bot.training.baselines.token_models import (
    AllTokens,
    AveragePooling,
    QueryTransformer,
    TokenMerging,
)
from fwd2bot.training.recipe import BackboneModel, OptimizerRecipe, load_recipe
from fwd2bot.training.scenes import corpus
from fwd2bot.training.tokenizer import train_tokenizer

OPTIONS = {"steps": 16, "minutes": None, "test_pictures": 4, "split": "validation"}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A random LLaVA with 16 image tokens and a tokenizer of the drawn world."""
    folder = tmp_path_factory.mktemp("backbone")
    sizes = BackboneModel(**{**BACKBONE, "patch_size": 24})
    tokenizer = train_tokenizer(corpus(40, shapes_only=True), sizes.vocab_size, sizes.max_position_embeddings)
    torch.manual_seed(0)
    build_backbone(sizes, tokenizer).save_pretrained(folder)
    build_processor(sizes, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    values = {
        "kind": "fwd2bot",
        "model": {"backbone": "none", "lora_rank": 4},
        "data": {**DATA, "pictures": 4, "rounds": 64, "full_share": 0.5},
        "optimizer": {"name": "adamw", "learning_rate": 0.01},
        "training": {**TRAINING, "output_dir": str(folder / "work")},
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(values))
    return load_recipe(path)


@pytest.mark.parametrize("cls", [QueryTransformer, CacheCompression, SingleForward])
def test_first_tokens_of_an_elastic_baseline_are_its_shorter_summary(cls):
    model = made(cls)
    model.set_attn_implementation("eager")
    inputs = tiny.tiny_processor().process_images(tiny.pictures(2))
    long, short = model.compress(**inputs).tokens, model.compress(**inputs, num_summary_tokens=2).tokens
    assert torch.allclose(long[:, :2], short, atol=1e-5)


def cache_parts(count=2):
    model, processor = made(CacheCompression), tiny.tiny_processor()
    model.set_attn_implementation("eager")
    summary = model.compress(**processor.process_images(tiny.pictures(count)), num_summary_tokens=2)
    return model, processor, summary


def test_cache_model_answers_as_its_training_pass_reads():
    """Greedy ids from the cache are the arg max of the logits that training takes its loss of."""
    model, processor, summary = cache_parts()
    inputs = processor(text=tiny.prompts(processor, ["What?", "Is there a dog here?"]))
    ids = model.generate_from_summary(summary, **inputs, max_new_tokens=5, do_sample=False)
    new, width = ids.shape[1] - inputs["input_ids"].shape[1], inputs["input_ids"].shape[1]
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, new, dtype=torch.long)], 1)
    logits, _ = model._generate_pass(summary, ids, mask, None, None)
    assert torch.equal(logits[:, width - 1 : -1].argmax(-1), ids[:, width:])


def test_cache_model_answers_each_prompt_as_it_does_alone():
    model, processor, summary = cache_parts()
    prompts = tiny.prompts(processor, ["What?", "Is there a dog here?"])
    both = model.generate_from_summary(summary, **processor(text=prompts), max_new_tokens=5, do_sample=False)[:, -5:]
    for row in range(2):
        alone = model.generate_from_summary(
            summary[[row]], **processor(text=prompts[row : row + 1]), max_new_tokens=5, do_sample=False
        )
        assert torch.equal(alone[0, -5:], both[row])


def test_cache_model_sees_the_picture_through_its_tokens_alone():
    model, processor, summary = cache_parts()
    inputs = processor(text=tiny.prompts(processor, ["What?"] * 2))
    logits, _ = model._generate_pass(summary, inputs["input_ids"], inputs["attention_mask"], None, None)
    assert not torch.allclose(logits[0], logits[1], atol=1e-4)
    swapped, _ = model._generate_pass(summary[[1, 0]], inputs["input_ids"], inputs["attention_mask"], None, None)
    assert torch.allclose(swapped, logits[[1, 0]], atol=1e-6)  # of a row's own picture, and of nothing else


def test_segments_of_a_packed_row_are_read_as_if_alone():
    model, processor, summary = cache_parts(1)
    ids = processor(text=tiny.prompts(processor, ["What?"]))["input_ids"]
    place = int((ids[0] == model.image_token_id).nonzero()) + 1
    prefix, tail = ids[:, :place], ids[:, place:]
    packed = torch.cat([prefix, tail, tail], 1)
    segments = torch.cat([torch.zeros_like(prefix), torch.ones_like(tail), 2 * torch.ones_like(tail)], 1)
    logits, _ = model._generate_pass(summary, packed, torch.ones_like(packed), None, segments)
    alone, _ = model._generate_pass(summary, ids, torch.ones_like(ids), None, None)
    for start in (place, place + tail.shape[1]):
        assert torch.allclose(logits[:, start : start + tail.shape[1]], alone[:, place:], atol=1e-5)


@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].model])
def test_every_method_trains_what_it_should_and_its_loss_falls(method, backbone, recipe):
    fixed = ("pooling", "merging", "pruning")
    lengths = [] if method == "uncompressed_lora" else [4] if method in fixed else [1, 4]
    row = Row("tried", method, lengths)
    model, processor = row_training.build(row, recipe, backbone)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = row_training.build_trainer(row, recipe, model, processor, OPTIONS)
    trainer.train()
    losses = [entry["autoregressive_loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-4:]) < sum(losses[:4])
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved and moved <= set(model.trained_parameters())
    still = {name for name in set(model.trained_parameters()) - moved if ".embed_tokens." not in name}
    assert not still, still


def test_rows_have_as_much_lora_and_those_of_one_adapter_have_it_in_one(backbone, recipe):
    counts = {}
    for method in (
        "fwd2bot",
        "pooling",
        "pruning",
        "merging",
        "query_transformer",
        "cache",
        "shared_adapter",
        "single_forward",
    ):
        model, _ = row_training.build(Row("tried", method, [4]), recipe, backbone)
        lora = {name: p.numel() for name, p in model.trained_parameters().items() if ".lora_" in name}
        counts[method] = sum(lora.values())
        assert any(".compress." in name for name in lora) == (method == "fwd2bot")
    assert len(set(counts.values())) == 1, counts
    models = [row_training.build(Row("tried", "fwd2bot", [4], rank=rank), recipe, backbone)[0] for rank in (1, 2)]
    lora = [[p for n, p in model.trained_parameters().items() if ".lora_" in n] for model in models]
    assert 2 * sum(p.numel() for p in lora[0]) == sum(p.numel() for p in lora[1])


def test_row_is_one_file_with_figures_costs_and_what_made_it(backbone, recipe):
    options = OPTIONS | {"steps": 2}
    result = run.run_row(Row("cache", "cache", [1, 2]), recipe, backbone, options)
    bare = run.run_row(Row("uncompressed", "uncompressed", []), recipe, backbone, options)
    assert result["steps_done"] == 2 and bare["steps_done"] == 0
    assert set(result["figures"]["k=2"]["presence"]) == {"random", "popular", "adversarial"}
    assert set(bare["figures"]["cost"]) == {"uncompressed"}
    cost = result["figures"]["cost"]["k=2"]
    assert cost["bytes_per_image"] == 2 * 2 * (2 * 2 * 32)  # two tokens, keys and values of two layers, 32 wide
    assert result["figures"]["k=2"]["bytes_per_image"] == cost["bytes_per_image"]
    assert "uncompressed" not in result["figures"] and "full_caption_to_image" not in result["figures"]["k=2"]
    assert json.loads(json.dumps(result)) == result


def command(folder, backbone, recipe_file, *more):
    small = ["--steps", "2", "--test-pictures", "2", "--backbone", str(backbone), "--recipe", str(recipe_file)]
    run.main([str(folder), *small, "--rows", "uncompressed", "pooling-k4", *more])


@pytest.fixture
def recipe_file(recipe, tmp_path):
    values = recipe.to_dict() | {"contrastive": {}, "validation": {}}
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(values))
    return path


def test_grid_goes_on_where_it_was_and_refuses_another_budget(backbone, recipe_file, tmp_path, capsys):
    folder = tmp_path / "results"
    command(folder, backbone, recipe_file, "--list")
    said = capsys.readouterr()
    assert said.out.splitlines() == [
        "open  uncompressed-seed0",
        *(f"open  pooling-k4-seed{seed}" for seed in (0, 1, 2)),
    ]
    assert "results is not there yet, so no row is done" in said.err
    folder.mkdir()
    (folder / "cache-seed5.json").touch()  # that of a further seed
    run.main([str(folder), "--list"])
    assert capsys.readouterr().out.splitlines()[-1] == "done  cache-seed5"
    shutil.rmtree(folder)
    command(folder, backbone, recipe_file, "--list", "--seeds", "2")
    assert capsys.readouterr().out == "open  pooling-k4-seed2\n"
    command(folder, backbone, recipe_file)
    first = (folder / "pooling-k4-seed0.json").read_bytes()
    (folder / "pooling-k4-seed1.json").unlink()
    capsys.readouterr()
    command(folder, backbone, recipe_file)
    said = capsys.readouterr().out
    assert said.count("done before") == 3 and "pooling-k4-seed1.json: " in said
    assert (folder / "pooling-k4-seed0.json").read_bytes() == first
    (folder / "pooling-k4-seed1.json").unlink()  # that of seed 0 is seen before this one trains
    with pytest.raises(SystemExit, match="steps was 2 and is 3"):
        command(folder, backbone, recipe_file, "--steps", "3")
    assert not (folder / "pooling-k4-seed1.json").exists()
    others = ("--rows", "cache", "--steps", "3")  # its own file is not there yet
    with pytest.raises(SystemExit, match="pooling-k4-seed0.json does not compare .* steps was 2 and is 3"):
        command(folder, backbone, recipe_file, *others)
    (folder / "pooling-k4-seed0.json").write_text("[]")
    with pytest.raises(SystemExit, match="pooling-k4-seed0.json is no result of a row .*a list, not an object"):
        command(folder, backbone, recipe_file)
    (folder / "pooling-k4-seed0.json").write_text("{")
    with pytest.raises(SystemExit, match="pooling-k4-seed0.json is no result of a row .* remove it"):
        command(folder, backbone, recipe_file)


def test_what_makes_the_rows_impossible_leaves_no_folder(backbone, recipe_file, tmp_path):
    folder = tmp_path / "results"
    with pytest.raises(SystemExit, match="error: .*max_step"):
        command(folder, backbone, recipe_file, "--steps", "2", "training.max_step=3")
    LlamaConfig().save_pretrained(tmp_path / "llama")
    with pytest.raises(SystemExit, match="error: .*is a llama; the comparison is written for LLaVA"):
        command(folder, tmp_path / "llama", recipe_file)
    with pytest.raises(SystemExit, match="error: .*nowhere is no folder, and no name on the Hub"):
        command(folder, tmp_path / "nowhere", recipe_file)
    with pytest.raises(SystemExit, match="error: hub/nope has no config.json here, nor on the Hub"):
        command(folder, "hub/nope", recipe_file)
    with pytest.raises(SystemExit, match="rows of the comparison have no model.config.summary_norm"):
        command(folder, backbone, recipe_file, "--steps", "2", "model.config={summary_norm: false}")
    with pytest.raises(SystemExit, match="rows of the comparison have no contrastive.final_weight"):
        command(folder, backbone, recipe_file, "--steps", "2", "contrastive.final_weight=0.5")
    assert not folder.exists()


def test_steps_within_the_warm_up_are_warned_of(backbone, recipe_file, tmp_path, capsys):
    rows = ("--rows", "uncompressed", "--steps", "2")
    command(tmp_path / "results", backbone, recipe_file, *rows, "training.warmup_steps=2")
    assert "training.warmup_steps of the recipe, 2, is not over after 2 steps" in capsys.readouterr().err
    command(tmp_path / "others", backbone, recipe_file, *rows, "training.warmup_steps=1")
    assert "warmup" not in capsys.readouterr().err


def test_training_of_a_row_stops_after_its_minutes(backbone, recipe, caplog):
    row = Row("tried", "pooling", [4])
    model, processor = row_training.build(row, recipe, backbone)
    trainer = row_training.build_trainer(row, recipe, model, processor, OPTIONS | {"minutes": 0.0})
    trainer.train()
    assert trainer.state.global_step == 1
    assert "model.freeze" not in caplog.text  # a row of one adapter freezes nothing


def test_signal_is_no_end_of_a_row_that_is_judged_all_the_same(backbone, recipe):
    row = Row("tried", "pooling", [4])
    recipe = dataclasses.replace(recipe, training=recipe.training | {"enable_jit_checkpoint": True})
    trainer = row_training.build_trainer(row, recipe, *row_training.build(row, recipe, backbone), OPTIONS)
    assert not any("JIT" in type(each).__name__ for each in trainer.callback_handler.callbacks)


def test_backbone_of_a_fwd2bot_is_what_was_wrapped(tmp_path):
    model = tiny.tiny_fwd2bot()
    model.save_pretrained(tmp_path / "whole")
    tiny.tiny_processor().save_pretrained(tmp_path / "whole")
    folder = row_training.bare_backbone(str(tmp_path / "whole"), tmp_path / "bare")
    taken = Fwd2BotForConditionalGeneration.from_backbone(str(folder), num_summary_tokens=2).backbone
    inputs = Fwd2BotProcessor.from_pretrained(tmp_path / "whole").backbone_processor(
        images=tiny.pictures(1), text=["<image> What?"], return_tensors="pt"
    )
    with torch.no_grad():
        assert torch.equal(taken(**inputs).logits, tiny.tiny_backbone()(**inputs).logits)
    assert row_training.bare_backbone(str(tmp_path / "whole"), folder) == folder
    with torch.no_grad():
        model.backbone.get_input_embeddings().weight[0] += 1
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="the backbone of another Fwd2Bot"):
        row_training.bare_backbone(str(tmp_path / "other"), folder)


def test_methods_fit_a_backbone_of_144_image_tokens():
    """The recipe of the backbone with patches of 8 pixels, as docs/evaluation.md has it, but for its tokenizer."""
    sizes = load_recipe("backbone.yaml", ["model.patch_size=8", "data.row_length=368"]).model
    tokenizer = train_tokenizer(corpus(40, shapes_only=True), 400, sizes.max_position_embeddings)
    processor = build_processor(sizes, tokenizer)
    assert image_tokens(processor) == 144
    pixels = processor(images=[tiny.pictures(1)], text=["<image>"], return_tensors="pt")["pixel_values"]
    for cls, k in ((AllTokens, 144), (AveragePooling, 16), (TokenMerging, 16), (QueryTransformer, 16)):
        backbone = build_backbone(sizes, tokenizer)
        model = cls.from_backbone(backbone, num_summary_tokens=k, lora_rank=4).eval()
        assert model.compress(input_ids=torch.ones(1, 1, dtype=torch.long), pixel_values=pixels).tokens.shape[1] == k


def test_rows_have_names_of_their_own_and_known_methods():
    files = [row.file for row in grid.rows()]
    assert len(files) == len(set(files))
    assert {row.method for row in grid.rows()} == set(METHODS)


def test_named_rows_have_any_seed_and_others_those_planned(tmp_path, capsys):
    planned = [(row.name, row.seed) for row in grid.rows()]
    assert [(row.name, row.seed) for row in grid.chosen_rows()] == planned
    assert [row.file for row in grid.chosen_rows(["rank-half", "cache"], [4, 0, 4])] == [
        "cache-seed4.json",
        "rank-half-seed4.json",
        "cache-seed0.json",
        "rank-half-seed0.json",
    ]
    assert grid.chosen_rows(["rank-half"], [4])[0].rank == 0.5
    assert {row.seed for row in grid.chosen_rows(seeds=[2])} == {2}
    assert [row.file for row in grid.chosen_rows(["uncompressed", "cache"], [0, 1])] == [
        "uncompressed-seed0.json",
        "cache-seed0.json",
        "cache-seed1.json",
    ]
    with pytest.raises(SystemExit):
        run.main([str(tmp_path), "--seeds", "2", "7"])
    assert "no row is planned with seed 7, but with 0, 1, 2; name the rows that shall" in capsys.readouterr().err


def test_row_has_its_own_share_of_all_learning_rates(backbone, recipe):
    recipe = dataclasses.replace(
        recipe, optimizer=OptimizerRecipe("muon", 0.01, 0.02, learning_rates={"adapters": 0.03})
    )
    row = Row("tried", "query_transformer", [1, 4], rate=0.1)
    trainer = row_training.build_trainer(row, recipe, *row_training.build(row, recipe, backbone), OPTIONS)
    rates = {group["group"]: group["lr"] for group in trainer.create_optimizer().param_groups}
    assert rates == pytest.approx({"rest": 0.001, "matrices": 0.002, "adapters_matrices": 0.003})


def test_unknown_row_and_no_time_to_train_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run.main([str(tmp_path), "--rows", "typo"])
    assert "unknown row typo; choose from" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run.main([str(tmp_path), "--rows", "cache", "--seeds", "1", "-1"])
    assert "--seeds must be 0 or more, got -1" in capsys.readouterr().err
    for minutes in ("0", "-1"):
        with pytest.raises(SystemExit):
            run.main([str(tmp_path), "--minutes", minutes])
        assert f"--minutes must be more than 0, got {minutes}" in capsys.readouterr().err
