"""A tiny model on a backbone that each library has quantised."""

import pytest
import tiny
from quantised_backbones import METHODS, QUESTIONS, WIDE, quantised, quantization, wrap
from transformers import AutoModelForImageTextToText


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the backbone lies, in float32."""
    path = tmp_path_factory.mktemp("backbone")
    tiny.tiny_backbone(**WIDE).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def full(tmp_path_factory, folder):
    """A full checkpoint in float32, and its model. Do not change them."""
    path = tmp_path_factory.mktemp("full")
    model = wrap(AutoModelForImageTextToText.from_pretrained(folder))
    model.save_pretrained(path)
    return path, model


@pytest.fixture(params=METHODS)
def method(request):
    quantization(request.param)  # skips
    return request.param


@pytest.fixture(scope="module")
def made():
    return {}


@pytest.fixture
def model(method, folder, made):
    """One per method, shared: do not change it."""
    if method not in made:
        made[method] = wrap(quantised(folder, method))
    return made[method]


@pytest.fixture(scope="module")
def images(processor):
    return processor.process_images(tiny.pictures(3))


@pytest.fixture(scope="module")
def prompts(processor):
    return processor(text=tiny.prompts(processor, QUESTIONS))
