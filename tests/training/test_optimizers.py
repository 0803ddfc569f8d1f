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


def test_steps_on_the_rest_equal_those_of_adamw():
    ours, theirs = small_model(), small_model()
    optimizer = build_optimizer(ours, "muon", **OPTIONS)
    linear = theirs[1].weight
    rest = [parameter for parameter in theirs.parameters() if parameter is not linear]
    adamw = torch.optim.AdamW(rest, lr=0.01, weight_decay=0.0, betas=(0.9, 0.98))
    take_steps(list(ours.parameters()), optimizer, 0, 3)
    take_steps(list(theirs.parameters()), adamw, 0, 3)
    pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs if b is not linear)


@pytest.mark.parametrize("options", [{"weight_decay": 0.1}, {"nesterov": False, "momentum": 0.9}])
@pytest.mark.parametrize("together", [2**26, 100])
def test_steps_on_matrices_are_those_of_torchs_muon(options, together, monkeypatch):
    """It computes in bfloat16, ours on the CPU in float32: alike to that rounding. Stacks of all, and of two."""
    monkeypatch.setattr("fwd2bot.training.muon.TOGETHER", together)
    shapes = [(4, 12), (12, 4), (4, 12), (8, 8), (4, 12), (300, 2)]
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(one.detach().clone()) for one in ours]
    start = [one.detach().clone() for one in ours]
    take_steps(ours, StackedMuon(ours, lr=0.02, **options), 0, 4)
    take_steps(theirs, torch.optim.Muon(theirs, lr=0.02, adjust_lr_fn="match_rms_adamw", **options), 0, 4)
    for one, other, before in zip(ours, theirs, start, strict=True):
        moved = (other - before).norm()
        assert moved > 0.1
        assert (one - other).norm() < 0.02 * moved


def test_matrices_without_a_gradient_stay_as_they_are():
    learnt, still = (torch.nn.Parameter(torch.ones(3, 5)) for _ in range(2))
    optimizer = StackedMuon([learnt, still], lr=0.1)
    learnt.grad = torch.randn(3, 5)
    assert optimizer.step(lambda: 7.0) == 7.0
    assert not torch.equal(learnt, torch.ones(3, 5))
    assert torch.equal(still, torch.ones(3, 5))


def test_states_go_from_torchs_muon_to_ours_and_back():
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(3, 5)) for _ in range(2)]
    theirs = torch.optim.Muon(parameters, lr=0.1, adjust_lr_fn="match_rms_adamw")
    take_steps(parameters, theirs, 0, 2)
    ours = StackedMuon(parameters, lr=0.3)
    ours.load_state_dict(theirs.state_dict())
    take_steps(parameters, ours, 2, 3)
    assert ours.param_groups[0]["lr"] == 0.1
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(theirs.state[parameters[0]]["momentum_buffer"], ours.state[parameters[0]]["momentum_buffer"])


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
