import pickle
from copy import deepcopy

import pytest
import torch

import kernels
from model import Llama
from model.config import LlamaConfig
from tests.support import kernel_testing as kt
from tests.support.step_testing import TINY, make_trainer, micro_batches, to_device
from training.step.flat import ALIGNMENT, FlatParameters


def make(dtype=torch.float16, **options):
    torch.manual_seed(0)
    model = Llama(LlamaConfig(**TINY | options), kernels.select("none", 2), dtype)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    return model, before, FlatParameters(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_keep_their_values_and_live_in_the_buffer(dtype, tied):
    model, before, flat = make(dtype, tie_embeddings=tied)
    assert sorted(flat.starts) == sorted(before)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.is_leaf
        assert parameter.is_contiguous()
        assert flat.starts[name] % ALIGNMENT == 0
        assert parameter.untyped_storage().data_ptr() == flat.values.untyped_storage().data_ptr()
        assert parameter.grad.untyped_storage().data_ptr() == flat.gradients.untyped_storage().data_ptr()


def test_what_decays_and_what_has_a_copy_comes_first():
    model, _, flat = make(tie_embeddings=False)
    copies = model.compute_copies()
    ranks = [0 if name in copies else 1 if model.get_parameter(name).ndim == 2 else 2 for name in flat.starts]
    assert ranks == sorted(ranks)
    assert set(ranks) == {0, 1, 2}
    vectors = [start for name, start in flat.starts.items() if model.get_parameter(name).ndim == 1]
    assert flat.n_decayed == min(vectors)
    assert len(flat.copies) == flat.starts["embedding.weight"]


@pytest.mark.parametrize("tied", [True, False])
def test_copies_are_the_first_values_rounded(tied):
    model, _, flat = make(tie_embeddings=tied)
    torch.nn.init.normal_(flat.values)
    model.refresh_compute_weights()
    assert len(model.compute_copies()) == 4 * 2 + 1
    for name, copy in model.compute_copies().items():
        assert torch.equal(copy, model.get_parameter(name).half())
        assert torch.equal(flat.view(flat.values[: len(flat.copies)].half(), name), copy)


def test_float32_has_no_copies():
    _, _, flat = make(torch.float32)
    assert flat.copies is None


def test_a_backward_pass_adds_to_the_flat_gradients_and_leaves_the_gaps_zero():
    model, _, flat = make(torch.float32, dim=36, n_heads=1, n_kv_heads=1, ffn_dim=20)
    tokens = torch.randint(300, (2, 8))
    loss = model(tokens, tokens)
    expected = torch.autograd.grad(loss, list(model.parameters()))
    for _ in range(2):
        model(tokens, tokens).backward()
    for (name, _), gradient in zip(model.named_parameters(), expected, strict=True):
        torch.testing.assert_close(flat.view(flat.gradients, name), 2 * gradient)
    filled = sum(p.numel() for p in model.parameters())
    assert filled < len(flat.gradients)
    in_place = torch.cat([flat.view(flat.gradients, name).flatten() for name in flat.starts])
    assert flat.gradients.double().square().sum() == pytest.approx(in_place.double().square().sum().item(), rel=1e-12)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "aot_eager"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_products_add_to_the_gradients_what_autograd_would(dtype, compiled):
    model, _, _ = make(dtype)
    alone = Llama(model.config, model.ops, dtype)
    alone.load_state_dict(model.state_dict())
    alone.refresh_compute_weights()
    tokens = torch.randint(300, (2, 8))
    scale = torch.tensor(0.5)  # with one the pass is a trainer's
    function = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    for _ in range(2):
        function(tokens, tokens, scale=scale).backward(scale)
        alone(tokens, tokens).backward(scale)
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [True, False])
def test_without_a_scale_autograd_gets_every_gradient_and_the_flat_ones_are_left_alone(dtype, tied):
    """After `zero_grad()`, or in `torch.autograd.grad`, what was bound is no parameter's gradient."""
    model, _, flat = make(dtype, tie_embeddings=tied)
    model.ops = kernels.select("all", 2) if dtype == torch.float32 and kt.DEVICE == "cpu" else model.ops
    alone = deepcopy(model)
    tokens = torch.randint(300, (2, 8))
    alone.zero_grad()
    alone(tokens, tokens).backward()
    found = torch.autograd.grad(model(tokens, tokens), list(model.parameters()))
    loss = model(tokens, tokens)
    model.zero_grad()
    loss.backward()
    for (name, p), q, gradient in zip(model.named_parameters(), alone.parameters(), found, strict=True):
        assert torch.equal(p.grad, q.grad), name
        assert torch.equal(gradient, q.grad), name
    assert not flat.gradients.any()


