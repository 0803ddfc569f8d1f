"""The three pipelines on one tiny model, and a checkpoint folder of it."""

import pytest
import tiny
import torch
from transformers import pipeline


def build(task, model, processor, **arguments):
    return pipeline(task, model=model, processor=processor, device="cpu", **arguments)


@pytest.fixture(scope="session")
def vivid_fwd2bot():
    """A tiny model whose answers differ from picture to picture. Shared by the session: do not change it."""
    model = tiny.tiny_fwd2bot()
    with torch.no_grad():
        model.summary_projector.weight.mul_(3)
    return model


@pytest.fixture(scope="session")
def compress(vivid_fwd2bot, tiny_processor):
    """Shared by the session: do not change it."""
    return build("fwd2bot-compress", vivid_fwd2bot, tiny_processor)


@pytest.fixture
def retrieval(vivid_fwd2bot, tiny_processor):
    """A new one for every test: it has a memory."""
    return build("fwd2bot-retrieval", vivid_fwd2bot, tiny_processor)


@pytest.fixture(scope="session")
def answer(vivid_fwd2bot, tiny_processor):
    """Shared by the session: do not change it."""
    return build("fwd2bot-answer", vivid_fwd2bot, tiny_processor)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A folder as it would lie on the Hub; at most 8 summary tokens, as the demo needs."""
    folder = tmp_path_factory.mktemp("hub") / "fwd2bot-test"
    tiny.tiny_fwd2bot(num_summary_tokens=8).save_pretrained(folder)
    tiny.tiny_processor().save_pretrained(folder)
    return folder


@pytest.fixture
def count_calls(monkeypatch):
    """`count_calls(object, name)` replaces a method by itself, and returns a list that grows with every call."""

    def wrap(owner, name):
        calls = []
        original = getattr(owner, name)

        def counted(*args, **kwargs):
            calls.append(kwargs)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)
        return calls

    return wrap
