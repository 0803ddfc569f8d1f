import copy

import pytest
import torch

from fwd2bot.training.muon import StackedMuon
from fwd2bot.training.optimizers import MuonAdamW, build_optimizer, parameter_groups

OPTIONS = {"learning_rate": 0.01, "matrix_learning_rate": 0.02, "weight_decay": 0.0}


def take_steps(parameters, optimizer, first, last):
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def small_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 6), torch.nn.LayerNorm(6))


def test_every_trainable_parameter_is_in_exactly_one_group(tiny_backbone):
    for parameter in list(tiny_backbone.parameters())[::5]:
        parameter.requires_grad_(False)
    groups = parameter_groups(tiny_backbone, **OPTIONS)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    trainable = [id(parameter) for parameter in tiny_backbone.parameters() if parameter.requires_grad]
    assert sorted(grouped) == sorted(trainable)


def test_stage_adapters_are_matrices_and_queries_are_not(tiny_fwd2bot):
    trained = tiny_fwd2bot.mark_trainable()
    names = {id(parameter): name for name, parameter in trained.items()}
    groups = {group["group"]: group for group in parameter_groups(tiny_fwd2bot, **OPTIONS)}
    matrices = {names[id(parameter)] for parameter in groups["matrices"]["params"]}
    rest = {names[id(parameter)] for parameter in groups["rest"]["params"]}
    assert matrices | rest == set(trained)
    assert matrices == {name for name in trained if "lora_" in name} | {"summary_projector.weight"}


def test_embeddings_and_head_are_not_matrices(tiny_backbone):
    matrices = parameter_groups(tiny_backbone, **OPTIONS)[1]["params"]
    embeddings = (tiny_backbone.get_input_embeddings().weight, tiny_backbone.get_output_embeddings().weight)
    assert all(matrix is not weight for matrix in matrices for weight in embeddings)
    assert all(matrix.dim() == 2 for matrix in matrices)


def random_matrices(shapes):
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]


def torchs_muon(parameters, **options):
    return torch.optim.Muon(parameters, lr=0.02, adjust_lr_fn="match_rms_adamw", **options)


def apart(ours, theirs, before):
    """How far both went apart, in shares of how far torch's went; the largest of all matrices."""
    moved = [(other - start).norm() for other, start in zip(theirs, before, strict=True)]
    assert min(moved) > 0.02
    return max((one - other).norm() / way for one, other, way in zip(ours, theirs, moved, strict=True))


def test_steps_equal_those_of_adamw_and_of_torchs_muon():
    ours, theirs = small_model(), small_model()
    optimizer = build_optimizer(ours, "muon", **OPTIONS)
    linear, before = theirs[1].weight, theirs[1].weight.detach().clone()
    rest = [parameter for parameter in theirs.parameters() if parameter is not linear]
    adamw = torch.optim.AdamW(rest, lr=0.01, weight_decay=0.0, betas=(0.9, 0.98))
    muon = torchs_muon([linear], weight_decay=0.0)
    take_steps(list(ours.parameters()), optimizer, 0, 3)
    for step in range(3):
        for one in (adamw, muon):
            take_steps(list(theirs.parameters()), one, step, step + 1)
    pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs if b is not linear)
    assert apart([ours[1].weight], [linear], [before]) < 0.02


@pytest.mark.parametrize(
    "options", [{"weight_decay": 0.1}, {"nesterov": False, "momentum": 0.9}, {"adjust_lr_fn": "original"}]
)
@pytest.mark.parametrize("together", [2**24, 100])
@pytest.mark.parametrize(("precision", "allowed"), [(torch.bfloat16, 0.005), (torch.float32, 0.02)])
def test_steps_on_matrices_are_those_of_torchs_muon(options, together, precision, allowed, monkeypatch):
    """Its precision is bfloat16, as ours is on an accelerator. In one stack, and in stacks of two."""
    monkeypatch.setattr("fwd2bot.training.muon.TOGETHER", together)
    monkeypatch.setattr("fwd2bot.training.muon._precision", lambda device: precision)
    options = {"lr": 0.02, "adjust_lr_fn": "match_rms_adamw", **options}
    shapes = [(4, 12), (12, 4), (4, 12), (8, 8), (4, 12), (300, 2)]
    ours, theirs, before = (random_matrices(shapes) for _ in range(3))
    take_steps(ours, StackedMuon(ours, **options), 0, 4)
    take_steps(theirs, torch.optim.Muon(theirs, **options), 0, 4)
    assert apart(ours, theirs, before) < allowed


