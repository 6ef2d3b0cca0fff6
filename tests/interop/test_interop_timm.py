"""timm's normalizer-free nets without timm: names, γ in convolutions, files, errors."""

import json
import re
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from normlab.config import load_config
from normlab.errors import UserError
from normlab.interop import safetensors, timm

COMMON = {"model.gain": "released", "conv.epsilon": 1e-5, "conv.epsilon_form": "added"}
RESNET = {
    **COMMON,
    "model.width": 4,
    "model.padding": "symmetric",
    "model.downsample": "pool",
    "model.skip_gain": None,
}
NFNET = {
    **COMMON,
    "model.activation": "gelu_erf",
    "model.widths": (16, 16, 16, 16),
    "model.group_width": 4,
}
GAMMA = 1.7139588594436646  # of relu, as released


def config_of(model, **fields):
    base = RESNET if model.startswith("nf_resnet") else NFNET
    named = {name.replace("__", "."): value for name, value in fields.items()}
    return load_config(f"configs/cifar10.py:model={model}", base | named)


class State(dict):
    """A state in the making, of random numbers."""

    def __init__(self):
        self.rng = np.random.default_rng(0)

    def conv(self, name, size, inputs, outputs):
        for entry, shape in (
            ("weight", (outputs, inputs, size, size)),
            ("bias", (outputs,)),
            ("gain", (outputs, 1, 1, 1)),
        ):
            self[f"{name}.{entry}"] = self.rng.normal(size=shape).astype("f4")

    def plain(self, name, *shape):
        self[f"{name}.weight"] = self.rng.normal(size=shape).astype("f4")
        self[f"{name}.bias"] = self.rng.normal(size=shape[:1]).astype("f4")


def nf_resnet26(width=4, classes=10, channels=3, blocks=2):
    """The state of timm's nf_resnet26, as wide as asked for, with as many blocks in each stage."""
    state, inputs = State(), width
    state.conv("stem.conv", 7, channels, width)
    for stage in range(4):
        inner = width * 2**stage
        for block in range(blocks):
            name = f"stages.{stage}.{block}"
            if block == 0:
                state.conv(f"{name}.downsample.conv", 1, inputs, 4 * inner)
            state.conv(f"{name}.conv1", 1, inputs, inner)
            state.conv(f"{name}.conv2", 3, inner, inner)
            state.conv(f"{name}.conv3", 1, inner, 4 * inner)
            inputs = 4 * inner
    state.plain("head.fc", classes, inputs)
    return state


def dm_nfnet_f0(width=16, group=4, classes=10):
    """The state of timm's dm_nfnet_f0, every stage as wide."""
    state, inputs = State(), width // 2
    stem = (3, 16, 32, 64, width // 2)
    for number in range(4):
        state.conv(f"stem.conv{number + 1}", 3, stem[number], stem[number + 1])
    for stage, blocks in enumerate((1, 2, 6, 3)):
        for block in range(blocks):
            name, inner = f"stages.{stage}.{block}", width // 2
            state[f"{name}.skipinit_gain"] = np.float32(state.rng.normal())
            if block == 0:
                state.conv(f"{name}.downsample.conv", 1, inputs, width)
            state.conv(f"{name}.conv1", 1, inputs, inner)
            state.conv(f"{name}.conv2", 3, group, inner)
            state.conv(f"{name}.conv2b", 3, group, inner)
            state.conv(f"{name}.conv3", 1, inner, width)
            state.plain(f"{name}.attn_last.fc1", inner, width, 1, 1)
            state.plain(f"{name}.attn_last.fc2", width, inner, 1, 1)
            inputs = width
    state.conv("final_conv", 1, inputs, 2 * inputs)
    state.plain("head.fc", classes, 2 * inputs)
    return state


def test_gamma_of_convolutions_goes_into_the_stem_and_out_of_the_head():
    state = nf_resnet26()
    params = timm.variables(state, config_of("nf_resnet26"))["params"]
    gain = state["stem.conv.gain"].reshape(-1)
    np.testing.assert_allclose(params["conv_stem"]["gain"], GAMMA * gain, rtol=1e-6)
    weight = state["head.fc.weight"].T
    np.testing.assert_allclose(params["head"]["kernel"], weight / GAMMA, rtol=1e-6)
    np.testing.assert_array_equal(params["head"]["bias"], state["head.fc.bias"])
    inside = params["stage2_block1"]["conv2"]
    np.testing.assert_array_equal(inside["gain"], state["stages.1.0.conv2.gain"].reshape(-1))
    kernel = state["stages.1.0.conv2.weight"]
    assert inside["kernel"][0, 2, 1, 3] == kernel[3, 1, 0, 2]


def test_an_nfnets_numbers_are_taken_as_they_are():
    state = dm_nfnet_f0()
    params = timm.variables(state, config_of("nfnet_f0"))["params"]
    np.testing.assert_array_equal(
        params["conv_stem1"]["gain"], state["stem.conv1.gain"].reshape(-1)
    )
    np.testing.assert_array_equal(params["head"]["kernel"], state["head.fc.weight"].T)
    block = params["stage3_block6"]
    assert block["skip_gain"] == state["stages.2.5.skipinit_gain"]
    np.testing.assert_array_equal(block["conv3"]["bias"], state["stages.2.5.conv2b.bias"])
    np.testing.assert_array_equal(block["conv4"]["bias"], state["stages.2.5.conv3.bias"])
    squeeze = state["stages.2.5.attn_last.fc1.weight"][:, :, 0, 0]
    np.testing.assert_array_equal(block["squeeze_excite"]["squeeze"]["kernel"], squeeze.T)


def refusal(call, *arguments):
    with pytest.raises(UserError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"model__gain": "exact"}, r"'model.gain' = 'exact' .*nf_resnet26: 'released'"),
        ({"conv__epsilon_form": "floor"}, r"'conv.epsilon_form' = 'floor' .*'added'"),
        ({"model__padding": "same"}, r"'model.padding' = 'same' .*'symmetric'"),
        ({"model__downsample": "conv"}, r"'model.downsample' = 'conv' .*'pool'"),
        ({"model__skip_gain": 0.0}, r"'model.skip_gain' = 0.0 .*None"),
    ],
)
def test_a_config_that_is_another_network_is_refused(fields, expected):
    said = refusal(timm.variables, nf_resnet26(), config_of("nf_resnet26", **fields))
    assert re.search(expected, said)


