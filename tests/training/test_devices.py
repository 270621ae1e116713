"""A training step on each device, against the same step in plain torch on the CPU."""

from __future__ import annotations

import pytest
import torch
from transformers import TrainerCallback

from dynabert_fast import ops
from dynabert_fast.training import TrainingOptions


@pytest.fixture(scope="module", autouse=True)
def _on_the_cpu():
    """Not here: each test says where."""


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    return request.param


class _Gradients(TrainerCallback):
    def __init__(self):
        self.found = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found = {
            name: p.grad.detach().double().cpu()
            for name, p in model.named_parameters()
            if p.grad is not None
        }


def one_step(make_trainer, device, stage, precision):
    """Loss and gradients of the one step of a training."""
    with pytest.MonkeyPatch.context() as patch:
        if device == "cpu":
            patch.setattr(torch.cuda, "is_available", lambda: False)
        options = TrainingOptions(batch_size=6, epochs=1, max_grad_norm=0.0, precision=precision)
        trainer, gradients = make_trainer(stage, options, train=6), _Gradients()
        trainer.add_callback(gradients)
        result = trainer.train()
        assert trainer.state.global_step == 1
        assert {p.device.type for p in trainer.model.parameters()} == {device}
    return result.training_loss, gradients.found


@pytest.mark.parametrize("stage", ["finetune", "width", "depth"])
def test_a_step_is_that_of_plain_torch_on_the_cpu(make_trainer, device, stage):
    with ops.use_backend("reference"):
        want, truth = one_step(make_trainer, "cpu", stage, "fp32")
    got, gradients = one_step(make_trainer, device, stage, "fp32")
    assert got == pytest.approx(want, rel=1e-4)
    assert gradients.keys() == truth.keys()
    for name, gradient in gradients.items():
        error = (gradient - truth[name]).abs().max()
        assert error <= 1e-4 * truth[name].abs().max() + 1e-7, name


def test_a_step_in_bf16_is_near_that_in_fp32(make_trainer, device):
    found = []
    for place, precision in (("cpu", "fp32"), (device, "bf16")):
        _, gradients = one_step(make_trainer, place, "depth", precision)
        found.append(torch.cat([g.flatten() for g in gradients.values()]))
    assert not torch.equal(*found)
    assert torch.nn.functional.cosine_similarity(*found, dim=0) > 0.95
