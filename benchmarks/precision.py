"""What lower precision and quantisation change on the embedded checkpoint, against float32.

    python benchmarks/precision.py [--num-summary-tokens 8] [--output precision.json]

Over the pictures of the gallery: how far the summaries are from those of float32 (norm of the difference over norm),
how many first captions find the same picture first, how many questions (one of each kind per picture) get the same
answer from the summaries, how many the right one; and the size of the weights. Libraries that are not installed are
left out. Prints a table in Markdown.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoProcessor, BitsAndBytesConfig, QuantoConfig, TorchAoConfig
from transformers.utils import is_bitsandbytes_available, is_optimum_quanto_available, is_torchao_available

import fwd2bot  # noqa: F401, registers the model with the Auto classes
from fwd2bot.pipelines.embedded import default_checkpoint, gallery


def variants() -> dict[str, dict[str, Any]]:
    """Name and arguments of `from_pretrained`; float32, which the others are compared with, comes first."""
    found: dict[str, dict[str, Any]] = {
        "float32": {"dtype": torch.float32},
        "bfloat16": {"dtype": torch.bfloat16},
        "float16": {"dtype": torch.float16},
    }
    if is_torchao_available():
        from torchao.quantization import Int8WeightOnlyConfig

        found["torchao int8 weights"] = {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig())}
    if is_optimum_quanto_available():
        found["quanto int8 weights"] = {"quantization_config": QuantoConfig(weights="int8")}
    if is_bitsandbytes_available():
        found["bitsandbytes 8 bit"] = {
            "quantization_config": BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
        }
        found["bitsandbytes nf4"] = {
            "quantization_config": BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
            )
        }
    return {name: {"dtype": torch.float32, **options} for name, options in found.items()}


def outputs(options: dict[str, Any], num_summary_tokens: int) -> dict[str, Any]:
    """Summaries, the picture that each caption finds first, and the answers of one variant."""
    path = default_checkpoint()
    model, processor = AutoModel.from_pretrained(path, **options).eval(), AutoProcessor.from_pretrained(path)
    size = sum(value.numel() * value.element_size() for value in stored(model))
    pictures = gallery()
    summary = model.compress(
        **processor.process_images([picture.path for picture in pictures]), num_summary_tokens=num_summary_tokens
    )
    captions = processor.process_texts([picture.captions[0] for picture in pictures])
    scores = model.embed(**captions, num_summary_tokens=num_summary_tokens) @ model.embed(summary=summary).T
    asked, right, answers = [], [], []
    for index, picture in enumerate(pictures):
        for question in {question.kind: question for question in picture.questions}.values():
            content = [{"type": "image"}, {"type": "text", "text": question.text}]
            asked.append(
                (
                    index,
                    processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True),
                )
            )
            right.append(question.answer)
    for start in range(0, len(asked), 32):
        rows = asked[start : start + 32]
        inputs = processor(text=[prompt for _, prompt in rows])
        ids = model.generate_from_summary(
            summary[[index for index, _ in rows]], **inputs, max_new_tokens=16, do_sample=False
        )
        new = ids[:, inputs["input_ids"].shape[1] :]
        answers += [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
    return {
        "tokens": summary.tokens.float(),
        "found": scores.argmax(1),
        "answers": answers,
        "right": [answer == wanted for answer, wanted in zip(answers, right, strict=True)],
        "bytes": size,
    }


def stored(model: torch.nn.Module) -> list[torch.Tensor]:
    """The tensors that hold the weights; quantised ones are made of several."""
    tensors = []
    for value in model.parameters():
        parts = value.__tensor_flatten__()[0] if hasattr(value, "__tensor_flatten__") else ()
        tensors += [getattr(value, part) for part in parts] or [value]
    return tensors


def compare(found: dict[str, Any], base: dict[str, Any]) -> dict[str, float]:
    same = [one == other for one, other in zip(found["answers"], base["answers"], strict=True)]
    return {
        "summary_error": ((found["tokens"] - base["tokens"]).norm() / base["tokens"].norm()).item(),
        "same_picture": (found["found"] == base["found"]).float().mean().item(),
        "same_answer": sum(same) / len(same),
        "right_answer": sum(found["right"]) / len(same),
        "megabytes": found["bytes"] / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-summary-tokens", type=int, default=8, help="length k of the summaries (default: 8)")
    parser.add_argument("--output", type=Path, help="write the figures there, as JSON")
    args = parser.parse_args()
    results, base = {}, None
    print("| | summary error | same picture first | same answer | right answer | weights |\n|---|---|---|---|---|---|")
    for name, options in variants().items():
        found = outputs(options, args.num_summary_tokens)
        base = found if base is None else base
        row = results[name] = compare(found, base)
        print(
            f"| {name} | {row['summary_error']:.4f} | {row['same_picture']:.1%} | {row['same_answer']:.1%} "
            f"| {row['right_answer']:.1%} | {row['megabytes']:.1f} MB |",
            flush=True,
        )
    if args.output:
        args.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
