"""The two optimizers beside each other and beside torch's own: updates, state dicts, changing from one to the other."""

import pytest
import torch

import kernels
from model import Llama
from tests.support import kernel_testing as kt
from tests.support.step_testing import TINY
from training.config import TrainConfig
from training.step import optimizer as optimizer_module
from training.step.flat import FlatParameters
from training.step.optimizer import MOMENTS, AdamW, FusedAdamW, make_optimizer

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
KINDS = {"none": AdamW, "adamw": FusedAdamW}
"""What --kernels chooses."""
both = pytest.mark.parametrize("kind", KINDS)


def make(kind="none", dtype=FP32, **options):
    config = TrainConfig(**TINY | {"kernels": kind, "learning_rate": 1e-2, "weight_decay": 0.1} | options)
    torch.manual_seed(0)
    model = Llama(config.shape(), kernels.select("none", config.n_layers), dtype).to(kt.DEVICE)
    return make_optimizer(FlatParameters(model), config)


def plain(flat, **options):
    """torch's AdamW on clones of the parameters, in the groups that ours has."""
    parameters = [p.detach().clone().requires_grad_() for p in flat.model.parameters()]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    options = {"fused": True} | options
    return parameters, torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), **options)


def fill_gradients(flat, seed):
    for i, (name, p) in enumerate(flat.model.named_parameters()):
        flat.view(flat.gradients, name).copy_(kt.tensor(*p.shape, seed=100 * seed + i))


def update(optimizer, seed, lr=1e-2, factor=0.5, skip=0.0):
    fill_gradients(optimizer.flat, seed)
    optimizer.lr.fill_(lr)
    optimizer.update(*torch.tensor([factor, skip], device=kt.DEVICE))


def update_plain(parameters, optimizer, flat, seed):
    fill_gradients(flat, seed)
    for p, ours in zip(parameters, flat.model.parameters(), strict=True):
        p.grad = ours.grad * 0.5
    optimizer.step()


def everything(optimizer):
    """Clones of all that an update may change, but the gradients."""
    state = [x for s in optimizer.state.values() for x in s.values()]
    copies = [] if optimizer.flat.copies is None else [optimizer.flat.copies]
    return [x.flatten().clone() for x in (optimizer.flat.values, *copies, *state)]


def places(optimizer):
    return [x.data_ptr() for p, s in optimizer.state.items() for x in (p, p.grad, optimizer.lr, *s.values())]


# ----------------------------------------------------------------------------------------------------------- the update


@both
def test_the_switch_chooses(kind):
    assert type(make(kind)) is KINDS[kind]


def test_the_switch_is_one_of_all():
    assert type(make("all")) is type(make(fused=True, kind="")) is FusedAdamW
    assert type(make("all,-adamw")) is type(make(fused=True, kind="-adamw")) is AdamW


