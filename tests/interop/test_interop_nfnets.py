"""DeepMind's published NFNets: which name stands where, and what a file may not be."""

import pickle
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from normlab.config import load_config
from normlab.errors import UserError
from normlab.interop import deepmind_nfnets
from normlab.models import build

NARROW = {
    "model.gain": "released",
    "model.widths": (16, 16, 16, 16),
    "model.group_width": 4,
}


def config_of(model="nfnet_f0", **fields):
    named = {name.replace("__", "."): value for name, value in fields.items()}
    return load_config(f"configs/cifar10.py:model={model}", NARROW | named)


def published(depths=(1, 2, 6, 3), width=16, group=4, classes=10, seed=0):
    """A tree with the names of the official code and random numbers, every stage as wide.

    The names of its modules, by hand: those made in a constructor stand behind `/~/`, and the
    second of a name is called `_1`.
    """
    rng = np.random.default_rng(seed)
    tree = {}

    def conv(name, size, inputs, outputs):
        tree[name] = {
            "w": rng.normal(size=(size, size, inputs, outputs)).astype("f4"),
            "gain": rng.uniform(0.5, 1.5, outputs).astype("f4"),
            "bias": rng.normal(size=outputs).astype("f4"),
        }

    def linear(name, inputs, outputs):
        tree[name] = {
            "w": rng.normal(size=(inputs, outputs)).astype("f4"),
            "b": rng.normal(size=outputs).astype("f4"),
        }

    stem = (3, 16, 32, 64, width // 2)
    for number in range(4):
        conv(f"NFNet/~/stem_conv{number}", 3, stem[number], stem[number + 1])
    for block in range(sum(depths)):
        name = f"NFNet/~/nf_block_{block}" if block else "NFNet/~/nf_block"
        tree[name] = {"skip_gain": np.float32(rng.uniform(0.5, 1.5)).reshape(())}
        inputs, inner = width if block else width // 2, width // 2
        conv(f"{name}/~/conv0", 1, inputs, inner)
        conv(f"{name}/~/conv1", 3, group, inner)
        conv(f"{name}/~/conv1b", 3, group, inner)
        conv(f"{name}/~/conv2", 1, inner, width)
        if block in np.cumsum((0, *depths[:3])):
            conv(f"{name}/~/conv_shortcut", 1, inputs, width)
        linear(f"{name}/~/squeeze_excite/~/linear", width, width // 2)
        linear(f"{name}/~/squeeze_excite/~/linear_1", width // 2, width)
    conv("NFNet/~/final_conv", 1, width, 2 * width)
    linear("NFNet/~/linear", 2 * width, classes)
    return tree


def written(tree, folder, name="F0_haiku.npz"):
    path = folder / name
    path.write_bytes(pickle.dumps(tree))
    return path


def test_every_number_of_a_file_has_its_place_in_the_model(tmp_path):
    tree = published()
    variables = deepmind_nfnets.load(written(tree, tmp_path), config_of())
    count = sum(value.size for part in tree.values() for value in part.values())
    assert sum(value.size for value in jax.tree.leaves(variables)) == count
    params = variables["params"]
    for ours, theirs in (
        (params["conv_stem1"]["kernel"], tree["NFNet/~/stem_conv0"]["w"]),
        (params["stage1_block1"]["skip_gain"], tree["NFNet/~/nf_block"]["skip_gain"]),
        (params["stage2_block1"]["conv3"]["gain"], tree["NFNet/~/nf_block_1/~/conv1b"]["gain"]),
        (params["stage3_block6"]["conv4"]["bias"], tree["NFNet/~/nf_block_8/~/conv2"]["bias"]),
        (
            params["stage4_block1"]["squeeze_excite"]["excite"]["kernel"],
            tree["NFNet/~/nf_block_9/~/squeeze_excite/~/linear_1"]["w"],
        ),
        (params["head"]["bias"], tree["NFNet/~/linear"]["b"]),
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_what_was_read_has_the_shapes_of_the_models_variables(tmp_path):
    config = config_of()
    variables = deepmind_nfnets.load(written(published(), tmp_path), config)
    x = jax.ShapeDtypeStruct((2, 32, 32, 3), "float32")
    init = build(config).init
    fresh = jax.eval_shape(lambda x: init(jax.random.key(0), x, train=False), x)
    found = {path: (value.shape, value.dtype) for path, value in flatten_dict(variables).items()}
    assert found == {path: (leaf.shape, leaf.dtype) for path, leaf in flatten_dict(fresh).items()}


def test_modules_are_as_many_as_in_the_published_files():
    # Stem 4; 12 blocks of 1 + 4 convolutions + 2 linear layers; 4 shortcuts; final convolution and
    # head: 94 (as others count F0's). A further variant has 12 blocks more: 84.
    assert len(published()) == 94
    assert len(published((2, 4, 12, 6))) == 178


def refusal(call, *arguments):
    with pytest.raises(UserError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_file_of_another_variant_is_named_with_the_models(tmp_path):
    path = written(published((2, 4, 12, 6)), tmp_path)
    said = refusal(deepmind_nfnets.load, path, config_of())
    assert "'nfnet_f1'" in said
    assert "'nfnet_f0'" in said
    assert deepmind_nfnets.load(path, config_of("nfnet_f1"))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"model__gain": "exact"}, r"'model.gain' = 'exact' .*'released'"),
        ({"conv__epsilon_form": "added"}, r"'conv.epsilon_form' = 'added' .*'floor'"),
        ({"conv__epsilon": 1e-5}, r"'conv.epsilon' = 1e-05 .*0.0001"),
        ({"model__activation": "relu"}, r"'model.activation' = 'relu' .*'gelu'"),
        ({"model__padding": "symmetric"}, r"'model.padding' = 'symmetric' .*'same'"),
        ({"model__second_conv": False}, r"'model.second_conv' = False .*True"),
    ],
)
def test_a_config_that_is_another_network_is_refused(tmp_path, fields, expected):
    path = written(published(), tmp_path)
    assert re.search(expected, refusal(deepmind_nfnets.load, path, config_of(**fields)))


def test_a_model_that_was_not_published_is_refused(tmp_path):
    path = written(published(), tmp_path)
    config = load_config("configs/cifar10.py:model=nf_resnet20")
    assert "'nf_resnet20'" in refusal(deepmind_nfnets.load, path, config)


def without(tree, module, name=None):
    changed = {key: dict(part) for key, part in tree.items()}
    if name is None:
        del changed[module]
    else:
        del changed[module][name]
    return changed


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: without(t, "NFNet/~/final_conv", "gain"), "lacks 'NFNet/~/final_conv gain'"),
        (lambda t: {**t, "NFNet/~/bn": {"w": np.zeros(3, "f4")}}, "unknown entry.*NFNet/~/bn w"),
        (
            lambda t: {**t, "NFNet/~/linear": {**t["NFNet/~/linear"], "b": np.zeros(9, "f4")}},
            r"'NFNet/~/linear b' has shape \(9,\), not \(10,\)",
        ),
        (lambda t: {"NFNet/~/linear": {"w": "text"}}, "'w' of 'NFNet/~/linear' is no array"),
        (lambda t: {"NFNet/~/linear": 1.0}, "'NFNet/~/linear' is no module"),
        (lambda t: {"other": {"w": np.zeros(3, "f4")}}, "unknown entry"),
    ],
)
def test_a_tree_that_does_not_fit_is_refused(tmp_path, change, expected):
    path = written(change(published()), tmp_path)
    assert re.search(expected, refusal(deepmind_nfnets.load, path, config_of()))


