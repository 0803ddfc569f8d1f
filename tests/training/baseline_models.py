"""Baselines and ablations on the tiny LLaVA."""

from typing import Any

import tiny
import torch


def made(cls: type, k: int = 4, **config: Any) -> Any:
    """A baseline on the tiny LLaVA, whose adapters are random."""
    torch.manual_seed(1)
    model = cls.from_backbone(tiny.tiny_backbone(), num_summary_tokens=k, lora_rank=4, **config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0, 0.1)
            elif name.endswith(".summary_queries"):
                parameter.normal_(0, 0.5)
    return model.eval()
