"""torch.compile: the generate pass is one graph, made once for a shape, and says what it says uncompiled.

The backend "eager" traces as the real compiler does, "aot_eager" goes through autograd's part as well; both leave out
the code generation.
"""

import threading

import pytest
import tiny
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig, DynamicCache

GREEDY = {"max_new_tokens": 8, "do_sample": False}
CLOSE = {"rtol": 0, "atol": 1e-5}
K = 8


@pytest.fixture(scope="module")
def shared():
    """A model that no test compiles in place or trains."""
    return tiny.tiny_fwd2bot(num_summary_tokens=K)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()
    torch._dynamo.config.capture_scalar_outputs = False


def batch(model, processor, seed=0, questions=("What?", "Why is it?")):
    """Summaries of two pictures of that seed, and the prompts about them."""
    images = processor.process_images(tiny.pictures(2, seed))
    return model.compress(**images), processor(text=tiny.prompts(processor, list(questions)))


def prefill(model, processor, seed=0):
    """What `generate_from_summary` hands to `forward` first: embeddings with the summaries in place."""
    calls = []
    handle = model.register_forward_pre_hook(lambda module, args, kwargs: calls.append(dict(kwargs)), with_kwargs=True)
    summary, prompts = batch(model, processor, seed)
    model.generate_from_summary(summary, **prompts, max_new_tokens=1)
    handle.remove()
    return {**calls[0], "past_key_values": DynamicCache(config=model.config.get_text_config())}


def assert_one_graph():
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


# The generate pass


@torch.no_grad()
def test_prefill_is_one_graph_and_gives_the_same_logits(shared, processor):
    compiled = torch.compile(shared.forward, backend="aot_eager", fullgraph=True)
    for seed in (0, 1):
        expected = shared(**prefill(shared, processor, seed)).logits
        inputs = prefill(shared, processor, seed)
        assert inputs["inputs_embeds"].ndim == 3
        torch.testing.assert_close(compiled(**inputs).logits, expected, **CLOSE)
    assert_one_graph()


@torch.no_grad()
def test_decode_step_is_one_graph_and_gives_the_same_logits(shared, processor):
    logits = []
    for step in (shared.forward, torch.compile(shared.forward, backend="eager", fullgraph=True)):
        inputs = prefill(shared, processor)
        output = shared(**inputs)
        logits.append(
            step(
                input_ids=output.logits[:, -1:].argmax(-1),
                attention_mask=torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1),
                position_ids=inputs["position_ids"][:, -1:] + 1,
                past_key_values=output.past_key_values,
            ).logits
        )
    torch.testing.assert_close(logits[1], logits[0], **CLOSE)
    assert_one_graph()


@torch.no_grad()
def test_words_alone_are_one_graph(shared, processor):
    words = processor(text=["What is a dog?"])
    compiled = torch.compile(shared.forward, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**words).logits, shared(**words).logits, **CLOSE)
    assert_one_graph()


def test_generation_with_a_static_cache_says_the_same(shared, processor):
    summary, prompts = batch(shared, processor)
    static = shared.generate_from_summary(summary, **prompts, **GREEDY, cache_implementation="static")
    assert torch.equal(static, shared.generate_from_summary(summary, **prompts, **GREEDY))


def test_compiled_generation_says_the_same_and_is_compiled_once(shared, processor):
    compiled = compile_on_any_device()
    for seed, questions in (
        (0, ["What?", "Why is it?"]),
        (1, ["What?", "Why is it?"]),
        (2, ["Who?!", "What is it"]),
    ):
        summary, prompts = batch(shared, processor, seed, questions)
        answers = shared.generate_from_summary(summary, **prompts, **GREEDY, **compiled)
        assert torch.equal(answers, shared.generate_from_summary(summary, **prompts, **GREEDY))
        assert_one_graph()


def test_other_lengths_cost_one_more_graph_at_most(shared, processor):
    compiled = compile_on_any_device()
    for k, question in ((K, "What?"), (4, "What?"), (2, "What is it?"), (1, "Where is the other one?")):
        summary, prompts = batch(shared, processor, 0, [question] * 2)
        summary = summary.truncate(k)
        answers = shared.generate_from_summary(summary, **prompts, **GREEDY, **compiled)
        assert torch.equal(answers, shared.generate_from_summary(summary, **prompts, **GREEDY))
    assert counters["stats"]["unique_graphs"] <= 2


