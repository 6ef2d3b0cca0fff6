"""timm's normalizer-free nets with their weights in ours: the same logits."""

import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="parity: PyTorch is not installed")
# As in test_parity_resnet.py: no operator of torchvision is needed here.
sys.modules.setdefault(
    "torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations")
)
theirs = pytest.importorskip("timm", reason="parity: timm is not installed")

from normlab.config import load_config  # noqa: E402
from normlab.errors import UserError  # noqa: E402
from normlab.interop import timm  # noqa: E402
from normlab.models import build  # noqa: E402

pytestmark = pytest.mark.parity

COMMON = {"model.gain": "released", "conv.epsilon": 1e-5, "conv.epsilon_form": "added"}
NFNET = {**COMMON, "model.activation": "gelu_erf"}
RESNET = {
    **COMMON,
    "model.padding": "symmetric",
    "model.downsample": "pool",
    "model.skip_gain": "none",
}


def their_net(name, **fields):
    """timm's net with a state that is nowhere as it was initialized, gains of branches included."""
    torch.manual_seed(0)
    net = theirs.create_model(name, pretrained=False, **fields).eval()
    with torch.no_grad():
        for key, value in net.named_parameters():
            if key.endswith("gain"):
                value.uniform_(0.5, 1.5)
            elif key.endswith("bias"):
                value.uniform_(-0.3, 0.3)
    return net


def logits_of(config, variables, images):
    model = build(config)
    return np.asarray(jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, images))


def both(name, kind, fields, side):
    net = their_net(name, num_classes=10)
    images = np.random.default_rng(0).normal(size=(2, side, side, 3)).astype("f4")
    with torch.no_grad():
        expected = net(torch.tensor(np.moveaxis(images, -1, 1))).numpy()
    config = load_config(f"configs/cifar10.py:model={kind}", fields)
    variables = timm.variables(net.state_dict(), config)
    return logits_of(config, variables, images), expected


def distance(found, expected):
    """The largest difference, over the largest value."""
    return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize(
    ("name", "kind", "fields", "side"),
    [
        ("dm_nfnet_f0", "nfnet_f0", NFNET, 64),
        ("dm_nfnet_f0", "nfnet_f0", NFNET, 75),  # odd sizes are padded elsewhere
        ("nf_resnet26", "nf_resnet26", RESNET, 64),
        ("nf_resnet26", "nf_resnet26", RESNET, 75),
        ("nf_resnet50", "nf_resnet50", RESNET, 64),
    ],
)
def test_logits_agree(name, kind, fields, side):
    found, expected = both(name, kind, fields, side)
    assert np.abs(expected).max() > 0.05
    assert distance(found, expected) < 1e-4


def test_the_two_forms_of_gelu_are_not_the_same_net():
    found, expected = both("dm_nfnet_f0", "nfnet_f0", {**NFNET, "model.activation": "gelu"}, 64)
    assert distance(found, expected) == pytest.approx(4e-4, rel=0.5)


class Call:
    """Pickled as a call of `function`."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def test_a_file_by_torch_is_read_and_a_hostile_one_is_refused(tmp_path):
    path, trace = tmp_path / "model.pth", tmp_path / "trace"
    state = {"w": torch.arange(6.0).reshape(2, 3), "half": torch.ones(2, dtype=torch.bfloat16)}
    torch.save(state, path)
    found = timm.read(path)
    np.testing.assert_array_equal(found["w"], state["w"].numpy())
    assert found["half"].dtype == np.float32
    for content in ({"w": Call(Path.touch, trace)}, {"epoch": 3}):
        torch.save(content, path)
        with pytest.raises(UserError, match="is no state of a PyTorch model") as error:
            timm.read(path)
        assert "\n" not in str(error.value)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("name", "kind", "fields"),
    [(f"dm_nfnet_f{k}", f"nfnet_f{k}", NFNET) for k in range(1, 7)]
    + [("nf_resnet101", "nf_resnet101", RESNET)],
)
def test_every_entry_of_the_deeper_ones_has_its_place(name, kind, fields):
    with torch.device("meta"):
        net = theirs.create_model(name, pretrained=False, num_classes=10)
    # An array of one number, whatever its shape: F6 is 1.7 GB.
    state = {
        key: np.broadcast_to(np.float32(0), tuple(value.shape))
        for key, value in net.state_dict().items()
    }
    config = load_config(f"configs/cifar10.py:model={kind}", fields)
    found = timm.variables(state, config)
    count = sum(value.size for value in jax.tree.leaves(found))
    assert count == sum(value.numel() for value in net.state_dict().values())
