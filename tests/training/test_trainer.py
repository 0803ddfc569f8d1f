import json
import shutil

import pytest
import safetensors.torch
import torch
from tiny import CHECKPOINTING, tiny_processor
from tiny_recipes import write_backbone_recipe, write_fwd2bot_recipe, write_several_recipe
from torch._dynamo.utils import counters
from transformers import AutoProcessor, LlavaForConditionalGeneration

from fwd2bot import Fwd2BotForConditionalGeneration
from fwd2bot.fingerprint_fwd2bot import weights_fingerprint
from fwd2bot.training import fwd2bot_model
from fwd2bot.training.fwd2bot_model import build_fwd2bot, compile_layers, mark_trained
from fwd2bot.training.recipe import load_recipe
from fwd2bot.training.run_checks import PROCESSES
from fwd2bot.training.sharding import divided_modules
from fwd2bot.training.train import build_trainer, main, train, training_arguments
from fwd2bot.training.trainer import INCOMPLETE, Fwd2BotTrainer, StageTrainer, load_strictly, newest_checkpoint


def losses(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def run(recipe, resume_from=None):
    trainer = build_trainer(load_recipe(recipe))
    trainer.train(resume_from_checkpoint=resume_from and str(resume_from))
    return trainer


@pytest.fixture(scope="module")
def backbone_run(tmp_path_factory):
    """A finished tiny run: its recipe, its folder, its logged figures."""
    folder = tmp_path_factory.mktemp("backbone")
    recipe = write_backbone_recipe(folder, folder / "run")
    trainer = run(recipe)
    trainer.model.save_pretrained(folder / "run" / "final")
    trainer.processing_class.save_pretrained(folder / "run" / "final")
    return recipe, folder / "run", losses(trainer)


@pytest.fixture(scope="module")
def fwd2bot_run(backbone_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fwd2bot")
    recipe = write_fwd2bot_recipe(folder, backbone_run[1] / "final", folder / "run")
    return recipe, folder / "run", losses(run(recipe))


@pytest.fixture(scope="module")
def several_run(fwd2bot_run, tmp_path_factory):
    """A run with several pictures to a row, which went on from a trained Fwd2Bot."""
    folder = tmp_path_factory.mktemp("several")
    recipe = write_several_recipe(folder, fwd2bot_run[1] / "checkpoint-4", folder / "run")
    return recipe, folder / "run", losses(run(recipe))


@pytest.mark.parametrize("stage", ["backbone_run", "fwd2bot_run", "several_run"])
def test_resumed_run_has_the_losses_of_an_uninterrupted_one(stage, request):
    recipe, folder, expected = request.getfixturevalue(stage)
    resumed = losses(run(recipe, folder / "checkpoint-2"))
    assert len(expected) == 4
    assert resumed == expected


def test_both_losses_temperature_length_and_rates_are_logged(fwd2bot_run):
    logged = {key for entry in fwd2bot_run[2] for key in entry}
    assert {"autoregressive_loss", "temperature", "num_summary_tokens", "learning_rate_matrices"} <= logged
    assert logged & {"contrastive_loss_full", "contrastive_loss_short"}


def test_weight_of_the_contrastive_loss_goes_in_a_line_to_its_last_one(fwd2bot_run, tmp_path):
    recipe, _, plain = fwd2bot_run
    overrides = [
        "contrastive.final_weight=0",
        f"training.output_dir={tmp_path}",
        "model.config={contrastive_loss_weight: 2}",
    ]
    trainer = build_trainer(load_recipe(recipe, overrides))
    trainer.train()
    logged = losses(trainer)
    assert [entry["contrastive_loss_weight"] for entry in logged] == pytest.approx([2, 4 / 3, 2 / 3, 0], abs=1e-4)
    for entry in logged:
        contrastive = next(value for name, value in entry.items() if name.startswith("contrastive_loss"))
        assert entry["loss"] == pytest.approx(
            entry["autoregressive_loss"] + entry["contrastive_loss_weight"] * contrastive, abs=1e-3
        )
    resumed = build_trainer(load_recipe(recipe, overrides))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(resumed) == logged
    assert not any("contrastive_loss_weight" in entry for entry in plain)  # it stays at that of the config
    assert (
        Fwd2BotForConditionalGeneration.from_pretrained(tmp_path / "checkpoint-4").config.contrastive_loss_weight == 2
    )


def test_weight_of_the_loss_changes_what_is_learnt(fwd2bot_run, tmp_path):
    same = build_trainer(
        load_recipe(fwd2bot_run[0], ["contrastive.final_weight=1", f"training.output_dir={tmp_path}/a"])
    )
    same.train()
    other = build_trainer(
        load_recipe(fwd2bot_run[0], ["contrastive.final_weight=0", f"training.output_dir={tmp_path}/b"])
    )
    other.train()
    usual = Fwd2BotForConditionalGeneration.from_pretrained(fwd2bot_run[1] / "checkpoint-4").state_dict()
    query = next(name for name in usual if name.endswith("summary_queries"))
    assert torch.equal(same.model.state_dict()[query], usual[query])
    assert not torch.equal(other.model.state_dict()[query], usual[query])


def test_all_evaluations_of_a_run_weigh_the_losses_as_its_last_step_does(fwd2bot_run, tmp_path):
    recipe = load_recipe(fwd2bot_run[0], ["contrastive.final_weight=0", f"training.output_dir={tmp_path}"])
    trainer = build_trainer(recipe)
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
    trainer.model.eval()
    weighed = trainer.prediction_step(trainer.model, batch, True)[0]
    trainer.final_contrastive_loss_weight = None
    whole = trainer.prediction_step(trainer.model, batch, True)[0]
    assert trainer.model.config.contrastive_loss_weight == 1 and whole > weighed + 0.1


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_train_as_others_do_under_the_same_names(fwd2bot_run, tmp_path, checkpointing):
    recipe, folder, expected = fwd2bot_run
    overrides = [f"training.output_dir={tmp_path}", f"training.{CHECKPOINTING}={str(checkpointing).lower()}"]

    def run_compiled(resume_from=None):
        trainer = build_trainer(load_recipe(recipe, overrides))
        compile_layers(trainer.model, backend="eager")  # generated code takes most of a minute
        trainer.train(resume_from_checkpoint=resume_from)
        return trainer

    torch.compiler.reset()
    counters.clear()
    trainer = run_compiled()
    assert counters["stats"]["unique_graphs"] > 1  # one for each adapter at least
    for entry, plain in zip(losses(trainer), expected, strict=True):
        assert entry["loss"] == pytest.approx(plain["loss"], abs=1e-3)
        assert entry["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-3)
    usual = safetensors.torch.load_file(folder / "checkpoint-4" / "model.safetensors")
    stored = safetensors.torch.load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert stored.keys() == usual.keys()
    assert losses(run_compiled(str(tmp_path / "checkpoint-2"))) == losses(trainer)
    plain = build_trainer(load_recipe(recipe, overrides))  # goes on without
    plain.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    found, compiled = ([entry["loss"] for entry in losses(each)] for each in (plain, trainer))
    assert found == pytest.approx(compiled, abs=1e-3)
    torch.compiler.reset()


def test_compiling_without_a_compiler_is_refused(fwd2bot_run, tmp_path, monkeypatch):
    recipe = load_recipe(fwd2bot_run[0], ["model.compile_layers=true", f"training.output_dir={tmp_path}"])
    monkeypatch.setenv("CXX", "nowhere++")
    with pytest.raises(ValueError, match="needs a C.. compiler on a CPU, and nowhere.. is not here"):
        build_trainer(recipe)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="is not here. Install one .*model.compile_layers=false"):
        build_trainer(recipe)


def test_language_model_without_a_list_of_layers_is_not_compiled(tiny_fwd2bot, monkeypatch):
    monkeypatch.setattr(type(tiny_fwd2bot), "get_decoder", lambda model: torch.nn.Identity())
    with pytest.raises(ValueError, match="Identity has no list of layers; set model.compile_layers=false"):
        compile_layers(tiny_fwd2bot)
    with pytest.raises(ValueError, match="Identity has no list of layers; start the run with ddp.yaml"):
        divided_modules(tiny_fwd2bot)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is:DeprecationWarning")  # torch's own, of its compiler
def test_recipe_compiles_each_layer_of_the_language_model(fwd2bot_run, tmp_path, monkeypatch):
    monkeypatch.setattr(fwd2bot_model, "check_compiler", lambda device: None)
    recipe = load_recipe(fwd2bot_run[0], ["model.compile_layers=true", f"training.output_dir={tmp_path}"])
    layers = build_trainer(recipe).model.get_decoder().layers
    assert len(layers) == 2 and all(layer._compiled_call_impl is not None for layer in layers)


def test_run_on_several_pictures_starts_with_the_weights_of_the_trained_model(fwd2bot_run, several_run):
    trained = Fwd2BotForConditionalGeneration.from_pretrained(fwd2bot_run[1] / "checkpoint-4")
    started = build_trainer(load_recipe(several_run[0])).model
    assert started.state_dict().keys() == trained.state_dict().keys()
    for name, tensor in trained.state_dict().items():
        assert torch.equal(started.state_dict()[name], tensor), name


def test_settings_of_the_recipe_replace_those_of_the_model_that_it_starts_from(several_run, tmp_path):
    overrides = ["model.config={contrastive_loss_weight: 0.3}", "model.summary_lengths=[2]"]
    overrides.append(f"training.output_dir={tmp_path}")
    config = build_trainer(load_recipe(several_run[0], overrides)).model.config
    assert (config.contrastive_loss_weight, config.summary_lengths) == (0.3, [2])


def test_setting_that_the_model_does_not_know_is_refused(several_run, tmp_path):
    overrides = ["model.config={contrastive_weight: 0.3}", f"training.output_dir={tmp_path}"]
    with pytest.raises(ValueError, match="contrastive_weight"):
        build_trainer(load_recipe(several_run[0], overrides))


def test_training_on_several_pictures_moves_every_adapter(fwd2bot_run, several_run):
    before = Fwd2BotForConditionalGeneration.from_pretrained(fwd2bot_run[1] / "checkpoint-4").state_dict()
    model = Fwd2BotForConditionalGeneration.from_pretrained(several_run[1] / "checkpoint-4")
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    trained = set(model.trained_parameters())
    assert moved <= trained
    assert {name for name in trained if "lora_" in name} <= moved


def test_training_of_the_generate_stage_alone_leaves_summaries_and_embeddings_as_they_are(
    fwd2bot_run, several_run, tmp_path
):
    start, output = fwd2bot_run[1] / "checkpoint-4", f"training.output_dir={tmp_path}"
    trainer = build_trainer(load_recipe(several_run[0], ["model.trained_stage=generate", output]))
    trainer.train()
    before = Fwd2BotForConditionalGeneration.from_pretrained(start)
    after = Fwd2BotForConditionalGeneration.from_pretrained(tmp_path / "checkpoint-4")
    old = before.state_dict()
    moved = {name for name, tensor in after.state_dict().items() if not torch.equal(tensor, old[name])}
    assert moved == {name for name in before.trained_parameters() if "lora_" in name and ".generate" in name}
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logs and all(entry["autoregressive_loss"] > 0 for entry in logs)
    assert not any("contrastive" in name for entry in logs for name in entry)


def test_frozen_parts_stay_as_they_are_also_in_a_run_that_is_gone_on_with(fwd2bot_run, several_run, tmp_path):
    overrides = ["model.freeze=[summary_projector, logit_scale, 'layers[.]0[.].*[.]compress[.]']"]
    recipe = load_recipe(several_run[0], [*overrides, f"training.output_dir={tmp_path}"])
    final = train(recipe)
    before = Fwd2BotForConditionalGeneration.from_pretrained(fwd2bot_run[1] / "checkpoint-4").state_dict()
    model = Fwd2BotForConditionalGeneration.from_pretrained(final)
    after = model.state_dict()
    frozen = {name for name in after if name.startswith("summary_projector.") or name == "logit_scale"}
    frozen |= {name for name in after if "layers.0." in name and ".compress." in name}
    assert len(frozen) > 3
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert moved == set(model.trained_parameters()) - frozen
    shutil.rmtree(tmp_path / "checkpoint-4")
    again = Fwd2BotForConditionalGeneration.from_pretrained(train(recipe)).state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in again.items())
    for others in (["model.freeze=[]"], ["model.trained_stage=generate", *overrides]):
        others += [f"training.output_dir={tmp_path}", "resume=anyway"]
        with pytest.raises(ValueError, match=r"was .* and is .*in another training.output_dir.*init_from=.*final"):
            build_trainer(load_recipe(several_run[0], others))


def test_freeze_is_refused_in_a_run_that_was_begun_before_it_could_be_set(several_run, tmp_path):
    shutil.copytree(several_run[1], tmp_path / "run")
    stored = json.loads((tmp_path / "run" / "recipe.json").read_text())
    del stored["model"]["freeze"], stored["data"]["several"]
    (tmp_path / "run" / "recipe.json").write_text(json.dumps(stored))
    here = [f"training.output_dir={tmp_path / 'run'}", "data.several={}"]
    with pytest.raises(ValueError, match=r"model.freeze was \[\] and is \['logit_scale'\]"):
        build_trainer(load_recipe(several_run[0], [*here, "model.freeze=[logit_scale]"]))
    build_trainer(load_recipe(several_run[0], here))


def test_freeze_of_one_pattern_is_no_list_of_letters(tiny_fwd2bot):
    with pytest.raises(TypeError, match=r"freeze is 'logit_scale'; give a list of patterns, such as \["):
        mark_trained(tiny_fwd2bot, freeze="logit_scale")


@pytest.fixture
def trainer_of(tmp_path):
    def build(model, **options):
        args = training_arguments({"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", **options})
        freeze = ["[.]compress[.]", "queries", "projector", "logit_scale"]
        return Fwd2BotTrainer(model, args, processing_class=tiny_processor(), freeze=freeze)

    return build


def test_frozen_contrastive_side_is_told_in_the_log(tiny_fwd2bot, trainer_of, monkeypatch):
    told = []
    monkeypatch.setattr("fwd2bot.training.trainer.logger.warning", told.append)
    trainer_of(tiny_fwd2bot)
    assert ["contrastive loss is computed and logged, and nothing learns" in text for text in told] == [True]


@pytest.mark.parametrize(("name", "value"), [("use_reentrant", True), ("determinism_check", "default")])
def test_options_of_checkpointing_that_zero3_cannot_have_are_refused(tiny_fwd2bot, trainer_of, name, value):
    tiny_fwd2bot.backbone.lm_head.weight.ds_tensor = torch.zeros(0)  # as DeepSpeed marks what it has divided
    with pytest.raises(ValueError, match=f"{CHECKPOINTING}_kwargs has {name} {value!r}, and ZeRO-3 needs"):
        trainer_of(tiny_fwd2bot, **{f"{CHECKPOINTING}_kwargs": {name: value}})


def test_learning_rate_of_what_is_frozen_is_refused_when_the_model_is_built(several_run, tmp_path):
    overrides = [f"training.output_dir={tmp_path}", "optimizer.learning_rates={logit_scale: 0.1, queries: 0.2}"]
    recipe = load_recipe(several_run[0], [*overrides, "model.freeze=[logit_scale]"])
    with pytest.raises(ValueError, match="learning_rates has logit_scale, .*or take it out of model.freeze"):
        build_fwd2bot(recipe, training_arguments(recipe.training))
    overrides.append("optimizer.learning_rates.logit_scale=null")
    recipe = load_recipe(several_run[0], [*overrides, "model.freeze=[logit_scale]"])
    build_fwd2bot(recipe, training_arguments(recipe.training))
    assert recipe.optimizer.learning_rates == {"queries": 0.2}


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        ("[projector, connector]", r"model.freeze has 'connector', which fits nothing that trains.*summary_queries"),
        ("['.']", r"model.freeze is \['.'\], which leaves nothing to train"),
    ],
)
def test_freezing_of_nothing_or_all_is_refused(several_run, tmp_path, freeze, message):
    with pytest.raises(ValueError, match=message):
        build_trainer(load_recipe(several_run[0], [f"model.freeze={freeze}", f"training.output_dir={tmp_path}"]))


