"""One optimizer step: it learns, it accumulates exactly, it skips what is not finite."""

import copy

import pytest
import torch

from tests.support import kernel_testing as kt
from tests.support.step_testing import make_trainer, micro_batches, train


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_batch_is_learnt_by_heart(dtype):
    trainer = make_trainer(dtype)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(300, (4, 33), generator=generator)  # noise: only memory helps
    batch = [(tokens[:, :-1], tokens[:, 1:], None)]
    for _ in range(150):
        loss = trainer.step(batch, 128, 5e-3).loss
    assert loss < 0.02


def gradients(trainer, batches, valid):
    """Gradients of a step, caught before the update."""
    trainer.grad_clip = 0
    with torch.no_grad():
        before = [p.clone() for p in trainer.model.parameters()]
    trainer.step(batches, valid, 0.0)
    assert all(torch.equal(p, q) for p, q in zip(trainer.model.parameters(), before, strict=True))
    return [p.grad.clone() for p in trainer.model.parameters()]


@pytest.mark.parametrize("ignored", [False, True], ids=["all count", "uneven"])
def test_any_cut_of_the_global_batch_gives_the_same_gradient(ignored):
    ((tokens, targets, _),) = micro_batches(0, count=1, rows=16)
    targets = targets.clone()
    if ignored:  # the mean of the means would weigh the first rows twice as much
        targets[:8, ::2] = -100
    valid = int((targets != -100).sum())
    cuts = [[(t, y, None) for t, y in zip(tokens.split(rows), targets.split(rows), strict=True)] for rows in (16, 4, 1)]
    whole, *parts = (gradients(make_trainer(), cut, valid) for cut in cuts)
    for part in parts:
        for a, b in zip(whole, part, strict=True):
            torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-4)


def test_the_reported_loss_is_that_of_the_whole_batch():
    trainer = make_trainer()
    batches = micro_batches(3, count=4)
    with torch.no_grad():
        wanted = torch.stack([trainer.model(t, y) for t, y, _ in batches]).mean()
    torch.testing.assert_close(trainer.step(batches, 4 * 4 * 32, 1e-3).loss, wanted)


def test_the_gradient_is_clipped_to_its_norm():
    batches = micro_batches(0)
    free, clipped = make_trainer(grad_clip=0.0), make_trainer(grad_clip=0.01)
    norm = free.step(batches, 256, 0.0).grad_norm
    assert torch.equal(clipped.step(batches, 256, 0.0).grad_norm, norm)
    total = torch.stack([p.grad.norm() for p in clipped.model.parameters()]).norm()
    torch.testing.assert_close(total.item(), 0.01, atol=0, rtol=1e-3)
    torch.testing.assert_close(norm, torch.stack([p.grad.norm() for p in free.model.parameters()]).norm())


def everything(trainer):
    state = [t for s in trainer.optimizer.state.values() for t in s.values()]
    copies = trainer.model.compute_copies().values()
    return [t.clone() for t in (*trainer.model.parameters(), *state, *copies)]


@pytest.mark.parametrize("kernels", ["none", "adamw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_step_that_is_not_finite_changes_nothing(dtype, kernels):
    trainer = make_trainer(dtype, kernels=kernels, device=kt.DEVICE)
    train(trainer, 2)
    model = trainer.model
    healthy = copy.deepcopy(model.final_norm.data)
    with torch.no_grad():
        model.final_norm[0] = torch.inf
    before = everything(trainer)
    result = trainer.step(micro_batches(5), 256, 1e-3)
    assert result.skipped == 1
    assert all(torch.equal(a, b) for a, b in zip(before, everything(trainer), strict=True))
    with torch.no_grad():
        model.final_norm.copy_(healthy)
    assert trainer.step(micro_batches(5), 256, 1e-3).skipped == 0
    assert not torch.equal(before[0], everything(trainer)[0])


def test_float16_halves_its_scale_at_an_overflow_and_doubles_it_in_time(monkeypatch):
    monkeypatch.setattr("training.step.optimizer.LossScale.GROWTH_INTERVAL", 3)
    trainer = make_trainer(torch.float16)
    scale = trainer.loss_scale.scale
    scale.fill_(2.0**40)  # overflows float16 at once
    while trainer.step(micro_batches(0), 256, 1e-3).skipped:
        pass
    settled = scale.item()
    assert settled < 2.0**40
    for _ in range(2):
        assert trainer.step(micro_batches(0), 256, 1e-3).skipped == 0
    assert scale.item() == 2 * settled


def test_other_dtypes_are_not_scaled():
    trainer = make_trainer(torch.bfloat16)
    train(trainer, 2)
    assert trainer.loss_scale.scale == 1


def test_the_scale_of_float16_does_not_show_in_loss_norm_or_update():
    small, large = make_trainer(torch.float16), make_trainer(torch.float16)
    small.loss_scale.scale.fill_(1024.0)
    large.loss_scale.scale.fill_(8192.0)
    results = [t.step(micro_batches(0), 256, 1e-3) for t in (small, large)]
    assert torch.equal(results[0].loss, results[1].loss)
    torch.testing.assert_close(results[0].grad_norm, results[1].grad_norm, atol=0, rtol=2e-3)


def test_matrices_decay_and_norms_do_not():
    trainer = make_trainer(weight_decay=0.5)
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    for group in trainer.optimizer.param_groups:
        for p in group["params"]:
            assert group["weight_decay"] == (0.5 if p.ndim == 2 else 0.0), names[id(p)]
    assert sum(len(g["params"]) for g in trainer.optimizer.param_groups) == len(names)


def test_evaluation_counts_tokens_not_batches_and_changes_nothing():
    trainer = make_trainer(dropout=0.5)
    batches = micro_batches(0, count=2)
    batches[1] = (batches[1][0], batches[1][1].clone(), None)
    batches[1][1][:, 1:] = -100
    before = everything(trainer)
    loss = trainer.evaluate(batches)
    trainer.model.eval()
    with torch.no_grad():
        sums = sum(trainer.model(t, y, reduction="sum") for t, y, _ in batches)
    assert loss == pytest.approx(sums.item() / (128 + 4), rel=1e-6)
    assert trainer.evaluate([]) == 0
    assert all(torch.equal(a, b) for a, b in zip(before, everything(trainer), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_training_repeats_to_the_bit_and_tracks_eager(dtype):
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        once, again = (train(make_trainer(dtype, compile=True), 10) for _ in range(2))
        eager = train(make_trainer(dtype), 10)
    finally:
        torch.use_deterministic_algorithms(False)
    assert once == again
    assert once == pytest.approx(eager, rel=1e-4 if dtype == torch.float32 else 1e-2)
