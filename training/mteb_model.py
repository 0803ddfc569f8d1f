"""A Fwd2Bot as a model of `mteb`, whose retrieval and compositionality tasks on pictures and texts run through it.

    model = Fwd2BotEncoder("hub/mine", num_summary_tokens=8)
    mteb.evaluate(model, mteb.get_tasks(tasks=["SugarCrepe"]), encode_kwargs={"batch_size": 16})

Needs the extra `mteb`.
"""

from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import normalize
from tqdm import tqdm

from fwd2bot import Fwd2BotForConditionalGeneration, Fwd2BotProcessor
from fwd2bot.backbone_fwd2bot import commit_of
from fwd2bot.configuration_fwd2bot import check_num_summary_tokens

from .provenance import weights_hash
from .recipe import check_dtype

try:
    from mteb.models.abs_encoder import AbsEncoder
    from mteb.models.model_meta import ModelMeta, ScoringFunction
except ImportError as error:
    raise ImportError(f'This needs mteb ({error}). Install it: pip install "fwd2bot[mteb]"') from error


class Fwd2BotEncoder(AbsEncoder):
    """Embeddings of pictures and of texts by the compress pass, at one length k.

    A row with a picture and a text (of tasks that search by both) has the sum of both embeddings, as mteb's own CLIP
    models have. Instructions of tasks are left out: the compress pass has its own prompts.

    Args:
        model_name: folder or Hub id of a Fwd2Bot. revision: of a Hub id.
        device: default: CUDA if there is one.
        num_summary_tokens: length k, default the configured one. Results of each k are kept apart by mteb.
        dtype: of the weights, "float32", "bfloat16" or "float16". Results of each are kept apart, too.

    Raises:
        ValueError: a length that the model does not have, or another dtype.
    """

    def __init__(
        self,
        model_name: str,
        revision: str | None = None,
        *,
        device: str | None = None,
        num_summary_tokens: int | None = None,
        dtype: str = "float32",
        **kwargs: Any,
    ):
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model = Fwd2BotForConditionalGeneration.from_pretrained(
            model_name, revision=revision or "main", dtype=getattr(torch, check_dtype(dtype)), **kwargs
        )
        self.model.eval().to(device)
        self.processor = Fwd2BotProcessor.from_pretrained(model_name, revision=revision or "main")
        self.num_summary_tokens = check_num_summary_tokens(num_summary_tokens, self.model.config)
        self.mteb_model_meta = model_meta(model_name, revision, self.model, self.num_summary_tokens)

    @torch.no_grad()
    def encode(self, inputs: Any, *, show_progress_bar: bool = False, **kwargs: Any) -> torch.Tensor:
        """Embeddings `(N, d)` in float32, unit norm, of the rows of a DataLoader.

        Args:
            inputs: batches as dicts of lists, "image" and "text" or one of them.

        Raises:
            ValueError: for a row with neither.
        """
        embeds = []
        for batch in tqdm(inputs, disable=not show_progress_bar, desc="encode"):
            count = len(next(iter(batch.values())))
            images, texts = (batch.get(name) or [None] * count for name in ("image", "text"))
            width = self.model.summary_projector.out_features
            total = torch.zeros(count, width)
            for values, process in ((images, self.processor.process_images), (texts, self.processor.process_texts)):
                rows = [row for row, value in enumerate(values) if value is not None]
                if rows:
                    read = process([values[row] for row in rows]).to(self.model.device)
                    total[rows] += self.model.embed(**read, num_summary_tokens=self.num_summary_tokens).cpu()
            empty = [
                row for row, pair in enumerate(zip(images, texts, strict=True)) if all(one is None for one in pair)
            ]
            if empty:
                raise ValueError(f"Row(s) {empty} of a batch have neither image nor text; leave this task out.")
            embeds.append(normalize(total, dim=-1))
        return torch.cat(embeds)


def model_meta(model_name: str, revision: str | None, model: Any, num_summary_tokens: int) -> ModelMeta:
    """What mteb keeps beside the results.

    As the revision stands the hash of a folder's weights, or the commit of a Hub id, so that mteb takes no result of
    earlier weights for theirs.
    """
    is_folder = Path(model_name).is_dir()
    name = f"fwd2bot/{Path(model_name).resolve().name}" if is_folder else model_name
    parameters = model.num_parameters()
    commit = None if is_folder else commit_of(model_name, revision)
    return ModelMeta.create_empty().model_copy(
        update={
            "loader": Fwd2BotEncoder,
            "name": name,
            "revision": weights_hash(Path(model_name)) if is_folder else commit or revision or "main",
            "n_parameters": parameters,
            "memory_usage_mb": parameters * model.dtype.itemsize / 2**20,
            "embed_dim": model.summary_projector.out_features,
            "open_weights": True,
            "framework": ["PyTorch", "Transformers", "safetensors"],
            "similarity_fn_name": ScoringFunction.COSINE,
            "use_instructions": False,
            "modalities": ["image", "text"],
            "experiment_kwargs": {
                "num_summary_tokens": num_summary_tokens,
                "dtype": str(model.dtype).removeprefix("torch."),
            },
        }
    )
