"""Shared by the tests of quantised backbones: the libraries, and a tiny model quantised by each."""

import pytest
import torch
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, QuantoConfig, TorchAoConfig

from fwd2bot import Fwd2BotForConditionalGeneration

GREEDY = {"max_new_tokens": 5, "do_sample": False}
QUESTIONS = ["What?", "Where is it?", "Why?"]
WIDE = {"hidden_size": 64, "intermediate_size": 128}  # 4 bit weights share a scale per 64 of a row
METHODS = ["torchao", "quanto", "bitsandbytes-8bit", "bitsandbytes-4bit"]
# PEFT's own layer for each library; quanto's layers are linear ones with another weight, on which its plain LoRA runs.
LORA_LAYERS = {
    "torchao": "TorchaoLoraLinear",
    "quanto": "Linear",
    "bitsandbytes-8bit": "Linear8bitLt",
    "bitsandbytes-4bit": "Linear4bit",
}
NOT_ON_CPU = [r".*vision_tower", r".*multi_modal_projector", "lm_head"]  # rows of the tiny tower are shorter than 64

WARNINGS = [
    # Not ours to mend: bitsandbytes tells with each call that it computes in float16.
    pytest.mark.filterwarnings("ignore:MatMul8bitLt"),
    # Nor that torchao registers its enums in a way that torch will not need.
    pytest.mark.filterwarnings("ignore:.*register_constant"),
]


def quantization(method: str):
    """The library's own configuration; the test is skipped where it is not installed."""
    if method == "torchao":
        pytest.importorskip("torchao")
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    if method == "quanto":
        pytest.importorskip("optimum.quanto")
        return QuantoConfig(weights="int8")
    pytest.importorskip("bitsandbytes")
    if method == "bitsandbytes-8bit":
        # Columns with a value above the threshold are left in float16, and which they are depends on the batch.
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=NOT_ON_CPU,
    )  # fmt: skip


def quantised(folder, method, dtype=torch.float32):
    return AutoModelForImageTextToText.from_pretrained(folder, quantization_config=quantization(method), dtype=dtype)


def wrap(backbone):
    """A Fwd2Bot whose adapters do something, the same at each call."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        model = Fwd2BotForConditionalGeneration.from_backbone(backbone, num_summary_tokens=4, lora_rank=4).eval()
        for name, parameter in model.trained_parameters().items():
            if ".lora_B." in name:
                parameter.normal_(0, 0.1)
        model.summary_projector.weight.mul_(5)
    return model


def assert_near_full_precision(method, found, expected):
    """Seen: 0.03 to 0.05 in 8 bit, 0.42 in 4 bit, on weights that are noise; unrelated summaries are 1.4 apart."""
    error = (found - expected).norm() / expected.norm()
    assert 0 < error < (0.6 if method.endswith("4bit") else 0.1)
