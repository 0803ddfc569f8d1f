"""What `import fwd2bot` brings in, and what it registers, seen from a fresh process outside the checkout."""

import json
import subprocess
import sys

import pytest

PROGRAM = """
import importlib.util, json, sys
import fwd2bot
loaded = sorted({name.partition(".")[0] for name in sys.modules})

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.pipelines import PIPELINE_REGISTRY

config = fwd2bot.Fwd2BotConfig
print(json.dumps({
    "loaded": loaded,
    "folders": [name for name in ("modeling_fwd2bot", "pipelines", "space_app", "training", "hub")
                if importlib.util.find_spec(name) is not None],
    "config": type(AutoConfig.for_model("fwd2bot")).__name__,
    "model": AutoModel._model_mapping[config].__name__,
    "image_text_to_text": AutoModelForImageTextToText._model_mapping[config].__name__,
    "processor": PROCESSOR_MAPPING[config].__name__,
    "tasks": PIPELINE_REGISTRY.get_supported_tasks(),
}))
"""


@pytest.fixture(scope="module")
def after_import(tmp_path_factory) -> dict:
    """What a new interpreter says of itself after `import fwd2bot`."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1, f"import fwd2bot printed something:\n{done.stdout}"
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "name", ["gradio", "lancedb", "datasets", "matplotlib", "sentence_transformers", "tensorboard"]
)
def test_import_loads_no_optional_package(after_import, name):
    assert name not in after_import["loaded"]


def test_folders_are_not_importable_by_their_own_names(after_import):
    assert after_import["folders"] == []


def test_import_registers_config_model_and_processor(after_import):
    assert after_import["config"] == "Fwd2BotConfig"
    assert after_import["model"] == "Fwd2BotForConditionalGeneration"
    assert after_import["image_text_to_text"] == "Fwd2BotForConditionalGeneration"
    assert after_import["processor"] == "Fwd2BotProcessor"


@pytest.mark.parametrize("task", ["fwd2bot-compress", "fwd2bot-retrieval", "fwd2bot-answer", "fwd2bot-rag"])
def test_import_registers_pipeline(after_import, task):
    assert task in after_import["tasks"]
