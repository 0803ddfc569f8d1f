"""The stage belongs to the running pass: to its thread and its recomputation, not to the model."""

import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fwd2bot.adapters_fwd2bot import (
    checkpoint_stage,
    current_stage,
    install_adapter,
    install_queries,
    linear_layer_names,
    run_stage,
)

LORA = {"r": 2, "lora_alpha": 2, "target_modules": ["layer"]}


@pytest.fixture
def adapted():
    """One linear layer, the identity, with adapters that add 1 ("compress") and 2 ("generate") times the sum."""
    model = nn.Sequential()
    model.add_module("layer", nn.Linear(2, 2, bias=False))
    nn.init.eye_(model.layer.weight)
    for stage, factor in (("compress", 1.0), ("generate", 2.0)):
        install_adapter(model, stage, LORA)
        nn.init.constant_(model.layer.lora_A[stage].weight, 0.5)
        nn.init.constant_(model.layer.lora_B[stage].weight, factor)
    return model


X = torch.tensor([[1.0, 3.0]])
RESULTS = {None: [[1.0, 3.0]], "compress": [[5.0, 7.0]], "generate": [[9.0, 11.0]]}


@pytest.mark.parametrize("stage", [None, "compress", "generate"])
def test_layer_runs_the_adapter_of_the_stage(adapted, stage):
    with run_stage(stage):
        assert adapted(X).tolist() == RESULTS[stage]


def test_stages_nest_and_end_with_their_block():
    assert current_stage() is None
    with run_stage("compress"):
        with run_stage(None):
            assert current_stage() is None
        assert current_stage() == "compress"
    assert current_stage() is None


def test_stage_ends_with_an_error_too():
    with pytest.raises(RuntimeError, match="inside"), run_stage("compress"):
        raise RuntimeError("inside")
    assert current_stage() is None


def test_threads_run_different_stages_at_once(adapted):
    everyone_inside = threading.Barrier(3)
    results = {}

    def work(stage):
        with run_stage(stage):
            everyone_inside.wait(timeout=30)
            results[stage] = adapted(X).tolist()
            everyone_inside.wait(timeout=30)

    threads = [threading.Thread(target=work, args=(stage,)) for stage in RESULTS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == RESULTS


def test_running_a_stage_leaves_requires_grad_alone(adapted):
    for parameter in adapted.parameters():
        parameter.requires_grad_(True)
    with run_stage("compress"):
        adapted(X)
    assert all(parameter.requires_grad for parameter in adapted.parameters())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputation_runs_under_the_stage_of_its_forward(use_reentrant):
    seen = []

    def function(x):
        seen.append(current_stage())
        return x * x

    x = torch.ones(1, requires_grad=True)
    with run_stage("generate"):
        y = checkpoint_stage(checkpoint)(function, x, use_reentrant=use_reentrant)
    with run_stage("compress"):
        y.backward()
    assert seen == ["generate", "generate"]


def test_queries_stand_at_the_ids_after_the_last_word():
    embedding = nn.Embedding(3, 2)
    words = embedding.weight.detach().clone()
    install_queries(embedding, torch.tensor([[5.0, 6.0], [7.0, 8.0]]))
    found = embedding(torch.tensor([[0, 4, 2, 3]]))
    expected = torch.stack([words[0], torch.tensor([7.0, 8.0]), words[2], torch.tensor([5.0, 6.0])])[None]
    assert torch.equal(found, expected)
    assert embedding.weight.shape == (3, 2)


def test_scaled_embedding_leaves_queries_unscaled():
    class Scaled(nn.Embedding):  # as in Gemma
        def forward(self, input_ids):
            return super().forward(input_ids) * 10

    embedding = Scaled(3, 2)
    install_queries(embedding, torch.ones(1, 2))
    found = embedding(torch.tensor([1, 3]))
    assert torch.equal(found, torch.stack([embedding.weight[1] * 10, torch.ones(2)]))


def test_queries_want_an_embedding():
    with pytest.raises(TypeError, match=r"must be a torch.nn.Embedding, got Linear"):
        install_queries(nn.Linear(2, 2), torch.zeros(1, 2))


def test_linear_layer_names_are_the_last_parts_once(tiny_backbone):
    names = linear_layer_names(tiny_backbone.get_decoder())
    assert names == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    with pytest.raises(ValueError, match="Embedding has no linear layer"):
        linear_layer_names(nn.Embedding(2, 2))


# The short way of a layer where no gradient is wanted


def plain_layer(settings, stage="compress", **options):
    """A linear layer with two adapters, and inputs for it."""
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("layer", nn.Linear(6, 5, **options))
    for name in ("compress", "generate"):
        install_adapter(model, name, {"r": 2, "lora_alpha": 4, "target_modules": ["layer"], **settings})
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model, torch.randn(2, 3, 6)


@pytest.mark.parametrize("stage", [None, "compress", "generate"])
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"use_rslora": True}, {"lora_dropout": 0.5}])
def test_layer_gives_without_gradients_what_it_gives_with(settings, stage):
    model, x = plain_layer(settings)
    model.eval()
    with run_stage(stage):
        expected = model(x)
        with torch.no_grad():
            torch.testing.assert_close(model(x), expected.detach(), rtol=0, atol=1e-6)
        with torch.inference_mode():
            torch.testing.assert_close(model(x[0]), expected[0].detach(), rtol=0, atol=1e-6)


def test_adapter_that_is_switched_off_adds_nothing_without_gradients_either():
    model, x = plain_layer({})
    model.eval()
    model.layer.enable_adapters(False)
    with run_stage("compress"), torch.no_grad():
        assert torch.equal(model(x), model.layer.base_layer(x))


def test_what_a_hook_kept_of_the_layer_below_stays_as_it_was():
    model, x = plain_layer({})
    model.eval()
    kept = []
    model.layer.base_layer.register_forward_hook(lambda module, inputs, output: kept.append(output))
    with run_stage("compress"), torch.no_grad():
        result = model(x)
        assert not torch.equal(result, kept[0])
        assert torch.equal(kept[0], torch.nn.functional.linear(x, *model.layer.base_layer.parameters()))


def test_dropout_of_training_is_applied_without_gradients_too():
    model, x = plain_layer({"lora_dropout": 0.9})
    model.train()
    with torch.no_grad(), run_stage("compress"):
        assert not torch.equal(model(x), model(x))


def test_autocast_is_kept_without_gradients():
    model, x = plain_layer({})
    with torch.no_grad(), run_stage("compress"), torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.bfloat16


def test_adapter_in_float32_on_a_half_precision_layer_keeps_the_dtype_of_the_layer():
    model, x = plain_layer({})
    model.layer.base_layer.to(torch.bfloat16)
    with torch.no_grad(), run_stage("compress"):
        assert model(x.bfloat16()).dtype == torch.bfloat16
