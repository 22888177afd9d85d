"""robustfast.compat: what code written for the published loss relies on."""

import inspect
import warnings

import pytest
import torch
from torch.nn.modules.loss import _Loss

from robustfast import DiscriminativeLoss
from robustfast.compat import PARTS, DiscriminativeLoss_forcing

PUBLISHED = ("num_classes", "dim", "delta_var", "delta_dist", "norm", "alpha", "beta", "gamma", "momentum")


def test_published_signature():
    names = list(inspect.signature(DiscriminativeLoss_forcing).parameters)
    assert tuple(names[:10]) == (*PUBLISHED, "size_average")
    assert list(inspect.signature(DiscriminativeLoss.forward).parameters)[1:] == [
        "input",
        "input_noise",
        "target",
        "fc",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss = DiscriminativeLoss_forcing(10, 128, 0.5, 5.0, 2, 1.0, 1.0, 0.001, 0.99, True)
    assert isinstance(loss, _Loss) and isinstance(loss, DiscriminativeLoss) and loss.reduction == "mean"
    assert DiscriminativeLoss_forcing(size_average=False, return_terms=True).reduction == "sum"
    assert loss(torch.randn(4, 128), None, torch.arange(4), torch.nn.Linear(128, 10)).dim() == 0


def test_published_state():
    loss = DiscriminativeLoss_forcing(4, 6)
    assert loss.init == (False,) * 4
    loss(torch.randn(3, 6), torch.randn(3, 6), torch.tensor([2, 2, 0]), torch.nn.Linear(6, 4))
    assert loss.init == (True, False, True, False)
    assert loss.mean_before.shape == (4, 6) and torch.equal(loss.mean_before, loss.centroids)
    twin = DiscriminativeLoss_forcing(4, 6)
    twin.mean_before, twin.init = loss.mean_before, list(loss.init)
    assert torch.equal(twin.centroids, loss.centroids) and torch.equal(twin.seen, loss.seen)
    with pytest.raises(TypeError):
        loss.init[1] = True  # of a list it would be lost
    assert loss.cpu() is loss  # the published code's returns None


@pytest.mark.parametrize("name", PARTS)
def test_parts_are_not_overridden_in_vain(name):
    with pytest.raises(TypeError, match=f"{name}: the loss is one op here"):
        type("Mine", (DiscriminativeLoss_forcing,), {name: lambda self, *arguments: 0})
    with pytest.raises(TypeError, match=f"{name}: the loss is one op here"):
        setattr(DiscriminativeLoss_forcing(4, 6), name, print)