def test_compiled_generation_from_pictures_says_the_same(shared, processor):
    inputs = processor(images=tiny.pictures(2), text=tiny.prompts(processor, ["What?", "Why?"]))
    answers = shared.generate(**inputs, **GREEDY, **compile_on_any_device())
    assert_one_graph()
    assert torch.equal(answers, shared.generate(**inputs, **GREEDY))


def compile_on_any_device():
    """transformers compiles the decoding steps by itself for a static cache, but on accelerators alone."""
    config = CompileConfig(backend="eager", mode=None, fullgraph=True)
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}


# The compress pass


@torch.no_grad()
def test_compress_pass_is_one_graph_where_scalars_are_captured(shared, processor):
    """LLaVA itself compares the number of image tokens with that of features: a graph break without the option."""
    torch._dynamo.config.capture_scalar_outputs = True
    vars(shared).pop("_words", None)  # as in a model that was not asked yet
    compiled = torch.compile(shared._compress_pass, backend="eager", fullgraph=True)
    for seed in (0, 1):
        images = processor.process_images(tiny.pictures(2, seed))
        torch.testing.assert_close(compiled(K, **images), shared.compress(**images).tokens, **CLOSE)
    assert_one_graph()


def test_compress_pass_has_no_graph_break_of_its_own(shared, processor):
    images = processor.process_images(tiny.pictures(2))
    breaks = torch._dynamo.explain(shared._compress_pass)(K, **images).break_reasons
    # Where a graph breaks within a `with` block, the function around is left as well: a "step_unsupported" more.
    causes = [reason for reason in breaks if reason.reason != "step_unsupported"]
    assert causes
    assert all("transformers" in reason.user_stack[-1].filename for reason in causes)


# Whole models and parts


def test_compiled_model_compresses_embeds_and_answers(shared, processor):
    summary, prompts = batch(shared, processor)
    images = processor.process_images(tiny.pictures(2))
    compiled = torch.compile(shared, backend="eager")
    torch.testing.assert_close(compiled.compress(**images).tokens, summary.tokens, **CLOSE)
    torch.testing.assert_close(compiled.embed(**images), shared.embed(summary=summary), **CLOSE)
    answers = compiled.generate_from_summary(summary, **prompts, **GREEDY)
    assert torch.equal(answers, shared.generate_from_summary(summary, **prompts, **GREEDY))


def test_compiled_layers_run_the_adapter_of_each_stage_in_every_thread(processor):
    model = tiny.tiny_fwd2bot(num_summary_tokens=K)
    summary, prompts = batch(model, processor)
    images, answers = (
        processor.process_images(tiny.pictures(2)),
        model.generate_from_summary(summary, **prompts, **GREEDY),
    )
    for layer in model.get_decoder().layers:
        layer.compile(backend="eager")
    same = {}

    def compress():
        same["compress"] = [
            torch.allclose(model.compress(**images).tokens, summary.tokens, atol=1e-5) for _ in range(5)
        ]

    def answer():
        same["generate"] = [
            torch.equal(model.generate_from_summary(summary, **prompts, **GREEDY), answers) for _ in range(5)
        ]

    threads = [threading.Thread(target=work) for work in (compress, answer)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same == {"compress": [True] * 5, "generate": [True] * 5}
    assert counters["stats"]["unique_graphs"] > 1


@pytest.mark.slow
def test_training_step_of_a_compiled_model_has_the_same_gradients(processor):
    gradients = []
    for compiled in (False, True):
        model = tiny.tiny_fwd2bot().train()
        step = torch.compile(model, backend="eager") if compiled else model
        step(**tiny.training_batch(processor, ["a dog", "cats", "no"]), num_summary_tokens=4).loss.backward()
        gradients.append([value.grad for value in model.mark_trainable().values()])
    assert counters["stats"]["unique_graphs"] >= 1
    for eager, traced in zip(*gradients, strict=True):
        torch.testing.assert_close(traced, eager, rtol=1e-4, atol=1e-6)