class Call:
    """Pickled as a call of `function`."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def test_a_file_that_would_execute_code_is_refused_and_does_not(tmp_path):
    trace = tmp_path / "trace"
    hostile = {"NFNet/~/linear": {"w": Call(Path.touch, trace)}}
    path = written(hostile, tmp_path)
    pickle.loads(path.read_bytes())
    assert trace.exists()  # so it is a program that works
    trace.unlink()
    said = refusal(deepmind_nfnets.load, path, config_of())
    assert "is no pickle of arrays: it wants " in said
    assert not trace.exists()


def test_dills_way_to_name_a_function_leads_to_no_other_one(tmp_path):
    """`_get_attr(_import_module("os"), "getcwd")()`, as dill would write it."""
    content = b"\x80\x03cdill._dill\n_get_attr\ncdill._dill\n_import_module\nX\x02\0\0\0os\x85R"
    content += b"X\x06\0\0\0getcwd\x86R)R."
    path = tmp_path / "F0_haiku.npz"
    path.write_bytes(content)
    assert "it wants os.getcwd" in refusal(deepmind_nfnets.load, path, config_of())


def test_a_key_nested_too_deep_to_be_printed_is_one_line(tmp_path):
    path = tmp_path / "F0_haiku.npz"
    path.write_bytes(b"\x80\x02})" + 5000 * b"\x85" + b"K\x01s.")
    said = refusal(deepmind_nfnets.load, path, config_of())
    assert "it has a key of type tuple, not text" in said


@pytest.mark.parametrize(
    "tree", [{1_000_000 * "x": 1}, {"x": {1_000_000 * "x": 1}}, {1_000_000 * b"x": {}}]
)
def test_a_long_name_is_cut(tmp_path, tree):
    assert len(refusal(deepmind_nfnets.read, written(tree, tmp_path, "f"))) < 600


def test_names_are_escaped(tmp_path):
    said = refusal(deepmind_nfnets.read, written({"\x1b[31m\n": 1}, tmp_path))
    assert r"'\x1b[31m\n' is no module" in said


@pytest.mark.parametrize("module", ["NFNet/~/linear", "NFNet/~/nf_block_1/~/conv1b"])
def test_weights_that_are_not_finite_are_refused(tmp_path, module):
    tree = published()
    tree[module]["w"][-1, 0] = np.nan
    said = refusal(deepmind_nfnets.load, written(tree, tmp_path), config_of())
    assert said == f"DeepMind's nfnet_f0: '{module} w' is not finite"


def test_an_array_of_todays_jax_is_refused(tmp_path):
    tree = {"NFNet/~/linear": {"w": jax.numpy.zeros(3)}}
    said = refusal(deepmind_nfnets.load, written(tree, tmp_path), config_of())
    assert "it wants jax." in said


@pytest.mark.parametrize("length", [0, 1, 20, 1000, -1])
def test_a_truncated_file_is_refused(tmp_path, length):
    path = written(published(), tmp_path)
    path.write_bytes(path.read_bytes()[:length])
    assert "is no pickle of arrays" in refusal(deepmind_nfnets.load, path, config_of())


def test_what_is_no_pickle_is_refused(tmp_path):
    path = tmp_path / "F0_haiku.npz"
    np.savez(path, w=np.zeros(3))  # what the name promises
    assert "is no pickle of arrays" in refusal(deepmind_nfnets.load, path, config_of())
    path.write_bytes(np.random.default_rng(0).bytes(10_000))
    assert "is no pickle of arrays" in refusal(deepmind_nfnets.load, path, config_of())
    path.write_bytes(pickle.dumps([1, 2]))
    assert "is a pickled list, not a dict" in refusal(deepmind_nfnets.load, path, config_of())
    absent = tmp_path / "absent"
    assert "cannot be read: No such file" in refusal(deepmind_nfnets.load, absent, config_of())
    assert "cannot be read: Is a directory" in refusal(deepmind_nfnets.load, tmp_path, config_of())


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickle_of_any_protocol_is_read(tmp_path, protocol):
    tree = {
        "a": {"w": np.arange(6.0, dtype=">f4").reshape(2, 3), "b": np.float32(3)},
        "b": {"w": np.asfortranarray(np.arange(6.0).reshape(2, 3))},
    }
    path = tmp_path / "f"
    path.write_bytes(pickle.dumps(tree, protocol))
    found = deepmind_nfnets.read(path)
    np.testing.assert_array_equal(found["a"]["w"], tree["a"]["w"])
    np.testing.assert_array_equal(found["b"]["w"], tree["b"]["w"])
    assert found["a"]["b"].shape == ()
    assert found["a"]["b"] == 3
