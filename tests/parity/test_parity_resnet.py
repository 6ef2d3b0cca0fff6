"""torchvision's ResNets with their weights in ours: the same logits, and the same weights back."""

import sys
import types

import agreement
import jax
import numpy as np
import pytest
from flax.core import FrozenDict

torch = pytest.importorskip("torch", reason="parity: PyTorch is not installed")
# torchvision's wheel has compiled operators (boxes and the like) for one build of torch. A ResNet
# needs none of them; beside another build only their registration fails, so it is left out.
sys.modules.setdefault(
    "torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations")
)
torchvision = pytest.importorskip("torchvision", reason="parity: torchvision is not installed")

from normlab.interop import pytorch  # noqa: E402
from normlab.models import MODELS  # noqa: E402
from normlab.models.conv import StandardConv  # noqa: E402
from normlab.norms import BatchNorm, GroupNorm, NormFactory  # noqa: E402

pytestmark = pytest.mark.parity


def ours_and_theirs(name, num_classes=7):
    """Our model, and torchvision's with a state that is nowhere as it was initialized."""
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, name)(num_classes=num_classes)
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor, low in (
                (module.weight.data, 0.5),
                (module.bias.data, -0.3),
                (module.running_mean, -0.3),
                (module.running_var, 0.7),
            ):
                tensor.uniform_(low, low + 0.6)
    fields = pytorch.norm_fields("batch_norm", {})
    norm = NormFactory(BatchNorm, FrozenDict(fields))
    return MODELS[name](num_classes=num_classes, norm=norm, conv=StandardConv()), theirs


def numpy_state(module):
    return {name: value.numpy() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_logits_agree_in_evaluation_and_training_and_so_do_states(name):
    model, theirs = ours_and_theirs(name)
    x = np.random.default_rng(0).normal(size=(4, 64, 64, 3)).astype("f4")
    images = torch.tensor(np.moveaxis(x, -1, 1))
    variables = pytorch.resnet_variables(theirs.state_dict(), model)
    agreement.assert_same(pytorch.resnet_state(variables, model), numpy_state(theirs))

    with torch.no_grad():
        expected = theirs.eval()(images).numpy()
        trained = theirs.train()(images).numpy()
    found = jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, x)
    _assert_close(found, expected)
    step = jax.jit(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]))
    found, updated = step(variables, x)
    _assert_close(found, trained)
    for key, value in pytorch.resnet_state({**variables, **updated}, model).items():
        if "num_batches_tracked" not in key:
            _assert_close(value, theirs.state_dict()[key].numpy())


def test_gradients_of_all_parameters_agree():
    """In float64: in float32 a relu's input near 0 falls now on this side, now on that."""
    model, theirs = ours_and_theirs("resnet18")
    rng = np.random.default_rng(1)
    x, weight = rng.normal(size=(4, 64, 64, 3)), rng.normal(size=(4, 7))
    logits = theirs.double().train()(torch.tensor(np.moveaxis(x, -1, 1)))
    (logits * torch.tensor(weight)).sum().backward()
    with jax.enable_x64(True):
        model = model.clone(dtype="float64")
        variables = pytorch.resnet_variables(theirs.state_dict(), model)

        def loss(params):
            together = {**variables, "params": params}
            logits, _ = model.apply(together, x, train=True, mutable=["batch_stats"])
            return (logits * weight).sum()

        gradients = {**variables, "params": jax.jit(jax.grad(loss))(variables["params"])}
        found = pytorch.resnet_state(gradients, model)
    for name, parameter in theirs.named_parameters():
        _assert_close(found[name], parameter.grad.numpy(), atol=1e-5)


def _assert_close(found, expected, atol=1e-4):
    """To 1e-4 of the largest value: float32 sums of thousands of terms in another order."""
    scale = np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(found) / scale, expected / scale, atol=atol)


@pytest.mark.parametrize("name", ["resnet34", "resnet101", "resnet152"])
def test_every_entry_of_the_deeper_ones_has_its_place(name):
    with torch.device("meta"):
        theirs = getattr(torchvision.models, name)()
    norm = NormFactory(BatchNorm, FrozenDict())
    model = MODELS[name](num_classes=1000, norm=norm, conv=StandardConv())
    state = {key: np.zeros(value.shape, "f4") for key, value in theirs.state_dict().items()}
    back = pytorch.resnet_state(pytorch.resnet_variables(state, model), model)
    assert {key: value.shape for key, value in back.items()} == {
        key: value.shape for key, value in state.items()
    }


def test_one_with_another_normalizer_agrees():
    """torchvision's `norm_layer`: here group norm, which has no running statistics."""
    theirs = torchvision.models.resnet18(
        num_classes=7, norm_layer=lambda channels: torch.nn.GroupNorm(8, channels)
    )
    norm = NormFactory(GroupNorm, FrozenDict({"num_groups": 8}))
    model = MODELS["resnet18"](num_classes=7, norm=norm, conv=StandardConv())
    x = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype("f4")
    variables = pytorch.resnet_variables(theirs.state_dict(), model)
    found = jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, x)
    with torch.no_grad():
        _assert_close(found, theirs(torch.tensor(np.moveaxis(x, -1, 1))).numpy())
    agreement.assert_same(pytorch.resnet_state(variables, model), numpy_state(theirs))
