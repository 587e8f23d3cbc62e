"""Errors of sharded runs; test_resume_ranks.py compares them with one process."""

import copy

import pytest
import torch

from support.compare import bit_equal
from support.tiny import tiny_module
from tf_lightning.errors import UserError
from tf_lightning.training.fsdp import check_numbers, number_states_by_module
from tf_lightning.training.optim import build_optimizer


def test_states_are_numbered_by_the_module_and_load_into_a_plain_optimizer():
    module = tiny_module()
    first, second = (build(module) for _ in range(2))
    parameters = list(module.parameters())
    for place, parameter in enumerate(module.net.parameters()):
        parameter.grad = torch.full_like(parameter, place + 1.0)
    first.step()
    state = copy.deepcopy(first.state_dict())
    with pytest.raises(UserError, match="resume it with the strategy auto or ddp until"):
        check_numbers({"optimizer_states": [state]})
    number_states_by_module(state, first, module)
    check_numbers({"optimizer_states": [state]})
    for place, values in state["state"].items():
        expected = 0.1 * parameters[place].grad
        torch.testing.assert_close(values["exp_avg"], expected)
    second.load_state_dict(state)
    assert bit_equal(second.state_dict(), first.state_dict())


def build(module) -> torch.optim.Optimizer:
    how = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1, "text_lr_ratio": 0.5}
    return build_optimizer(module.net, **how, muon=False, bf16=False)
