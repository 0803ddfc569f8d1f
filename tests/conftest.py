"""Shared by all tests: no network, and deprecations seen as errors."""

import os

# Read by huggingface_hub and transformers when they are imported, so they come before every other import.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import logging  # noqa: E402
import signal  # noqa: E402

import pytest  # noqa: E402
import tiny  # noqa: E402
from transformers.utils import logging as transformers_logging  # noqa: E402

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job, whose children would not hear Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)


class DeprecationIsAnError(logging.Handler):
    """Raises where a library announces through its logger that something we call is going away."""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "deprecat" in message.lower():
            raise DeprecationWarning(f"{record.name} logged a deprecation: {message}")


@pytest.fixture(autouse=True, scope="session")
def deprecations_are_errors():
    """Adds the handler to transformers' and peft's loggers; `filterwarnings` in pyproject.toml sees to warnings."""
    handler = DeprecationIsAnError(level=logging.WARNING)
    loggers = [logging.getLogger(name) for name in ("transformers", "peft", "huggingface_hub")]
    for logger in loggers:
        logger.addHandler(handler)
    yield handler
    for logger in loggers:
        logger.removeHandler(handler)


@pytest.fixture(autouse=True)
def what_commands_silence_stays_theirs():
    """A command sets the verbosity and the progress bars of its process; the tests after it have what was before."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    yield
    transformers_logging.set_verbosity(verbosity)
    if bars != transformers_logging.is_progress_bar_enabled():
        (transformers_logging.enable_progress_bar if bars else transformers_logging.disable_progress_bar)()


@pytest.fixture
def deprecations_are_theirs(deprecations_are_errors):
    """For a test that runs code of transformers which calls, in the oldest version, something deprecated itself."""
    deprecations_are_errors.setLevel(logging.CRITICAL)
    yield
    deprecations_are_errors.setLevel(logging.WARNING)


@pytest.fixture
def tiny_tokenizer():
    return tiny.tiny_tokenizer()


@pytest.fixture
def tiny_backbone():
    return tiny.tiny_backbone()


@pytest.fixture(scope="session")
def tiny_processor():
    """Shared by the session: do not change it."""
    return tiny.tiny_processor()


@pytest.fixture
def tiny_fwd2bot():
    """A new one for every test, which may train or break it."""
    return tiny.tiny_fwd2bot()


@pytest.fixture(scope="session")
def shared_fwd2bot():
    """Shared by the session: do not change it."""
    return tiny.tiny_fwd2bot()


@pytest.fixture(scope="session")
def pictures():
    """`pictures(count)` draws so many."""
    return tiny.pictures
