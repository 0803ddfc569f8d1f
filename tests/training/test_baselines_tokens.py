"""What the baselines of the comparison keep of a picture."""

import pytest
import tiny
import torch
from baseline_models import made
from transformers import CLIPVisionConfig, LlavaForConditionalGeneration

from fwd2bot.training.answering import answer_uncompressed
from fwd2bot.training.baselines.token_models import (
    AllTokens,
    AttentionPruning,
    AveragePooling,
    QueryTransformer,
    TokenMerging,
    _places,
    _Resampler,
)


def test_pooling_takes_the_mean_of_each_rectangle():
    tokens = torch.arange(16.0).view(1, 16, 1)  # a 4x4 plane
    assert AveragePooling.reduce(None, tokens, 1, None).flatten().tolist() == [7.5]
    assert AveragePooling.reduce(None, tokens, 4, None).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert AveragePooling.reduce(None, tokens, 2, None).flatten().tolist() == [6.5, 8.5]


def test_pruning_keeps_the_most_attended_tokens_in_the_order_of_the_image():
    tokens, scores = torch.arange(4.0).view(1, 4, 1), torch.tensor([[0.3, 0.1, 0.1, 0.6]])
    assert AttentionPruning.reduce(None, tokens, 2, scores).flatten().tolist() == [0.0, 3.0]


@pytest.mark.parametrize(("layer", "seen"), [(-1, 1), (-2, 0), (1, 0), (2, 1), ([-2, -1], 1), ([2, 1], 0)])
@pytest.mark.parametrize("strategy", ["full", "default"])
def test_scores_of_pruning_are_the_attention_that_each_kept_token_receives(strategy, layer, seen):
    """By layer 0 of two the second token is read most, by layer 1 the third; the first one reads in its own way."""
    model = made(AttentionPruning)
    model.config.backbone_config.vision_feature_select_strategy = strategy
    model.config.backbone_config.vision_feature_layer = layer
    attentions = []
    for token in range(2):
        attention = torch.full((1, 3, 5, 5), 0.1)  # (N, heads, readers, tokens)
        attention[:, :, :, token + 1] = 0.6
        attention[:, :, 0] = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4]).roll(token)  # the class token's, if there is one
        attentions.append(attention)
    expected = attentions[seen][:, 0].mean(1) if strategy == "full" else attentions[seen][:, 0, 0, 1:]
    assert torch.allclose(model._scores(attentions), expected)


@pytest.mark.parametrize("layer", [0, -3])
def test_pruning_needs_a_layer_with_attention(layer):
    model = made(AttentionPruning)
    model.config.backbone_config.vision_feature_layer = layer
    with pytest.raises(ValueError, match=f"vision_feature_layer {layer} is before the first layer"):
        model._scores([torch.ones(1, 2, 4, 4)] * 2)


def test_query_transformer_is_loaded_as_it_was_saved(tmp_path):
    model = made(QueryTransformer)
    model.save_pretrained(tmp_path)
    loaded = QueryTransformer.from_pretrained(tmp_path)
    inputs = tiny.tiny_processor().process_images(tiny.pictures(2))
    assert torch.equal(loaded.compress(**inputs).tokens, model.compress(**inputs).tokens)


def test_pruning_on_a_tower_with_a_class_token_scores_the_tokens_that_are_left():
    plain = tiny.tiny_backbone().config
    sizes = {name: getattr(plain.vision_config, name) for name in ("image_size", "patch_size", "num_attention_heads")}
    plain.vision_config = CLIPVisionConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, **sizes)
    plain.vision_feature_select_strategy, plain.vision_feature_layer = "default", -2
    backbone = LlavaForConditionalGeneration(plain).eval()
    model = AttentionPruning.from_backbone(backbone, num_summary_tokens=4, lora_rank=4).eval()
    model.set_attn_implementation("eager")
    seen = []
    model.reduce = lambda tokens, k, scores: seen.append((tokens.shape[:2], scores)) or tokens[:, :k]
    model.compress(**tiny.tiny_processor().process_images(tiny.pictures(2)))
    shape, scores = seen[0]
    assert shape == scores.shape and (scores > 0).all() and (scores.sum(1) < 1).all()  # the class token's own is out


def test_merging_makes_equal_tokens_one_and_keeps_the_weighted_mean():
    tokens = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 3.0]]])
    assert TokenMerging.reduce(None, tokens, 3, None)[0, 0].tolist() == [1.0, 0.0]  # the first two are most alike
    merged = TokenMerging.reduce(None, tokens, 2, None)[0]
    assert merged.tolist() == [[1.0, 0.0], [0.0, 2.0]]
    torch.manual_seed(0)
    drawn = torch.randn(2, 16, 8)
    assert torch.allclose(TokenMerging.reduce(None, drawn, 1, None)[:, 0], drawn.mean(1), atol=1e-5)  # by their sizes
    assert TokenMerging.reduce(None, drawn, 5, None).shape == (2, 5, 8)


def test_merging_merges_the_most_alike_first_and_keeps_the_order_of_the_image():
    tokens = torch.eye(16).repeat(2, 1, 1)
    tokens[:, 5] = tokens[:, 2]
    assert torch.equal(TokenMerging.reduce(None, tokens, 15, None), tokens[:, [*range(5), *range(6, 16)]])
    angles = torch.linspace(0, 1.5, 16)  # neighbours are the most alike
    arc = torch.stack([angles.cos(), angles.sin()], 1).repeat(2, 1, 1)
    left = TokenMerging.reduce(None, arc, 5, None)
    assert (torch.atan2(left[..., 1], left[..., 0]).diff(dim=1) > 0.05).all()


def test_untrained_baseline_on_all_tokens_answers_as_the_bare_backbone():
    backbone, processor = tiny.tiny_backbone(), tiny.tiny_processor()
    model = AllTokens.from_backbone(backbone, num_summary_tokens=16, summary_lengths=[16], lora_rank=4).eval()
    prompts = tiny.prompts(processor, ["What?", "Is there a dog here?"])
    summary = model.compress(**processor.process_images(tiny.pictures(2)))
    inputs = processor(text=prompts)
    ids = model.generate_from_summary(summary, **inputs, max_new_tokens=5, do_sample=False)
    images = [[picture] for picture in tiny.pictures(2)]
    bare = answer_uncompressed(model, processor.backbone_processor, images, prompts, max_new_tokens=5)
    assert torch.equal(ids[:, inputs["input_ids"].shape[1] :], bare)


def test_query_transformer_begins_with_means_of_image_tokens_weighted_by_each_query_in_its_own_way():
    torch.manual_seed(0)
    reducer = _Resampler(16, 64, 32, 4)
    one_hot = torch.eye(64, 32)[None]  # token t is the unit vector t, as far as there are any
    read = reducer(one_hot, 16)[0]  # (k, d): heads share the width, so each number is the weight of its token
    assert (read >= 0).all() and (read < 1).all()
    spread = (read / read.mean(1, keepdim=True)).std(1)
    assert (spread > 0.1).all()  # even weights have 0
    assert (torch.pdist(read) > 0.01).all()


def test_places_of_the_query_transformer_tell_every_token_apart():
    for count in (16, 64, 144, 10):  # squares, and a line
        distances = torch.pdist(_places(count, 32))
        assert _places(count, 32).shape == (count, 32) and distances.min() > 0.3