def test_a_state_of_another_depth_is_refused():
    said = refusal(timm.variables, nf_resnet26(), config_of("nf_resnet50"))
    assert "(2, 2, 2, 2) blocks" in said
    assert "'nf_resnet50'" in said


def test_a_model_that_is_not_converted_is_refused():
    config = load_config("configs/cifar10.py:model=resnet20")
    assert "unknown model of timm: 'resnet20'" in refusal(timm.variables, nf_resnet26(), config)


def test_a_state_that_does_not_fit_is_refused():
    state, config = nf_resnet26(), config_of("nf_resnet26")
    lacking = {name: value for name, value in state.items() if name != "stem.conv.gain"}
    assert "lacks 'stem.conv.gain'" in refusal(timm.variables, lacking, config)
    more = {**state, "stem.norm.weight": np.zeros(4)}
    assert "unknown entry" in refusal(timm.variables, more, config)
    other = {**state, "head.fc.weight": np.zeros((9, 128))}
    said = refusal(timm.variables, other, config)
    assert "'head.fc.weight' has shape (9, 128), not (10, 128)" in said


def packed(state, **metadata):
    """The bytes of a safetensors file, by its definition."""
    header, data = {"__metadata__": metadata}, b""
    for name, value in state.items():
        raw = np.ascontiguousarray(value).tobytes()
        kind = {"f2": "F16", "f4": "F32", "f8": "F64", "i8": "I64"}[np.asarray(value).dtype.str[1:]]
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": kind, "shape": list(np.shape(value)), "data_offsets": offsets}
        data += raw
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def test_a_safetensors_file_is_read(tmp_path):
    path = tmp_path / "model.safetensors"
    state = nf_resnet26()
    path.write_bytes(packed(state, format="pt"))
    found = safetensors.read(path)
    assert found.keys() == state.keys()
    for name, value in state.items():
        np.testing.assert_array_equal(found[name], value)
    config = config_of("nf_resnet26")
    loaded, given = timm.load(path, config), timm.variables(state, config)
    jax.tree.map(np.testing.assert_array_equal, loaded, given)


