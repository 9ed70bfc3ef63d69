"""Muon over the flat parameters, against torch's on matrices of their own; and what a trainer asks of an optimizer."""

import pytest
import torch

import kernels
from model import Llama, huggingface
from tests.support import kernel_testing as kt
from tests.support.step_testing import TINY, make_trainer, micro_batches, train
from training.config import TrainConfig
from training.step import optimizer as optimizer_module
from training.step.muon import Muon, matrices
from training.step.optimizer import AdamW, FusedAdamW, flatten, make_optimizer

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
both = pytest.mark.parametrize("spec", ["none", "adamw"])
RATE, DECAY = 1e-2, 0.1


def make(dtype=torch.float32, spec="none", tied=True, **options) -> Muon:
    options = {"kernels": spec, "optimizer": "muon", "weight_decay": DECAY, "tie_embeddings": tied} | options
    config = TrainConfig(**TINY | options)
    torch.manual_seed(0)
    model = Llama(config.shape(), kernels.select("none", config.n_layers), dtype).to(kt.DEVICE)
    return make_optimizer(flatten(model, config), config)


def fill_gradients(flat, seed):
    for i, (name, p) in enumerate(flat.model.named_parameters()):
        flat.view(flat.gradients, name).copy_(kt.tensor(*p.shape, seed=100 * seed + i))


def update(optimizer, seed, lr=RATE, factor=0.5, skip=0.0):
    fill_gradients(optimizer.flat, seed)
    optimizer.lr.fill_(lr)
    optimizer.update(*torch.tensor([factor, skip], device=kt.DEVICE))


def everything(optimizer):
    copies = [] if optimizer.flat.copies is None else [optimizer.flat.copies]
    state = [x for of in optimizer.state.values() for x in of.values()]
    return [x.flatten().clone() for x in (optimizer.flat.values, *copies, *state)]


@both
@dtypes
@pytest.mark.parametrize("tied", [True, False])
def test_it_updates_as_torchs_muon_and_adamw_do_on_separate_matrices(dtype, spec, tied):
    ours = make(dtype, spec, tied)
    model, flat = ours.flat.model, ours.flat
    mine = matrices(model)
    separate = huggingface.unpack(model.config, {name: model.get_parameter(name).detach().clone() for name in mine})
    assert len(separate) == 7 * model.config.n_layers  # q, k, v, o, gate, up, down
    separate = {name: torch.nn.Parameter(x.contiguous()) for name, x in separate.items()}
    muon = torch.optim.Muon(separate.values(), lr=RATE, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw")
    rest = {name: torch.nn.Parameter(p.detach().clone()) for name, p in model.named_parameters() if name not in mine}
    groups = [
        {"params": [p for p in rest.values() if p.ndim == 2], "weight_decay": DECAY},
        {"params": [p for p in rest.values() if p.ndim == 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95))
    for seed in range(4):
        fill_gradients(flat, seed)
        for name, x in huggingface.unpack(model.config, {n: flat.view(flat.gradients, n) for n in mine}).items():
            separate[name].grad = x * 0.5
        for name, p in rest.items():
            p.grad = flat.view(flat.gradients, name) * 0.5
        muon.step()
        adamw.step()
        update(ours, seed)
    found = huggingface.unpack(model.config, {name: model.get_parameter(name).detach() for name in mine})
    for name, theirs in separate.items():
        # Orthogonalized in bfloat16: one rounding that differs can move an element of an update by a few of its ulps.
        torch.testing.assert_close(found[name], theirs.detach(), rtol=0, atol=RATE * 0.02, msg=name)
        assert kt.relative_rms(found[name], theirs.detach().double()) < 1e-3, name
    for name, theirs in rest.items():
        torch.testing.assert_close(model.get_parameter(name).detach(), theirs.detach(), rtol=2e-6, atol=2e-8, msg=name)
    for name, copy in model.compute_copies().items():
        assert torch.equal(copy, model.get_parameter(name).to(dtype)), name


def test_an_update_is_as_large_as_adamws_and_nearly_orthogonal():
    optimizer = make(weight_decay=0.0)
    model = optimizer.flat.model
    before = {name: model.get_parameter(name).detach().clone() for name in matrices(model)}
    update(optimizer, 0)
    steps = {name: model.get_parameter(name).detach() - before[name] for name in before}
    for name, step in huggingface.unpack(model.config, steps).items():
        assert 0.1 * RATE < step.pow(2).mean().sqrt() < 0.3 * RATE, name
        singular = torch.linalg.svdvals(step) / (0.2 * max(step.shape) ** 0.5 * RATE)
        assert singular.quantile(0.05) > 0.6, name  # a square of noise has 0.05 of its largest there
        assert singular.max() < 1.3, name


@both
@dtypes
@pytest.mark.parametrize("before", [0, 2])
def test_a_skipped_update_changes_nothing(spec, dtype, before):
    optimizer = make(dtype, spec)
    for seed in range(before):
        update(optimizer, seed)
    kept = everything(optimizer)
    update(optimizer, 5, factor=torch.nan, skip=1.0)
    kt.assert_same_bits(everything(optimizer), kept)
    update(optimizer, 5)
    assert optimizer_module.updates(optimizer.flat.model, optimizer) == before + 1
    assert all(x.isfinite().all() for x in everything(optimizer))


@both
def test_adamw_keeps_what_is_not_a_matrix_of_a_layer(spec):
    optimizer = make(spec=spec, tied=False)
    assert type(optimizer.rest) is (FusedAdamW if spec == "adamw" else AdamW)
    moments = optimizer_module.moments(optimizer.flat.model, optimizer)
    assert set(moments["exp_avg"]) == {name for name, _ in optimizer.flat.model.named_parameters()}
    assert set(moments["exp_avg"]) - set(moments["exp_avg_sq"]) == set(matrices(optimizer.flat.model))


@pytest.mark.parametrize(("first", "second"), [("none", "none"), ("none", "adamw")])
def test_its_state_is_put_back_to_the_bit(first, second):
    old, new = make(spec=first), make(spec=second)
    for seed in range(3):
        update(old, seed)
        update(new, seed + 7)  # to be forgotten
    with torch.no_grad():
        new.flat.values.copy_(old.flat.values)
    model = old.flat.model
    saved = optimizer_module.moments(model, old)
    optimizer_module.restore(
        new.flat.model, new, lambda moment, name: saved[moment][name], optimizer_module.updates(model, old)
    )
    kt.assert_same_bits(everything(new), everything(old))
    update(new, 3)
    update(old, 3)
    torch.testing.assert_close(new.flat.values, old.flat.values, rtol=3e-7, atol=3e-8)


def test_a_step_is_the_same_however_the_batch_is_cut():
    whole, cut = (make_trainer(optimizer="muon") for _ in range(2))
    batches = micro_batches(0, count=2)
    valid = sum(int((targets != -100).sum()) for _, targets, _ in batches)
    joined = tuple(torch.cat(parts) for parts in list(zip(*batches, strict=True))[:2])
    for trainer, given in ((whole, [(*joined, None)]), (cut, batches)):
        trainer.step(given, valid, 1e-2)
    torch.testing.assert_close(whole.flat.values, cut.flat.values, rtol=0, atol=2e-4)


def test_it_learns():
    losses = train(make_trainer(optimizer="muon"), 30, lr=3e-3)
    assert losses[0] > 5.5
    assert losses[-1] < 3.5