def test_the_reference_is_torchs_own_to_the_bit():
    ours = make()
    parameters, theirs = plain(ours.flat)
    for group in theirs.param_groups:
        group["lr"] = ours.lr  # 0.01 as it is in float32
    for seed in range(5):
        update(ours, seed)
        update_plain(parameters, theirs, ours.flat, seed)
    kt.assert_same_bits([p.detach() for p in ours.flat.model.parameters()], [p.detach() for p in parameters])
    for mine, state in zip(ours.state.values(), theirs.state.values(), strict=True):
        kt.assert_same_bits([x.flatten() for x in mine.values()], [x.flatten() for x in state.values()])


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
def test_both_make_the_same_updates(dtype):
    one, other = make("none", dtype), make("adamw", dtype)
    for seed in range(4):
        for optimizer in (one, other):
            update(optimizer, seed, lr=1e-2 / (seed + 1))
    torch.testing.assert_close(other.flat.values, one.flat.values, rtol=2e-6, atol=2e-8)
    torch.testing.assert_close(other.exp_avg, one.exp_avg, rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(other.exp_avg_sq, one.exp_avg_sq, rtol=2e-6, atol=1e-9)
    for name, copy in other.flat.model.compute_copies().items():
        torch.testing.assert_close(copy, one.flat.model.compute_copies()[name], rtol=8e-3, atol=1e-5)


@both
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_the_copies_are_the_parameters_rounded(kind, dtype):
    optimizer = make(kind, dtype)
    before = optimizer.flat.copies.clone()
    update(optimizer, 0)
    assert not torch.equal(optimizer.flat.copies, before)
    for name, copy in optimizer.flat.model.compute_copies().items():
        assert torch.equal(copy, optimizer.flat.model.get_parameter(name).to(dtype))


@both
def test_matrices_decay_and_norms_do_not(kind):
    optimizer = make(kind, weight_decay=0.5)
    before = {name: p.detach().clone() for name, p in optimizer.flat.model.named_parameters()}
    optimizer.lr.fill_(0.1)
    optimizer.update(*torch.tensor([1.0, 0.0], device=kt.DEVICE))  # the gradients are zeros
    for name, p in optimizer.flat.model.named_parameters():
        kept = 1 - 0.1 * 0.5 if p.ndim == 2 else 1.0
        torch.testing.assert_close(p.detach(), before[name] * kept, rtol=3e-7, atol=0, msg=name)


@both
@pytest.mark.parametrize("before", [0, 2])
def test_a_skipped_update_changes_nothing(kind, before):
    optimizer = make(kind, FP16)
    for seed in range(before):
        update(optimizer, seed)
    kept = everything(optimizer)
    update(optimizer, 5, factor=torch.nan, skip=1.0)
    kt.assert_same_bits(everything(optimizer), kept)
    update(optimizer, 5)
    assert optimizer_module.updates(optimizer.flat.model, optimizer) == before + 1


def test_the_fused_update_leaves_the_gradients():
    optimizer = make("adamw")
    update(optimizer, 0)
    after = optimizer.flat.gradients.clone()
    fill_gradients(optimizer.flat, 0)
    kt.assert_same_bits([after], [optimizer.flat.gradients])


def test_torchs_step_is_not_there_to_be_called_on_the_fused_one():
    with pytest.raises(NotImplementedError, match=r"FusedAdamW: call update"):
        make("adamw").step()


# ------------------------------------------------------------------------------------------------ by name, for checkpoints


@both
def test_before_the_first_update_the_moments_are_zeros(kind):
    optimizer = make(kind)
    model = optimizer.flat.model
    assert optimizer_module.updates(model, optimizer) == 0
    found = optimizer_module.moments(model, optimizer)
    assert set(found) == set(MOMENTS)
    for moment in found.values():
        assert {name: x.shape for name, x in moment.items()} == {name: p.shape for name, p in model.named_parameters()}
        assert not any(x.any() for x in moment.values())


@pytest.mark.parametrize(("first", "second"), [("none", "adamw"), ("adamw", "none"), ("none", "none")])
def test_a_run_changes_its_optimizer_at_a_checkpoint_to_the_bit(first, second):
    old, new = make(first), make(second)
    for seed in range(3):
        update(old, seed)
        update(new, seed + 7)  # to be forgotten
    before = places(new)
    with torch.no_grad():
        new.flat.values.copy_(old.flat.values)
    model = old.flat.model
    saved = optimizer_module.moments(model, old)
    optimizer_module.restore(
        new.flat.model, new, lambda moment, name: saved[moment][name], optimizer_module.updates(model, old)
    )
    assert places(new) == before
    kt.assert_same_bits(everything(new), everything(old))
    update(new, 3)
    update(old, 3)
    torch.testing.assert_close(new.flat.values, old.flat.values, rtol=3e-7, atol=3e-8)
    assert optimizer_module.updates(new.flat.model, new) == 4


# ----------------------------------------------------------------------------------------------------------- state dicts


@both
@pytest.mark.parametrize("fused", [True, False])
def test_torchs_adamw_takes_our_state_dict_and_goes_on(kind, fused):
    ours = make(kind)
    for seed in range(3):
        update(ours, seed)
    parameters, theirs = plain(ours.flat, fused=fused)
    theirs.load_state_dict(ours.state_dict())
    assert [p.shape for p in theirs.state] == [p.shape for p in ours.state]
    for p, mine in zip(theirs.state.values(), ours.state.values(), strict=True):
        assert set(p) == {"step", *MOMENTS}
        for key, x in p.items():
            assert x.dtype == FP32
            assert x.is_contiguous()
            assert torch.equal(x, mine[key])
    for seed in range(3, 6):
        update_plain(parameters, theirs, ours.flat, seed)
        update(ours, seed)
    for p, q in zip(ours.flat.model.parameters(), parameters, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=3e-8)
    assert {float(s["step"]) for s in theirs.state.values()} == {6}


@both
@pytest.mark.parametrize("capturable", [True, False])
def test_we_take_the_state_dict_of_torchs_adamw_in_place_and_go_on(kind, capturable):
    ours = make(kind)
    before = places(ours)
    parameters, theirs = plain(ours.flat, fused=capturable)
    for seed in range(3):
        update_plain(parameters, theirs, ours.flat, seed)
        update(ours, seed + 7)  # to be forgotten
    with torch.no_grad():
        for p, q in zip(ours.flat.model.parameters(), parameters, strict=True):
            p.copy_(q)
    groups = [{k: v for k, v in group.items() if k != "params"} for group in ours.param_groups]
    ours.load_state_dict(theirs.state_dict())
    assert places(ours) == before
    assert [{k: v for k, v in group.items() if k != "params"} for group in ours.param_groups] == groups
    for p, mine in zip(theirs.state.values(), ours.state.values(), strict=True):
        assert all(torch.equal(x.to(kt.DEVICE), mine[key]) for key, x in p.items())
    for seed in range(3, 6):
        update_plain(parameters, theirs, ours.flat, seed)
        update(ours, seed)
    for p, q in zip(ours.flat.model.parameters(), parameters, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=3e-8)


@both
def test_a_state_dict_is_a_copy(kind):
    optimizer = make(kind)
    update(optimizer, 0, lr=0.25)
    saved = optimizer.state_dict()
    kept = everything(optimizer)
    with torch.no_grad():
        values = optimizer.flat.values.clone()
        update(optimizer, 1, lr=0.5)
        optimizer.flat.values.copy_(values)
    assert [group["lr"] for group in saved["param_groups"]] == [0.25, 0.25]
    optimizer.load_state_dict(saved)
    kt.assert_same_bits(everything(optimizer), kept)


@both
def test_the_state_of_an_optimizer_that_made_no_update_is_none(kind):
    optimizer = make(kind)
    update(optimizer, 0)
    optimizer.load_state_dict(plain(optimizer.flat)[1].state_dict())
    assert not any(x.any() for state in optimizer.state.values() for x in state.values())


def no_moment(saved):
    del saved["state"][0]["exp_avg_sq"]


def narrower(saved):
    saved["state"][1]["exp_avg"] = saved["state"][1]["exp_avg"][:, :1]


def another_count(saved):
    saved["state"][2]["step"] += 1


def one_group(saved):
    del saved["param_groups"][1]


def amsgrad(saved):
    saved["state"][0]["max_exp_avg_sq"] = saved["state"][0]["exp_avg_sq"]


@both
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_moment, "load_state_dict: parameter 0 has state of shapes"),
        (narrower, r"load_state_dict: parameter 1 has .*\(\d+, 1\).*, wanted"),
        (amsgrad, "load_state_dict: parameter 0 has .*max_exp_avg_sq"),
        (another_count, r"load_state_dict: parameters were updated \[2\.0, 3\.0\] times"),
        (one_group, "different number of parameter groups"),
    ],
)
def test_a_state_dict_that_does_not_fit_is_refused_and_changes_nothing(kind, damage, message):
    optimizer = make(kind)
    update(optimizer, 0)
    update(optimizer, 1)
    saved = optimizer.state_dict()
    damage(saved)
    update(optimizer, 2)
    kept, before = everything(optimizer), places(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    kt.assert_same_bits(everything(optimizer), kept)
    assert places(optimizer) == before
    update(optimizer, 3)
    assert optimizer_module.updates(optimizer.flat.model, optimizer) == 4