def test_trained_backbone_loads_with_every_tensor(backbone_run):
    recipe, folder, _ = backbone_run
    model, info = LlavaForConditionalGeneration.from_pretrained(folder / "final", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    saved = safetensors.torch.load_file(folder / "checkpoint-4" / "model.safetensors")
    for name, tensor in model.state_dict().items():
        if name in saved:  # a tied tensor is saved once
            assert torch.equal(tensor, saved[name])
    assert AutoProcessor.from_pretrained(folder / "final").tokenizer.padding_side == "left"


def test_checkpoint_loads_as_a_model(fwd2bot_run):
    Fwd2BotForConditionalGeneration.from_pretrained(fwd2bot_run[1] / "checkpoint-4")


def test_checkpoint_has_the_fingerprint_of_its_own_weights(fwd2bot_run, tmp_path):
    trainer = build_trainer(load_recipe(fwd2bot_run[0]))
    untrained = trainer.model.fingerprint  # puts it into the config, as compress() does
    load_strictly(trainer.model, fwd2bot_run[1] / "checkpoint-4")
    trainer.save_model(str(tmp_path))
    saved = Fwd2BotForConditionalGeneration.from_pretrained(tmp_path)
    assert saved.config.fingerprint == weights_fingerprint(saved.trained_parameters()) != untrained


@pytest.mark.parametrize(("name", "flag"), [("FSDP", "is_fsdp_enabled"), ("DeepSpeed", "is_deepspeed_enabled")])
def test_sharded_run_is_refused_by_name(name, flag, backbone_run, monkeypatch):
    create = StageTrainer.create_accelerator_and_postprocess

    def create_sharded(self):
        create(self)
        setattr(self, flag, True)

    monkeypatch.setattr(StageTrainer, "create_accelerator_and_postprocess", create_sharded)
    with pytest.raises(SystemExit, match=f"^error: .* that {name} shards.*fsdp2.yaml"):
        main([str(backbone_run[0])])


def test_run_in_chunks_has_the_losses_of_whole_batches(fwd2bot_run, tmp_path):
    """Drawn pictures, packed rows, lengths drawn from 1, 2 and 4. By AdamW: Muon raises what rounding changes."""
    logged = []
    for options in ([], ["contrastive.chunk_size=3", f"training.{CHECKPOINTING}=true"]):
        overrides = ["optimizer.name=adamw", f"training.output_dir={tmp_path / str(len(options))}", *options]
        trainer = build_trainer(load_recipe(fwd2bot_run[0], overrides))
        trainer.train()
        logged.append(losses(trainer))
    assert len(logged[0]) == 4
    for found, expected in zip(*logged, strict=True):
        assert found == pytest.approx(expected, abs=2e-4)  # the parts of the loss are logged with four digits
        assert found["loss"] == pytest.approx(expected["loss"], abs=1e-5)


def test_run_that_was_begun_with_another_recipe_is_not_gone_on_with(fwd2bot_run):
    recipe, folder, _ = fwd2bot_run
    stored = (folder / "recipe.json").read_text()
    overrides = ["data.seed=7", "training.max_steps=9", "optimizer.learning_rate=0.1", "training.warmup_steps=3"]
    with pytest.raises(ValueError, match="data.seed was 0 and is 7") as error:
        build_trainer(load_recipe(recipe, overrides))
    assert "optimizer.learning_rate was 0.002 and is 0.1" in str(error.value)
    assert "training.warmup_steps was not set and is 3" in str(error.value)
    assert "max_steps" not in str(error.value)
    assert (folder / "recipe.json").read_text() == stored
    build_trainer(load_recipe(recipe, ["training.max_steps=9", "training.logging_steps=2", "training.report_to=none"]))
    build_trainer(load_recipe(recipe, [*overrides, "resume=anyway"]))
    (folder / "recipe.json").write_text(stored)


def test_run_is_not_gone_on_with_in_another_number_of_processes(backbone_run, tmp_path):
    shutil.copytree(backbone_run[1], tmp_path / "run")
    stored = tmp_path / "run" / PROCESSES
    assert json.loads(stored.read_text()) == {"world_size": 1}
    stored.write_text('{"world_size": 2}')
    here = f"training.output_dir={tmp_path / 'run'}"
    with pytest.raises(ValueError, match=r"a run of 2 process\(es\), and this start has 1"):
        build_trainer(load_recipe(backbone_run[0], [here]))
    assert json.loads(stored.read_text()) == {"world_size": 2}
    build_trainer(load_recipe(backbone_run[0], [here, "resume=anyway"]))
    assert json.loads(stored.read_text()) == {"world_size": 1}


def test_checkpoint_is_incomplete_until_every_process_has_written(backbone_run, tmp_path, monkeypatch):
    trainer = build_trainer(load_recipe(backbone_run[0], [f"training.output_dir={tmp_path}"]))
    trainer.create_optimizer_and_scheduler(4)
    mark, seen = tmp_path / "checkpoint-0" / INCOMPLETE, []
    wait = trainer.accelerator.wait_for_everyone
    monkeypatch.setattr(trainer.accelerator, "wait_for_everyone", lambda: (seen.append(mark.exists()), wait()))
    trainer._save_checkpoint(trainer.model, None)
    assert seen[0] and seen[-1] and not mark.exists()
    mark.touch()  # as the first process has it; the others leave it alone
    monkeypatch.setattr(type(trainer.args), "should_save", property(lambda args: False))
    trainer._save_checkpoint(trainer.model, None)
    assert mark.exists()


def test_checkpoint_that_lacks_a_tensor_does_not_load(backbone_run, tmp_path):
    recipe, folder, _ = backbone_run
    tensors = safetensors.torch.load_file(folder / "checkpoint-4" / "model.safetensors")
    name = next(name for name in tensors if "q_proj" in name)
    del tensors[name]
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match="q_proj"):
        load_strictly(build_trainer(load_recipe(recipe)).model, tmp_path)