def described(more=None, **fields):
    """A file of 16 bytes with one tensor, `w`, and perhaps a second one: where that stands."""
    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} | fields
    header = {"w": entry}
    if more:
        header["v"] = entry | {"data_offsets": more, "shape": [(more[1] - more[0]) // 4]}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(16)


def test_tensors_may_stand_in_another_order_than_their_names(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(described(data_offsets=[8, 16], shape=[2], more=[0, 8]))
    assert {name: value.shape for name, value in safetensors.read(path).items()} == {
        "w": (2,),
        "v": (2,),
    }


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "header is cut off"),
        (b"\xff" * 8 + b"{}", "header is cut off"),
        (packed({"w": np.zeros(9, "f4")})[:-1], "'w' lies outside of the file"),
        (packed({"w": np.zeros(9, "i8")}), "unknown kind of numbers of 'w': 'I64'"),
        (described(shape=[-1]), "'w' has shape [-1], not a list of sizes"),
        (described(shape=4), "'w' has shape 4, not a list of sizes"),
        (described(shape=None), "'w' has shape null, not a list of sizes"),
        (described(shape=[2.0, 2]), "'w' has shape [2.0, 2], not a list of sizes"),
        (described(shape=[True, 4]), "'w' has shape [true, 4], not a list of sizes"),
        (described(shape=[2**70]), "is no safetensors file"),
        (described(dtype="\x1b[2J"), r"unknown kind of numbers of 'w': '\x1b[2J'"),
        (described(data_offsets=[0, 16], shape=[4], more=[0, 16]), "its tensors overlap"),
        (described(data_offsets=[0, 8], shape=[2], more=[4, 16]), "its tensors overlap"),
        (described(data_offsets=[0, 4], shape=[1], more=[8, 16]), "its tensors leave a gap"),
        (described(data_offsets=[4, 16], shape=[3]), "its tensors leave a gap"),
        (described(data_offsets=[0, 12], shape=[3]), "its tensors leave a gap"),
        (b"\x02" + b"\0" * 7 + b"[]", "is no safetensors file"),
        (b"\x08" + b"\0" * 7 + b'{"w": 1}', "is no safetensors file"),
        (b"\x04" + b"\0" * 7 + b"\xff\xff\xff\xff", "is no safetensors file"),
    ],
)
def test_a_damaged_safetensors_file_is_refused(tmp_path, content, expected):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert expected in refusal(safetensors.read, path)


def test_without_pytorch_its_files_are_refused_and_safetensors_read(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # an import of it fails
    said = refusal(timm.read, tmp_path / "model.pth")
    assert "needs PyTorch, which is not installed" in said
    path = tmp_path / "model.safetensors"
    path.write_bytes(packed({"w": np.ones(2, "f4")}))
    assert timm.read(path).keys() == {"w"}


@pytest.mark.parametrize("version", ["2.5.1+cu121", "1.13.1", "2.0"])
def test_an_old_pytorch_which_would_execute_the_file_is_not_asked(tmp_path, monkeypatch, version):
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(__version__=version))
    said = refusal(timm.read, tmp_path / "model.pth")
    assert f"needs PyTorch 2.6, and {version} is installed" in said


@pytest.mark.parametrize("version", ["2.6.0", "2.13.0+cpu", "3.0"])
def test_a_later_pytorch_is_told_to_execute_nothing(tmp_path, monkeypatch, version):
    asked = []

    def load(path, **options):
        asked.append(options["weights_only"])
        return {}

    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(__version__=version, load=load))
    assert timm.read(tmp_path / "model.pth") == {}
    assert asked == [True]


@pytest.mark.parametrize("name", [1, ("a", "b"), None, b"stem"])
def test_a_key_that_is_no_name_is_refused(name):
    said = refusal(timm.variables, {name: np.zeros(3)}, config_of("nf_resnet26"))
    assert said == f"the state has a key of type {type(name).__name__}, not a name"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
def test_weights_that_are_not_finite_are_refused(value):
    state = nf_resnet26()
    wrong = state["stages.1.0.conv2.weight"].astype("f8")  # 1e300 is finite, and no float32
    wrong[3, 1, 0, 2] = value
    state["stages.1.0.conv2.weight"] = wrong
    said = refusal(timm.variables, state, config_of("nf_resnet26"))
    assert said == "timm's nf_resnet26: 'stages.1.0.conv2.weight' is not finite"


def test_a_long_name_is_cut(tmp_path):
    path = tmp_path / "model.safetensors"
    long = "stem." + 1_000_000 * "x"
    path.write_bytes(packed({**nf_resnet26(), long: np.zeros(3, "f4")}))
    said = refusal(timm.load, path, config_of("nf_resnet26"))
    assert "unknown entry of timm's nf_resnet26: 'stem.xxx" in said
    assert len(said) < 300
    path.write_bytes(packed({long: np.zeros(3, "i8")}))
    assert len(refusal(safetensors.read, path)) < 300


def test_a_file_that_is_not_there_is_refused(tmp_path):
    absent = tmp_path / "model.safetensors"
    assert "cannot be read: No such file" in refusal(timm.load, absent, config_of("nf_resnet26"))
