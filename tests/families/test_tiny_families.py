"""The tiny families themselves: real inputs go through, and picture tokens fit what the model merges."""

import pytest
import torch

from . import tiny_families

# Not ours to mend: transformers' GLM-4V processor hands a tensor to numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(params=sorted(tiny_families.FAMILIES))
def name(request):
    return request.param


@pytest.fixture
def family(name):
    return tiny_families.build(name)


def batch_of(processor, images, texts):
    prompts = [
        processor.apply_chat_template(tiny_families.conversation(text), add_generation_prompt=True) for text in texts
    ]
    return processor(images=[[image] for image in images], text=prompts, padding=True, return_tensors="pt")


def model_inputs(batch):
    return {name: value for name, value in batch.items() if name != "labels"}


def test_two_pictures_of_different_size_give_finite_logits(family):
    model, processor = family
    batch = batch_of(processor, tiny_families.pictures()[:2], ["What?", "What is in the picture?"])
    with torch.no_grad():
        logits = model(**model_inputs(batch)).logits
    assert logits.shape[:2] == batch["input_ids"].shape
    assert torch.isfinite(logits).all()


def test_as_many_picture_tokens_as_the_model_has_picture_features(family):
    model, processor = family
    batch = batch_of(processor, tiny_families.pictures(), ["What?"] * 5)
    pixels = {
        name: value
        for name, value in model_inputs(batch).items()
        if name not in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
    }
    with torch.no_grad():
        features = model.get_image_features(**pixels, return_dict=True).pooler_output
    features = torch.cat([part.flatten(0, -2) for part in features])  # one tensor, or one for each picture
    tokens = int((batch["input_ids"] == tiny_families.merged_token_id(model)).sum())
    assert (tokens, model.config.get_text_config().hidden_size) == tuple(features.shape)


def test_the_picture_matters_to_the_logits(family):
    model, processor = family
    first, _, second, *_ = tiny_families.pictures()
    with torch.no_grad():
        logits = [
            model(**model_inputs(batch_of(processor, [picture.resize((48, 48))], ["What?"]))).logits[0, -1]
            for picture in (first, second)
        ]
    assert (logits[0] - logits[1]).abs().max() > 1e-2


def test_embeddings_are_tied_scaled_and_padded_in_the_families_named_so(name, family):
    model, processor = family
    words, head = model.get_input_embeddings(), model.get_output_embeddings()
    first = torch.tensor([1])
    assert (words.weight is head.weight) == (name in tiny_families.TIED)
    assert (not torch.equal(words(first), words.weight[first])) == (name in tiny_families.SCALED)
    assert (words.num_embeddings > len(processor.tokenizer)) == (name in tiny_families.PADDED)


def test_processor_survives_saving_and_loading(family, tmp_path):
    _, processor = family
    processor.save_pretrained(tmp_path)
    loaded = type(processor).from_pretrained(tmp_path)
    # Where torchvision is installed the one that resizes with it was loaded, and gives slightly different pixels.
    loaded.image_processor = type(processor.image_processor).from_pretrained(tmp_path)
    pictures, texts = tiny_families.pictures()[:2], ["What?", "What is in the picture?"]
    before, after = batch_of(processor, pictures, texts), batch_of(loaded, pictures, texts)
    assert loaded.chat_template == processor.chat_template
    assert before.keys() == after.keys()
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=0)


def test_every_build_is_the_callers_own_copy(name):
    first, second = (tiny_families.build(name)[0] for _ in range(2))
    with torch.no_grad():
        next(first.parameters()).add_(1)
    assert not torch.equal(next(first.parameters()), next(second.parameters()))
