"""The HF Trainer for both stages: strict checkpoints, our optimizer, packed rows, the parts of the loss in the log."""

import json
import shutil
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from PIL import Image
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel, Trainer, TrainerState, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import SAFE_WEIGHTS_NAME, logging

from fwd2bot.adapter_checkpoint_fwd2bot import OWN_WEIGHTS, fill_adapters, read_adapters
from fwd2bot.configuration_fwd2bot import STAGES
from fwd2bot.packing_fwd2bot import packed_attention_mask
from fwd2bot.quantization_fwd2bot import is_quantized

from . import zero3
from .chunked import ChunkedStep, as_batch, count_labels
from .commands import STEPS
from .data import IGNORED
from .fwd2bot_model import mark_trained, trains_summaries
from .gathering import average_gradients, gather_counts, world_size
from .optimizers import build_optimizer
from .recipe import TRAINED_STAGES, OptimizerRecipe
from .run_checks import write_whole
from .sharding import is_sharded
from .sources import SourceMixture
from .validation import Validation

logger = logging.get_logger(__name__)

STATE_FILES = ("optimizer.pt", "scheduler.pt", "trainer_state.json")
WEIGHTS = (SAFE_WEIGHTS_NAME, OWN_WEIGHTS)  # either
# transformers 5.23 renamed `gradient_checkpointing`.
RENAMED = hasattr(TrainingArguments, "activation_checkpointing")
CHECKPOINTING = "activation_checkpointing" if RENAMED else "gradient_checkpointing"
INCOMPLETE = "checkpoint-is-incomplete.txt"  # the Trainer's own name, for checkpoints begun on a signal


