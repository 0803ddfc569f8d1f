"""Makes the pipelines known to `transformers.pipeline`; `import fwd2bot` calls `register()`."""

from transformers import AutoModel
from transformers.pipelines import PIPELINE_REGISTRY

from .answer_pipeline import AnswerPipeline
from .compress_pipeline import CompressPipeline
from .embedded import checkpoint_path
from .rag_pipeline import RagPipeline
from .retrieval_pipeline import RetrievalPipeline

PIPELINES = {
    "fwd2bot-compress": CompressPipeline,
    "fwd2bot-retrieval": RetrievalPipeline,
    "fwd2bot-answer": AnswerPipeline,
    "fwd2bot-rag": RagPipeline,
}


def register() -> None:
    """Register the tasks, with the checkpoint inside the package as the default model."""
    for task, pipeline_class in PIPELINES.items():
        if task not in PIPELINE_REGISTRY.get_supported_tasks():
            PIPELINE_REGISTRY.register_pipeline(
                task,
                pipeline_class=pipeline_class,
                pt_model=AutoModel,
                default={"model": (str(checkpoint_path()), None)},
                type="multimodal",
            )
