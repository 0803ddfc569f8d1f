"""bfloat16, float16, autocast, attention implementations: the laws of float32, to the rounding of the dtype."""

import pytest
import tiny
import torch
from transformers.utils import is_flash_attn_2_available

from fwd2bot import Fwd2BotForConditionalGeneration, Fwd2BotSummary

GREEDY = {"max_new_tokens": 5, "do_sample": False}
HALF = [torch.bfloat16, torch.float16]
QUESTIONS = ["What?", "Where is it?", "Why?"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a model in float32, and that model. Do not change them."""
    folder, model = tmp_path_factory.mktemp("saved"), tiny.tiny_fwd2bot()
    model.save_pretrained(folder)
    return folder, model


@pytest.fixture(params=HALF, ids=str)
def half(request, saved):
    """The same in half the bits."""
    return Fwd2BotForConditionalGeneration.from_pretrained(saved[0], dtype=request.param)


@pytest.fixture(scope="module")
def prompts(processor):
    return processor(text=tiny.prompts(processor, QUESTIONS))


def batch(processor):
    return tiny.training_batch(processor, ["a dog", "cats", "no"])


def assert_close_in(dtype: torch.dtype, found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to 4 roundings of the largest value.

    A matrix of another shape is multiplied in blocks of another shape, so its sums are added up in another order, and
    each order rounds once more per layer. Measured on 10 families of tiny models: at most 1.5 roundings.
    """
    atol = 4 * torch.finfo(dtype).eps * expected.abs().max().item()
    torch.testing.assert_close(found.float(), expected.float(), rtol=0, atol=atol)


# Half precision


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_new_parts_take_the_dtype_of_the_backbone(dtype):
    model = Fwd2BotForConditionalGeneration.from_backbone(tiny.tiny_backbone().to(dtype), num_summary_tokens=4)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype} == {model.dtype}


def test_summary_has_the_dtype_of_the_model(half, images):
    summary = half.compress(**images)
    assert summary.tokens.dtype == half.dtype
    assert summary.metadata["dtype"] == str(half.dtype).removeprefix("torch.")


def test_summary_is_that_of_float32_but_for_rounding(half, saved, images):
    assert_close_in(half.dtype, half.compress(**images).tokens, saved[1].compress(**images).tokens)


def test_prefix_of_long_summary_equals_short_summary(half, images):
    longest = half.compress(**images).tokens
    for k in (1, 2):
        assert_close_in(half.dtype, half.compress(**images, num_summary_tokens=k).tokens, longest[:, :k])


def test_summary_does_not_depend_on_the_batch(half, processor, images):
    together = half.compress(**images).tokens
    for index, picture in enumerate(tiny.pictures(3)):
        alone = half.compress(**processor.process_images(picture)).tokens
        assert_close_in(half.dtype, alone, together[index : index + 1])


def test_embeddings_are_float32_of_unit_norm_and_have_one_path(half, images):
    embeds = half.embed(**images)
    assert embeds.dtype == torch.float32
    torch.testing.assert_close(embeds.norm(dim=-1), torch.ones(3))
    assert torch.equal(embeds, half.embed(summary=half.compress(**images)))


def test_one_path_to_an_answer(half, processor, images, prompts):
    from_images = half.generate(
        **processor(images=tiny.pictures(3), text=tiny.prompts(processor, QUESTIONS)), **GREEDY
    )
    assert torch.equal(from_images, half.generate_from_summary(half.compress(**images), **prompts, **GREEDY))


def test_float32_summary_from_disk_answers_in_half_precision(half, saved, images, prompts, tmp_path):
    summary = saved[1].compress(**images)
    summary.save_file(tmp_path / "summary.safetensors")
    loaded = half.load_summary(tmp_path / "summary.safetensors")
    answers = half.generate_from_summary(
        Fwd2BotSummary.load_file(tmp_path / "summary.safetensors"), **prompts, **GREEDY
    )
    assert torch.equal(answers, half.generate_from_summary(summary.to(half.dtype), **prompts, **GREEDY))
    assert torch.equal(answers, half.generate_from_summary(loaded, **prompts, **GREEDY))


def test_half_precision_summary_answers_in_float32(half, saved, images, prompts):
    summary = half.compress(**images)
    answers = saved[1].generate_from_summary(summary, **prompts, **GREEDY)
    assert torch.equal(answers, saved[1].generate_from_summary(summary.to(torch.float32), **prompts, **GREEDY))


def test_saved_and_loaded_without_dtype_is_the_same(half, images, tmp_path):
    half.save_pretrained(tmp_path)
    loaded = Fwd2BotForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.dtype == half.dtype and loaded.fingerprint == half.fingerprint
    assert torch.equal(loaded.compress(**images).tokens, half.compress(**images).tokens)


# Training


def three_steps(model, processor) -> set[str]:
    """Names of the parameters that moved."""
    trained = model.mark_trainable()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(**batch(processor), num_summary_tokens=4).loss
        loss.backward()
        optimizer.step()
    assert torch.isfinite(loss)
    return {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}


def test_bfloat16_trains_what_it_should(saved, processor):
    model = Fwd2BotForConditionalGeneration.from_pretrained(saved[0], dtype=torch.bfloat16).train()
    assert three_steps(model, processor) == set(model.trained_parameters())