class StageTrainer(Trainer):
    """A Trainer whose checkpoints hold every tensor under the model's own names, and load only if every one arrives.

    The Trainer's own way loses a LLaVA silently: `save_pretrained` writes legacy names and the resume is not strict.

    Raises:
        ValueError: for a run whose weights FSDP or DeepSpeed would shard.
    """

    def __init__(self, *args: Any, optimizer_recipe: OptimizerRecipe | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        for name, enabled in (("FSDP", self.is_fsdp_enabled), ("DeepSpeed", self.is_deepspeed_enabled)):
            if enabled:
                raise ValueError(
                    f"{type(self).__name__} cannot save or resume weights that {name} shards. Runs in one process and "
                    "DDP runs work; fwd2bot.training.train with accelerate/fsdp2.yaml or zero3.yaml divides frozen "
                    "weights."
                )
        self.optimizer_recipe = optimizer_recipe or OptimizerRecipe()
        self._parts: dict[str, list[torch.Tensor]] = defaultdict(list)

    @property
    def checkpoints_layers(self) -> bool:
        """Whether layers keep no activations and compute them again."""
        return bool(getattr(self.args, CHECKPOINTING))

    def checkpoint_layers(self) -> None:
        """Have them do so, as `train` does where the arguments ask for it; for a step without `train`."""
        if self.checkpoints_layers:
            options = dict(getattr(self.args, f"{CHECKPOINTING}_kwargs") or {})
            apart = {name: options.pop(name) for name in ("every_n_layers", "offload") if name in options}
            getattr(self.model, f"{CHECKPOINTING}_enable")(options or None, **apart)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            recipe = self.optimizer_recipe
            self.optimizer = build_optimizer(
                model if model is not None else self.model,
                recipe.name,
                learning_rate=recipe.learning_rate,
                matrix_learning_rate=recipe.matrix_learning_rate,
                weight_decay=recipe.weight_decay,
                momentum=recipe.momentum,
                betas=tuple(recipe.betas),
                learning_rates=recipe.learning_rates,
            )
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        # a mixture is shuffled already, and its streams can only be read in order
        return (
            SequentialSampler(dataset) if isinstance(dataset, SourceMixture) else super()._get_train_sampler(dataset)
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the parts of the loss since the last log, and the learning rate of each group."""
        if "loss" in logs:
            for name, value in self._means().items():
                logs[name] = round(value, 4)
            for group in self.optimizer.param_groups if self.optimizer is not None else []:
                if "group" in group:
                    logs[f"learning_rate_{group['group']}"] = group["lr"]
        super().log(logs, start_time)

    def record(self, name: str, value: torch.Tensor | float) -> None:
        """Remember a figure for the next log, which shows its mean."""
        self._parts[name].append(torch.as_tensor(value, dtype=torch.float32).detach())

    def _means(self) -> dict[str, float]:
        """The mean of each figure since the last log, over all processes; not every process has every figure."""
        own = {name: (sum(value.item() for value in values), len(values)) for name, values in self._parts.items()}
        self._parts.clear()
        every = [own]
        if world_size() > 1:
            every = [None] * world_size()
            dist.all_gather_object(every, own)
        names = dict.fromkeys(name for each in every for name in each)
        pairs = {name: [each[name] for each in every if name in each] for name in names}
        return {name: sum(total for total, _ in of) / sum(count for _, count in of) for name, of in pairs.items()}

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if holds_adapters_alone(model):
            model.save_pretrained(folder, adapter_only=True)
            self.processing_class.save_pretrained(folder)
            torch.save(self.args, folder / "training_args.bin")
            return
        if hasattr(model, "fingerprint"):  # the config's own is that of the weights at the last load or compress()
            model.config.fingerprint = model.fingerprint
        model.config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
        safetensors.torch.save_model(model, str(folder / SAFE_WEIGHTS_NAME), metadata={"format": "pt"})
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        torch.save(self.args, folder / "training_args.bin")

    def save_final(self, folder: Path) -> None:
        """The model as a checkpoint of its own kind with its processor; of adapters alone on a quantised backbone."""
        if self.is_world_process_zero():
            model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
            model.save_pretrained(folder, **({"adapter_only": True} if holds_adapters_alone(model) else {}))
            self.processing_class.save_pretrained(folder)
            steps = self.state.global_step
            best = self.state.best_global_step if self.args.load_best_model_at_end else None
            write_whole(folder / STEPS, json.dumps({"steps": steps, "weights_of_step": best or steps}) + "\n")
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        load_strictly(model if model is not None else self.model, Path(resume_from_checkpoint))

    def end_as(self, state: TrainerState, checkpoint: Path) -> None:
        """Be as a run that ended with this checkpoint: with the weights of its best one, if that was saved."""
        self.state = state
        best = Path(state.best_model_checkpoint or checkpoint).name
        load_strictly(self.model, checkpoint.parent / best)  # wherever the folder of the run lies now

    def _load_best_model(self) -> None:
        load_strictly(self.model, Path(self.state.best_model_checkpoint))

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / INCOMPLETE).write_text("being written, or cut off while it was\n", encoding="utf-8")
        self.accelerator.wait_for_everyone()  # so that no process writes into a folder without the mark
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # each writes the state of its own random numbers
        if self.args.should_save:
            (folder / INCOMPLETE).unlink(missing_ok=True)


class BackboneTrainer(StageTrainer):
    """Trains a LLaVA on packed rows: its 4D mask and positions are made here, on the model's device.

    Logits are made from the first token that is learnt in any row on: what stands before it, the image above all, is
    most of a short row, and no loss is taken there.
    """

    def compute_loss(
        self, model: PreTrainedModel, inputs: dict[str, torch.Tensor], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        inputs = dict(inputs)
        learnt = (inputs["labels"] != IGNORED).any(0).nonzero()
        if len(learnt) and not self.args.torch_compile:  # which wants one shape of all batches
            kept = inputs["labels"].shape[1] - max(int(learnt[0]) - 1, 0)  # the token before it predicts it
            inputs["labels"], inputs["logits_to_keep"] = inputs["labels"][:, -kept:], kept
        if "segment_ids" not in inputs:  # rows of one conversation each
            return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        visible, position_ids = packed_attention_mask(inputs.pop("segment_ids"), inputs["attention_mask"])
        dtype = torch.bfloat16 if self.args.bf16 else torch.float32
        # additive, since not every attention implementation takes a bool mask
        mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
        inputs["attention_mask"] = mask.masked_fill_(~visible, torch.finfo(dtype).min)
        inputs["position_ids"] = position_ids
        return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)


class Fwd2BotTrainer(StageTrainer):
    """Trains a Fwd2Bot: both losses, over batches in chunks and over all processes; their parts go to the log.

    Gradients are averaged over the processes here, once per optimiser step, and not by DDP's own hooks: so a process
    whose batch has no conversation or no text, or more chunks than another, is nothing special.

    Args:
        trained_stage: "both", or "generate" for the adapter of that stage alone.
        freeze: patterns of the names of what does not train all the same, see `mark_trained`.
        gather: whether the contrastive loss is over the batches of all processes.
        final_contrastive_loss_weight: the weight of that loss in the last step, which it nears in a line from that of
            the config, and in evaluations; None: it stays at that of the config.
        validation: its figures join those of every evaluation, as `eval_accuracy` and so on.

    Raises:
        ValueError: for several GPUs in one process, torch.compile, labels that are to be averaged process by process,
            `freeze` that fits nothing or leaves nothing, or options of checkpointing that ZeRO-3 cannot run with.
        TypeError: `freeze` is one pattern, not a list of them.
    """

    def __init__(
        self,
        *args: Any,
        trained_stage: str = "both",
        freeze: Sequence[str] = (),
        gather: bool = True,
        final_contrastive_loss_weight: float | None = None,
        validation: Validation | None = None,
        **kwargs: Any,
    ):
        if trained_stage not in TRAINED_STAGES:
            raise ValueError(f"trained_stage is {trained_stage!r}; choose one of {', '.join(TRAINED_STAGES)}")
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"this one process sees {self.args.n_gpu} GPUs and would use one. Start one process for each, with "
                "accelerate launch --num_processes N -m fwd2bot.training.train, or choose one: CUDA_VISIBLE_DEVICES=0"
            )
        if self.args.torch_compile:
            raise ValueError(
                "training.torch_compile is for a model with one forward pass, and a step here has many, of changing "
                "shapes. Leave it out; model.compile_layers compiles each layer of the language model by itself"
            )
        if not self.args.average_tokens_across_devices and self.args.world_size > 1:
            raise ValueError(
                "training.average_tokens_across_devices is false, but the mean over the labels is always that over "
                "all processes here. Leave it out"
            )
        self.trained_stage, self.freeze, self.validation = trained_stage, freeze, validation
        self.final_contrastive_loss_weight = final_contrastive_loss_weight
        whole = self.accelerator.unwrap_model(self.model)
        mark_trained(whole, trained_stage, freeze)
        if freeze and trained_stage == "both" and not trains_summaries(whole):
            logger.warning(
                f"model.freeze is {list(freeze)}, which leaves the adapter of the generate stage alone to train: the "
                "contrastive loss is computed and logged, and nothing learns from it. Beside model.init_from, "
                "model.trained_stage=generate spares it"
            )
        if any(zero3.is_divided(value) for value in whole.parameters()):
            given = getattr(self.args, f"{CHECKPOINTING}_kwargs") or {}
            for name, needed in zero3.RECOMPUTATION.items():
                if given.get(name, needed) != needed:
                    raise ValueError(
                        f"training.{CHECKPOINTING}_kwargs has {name} {given[name]!r}, and ZeRO-3 needs {needed!r}: "
                        "leave it out, or start with fsdp2.yaml"
                    )
            setattr(self.args, f"{CHECKPOINTING}_kwargs", given | zero3.RECOMPUTATION)
        black = self.processing_class.process_images([Image.new("RGB", (32, 32))]) if is_sharded(whole) else {}
        self._step = ChunkedStep(whole, gather, {name: value.to(whole.device) for name, value in black.items()})
        self._place = (-1, 0)  # the optimiser step, and the batch in it

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:  # whatever was marked since
            mark_trained(self.model, self.trained_stage, self.freeze)
        return super().create_optimizer(model)

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        model.train()
        batch = as_batch(self._prepare_inputs(inputs))
        step, micro = self._place
        self._place = (step, micro + 1) if step == self.state.global_step else (self.state.global_step, 0)
        weight = self._contrastive_loss_weight()
        losses = self._step(
            batch,
            num_items_in_batch,
            seed="/".join(map(str, ("lengths", self.args.seed, *self._place))),
            share=1 / self.current_gradient_accumulation_steps,
            backward=self.accelerator.backward,
            contrastive_loss_weight=weight,
        )
        if self.accelerator.sync_gradients:
            average_gradients(self._step.model.parameters())
        self.record("autoregressive_loss", losses.autoregressive * self.current_gradient_accumulation_steps)
        if losses.contrastive is not None:
            self.record("_".join(["contrastive_loss", *filter(None, [batch.text_kind])]), losses.contrastive)
        if weight is not None:
            self.record("contrastive_loss_weight", weight)
        self.record("temperature", torch.exp(-self._step.model.logit_scale.detach()))
        if len(losses.lengths):
            self.record("num_summary_tokens", losses.lengths.float().mean())
        return losses.total.detach()

    def _contrastive_loss_weight(self) -> float | None:
        """Of this step; None where it stays at the config's."""
        last = self.final_contrastive_loss_weight
        if last is None:
            return None
        first = self._step.model.config.contrastive_loss_weight
        done = self.state.global_step / max(self.state.max_steps - 1, 1)  # 1 in the last step
        return first + (last - first) * min(done, 1)

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, None, None]:
        """The loss of a batch, at the configured length, with the last weight: equal weights in all evaluations."""
        inputs = self._prepare_inputs(inputs)
        count = self._get_num_items_in_batch([inputs], self.args.device)
        with torch.no_grad():
            weight = self.final_contrastive_loss_weight
            return self._step(as_batch(inputs), count, contrastive_loss_weight=weight).total, None, None

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """The loss, and the figures of `validation`."""
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.validation is not None:
            with self.accelerator.autocast():  # as training: what trains may have another dtype than what is frozen
                figures = self.validation(self._step.model)
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in figures.items()})
        return output

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor:
        """Labels of all batches of an optimiser step, on all processes; 1 where there are none."""
        own = sum(int(count_labels(inputs)) for inputs in batch_samples)
        return gather_counts([own], device).sum().clamp(min=1).to(device)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """0: the Trainer's estimate, six times parameters and tokens, is that of a model that trains all it has."""
        return 0