def test_training_moves_the_trained_parameters_and_nothing_else(backbone_run, fwd2bot_run):
    trainer = build_trainer(load_recipe(fwd2bot_run[0]))
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trained = set(trainer.model.mark_trainable())
    load_strictly(trainer.model, fwd2bot_run[1] / "checkpoint-4")
    moved = {name for name, tensor in trainer.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved <= trained
    assert {name for name in trained if "lora_" in name} <= moved


def test_newest_complete_checkpoint_is_found_and_incomplete_ones_removed(backbone_run, tmp_path):
    for name in ("checkpoint-2", "checkpoint-4"):
        shutil.copytree(backbone_run[1] / name, tmp_path / name)
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    (tmp_path / "checkpoint-4" / INCOMPLETE).touch()
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert not (tmp_path / "checkpoint-4").exists()
    assert newest_checkpoint(tmp_path / "nowhere") is None


def test_train_goes_on_where_a_run_was_cut_off(backbone_run, tmp_path):
    recipe = write_backbone_recipe(tmp_path, tmp_path / "run")
    (tmp_path / "run").mkdir()
    shutil.copytree(backbone_run[1] / "checkpoint-2", tmp_path / "run" / "checkpoint-2")
    final = train(load_recipe(recipe))
    ours = safetensors.torch.load_file(final / "model.safetensors")
    theirs = safetensors.torch.load_file(backbone_run[1] / "final" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_command_reports_an_unknown_key_in_one_line(backbone_run):
    with pytest.raises(SystemExit, match="^error: unknown key max_step in training"):
        main([str(backbone_run[0]), "training.max_step=3"])
