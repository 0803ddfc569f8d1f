"""Muon on the hidden matrices and AdamW on the rest, as one optimizer."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from fwd2bot.adapters_fwd2bot import is_adapter_parameter
from fwd2bot.backbone_fwd2bot import CONNECTORS

from .muon import StackedMuon

MUON, ADAMW = "muon", "adamw"


class MuonAdamW(torch.optim.Optimizer):
    """Each parameter group names its algorithm; state, groups and checkpoints are those of one ordinary optimizer.

    Muon takes 2D parameters only, and the HF Trainer, its learning rate scheduler and its checkpoints take one
    optimizer. So this one owns the groups and the state, and lends them to both algorithms at every step.

    The scale that lets Muon share AdamW's learning rates is from https://arxiv.org/abs/2502.16982 (`match_rms_adamw`).

    Args:
        groups: parameter groups, each with `algorithm` "muon" or "adamw", `lr`, `weight_decay`, and its options.

    Raises:
        ValueError: a group names another algorithm, or gives Muon a parameter that is not a matrix.
    """

    def __init__(self, groups: Iterable[dict[str, Any]]):
        groups = [dict(group, params=list(group["params"])) for group in groups]
        self._algorithms: dict[str, torch.optim.Optimizer] = {}
        for group in groups:
            algorithm = group.get("algorithm")
            if algorithm not in (MUON, ADAMW):
                raise ValueError(f"unknown algorithm {algorithm!r} in a parameter group; choose {MUON} or {ADAMW}")
            options = {name: value for name, value in group.items() if name not in ("algorithm", "group")}
            if algorithm == MUON:
                inner = StackedMuon([options], adjust_lr_fn="match_rms_adamw")
            else:
                inner = torch.optim.AdamW([options])
            group.update(inner.param_groups[0])  # with the defaults of every option filled in
            self._algorithms.setdefault(algorithm, inner)
        super().__init__(groups, defaults={})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for algorithm, inner in self._algorithms.items():
            inner.param_groups = [group for group in self.param_groups if group["algorithm"] == algorithm]
            inner.state = self.state
            inner.step()
        return loss


def parameter_groups(
    model: nn.Module,
    learning_rate: float,
    matrix_learning_rate: float,
    weight_decay: float,
    momentum: float = 0.95,
    betas: tuple[float, float] = (0.9, 0.98),
    learning_rates: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Sort the trainable parameters of a model: every one into exactly one group.

    Muon gets the hidden matrices: the 2D weights of linear layers but for the output head. AdamW gets embeddings,
    head, biases, norms, convolutions and anything else, without weight decay.

    Args:
        learning_rates: of roles in a Fwd2Bot (see `role_of`), whose parameters are then in groups of their own.

    Raises:
        ValueError: for a role that no trainable parameter has.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    hidden = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear) and module is not head}
    for module in model.modules():  # a tied weight is an embedding first
        if isinstance(module, nn.Embedding):
            hidden.discard(id(module.weight))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trainable if id(parameter) in hidden]
    rest = [parameter for parameter in trainable if id(parameter) not in hidden]
    groups = [
        dict(group="rest", params=rest, algorithm=ADAMW, lr=learning_rate, weight_decay=0.0, betas=tuple(betas)),
        dict(
            group="matrices",
            params=matrices,
            algorithm=MUON,
            lr=matrix_learning_rate,
            weight_decay=weight_decay,
            momentum=momentum,
        ),
    ]
    check_roles(model, learning_rates or {})
    for role, rate in (learning_rates or {}).items():
        of_role = [value for name, value in model.named_parameters() if role_of(name) == role]
        chosen = {id(parameter) for parameter in of_role if parameter.requires_grad}
        own = []
        for group in groups:
            apart = [parameter for parameter in group["params"] if id(parameter) in chosen]
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in chosen]
            name = role if group["algorithm"] == ADAMW else f"{role}_matrices"
            own.append({**group, "group": name, "params": apart, "lr": rate})
        groups += own
    return [group for group in groups if group["params"]]


def check_roles(model: nn.Module, roles: Iterable[str]) -> None:
    """Raise `ValueError` for a role (see `role_of`) that no trainable parameter of a model has."""
    found = {role_of(name) for name, value in model.named_parameters() if value.requires_grad}
    for role in roles:
        if role not in found:
            raise ValueError(
                f"optimizer.learning_rates has {role}, but nothing of that role trains; leave it out (on the command "
                f"line: optimizer.learning_rates.{role}=null), or take it out of model.freeze if it is there"
            )


def role_of(name: str) -> str | None:
    """What a trainable parameter of a Fwd2Bot is, by its name: one of `recipe.ROLES`; None for the backbone's own."""
    if is_adapter_parameter(name):
        return "adapters"
    if name.endswith(".summary_queries"):
        return "queries"
    if "summary_projector." in name:
        return "projector"
    if name.rpartition(".")[2] in ("logit_scale", "logit_bias"):
        return "logit_scale"
    return "connector" if any(f".{connector}." in name for connector in CONNECTORS) else None


def build_optimizer(model: nn.Module, name: str, **options: Any) -> torch.optim.Optimizer:
    """Build "muon" (Muon on the hidden matrices, AdamW on the rest) or "adamw" (AdamW on all).

    Args:
        options: those of `parameter_groups`. With "adamw", `matrix_learning_rate` is AdamW's on the hidden matrices.

    Raises:
        ValueError: an unknown name, or a model of which nothing is trainable.
    """
    if name not in (MUON, ADAMW):
        raise ValueError(f"unknown optimizer {name!r}; choose {MUON} or {ADAMW}")
    groups = parameter_groups(model, **options)
    if not groups:
        raise ValueError("nothing to train: no parameter requires a gradient; call mark_trainable() first")
    if name == ADAMW:
        betas = groups[0].get("betas", (0.9, 0.98))
        kept = ("group", "params", "lr", "weight_decay")
        groups = [{key: group[key] for key in kept} | {"algorithm": ADAMW, "betas": betas} for group in groups]
    return MuonAdamW(groups)
