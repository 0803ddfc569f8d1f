"""Recipes for real backbones: lower precision, quantised (QLoRA), adapters of one's own, a connector that trains."""

import pytest
import tiny
import torch
from source_recipes import write_backbone, write_source_recipe

from fwd2bot import Fwd2BotForConditionalGeneration
from fwd2bot.training.optimizers import build_optimizer, role_of
from fwd2bot.training.recipe import load_recipe
from fwd2bot.training.train import build_trainer, run, train
from fwd2bot.training.trainer import newest_checkpoint


def recipe(tmp_path, name="run", **sections):
    return load_recipe(write_source_recipe(tmp_path, tmp_path / name, sections))


def state(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def moved(before, after) -> set[str]:
    return {name for name, value in after.items() if not torch.equal(value, before[name])}


def test_connector_trains_with_what_fwd2bot_adds_and_nothing_else(tmp_path):
    """Law 5 with `train_connector`; a full checkpoint keeps it."""
    loaded = recipe(tmp_path, model={"train_connector": True})
    trainer = build_trainer(loaded)
    before, added = state(trainer.model), set(trainer.model.trained_parameters())
    final = run(trainer, loaded)
    connector = {name for name in before if ".multi_modal_projector." in name}
    assert len(connector) == 4
    after = Fwd2BotForConditionalGeneration.from_pretrained(final)
    assert moved(before, state(after)) == added | connector
    assert set(after.trained_parameters()) == added
    assert after.mark_trainable().keys() == added | connector


def test_connector_that_trained_is_not_left_out_of_a_checkpoint(tmp_path):
    model = tiny.tiny_fwd2bot(train_connector=True)
    with pytest.raises(ValueError, match="connector .* was trained .*Save in full"):
        model.save_pretrained(tmp_path / "adapters", adapter_only=True)


def test_frozen_weights_are_in_bfloat16_and_what_trains_in_float32(tmp_path):
    loaded = recipe(tmp_path, model={"dtype": "bfloat16"})
    trainer = build_trainer(loaded)
    dtypes = {name: value.dtype for name, value in trainer.model.named_parameters()}
    trained = set(trainer.model.trained_parameters())
    assert {dtypes[name] for name in trained} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if name not in trained} == {torch.bfloat16}
    before = state(trainer.model)
    run(trainer, loaded)
    assert moved(before, state(trainer.model)) == trained
    assert all(torch.isfinite(torch.tensor(entry.get("loss", 0.0))) for entry in trainer.state.log_history)


@pytest.mark.parametrize(
    "adapters", [{"r": 2, "lora_alpha": 8}, {"compress": {"r": 2, "lora_alpha": 8}, "generate": {"r": 3}}]
)
def test_adapters_are_those_of_the_recipe(tmp_path, adapters):
    model = build_trainer(recipe(tmp_path, model={"adapters": adapters})).model
    assert model.config.adapters["compress"]["r"] == 2
    assert model.config.adapters["compress"]["lora_alpha"] == 8
    assert model.config.adapters["generate"]["r"] == adapters.get("generate", adapters)["r"]


def test_each_role_has_its_own_learning_rate(tmp_path):
    model = tiny.tiny_fwd2bot(train_connector=True, contrastive_loss="sigmoid")
    rates = {"queries": 0.1, "projector": 0.2, "adapters": 0.3, "logit_scale": 0.4, "connector": 0.5}
    model.mark_trainable()
    roles = {name: role_of(name) for name, value in model.named_parameters() if value.requires_grad}
    assert set(roles.values()) == set(rates)
    options = {"learning_rate": 1.0, "matrix_learning_rate": 1.0, "weight_decay": 0.0}
    for name in ("adamw", "muon"):
        optimizer = build_optimizer(model, name, **options, learning_rates=rates)
        found = {id(value): group["lr"] for group in optimizer.param_groups for value in group["params"]}
        assert {name: found[id(value)] for name, value in model.named_parameters() if value.requires_grad} == {
            name: rates[role] for name, role in roles.items()
        }
    with pytest.raises(ValueError, match="has connector, but nothing of that role trains"):
        build_optimizer(tiny.tiny_fwd2bot(), "adamw", **options, learning_rates={"connector": 0.1})


def test_sigmoid_loss_trains_its_bias_and_is_kept(tmp_path):
    final = train(recipe(tmp_path, contrastive={"loss": "sigmoid"}))
    model = Fwd2BotForConditionalGeneration.from_pretrained(final)
    assert model.config.contrastive_loss == "sigmoid"
    assert model.logit_bias.item() != -10
    again = recipe(tmp_path, "again", model={"init_from": str(final)}, contrastive={"loss": "infonce"})
    with pytest.raises(ValueError, match="contrastive.loss is infonce, but .* was trained with sigmoid"):
        build_trainer(again)
    again = recipe(tmp_path, "again", model={"init_from": str(final), "config": {"summary_norm": False}})
    with pytest.raises(ValueError, match="model.config.summary_norm is False, but .* was trained with True"):
        build_trainer(again)


def test_model_without_the_sigmoid_loss_has_the_weights_that_it_always_had():
    names = set(tiny.tiny_fwd2bot().state_dict())
    assert set(tiny.tiny_fwd2bot(contrastive_loss="sigmoid").state_dict()) - names == {"logit_bias"}
    assert not any("bias" in name and "logit" in name for name in names)


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_quantised_backbone_trains_and_is_gone_on_from(tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    # 4 bit packs rows of multiples of 64
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2}
    write_backbone(tmp_path, **sizes)
    loaded = recipe(tmp_path, model={"quantization": bits})
    trainer = build_trainer(loaded)
    trained = set(trainer.model.trained_parameters())
    before = state(trainer.model)
    final = run(trainer, loaded)
    assert moved(before, {name: value for name, value in state(trainer.model).items() if name in trained}) == trained
    checkpoint = newest_checkpoint(tmp_path / "run")
    assert not (checkpoint / "model.safetensors").exists()
    assert not (final / "model.safetensors").exists()
    plain = Fwd2BotForConditionalGeneration.from_pretrained(final)  # on the backbone as it came
    for name, value in plain.trained_parameters().items():
        assert torch.equal(value, trainer.model.get_parameter(name)), name
    longer = load_recipe(tmp_path / "run.yaml", ["training.max_steps=7"])
    again = build_trainer(longer)
    run(again, longer)
    assert [entry["step"] for entry in again.state.log_history if "loss" in entry][-1] == 7
