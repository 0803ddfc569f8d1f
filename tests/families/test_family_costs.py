"""What a picture costs, on every family of backbones."""

import pytest
from PIL import Image

from fwd2bot.training.answering import image_tokens
from fwd2bot.training.cost import costs

from .test_family_laws import fwd2bot_on
from .tiny_families import FAMILIES, conversation, merged_token_id, pictures

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_costs_count_what_the_language_model_reads_in_the_place_of_a_picture(name):
    model, processor = fwd2bot_on(name)
    picture = pictures()[0]
    prompt = processor.apply_chat_template(conversation("What?"), add_generation_prompt=True)
    found = costs(model, processor, picture, prompt, [1, 4])
    read = int((processor.process_images([picture])["input_ids"] == merged_token_id(model.backbone)).sum())
    assert read > 1 and found["uncompressed"]["tokens_per_image"] == read
    assert [found[f"k={k}"]["tokens_per_image"] for k in (1, 4)] == [1, 4]
    width = model.config.get_text_config().hidden_size
    assert (
        found["uncompressed"]["bytes_per_image"] == 2 * width * read and found["k=4"]["bytes_per_image"] == 8 * width
    )
    assert 0 < found["k=1"]["cache_bytes"] < found["k=4"]["cache_bytes"]
    square = Image.new("RGB", (96, 96))
    read = int((processor.process_images([square])["input_ids"] == merged_token_id(model.backbone)).sum())
    assert image_tokens(processor.backbone_processor) == read