def test_float32_parameters_train_on_a_half_precision_backbone(half, processor, images, prompts):
    for parameter in half.train().trained_parameters().values():
        parameter.data = parameter.data.float()
    assert three_steps(half, processor) == set(half.trained_parameters())
    summary = half.eval().compress(**images)
    assert summary.tokens.dtype == torch.float32
    assert half.generate_from_summary(summary, **prompts, **GREEDY).shape == (3, prompts["input_ids"].shape[1] + 5)


def test_model_with_float32_parameters_on_half_precision_comes_back(half, images, tmp_path):
    for parameter in half.trained_parameters().values():
        parameter.data = parameter.data.float()
    half.save_pretrained(tmp_path)
    loaded = Fwd2BotForConditionalGeneration.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {half.dtype}
    assert loaded.fingerprint == half.fingerprint
    assert_close_in(half.dtype, loaded.compress(**images).tokens, half.compress(**images).tokens)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_gradients_under_autocast_are_those_of_float32_but_for_rounding(processor, dtype):
    gradients = []
    for enabled in (False, True):
        model = tiny.tiny_fwd2bot().train()
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            output = model(**batch(processor), num_summary_tokens=4)
        assert output.image_embeds.dtype == output.text_embeds.dtype == torch.float32
        output.loss.backward()
        gradients.append(torch.cat([value.grad.flatten() for value in model.mark_trainable().values()]))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.999


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient_checkpointing_under_autocast_changes_no_gradient(processor, dtype):
    gradients = []
    for checkpointing in (False, True):
        model = tiny.tiny_fwd2bot().train()
        for parameter in set(model.parameters()) - set(model.trained_parameters().values()):
            parameter.data = parameter.data.to(dtype)
        if checkpointing:
            tiny.enable_checkpointing(model, {"use_reentrant": False})
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**batch(processor), num_summary_tokens=4).loss
        loss.backward()
        gradients.append([value.grad for value in model.mark_trainable().values()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed)


def test_compress_and_answer_under_autocast(saved, processor, images, prompts):
    model = saved[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        summary = model.compress(**images)
        answers = model.generate_from_summary(summary, **prompts, **GREEDY)
        assert torch.equal(model.embed(**images), model.embed(summary=summary))
    assert_close_in(torch.bfloat16, summary.tokens, model.compress(**images).tokens)
    assert answers.shape == (3, prompts["input_ids"].shape[1] + 5)


# Attention


def attention_layers(model) -> dict[str, str]:
    """Which implementation each kind of attention layer runs."""
    layers = [layer for layer in model.modules() if type(layer).__name__.endswith("Attention")]
    return {type(layer).__name__: layer.config._attn_implementation for layer in layers}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_reaches_vision_tower_and_language_model(saved, images, prompts, attention):
    model = Fwd2BotForConditionalGeneration.from_pretrained(saved[0], attn_implementation=attention)
    assert attention_layers(model) == {"SiglipAttention": attention, "LlamaAttention": attention}
    expected = saved[1].compress(**images)
    torch.testing.assert_close(model.compress(**images).tokens, expected.tokens, rtol=0, atol=1e-5)
    assert torch.equal(
        model.generate_from_summary(expected, **prompts, **GREEDY),
        saved[1].generate_from_summary(expected, **prompts, **GREEDY),
    )


def test_attention_by_part_is_an_error_at_loading_and_works_afterwards(saved, images):
    parts = {"vision_config": "eager", "text_config": "sdpa"}
    with pytest.raises(ValueError, match=r"'eager'.* would not reach the parts .* model.backbone.set_attn_impl"):
        Fwd2BotForConditionalGeneration.from_pretrained(saved[0], attn_implementation=parts)
    model = Fwd2BotForConditionalGeneration.from_pretrained(saved[0])
    model.backbone.set_attn_implementation(parts)
    assert attention_layers(model) == {"SiglipAttention": "eager", "LlamaAttention": "sdpa"}
    torch.testing.assert_close(model.compress(**images).tokens, saved[1].compress(**images).tokens, rtol=0, atol=1e-5)


def test_attention_can_be_changed_after_loading(saved, images):
    model = Fwd2BotForConditionalGeneration.from_pretrained(saved[0])
    model.set_attn_implementation("eager")
    assert attention_layers(model) == {"SiglipAttention": "eager", "LlamaAttention": "eager"}
    torch.testing.assert_close(model.compress(**images).tokens, saved[1].compress(**images).tokens, rtol=0, atol=1e-5)


@pytest.mark.skipif(is_flash_attn_2_available(), reason="flash-attn is installed")
def test_flash_attention_that_is_not_installed_is_an_error_that_names_it(saved):
    with pytest.raises(ImportError, match=r"FlashAttention2 .* doesn't seem to be installed"):
        Fwd2BotForConditionalGeneration.from_pretrained(saved[0], attn_implementation="flash_attention_2")


@pytest.mark.gpu
@pytest.mark.skipif(not is_flash_attn_2_available(), reason="needs flash-attn and a GPU")
def test_flash_attention_gives_the_same(saved, images):
    options = {"dtype": torch.bfloat16, "device_map": "cuda"}
    flash, sdpa = (
        Fwd2BotForConditionalGeneration.from_pretrained(saved[0], attn_implementation=attention, **options)
        for attention in ("flash_attention_2", "sdpa")
    )
    on_gpu = images.to("cuda")
    assert_close_in(torch.bfloat16, flash.compress(**on_gpu).tokens, sdpa.compress(**on_gpu).tokens)