def test_no_more_than_some_matrices_are_stacked(monkeypatch):
    monkeypatch.setattr("fwd2bot.training.muon.TOGETHER", 100)
    stacked, whole = [], torch.stack
    monkeypatch.setattr(torch, "stack", lambda parts: stacked.append(len(parts)) or whole(parts))
    parameters = random_matrices([(4, 12)] * 5 + [(20, 20)] * 2)
    take_steps(parameters, StackedMuon(parameters, lr=0.1), 0, 1)
    assert stacked == [2, 2, 1, 1, 1]


def test_matrices_without_a_gradient_stay_as_they_are():
    learnt, still = (torch.nn.Parameter(torch.ones(3, 5)) for _ in range(2))
    optimizer = StackedMuon([learnt, still], lr=0.1)
    learnt.grad = torch.randn(3, 5)
    optimizer.step()
    assert not torch.equal(learnt, torch.ones(3, 5))
    assert torch.equal(still, torch.ones(3, 5))


def test_loss_of_a_closure_is_returned():
    [parameter] = random_matrices([(3, 5)])

    def closure():
        loss = parameter.square().sum()
        loss.backward()
        return loss

    before = parameter.detach().clone()
    assert StackedMuon([parameter], lr=0.1).step(closure) == before.square().sum()
    assert not torch.equal(parameter, before)


@pytest.mark.parametrize("first", [torchs_muon, StackedMuon])
def test_states_go_from_torchs_muon_to_ours_and_back(first):
    ours, theirs, before = (random_matrices([(3, 5), (3, 5)]) for _ in range(3))
    take_steps(theirs, torchs_muon(theirs), 0, 4)
    second = StackedMuon if first is torchs_muon else torchs_muon
    optimizer = first(ours)
    optimizer.param_groups[0].update(lr=0.02, adjust_lr_fn="match_rms_adamw")
    take_steps(ours, optimizer, 0, 2)
    resumed = second(ours)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    take_steps(ours, resumed, 2, 4)
    assert apart(ours, theirs, before) < 0.02


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_resume_from_state_dict_continues_exactly(name, tmp_path):
    whole, half = small_model(), small_model()
    optimizer = build_optimizer(whole, name, **OPTIONS)
    take_steps(list(whole.parameters()), optimizer, 0, 4)

    optimizer = build_optimizer(half, name, **OPTIONS)
    take_steps(list(half.parameters()), optimizer, 0, 2)
    torch.save({"model": half.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    resumed = small_model()
    state = torch.load(tmp_path / "state.pt")
    resumed.load_state_dict(state["model"])
    optimizer = build_optimizer(resumed, name, **OPTIONS)
    optimizer.load_state_dict(state["optimizer"])
    take_steps(list(resumed.parameters()), optimizer, 2, 4)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_scheduler_reaches_both_groups():
    optimizer = build_optimizer(small_model(), "muon", **OPTIONS)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.005, 0.01]


def test_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match="muon or adamw"):
        build_optimizer(small_model(), "sgd", **OPTIONS)


def test_unknown_algorithm_in_a_group_is_refused():
    with pytest.raises(ValueError, match="'lion'"):
        MuonAdamW([{"params": list(small_model().parameters()), "algorithm": "lion"}])


def test_model_with_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="mark_trainable"):
        build_optimizer(small_model().requires_grad_(False), "muon", **OPTIONS)
