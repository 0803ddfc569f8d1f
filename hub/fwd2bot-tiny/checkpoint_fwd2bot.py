"""How a model comes to be and is kept: around a backbone, from a checkpoint, strictly, and into one."""

import os
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import torch
from huggingface_hub import HfApi
from peft import LoraConfig
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME, cached_file, logging

from .adapter_checkpoint_fwd2bot import fill_adapters, read_adapters, save_adapters
from .adapters_fwd2bot import is_adapter_parameter, lora_arguments
from .backbone_fwd2bot import check_backbone, commit_of, load_backbone
from .configuration_fwd2bot import STAGES, own_fields
from .fingerprint_fwd2bot import FingerprintMixin, weights_fingerprint
from .folder_fwd2bot import HUB_OPTIONS, check_name, copy_code, draft_folder, find_code, set_auto_map
from .last_positions_fwd2bot import install_last_positions
from .merging_fwd2bot import cannot_merge, merge_in_place
from .quantization_fwd2bot import is_quantized, mark_backbone, quantize_backbone_only
from .weights_fwd2bot import check_loading_info, check_same_backbone

logger = logging.get_logger(__name__)

# Of the Auto classes, which hand them on.
AUTO_OPTIONS = ("trust_remote_code", "code_revision", "adapter_kwargs", "_from_auto", "_from_pipeline")
UPLOAD_OPTIONS = ("commit_message", "commit_description", "revision", "create_pr")


