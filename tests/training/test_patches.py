"""The small backbone cut into other patches: what is kept, what is resampled, what is refused."""

import pytest
import tiny
import torch
from tiny_recipes import BACKBONE, write_backbone_recipe
from transformers import AutoProcessor, LlavaForConditionalGeneration

from fwd2bot.training.backbone import build_backbone, build_processor, resample_patches
from fwd2bot.training.recipe import BackboneModel, load_recipe
from fwd2bot.training.tokenizer import train_tokenizer
from fwd2bot.training.train import train


@pytest.fixture
def llava():
    """A random LLaVA whose pictures of 96 pixels are 4x4 patches, and its processor."""
    sizes = BackboneModel(**{**BACKBONE, "patch_size": 24})
    tokenizer = train_tokenizer(["what is this? a dog"], sizes.vocab_size, sizes.max_position_embeddings)
    torch.manual_seed(0)
    return build_backbone(sizes, tokenizer).eval(), build_processor(sizes, tokenizer)


def inputs_of(processor):
    return processor(images=tiny.pictures(1), text=["<image> what is this?"], return_tensors="pt")


@torch.no_grad()
def test_patches_of_the_same_size_change_nothing(llava):
    model, processor = llava
    before = model(**inputs_of(processor)).logits
    same = resample_patches(model, processor, 24).eval()
    assert torch.allclose(same(**inputs_of(processor)).logits, before, atol=1e-6)


@torch.no_grad()
def test_smaller_patches_are_more_image_tokens_of_the_same_picture(llava):
    model, processor = llava
    embeddings = model.get_encoder("image").embeddings
    across = torch.arange(4.0).repeat(4)  # how far to the right a place is
    embeddings.position_embedding.weight[:, 0] = across
    embeddings.patch_embedding.weight.fill_(0.5)
    white = torch.ones(1, 3, 96, 96)
    before = embeddings.patch_embedding(white)
    finer = resample_patches(model, processor, 8).eval()
    assert finer.config.image_seq_length == 144 and model.config.image_seq_length == 16
    inputs = inputs_of(processor)
    assert (inputs["input_ids"] == finer.config.image_token_id).sum() == 144
    assert finer(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]
    embeddings = finer.get_encoder("image").embeddings
    assert torch.allclose(embeddings.patch_embedding(white), before[..., :1, :1].expand(1, -1, 12, 12), rtol=1e-4)
    right = embeddings.position_embedding.weight[:, 0].view(12, 12)
    assert torch.allclose(right[0], right[-1], atol=1e-5) and (right[0].diff() > 0).all()
    untouched = "model.language_model.layers.0.mlp.up_proj.weight"
    assert torch.equal(finer.state_dict()[untouched], model.state_dict()[untouched])


def test_patches_that_do_not_fit_are_refused(llava):
    with pytest.raises(ValueError, match="resample_patches is 7, but the pictures are 96 pixels wide"):
        resample_patches(*llava, 7)
    with pytest.raises(ValueError, match="name it in model.init_from"):
        load_recipe("backbone.yaml", ["model.resample_patches=8"])


def test_recipe_goes_on_from_a_model_in_other_patches(tmp_path):
    before = train(load_recipe(write_backbone_recipe(tmp_path, tmp_path / "before", max_steps=1)))
    path = write_backbone_recipe(tmp_path, tmp_path / "finer", max_steps=2)
    longer = [f"model.init_from={before}", "model.resample_patches=24", "data.row_length=200"]
    after = train(load_recipe(path, longer))
    model, processor = LlavaForConditionalGeneration.from_pretrained(after), AutoProcessor.from_pretrained(after)
    assert model.config.vision_config.patch_size == processor.patch_size == 24
    assert (inputs_of(processor)["input_ids"] == model.config.image_token_id).sum() == 16


def test_backbone_goes_on_with_a_llava_alone(tmp_path):
    """Another model would be read as one whose weights are all missing, and drawn anew."""
    tiny.tiny_fwd2bot().save_pretrained(tmp_path / "fwd2bot")
    path = write_backbone_recipe(tmp_path, tmp_path / "run")
    with pytest.raises(ValueError, match="a fwd2bot, and kind: backbone goes on with a LLaVA"):
        train(load_recipe(path, [f"model.init_from={tmp_path / 'fwd2bot'}"]))