@pytest.mark.parametrize(
    "copied", [deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_what_is_bound_does_not_travel_with_a_copy_of_the_model(copied):
    model, _, flat = make(torch.bfloat16, tie_embeddings=False)
    other = copied(model)
    tokens = torch.randint(300, (2, 8))
    model(tokens, tokens).backward()
    other(tokens, tokens).backward()
    before = flat.gradients.clone()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name
    assert other.embedding.looked_up_gradient_sum is None
    for weight in other.weights().values():
        assert weight.gradient_sum is None
        if weight.compute_weight is not None:  # its own, and no larger than it is
            assert weight.compute_weight.untyped_storage().nbytes() == weight.compute_weight.nbytes
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1)
    other.refresh_compute_weights()
    assert torch.equal(flat.gradients, before)
    assert all(
        torch.equal(w.compute_weight, w.weight.bfloat16())
        for n, w in model.weights().items()
        if n in model.compute_copies()
    )


def test_the_look_up_adds_to_the_same_memory_through_a_storage_of_its_own():
    model, _, flat = make()
    total, looked_up = model.embedding.gradient_sum, model.embedding.looked_up_gradient_sum
    assert total.data_ptr() == looked_up.data_ptr() == flat.view(flat.gradients, "embedding.weight").data_ptr()
    assert total.untyped_storage()._cdata != looked_up.untyped_storage()._cdata


def test_no_shape_needs_memory():
    with torch.device("meta"):
        model = Llama(LlamaConfig(**TINY), kernels.select("none", 2), torch.bfloat16)
    flat = FlatParameters(model)
    assert flat.values.device == flat.copies.device == torch.device("meta")


# ------------------------------------------------------------------------------------------- the norms' gradients in rows


def norms(spec: str, **options) -> dict[str, torch.Tensor]:
    """The gradients of the norms' weights after two micro-steps and the passes of a trainer, by name."""
    trainer = make_trainer(spec=spec, device=kt.DEVICE, kernels=spec, **options)
    batches = to_device(micro_batches(0, rows=2))
    trainer.step(batches, 2 * 2 * 32, 0.0)
    gradients = trainer.flat.gradients.clone()
    trainer.step(batches, 2 * 2 * 32, 0.0)  # what the first step left in the rows is gone
    kt.assert_same_bits([trainer.flat.gradients], [gradients])
    return {name: p.grad for name, p in trainer.model.named_parameters() if p.ndim == 1}


@pytest.mark.parametrize("spec", ["rms_norm", "rms_norm,-rms_norm@0", "rms_norm@out"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_norms_sum_their_gradients_in_rows_where_their_kernel_is_on(spec, dtype):
    names = {f"layers.{i}.{norm}" for i in range(2) for norm in ("attention_norm", "ffn_norm")} | {"final_norm"}
    chosen = {
        "rms_norm,-rms_norm@0": names - {"layers.0.attention_norm", "layers.0.ffn_norm"},
        "rms_norm@out": {"final_norm"},
    }
    model = make_trainer(spec=spec, device=kt.DEVICE, dtype=dtype).model
    assert set(model.norms_with_rows()) == chosen.get(spec, names)
    found, wanted = norms(spec, dtype=dtype), norms("none", dtype=dtype)
    for name in names:
        assert wanted[name].any()
        assert kt.relative_rms(found[name], wanted[name].double()) < (1e-5 if dtype == torch.float32 else 5e-3), name


def test_autograd_gets_the_gradients_of_norms_in_any_pass_but_a_trainers():
    trainer = make_trainer(spec="rms_norm", device=kt.DEVICE)
    tokens, targets, _ = to_device(micro_batches(0, rows=1))[0]
    trainer.flat.clear_gradients()
    trainer.model(tokens, targets).backward()
    assert not trainer.flat.norm_rows.any()
    assert trainer.model.final_norm.grad.any()


@pytest.mark.parametrize("copied", [deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_rows_do_not_travel_with_a_copy(copied):
    model = make_trainer(spec="rms_norm", device=kt.DEVICE).model
    if copied is not deepcopy:
        model.ops = ()  # Triton's are not to be pickled
    copy = copied(model)
    assert model.final_norm_gradient_rows
    assert model.layers[1].norm_gradient_rows[1]
    assert copy.final_norm_gradient_rows == ()
    assert [layer.norm_gradient_rows for layer in copy.layers] == [((), ())] * 2