def holds_adapters_alone(model: torch.nn.Module) -> bool:
    """Whether checkpoints of a model leave its backbone out: a quantised or sharded one is not here as it came."""
    return hasattr(model, "backbone") and (is_quantized(model.backbone) or is_sharded(model))


def load_strictly(model: torch.nn.Module, folder: Path) -> None:
    """Load a checkpoint's weights into a model; tied tensors count once.

    Raises:
        RuntimeError: a tensor of the model is missing from the file, or one of the file is unknown to the model.
    """
    model = getattr(model, "_orig_mod", model)  # a compiled model wraps the one that was saved
    if holds_adapters_alone(model) or (folder / OWN_WEIGHTS).is_file():
        fill_adapters(model, read_adapters(folder, STAGES, {}), folder)
        return
    safetensors.torch.load_model(model, str(folder / SAFE_WEIGHTS_NAME), strict=True)


def newest_checkpoint(output_dir: str | Path, clean: bool = True) -> Path | None:
    """The newest complete checkpoint of a run, or None.

    A checkpoint that was cut off while it was written is removed if `clean`, and passed over if not. Another that
    cannot be resumed from (saved without its optimizer, say) is left alone, and a warning says so.
    """
    found = []
    for folder in Path(output_dir).glob("checkpoint-*"):
        step = folder.name.removeprefix("checkpoint-")
        if not step.isdigit():
            continue
        if (folder / INCOMPLETE).exists():
            if clean:
                _remove(folder)
        elif _can_go_on(folder):
            found.append((int(step), folder))
        else:
            logger.warning(f"{folder} lacks weights or some of {', '.join(STATE_FILES)} and is not resumed from")
    return max(found)[1] if found else None


def _remove(folder: Path) -> None:
    """Remove a checkpoint that is incomplete; its mark goes last, so that a kill on the way leaves it incomplete."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != INCOMPLETE:
            path.unlink()
    shutil.rmtree(folder)


def _can_go_on(folder: Path) -> bool:
    has_weights = any((folder / name).is_file() for name in WEIGHTS)
    has_state = all((folder / name).is_file() for name in STATE_FILES)
    return has_weights and has_state and any(folder.glob("rng_state*.pth"))
