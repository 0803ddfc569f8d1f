"""Where summary tokens looked: the weights of the compress pass itself, on the grid of patches."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import tiny
import torch
from PIL import Image

from fwd2bot.training import attention_maps as module
from fwd2bot.training.attention_maps import _covered_box, attention_maps


def test_maps_are_the_shares_of_the_patches(shared_fwd2bot, tiny_processor):
    found = attention_maps(shared_fwd2bot, tiny_processor, tiny.pictures(1)[0])
    assert found.maps.shape == (4, 4, 4)
    assert torch.allclose(found.maps.sum((1, 2)), torch.ones(4))
    assert ((0 < found.picture_share) & (found.picture_share < 1)).all()
    assert found.box == (0.0, 0.0, 20.0, 30.0)


def test_maps_are_the_weights_of_a_pass_with_eager_attention(tiny_fwd2bot, tiny_processor):
    """Against hooks on the attention layers of a model that runs eagerly anyway."""
    picture = tiny.pictures(1)[0]
    found = attention_maps(tiny_fwd2bot, tiny_processor, picture, layers=[1])
    tiny_fwd2bot.get_decoder().set_attn_implementation("eager")
    seen = []
    layer = tiny_fwd2bot.get_decoder().layers[1].self_attn
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output[1]))
    inputs = tiny_processor.process_images([picture])
    tiny_fwd2bot.compress(**inputs)
    [weights] = seen  # (1, heads, L + k, L + k)
    is_image = inputs["input_ids"][0] == tiny_fwd2bot.image_token_id
    patches = weights[0, :, -4:, :-4].mean(0)[:, is_image]  # (k, 16)
    assert torch.allclose(found.picture_share, patches.sum(1), atol=1e-6)
    assert torch.allclose(found.maps, (patches / patches.sum(1, keepdim=True)).reshape(4, 4, 4), atol=1e-6)


def test_shorter_length_gives_the_first_maps(shared_fwd2bot, tiny_processor):
    picture = tiny.pictures(1)[0]
    longer = attention_maps(shared_fwd2bot, tiny_processor, picture)
    shorter = attention_maps(shared_fwd2bot, tiny_processor, picture, num_summary_tokens=2)
    assert torch.allclose(shorter.maps, longer.maps[:2], atol=1e-6)


def test_model_stays_as_it_is(shared_fwd2bot, tiny_processor):
    inputs = tiny_processor.process_images(tiny.pictures(2))
    before = shared_fwd2bot.compress(**inputs).tokens
    kept = {name: (id(value), value.data_ptr()) for name, value in shared_fwd2bot.named_parameters()}
    attention_maps(shared_fwd2bot, tiny_processor, tiny.pictures(1)[0])
    assert shared_fwd2bot.config.get_text_config()._attn_implementation == "sdpa"
    assert torch.equal(shared_fwd2bot.compress(**inputs).tokens, before)
    assert {name: (id(value), value.data_ptr()) for name, value in shared_fwd2bot.named_parameters()} == kept


def test_map_follows_the_order_of_the_patches(tiny_fwd2bot, tiny_processor, monkeypatch):
    """Weights that are put on one image token alone appear in its place: token 9 of 4 x 4 is row 2, column 1."""
    inputs = tiny_processor.process_images(tiny.pictures(1))
    place = (inputs["input_ids"][0] == tiny_fwd2bot.image_token_id).nonzero()[9, 0]
    length = inputs["input_ids"].shape[1] + 4
    weights = torch.zeros(1, 2, length, length)
    weights[..., place] = 1.0
    twin = SimpleNamespace(_read_with_queries=lambda k, **_: SimpleNamespace(attentions=(weights, weights)))
    monkeypatch.setattr(module, "_eager_twin", lambda model: twin)
    found = attention_maps(tiny_fwd2bot, tiny_processor, tiny.pictures(1)[0])
    assert (found.maps[:, 2, 1] == 1).all() and found.maps.sum() == 4


def test_centre_crop_is_seen_in_the_box():
    class Clip:
        do_center_crop, do_pad = True, None
        size, crop_size = {"shortest_edge": 100}, {"height": 80, "width": 80}

    # 400 x 200 is shown as 200 x 100, of which the middle 80 x 80 are seen: 160 x 160 pixels of the picture
    assert _covered_box(Clip(), (400, 200)) == (120.0, 20.0, 280.0, 180.0)


def test_other_families_are_refused_by_name(tiny_fwd2bot, tiny_processor):
    tiny_fwd2bot.config.backbone_config.model_type = "qwen2_5_vl"
    with pytest.raises(ValueError, match="family 'qwen2_5_vl' lie in the picture is not known.*llava"):
        attention_maps(tiny_fwd2bot, tiny_processor, Image.new("RGB", (24, 24)))


def test_tokens_that_are_no_square_are_refused(tiny_fwd2bot, tiny_processor):
    tiny_fwd2bot.config.backbone_config.vision_config.patch_size = 8
    with pytest.raises(ValueError, match="16 image tokens .*are no square"):
        attention_maps(tiny_fwd2bot, tiny_processor, Image.new("RGB", (24, 24)))


@pytest.mark.parametrize("layers", [[], [2], [-3]])
def test_unknown_layer_is_refused(shared_fwd2bot, tiny_processor, layers):
    with pytest.raises(ValueError, match="the layers 0 to 1"):
        attention_maps(shared_fwd2bot, tiny_processor, tiny.pictures(1)[0], layers=layers)


def test_import_needs_no_package_of_the_training_extra():
    program = (
        "import sys, fwd2bot.training.attention_maps\n"
        "print(sorted({'datasets', 'tensorboard', 'sacrebleu', 'rouge_score'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