class CheckpointMixin(FingerprintMixin):
    """Loading and saving of [`Fwd2BotForConditionalGeneration`]: strict, and with its code in the folder."""

    _hub: dict[str, Any] = {}  # with which options it was loaded from the Hub
    adapters_merged: bool = False  # whether the weights hold the adapter of the only stage

    @classmethod
    def from_backbone(
        cls,
        backbone: PreTrainedModel | str | os.PathLike,
        *,
        processor: Any | None = None,
        num_summary_tokens: int = 16,
        summary_lengths: list[int] | None = None,
        lora_rank: int = 16,
        lora_alpha: int | None = None,
        adapters: Mapping[str, LoraConfig | Mapping[str, Any]] | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> Self:
        """An untrained Fwd2Bot around an LVLM, whose weights it never changes.

        Args:
            backbone: a model of `AutoModelForImageTextToText`, or the id or path of one. To choose its dtype, device
                or attention, load it first.
            revision: of the backbone, branch, tag or commit; its commit stands in the config from then on.
            processor: the backbone's processor; if given, an error tells when it is another model's.
            num_summary_tokens, summary_lengths: see [`Fwd2BotConfig`].
            lora_rank, lora_alpha: of both stage adapters, on every linear layer of the language model; alpha = rank
                by default (VladVA, arXiv 2412.04378, uses 16 and 16).
            adapters: instead, a `peft.LoraConfig` or its arguments for "compress", for "generate" or for both; without
                `target_modules`, the same layers.
            kwargs: further fields of [`Fwd2BotConfig`].

        Raises:
            TypeError, ValueError: for a model that reads no images, one that carries adapters already, or a processor
                or adapters that do not fit.
        """
        unknown = sorted(set(kwargs) - own_fields(cls.config_class))
        if unknown:
            raise ValueError(
                f"from_backbone() has no {unknown}; allowed are the fields of Fwd2BotConfig. Options of loading "
                "belong to the backbone: load it with them, then hand it over."
            )
        if isinstance(backbone, (str, os.PathLike)):
            backbone = load_backbone(backbone, revision=revision or "main")
        check_backbone(backbone, processor)
        decoder, name = backbone.get_decoder(), backbone.config.name_or_path or None
        commit = getattr(backbone.config, "_commit_hash", None) or commit_of(name, revision)
        own = {"r": lora_rank, "lora_alpha": lora_rank if lora_alpha is None else lora_alpha}
        config = cls.config_class(
            backbone_config=backbone.config,
            backbone_name_or_path=os.path.abspath(name) if name and os.path.isdir(name) else name,
            backbone_revision=commit or revision,
            num_summary_tokens=num_summary_tokens,
            summary_lengths=summary_lengths,
            adapters=lora_arguments(adapters, own, decoder),
            **kwargs,
        )
        model = cls._around(config, backbone)
        model.mark_trainable()
        return model.train(backbone.training)

    @classmethod
    def _around(cls, config: Any, backbone: PreTrainedModel, stage: str | None = None) -> Self:
        """A Fwd2Bot around a loaded backbone, whose dtype, device and attention it takes over."""
        check_backbone(backbone)
        config.backbone_config = backbone.config
        config._attn_implementation = backbone.config._attn_implementation
        words, last = backbone.get_input_embeddings().weight, list(backbone.get_decoder().parameters())[-1]
        model = cls(config, backbone=backbone, stage=stage)
        # These alone: a cast of all would round the rotary frequencies. In the dtype of the words, since layers that
        # are quantised have one of their own. PEFT puts a LoRA where its layer is; the rest goes where its input is.
        for name, parameter in model.trained_parameters().items():
            place = words if name.endswith(".summary_queries") else parameter if is_adapter_parameter(name) else last
            parameter.data = parameter.data.to(dtype=words.dtype, device=place.device)
        return model

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *args: Any,
        backbone: Any | None = None,
        merge_adapters: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As `PreTrainedModel.from_pretrained`, but a missing or unexpected weight is an error.

        Args:
            stage: `None` loads everything; "compress" without the generate adapter and the output head; "generate"
                without vision tower and compress adapter; "text" both adapters without vision tower (embeds texts,
                answers from summaries).
            backbone: for an adapter-only checkpoint, the model that its adapters belong to (it is taken over), or its
                id or path. Default: the one that the config names, at its revision.
            merge_adapters: with stage="compress" or "generate", fold that stage's adapter into the weights, which
                saves the time that it takes beside them; such a model cannot train. Default: where the weights are
                plain floats, and the backbone was not handed over as a model, whose weights are yours.
            kwargs: for an adapter-only checkpoint, they load the backbone: `dtype`, `device_map`,
                `attn_implementation`, `quantization_config`, ...

        Raises:
            ValueError: for weights that do not fit, or a backbone that the adapters were not trained on.
        """
        path, hub = pretrained_model_name_or_path, {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
        check_name(path)
        return_info = kwargs.pop("output_loading_info", False)
        if isinstance(kwargs.get("attn_implementation"), dict):
            raise ValueError(
                f"attn_implementation={kwargs['attn_implementation']!r} would not reach the parts of the backbone. "
                "Give one name for all, or call model.backbone.set_attn_implementation with it afterwards."
            )
        stage = kwargs.get("stage")
        if merge_adapters and stage not in STAGES:
            raise ValueError(
                f"merge_adapters=True came with stage={stage!r}, which keeps both adapters, and the weights have room "
                f"for one of them. Choose a stage of {list(STAGES)}, or leave merge_adapters out."
            )
        stored = _stored_config(path, kwargs.get("config"), hub)
        _check_trained(stored, kwargs, path)
        if stored.get("adapter_only", False):
            model = cls._from_adapters(path, backbone, **kwargs)
            info: dict[str, Any] = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set()}
        elif backbone is not None:
            raise ValueError(
                f"{path} is a full checkpoint: its backbone is inside. Leave `backbone` out; it is for checkpoints "
                "that save_pretrained(path, adapter_only=True) wrote."
            )
        else:
            if kwargs.get("quantization_config") is not None:
                kwargs["quantization_config"] = quantize_backbone_only(kwargs["quantization_config"])
            model, info = super().from_pretrained(path, *args, output_loading_info=True, **kwargs)
            check_loading_info(info, path)
            mark_backbone(model)
            install_last_positions(model.get_decoder())
        commit = getattr(model.config, "_commit_hash", None) or commit_of(path, hub.get("revision"), **_cache(hub))
        model._hub = {**hub, "revision": commit} if commit else hub
        if stage in STAGES and (merge_adapters or (merge_adapters is None and not isinstance(backbone, nn.Module))):
            model._merge_adapters(path, required=merge_adapters is not None)
        model.mark_trainable()
        if model.adapters_merged or model.config.merged_stage is not None:
            model._merged_fingerprint = model.config.fingerprint
        model._remember_weights()
        return (model, info) if return_info else model

    @classmethod
    def _from_adapters(
        cls, path: str | os.PathLike, backbone: Any | None, config: Any = None, stage: str | None = None, **kwargs: Any
    ) -> Any:
        hub = {name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs}
        for name in AUTO_OPTIONS:
            kwargs.pop(name, None)
        if not isinstance(config, PreTrainedConfig):
            own = {name: kwargs.pop(name) for name in own_fields(cls.config_class) if name in kwargs}
            config = cls.config_class.from_pretrained(config or path, **hub, **own)
        if getattr(config, "_attn_implementation_internal", None):  # the Auto classes put it there
            kwargs.setdefault("attn_implementation", config._attn_implementation)
        saved = read_adapters(path, [name for name in STAGES if stage in (None, "text", name)], hub)
        backbone = _load_backbone_of(config, path, backbone, hub, kwargs)
        check_backbone(backbone)
        check_same_backbone(saved.sample, config.backbone_config, backbone, _backbone_name(config), path)
        if saved.changed:
            logger.warning(
                f"The adapters of {saved.changed} in {path} were changed since they were saved: this is another "
                "model, with a fingerprint of its own, and it refuses the summaries of the saved one."
            )
            config.fingerprint = None
        config.name_or_path = os.fspath(path)
        model = cls._around(config, backbone, stage)
        fill_adapters(model, saved, path)
        if cached_file(path, GENERATION_CONFIG_NAME, **hub, _raise_exceptions_for_missing_entries=False):
            model.generation_config = GenerationConfig.from_pretrained(path, **hub)
        return model.eval()

    def _merge_adapters(self, path: str | os.PathLike, required: bool) -> None:
        """Fold the adapter of the only stage into the weights, where they are plain floats.

        Raises:
            ValueError: where they are not and it was asked for.
        """
        decoder = self.get_decoder()
        obstacle = cannot_merge(decoder)
        if obstacle is None:
            if self.config.fingerprint is None:
                self.config.fingerprint = weights_fingerprint(self.trained_parameters())
            merge_in_place(decoder, self.stage)
            self.adapters_merged = True
        elif required:
            raise ValueError(
                f"The adapter of {path} cannot be merged: {obstacle}. Leave merge_adapters out, or load the model "
                "unquantised, without offloading."
            )

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        adapter_only: bool = False,
        **kwargs: Any,
    ) -> None:
        """As `PreTrainedModel.save_pretrained`, plus the code that `trust_remote_code=True` loads.

        Args:
            adapter_only: leave the backbone out; `from_pretrained` will load it from `config.backbone_name_or_path` at
                `config.backbone_revision`, or take the one it is given. Plain PEFT reads the two adapters, in the
                folders `compress` and `generate`.

        Everything is written beside its place first and moved there when it is complete: a full disk leaves the
        folder as it was.

        Raises:
            ValueError: for a model that was loaded with a `stage`: parts of it are missing.
            OSError: for a folder that cannot be written, or code that cannot be found.
        """
        if self.stage is not None and (self.config.merged_stage is None or adapter_only):
            raise ValueError(self._lacks_parts("be saved"))
        if is_quantized(self.backbone) and not adapter_only:
            raise ValueError(
                "The backbone is quantised, and a full checkpoint holds it in the precision that it was trained in. "
                "Save with adapter_only=True, which leaves the backbone out."
            )
        if self.config.train_connector and adapter_only:
            raise ValueError(
                "The connector of this model's backbone was trained with it (config.train_connector), and adapters "
                "alone would lose it. Save in full, without adapter_only."
            )
        if kwargs.get("distributed_checkpoint"):
            raise ValueError("distributed_checkpoint is not supported. Leave it out: the main process writes it all.")
        if os.path.isfile(save_directory):
            raise NotADirectoryError(f"{save_directory} is a file. Give a folder to save the model in.")
        if adapter_only and not self.config.backbone_name_or_path:
            logger.warning(
                "This model does not know where its backbone came from: whoever loads the adapters must have it, "
                "bare, and hand it over with from_pretrained(path, backbone=...). Set config.backbone_name_or_path to "
                "name it."
            )
        find_code(self.config, self._hub)  # an error comes before anything is written
        self.config.fingerprint = self.fingerprint
        set_auto_map(self.config)
        self.config.adapter_only = adapter_only
        if not is_main_process:
            if not adapter_only:  # sharded weights are gathered by all processes together, and one of them writes
                with TemporaryDirectory() as nowhere:
                    super().save_pretrained(nowhere, is_main_process=False, state_dict=state_dict, **kwargs)
            return
        with draft_folder(save_directory) as draft:
            if adapter_only:
                save_adapters(self, draft, state_dict)
                self.config.architectures = [type(self).__name__]
                self.config.save_pretrained(draft)
                if self.generation_config is not None:
                    self.generation_config.save_pretrained(draft)
            else:
                super().save_pretrained(draft, state_dict=state_dict, **kwargs)
            copy_code(draft, self.config, self._hub)
        if push_to_hub:  # only now the folder is complete; this saves once more, into a folder of its own
            hub = ("commit_message", "private", "token", "revision", "create_pr", "max_shard_size")
            options = {key: value for key, value in kwargs.items() if key in hub}
            self.push_to_hub(kwargs.get("repo_id", Path(save_directory).name), adapter_only=adapter_only, **options)

    def push_to_hub(self, repo_id: str, *, adapter_only: bool = False, **kwargs: Any) -> str:
        """As `PreTrainedModel.push_to_hub`; `adapter_only` as in `save_pretrained`."""
        if not adapter_only:
            return super().push_to_hub(repo_id, **kwargs)
        unknown = sorted(set(kwargs) - {"token", "private", *UPLOAD_OPTIONS, "max_shard_size"})
        if unknown:
            raise TypeError(f"push_to_hub() of adapters has no {unknown}; allowed: token, private, {UPLOAD_OPTIONS}.")
        upload = {name: kwargs[name] for name in UPLOAD_OPTIONS if name in kwargs}
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, adapter_only=True)
            api = HfApi(token=kwargs.get("token"))
            repo_id = api.create_repo(repo_id, private=kwargs.get("private"), exist_ok=True).repo_id
            stale = ["model*.safetensors", "model.safetensors.index.json"]  # of a full checkpoint
            return api.upload_folder(repo_id=repo_id, folder_path=folder, delete_patterns=stale, **upload)


def _stored_config(path: str | os.PathLike, config: Any, hub: dict[str, Any]) -> dict[str, Any]:
    """The config as it is stored in the checkpoint, or at the path that was given as `config`."""
    if isinstance(config, (str, os.PathLike)):
        path = config
    return PreTrainedConfig.get_config_dict(path, **hub)[0]


def _check_trained(stored: dict[str, Any], kwargs: dict[str, Any], path: str | os.PathLike) -> None:
    """Raise `ValueError` for what a checkpoint was not trained with, given as an option or in a config.

    That is another number of queries, or summaries from the other side of the final norm.
    """
    asked = kwargs.get("num_summary_tokens", getattr(kwargs.get("config"), "num_summary_tokens", None))
    trained = stored.get("num_summary_tokens")
    if None not in (asked, trained) and asked != trained:
        raise ValueError(
            f"num_summary_tokens={asked} cannot be chosen in loading: the model in {path} was trained with {trained} "
            f"summary queries. Choose a length of 1 to {trained} where you compress."
        )
    trained = stored.get("summary_norm", True)
    asked = kwargs.get("summary_norm", getattr(kwargs.get("config"), "summary_norm", trained))
    if asked != trained:
        raise ValueError(
            f"summary_norm={asked} cannot be chosen in loading: the model in {path} was trained with {trained}. Leave "
            "it out, or train a new model with it."
        )


def _cache(hub: dict[str, Any]) -> dict[str, Any]:
    """The options that say where files of the Hub lie on this machine."""
    return {name: hub[name] for name in ("cache_dir", "subfolder") if name in hub}


def _load_backbone_of(
    config: Any, path: str | os.PathLike, backbone: Any | None, hub: dict[str, Any], kwargs: dict[str, Any]
) -> PreTrainedModel:
    """The backbone of an adapter-only checkpoint: the given one, or the one that its config names."""
    shared = {name: hub[name] for name in hub if name not in ("revision", "subfolder")}
    if isinstance(backbone, (str, os.PathLike)):
        return load_backbone(backbone, **shared, **kwargs)
    if backbone is not None:
        if kwargs:
            raise ValueError(
                f"{sorted(kwargs)} would load a backbone, but a loaded one was given. Load it with them, or give its "
                "id or path."
            )
        return backbone
    if not config.backbone_name_or_path:
        raise ValueError(
            f"{path} holds adapters alone and does not say of which backbone. Hand it over: from_pretrained(path, "
            "backbone=...)."
        )
    try:
        return load_backbone(
            config.backbone_name_or_path, revision=config.backbone_revision or "main", **shared, **kwargs
        )
    except OSError as error:
        raise OSError(
            f"{path} holds adapters alone, and their backbone, {_backbone_name(config)}, cannot be loaded: {error} "
            "If you have it elsewhere, hand it over: from_pretrained(path, backbone=...)."
        ) from error


def _backbone_name(config: Any) -> str:
    revision = f" at revision {config.backbone_revision}" if config.backbone_revision else ""
    return f"{config.backbone_name_or_path or 'one that the config does not name'}{revision}"
