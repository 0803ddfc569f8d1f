"""What most tests of the model start from. All of it is shared: do not change it."""

import pytest
import tiny

QUESTIONS = ["What is it?", "Is it a very large red thing?", "Why?"]


@pytest.fixture(scope="session")
def model(shared_fwd2bot):
    return shared_fwd2bot


@pytest.fixture(scope="session")
def processor(tiny_processor):
    return tiny_processor


@pytest.fixture(scope="session")
def images(processor):
    """Three pictures as `process_images` gives them."""
    return processor.process_images(tiny.pictures(3))


@pytest.fixture(scope="session")
def summary(model, images):
    return model.compress(**images)


@pytest.fixture(scope="session")
def prompts(processor):
    """Three prompts of different lengths, each on one image."""
    return tiny.prompts(processor, QUESTIONS)


@pytest.fixture(scope="session")
def saved(tmp_path_factory, processor):
    """A folder with a model and its processor, and that model."""
    folder, model = tmp_path_factory.mktemp("saved"), tiny.tiny_fwd2bot()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder, model
