"""The vision transformer: counts by hand, and its definition against a reference in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from normlab.analysis.folding import fold
from normlab.config import from_json, load_config, to_json
from normlab.errors import UserError
from normlab.models import build, count_params
from normlab.models.cost import macs
from normlab.models.layers import norm_layers
from normlab.optim import role_mask, roles
from normlab.training import parallel
from normlab.training.setup import build_parts
from normlab.training.state import create_state
from normlab.training.step import make_train_step

SMALL = {"model.width": 12, "model.depth": 1, "model.num_heads": 3, "model.mlp_ratio": 2}


def config_of(norm="layer_norm", data="cifar10", **fields):
    names = {name.replace("__", "."): value for name, value in fields.items()}
    return load_config(f"configs/{data}.py:model=vit_tiny,norm={norm}", names)


def small(norm="layer_norm", **fields):
    return config_of(norm, "digits", **SMALL, **fields)


def shapes_of(config, shape=(32, 32, 3)):
    net = build(config)
    images = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
    return jax.eval_shape(lambda x: net.init(jax.random.key(0), x, train=False), images)["params"]


def test_parameters_by_hand():
    # Patches 4·4·3·192 + 192 = 9,408; class token 192; positions 65·192 = 12,480.
    # A block: two norms of 384; qkv 192·576 + 576 = 111,168; out 192·192 + 192 = 37,056;
    # MLP 192·768 + 768 + 768·192 + 192 = 295,872; together 444,864. Final norm 384; head 1,930.
    block = 2 * 384 + 111_168 + 37_056 + 295_872
    by_hand = 9_408 + 192 + 12_480 + 12 * block + 384 + 1_930
    assert count_params(shapes_of(config_of())) == by_hand == 5_362_762
    # Without the class token 192 fewer, and 192 positions; post-norm has no final norm.
    mean = shapes_of(config_of(model__pooling="mean"))
    assert count_params(mean) == by_hand - 384
    assert count_params(shapes_of(config_of(model__norm_position="post"))) == by_hand - 384
    # rms_norm has no bias: 192 for each of 25.
    assert count_params(shapes_of(config_of("rms_norm"))) == by_hand - 25 * 192


def test_multiply_accumulates_by_hand():
    # 65 tokens. Patches 64·48·192; a block: qkv 65·192·576, scores and mixture 65·65·192 each, out
    # 65·192·192, MLP 2·65·192·768; head 1,920.
    block = 65 * 192 * 576 + 2 * 65 * 65 * 192 + 65 * 192 * 192 + 2 * 65 * 192 * 768
    expected = 64 * 48 * 192 + 12 * block + 1_920
    assert expected == 365_107_584
    assert macs(build(config_of()), (32, 32, 3)) == expected
    assert macs(build(config_of("batch_norm")), (32, 32, 3)) == expected


# The definition ----------------------------------------------------------------------------------


def standardized(x):
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + 1e-5)


def reference(params, images, position, pooling, heads=3):
    """Returns the logits of one block, in float64, by the papers' equations."""

    def dense(x, p):
        return x @ p["kernel"] + p["bias"]

    def norm(x, p):
        return standardized(x) * p["scale"] + p["bias"]

    def attention(x, p):
        out = np.zeros_like(x)
        width = x.shape[-1] // heads
        q, k, v = np.split(dense(x, p["qkv"]), 3, -1)
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            for n in range(len(x)):
                scores = q[n, :, part] @ k[n, :, part].T / np.sqrt(width)
                weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
                out[n, :, part] = weights @ v[n, :, part]
        return dense(out, p["out"])

    def mlp(x, p):
        z = dense(x, p["mlp1"])
        gelu = z / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))
        return dense(gelu, p["mlp2"])

    n, h, w, c = images.shape
    patches = images.reshape(n, h // 4, 4, w // 4, 4, c).transpose(0, 1, 3, 2, 4, 5)
    kernel = params["patch"]["kernel"].reshape(16 * c, -1)
    x = patches.reshape(n, -1, 16 * c) @ kernel + params["patch"]["bias"]
    if pooling == "class_token":
        x = np.concatenate([np.repeat(params["class_token"], n, 0), x], 1)
    x = x + params["positions"]
    p = params["block1"]
    if position == "pre":
        x = x + attention(norm(x, p["norm1"]), p["attention"])
        x = x + mlp(norm(x, p["norm2"]), p)
        x = norm(x, params["norm_final"])
    else:
        x = norm(x + attention(x, p["attention"]), p["norm1"])
        x = norm(x + mlp(x, p), p["norm2"])
    x = x[:, 0] if pooling == "class_token" else x.mean(1)
    return dense(x, params["head"])


def drawn(net, images):
    """Returns variables whose parameters are all drawn, none at its start."""
    shapes = jax.eval_shape(lambda: net.init(jax.random.key(1), images, train=False))
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 0.4, s.shape), s.dtype), shapes)


def logits_of(net, variables, images):
    return jax.jit(lambda v, x: net.apply(v, x, train=False))(variables, images)


@pytest.mark.parametrize("pooling", ["class_token", "mean"])
@pytest.mark.parametrize("position", ["pre", "post"])
def test_a_block_is_the_papers(position, pooling):
    net = build(small(model__norm_position=position, model__pooling=pooling))
    images = jax.random.normal(jax.random.key(0), (3, 8, 12, 2))
    variables = drawn(net, images)
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), variables["params"])
    expected = reference(params, np.asarray(images, np.float64), position, pooling)
    got = logits_of(net, variables, images)
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)
    if position == "pre":  # whose parameters are enough for the other
        other = reference(params, np.asarray(images, np.float64), "post", pooling)
        assert not np.allclose(got, other, atol=0.1)


def test_without_positions_the_order_of_patches_makes_no_difference():
    images = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
    turned = jnp.concatenate([images[:, 4:], images[:, :4]], 1)  # patches change places
    for positions in (False, True):
        net = build(small(model__position_embedding=positions, model__pooling="mean"))
        variables = drawn(net, images)
        a, b = (logits_of(net, variables, x) for x in (images, turned))
        assert np.allclose(a, b, atol=1e-5) is not positions


# Normalizers of tokens ---------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_tokens_are_normalized_over_their_channels_unless_a_config_says_otherwise(norm):
    config = config_of(norm)
    assert config.norm.axes == "channel"
    assert load_config(f"configs/cifar10.py:norm={norm}").norm.axes == "all"
    assert config_of(norm, norm__axes="all").norm.axes == "all"
    changed = config_of(norm, norm__axes="all")
    assert from_json(to_json(changed)).norm.axes == "all"
    assert build(changed).norm.module.axes == "all"
    # Overrides have the model's default, too.
    override = config_of("batch_norm", norm_overrides=f"norm_final={norm}")
    assert build(override).norm.at("norm_final").module.axes == "channel"
    cnn = load_config("configs/cifar10.py:norm=batch_norm", {"norm_overrides": f"norm1={norm}"})
    assert build(cnn).norm.at("norm1").module.axes == "all"


def test_paths_of_normalizers_are_unique_and_take_overrides():
    config = config_of(norm_overrides="block1/*=none,*/norm2=rms_norm")
    kinds = {x.path: x.kind for x in norm_layers(build(config), (32, 32, 3))}
    assert len(kinds) == 25
    assert kinds["block1/norm1"] == "none"
    assert kinds["block12/norm2"] == "rms_norm"
    assert kinds["norm_final"] == "layer_norm"
    assert norm_layers(build(config), (32, 32, 3))[-1].shape == (65, 192)


def test_linear_layers_keep_their_bias_whatever_the_normalizer_has():
    for norm in ("batch_norm", "none"):
        params = shapes_of(config_of(norm))
        for layer in (params["patch"], params["block3"]["attention"]["out"], params["head"]):
            assert set(layer) == {"kernel", "bias"}


def test_positions_and_class_token_are_embeddings():
    params = shapes_of(config_of())
    found = roles(params)
    assert (found["positions"], found["class_token"]) == ("embedding", "embedding")
    assert found["block1"]["mlp1"] == {"kernel": "kernel", "bias": "bias"}
    assert found["norm_final"] == {"scale": "norm_scale", "bias": "norm_bias"}
    assert not role_mask(params, ("kernel",))["positions"]
    assert role_mask(params, ("embedding",))["positions"]


@pytest.mark.parametrize(
    ("norm", "position"), [("layer_norm", "pre"), ("batch_norm", "post"), ("dyt", "pre")]
)
def test_a_step_of_training_moves_every_parameter(norm, position):
    fields = {"train__num_steps": 4, "train__batch_size": 8, "model__norm_position": position}
    parts = build_parts(small(norm, **fields))
    state = create_state(parts, parallel.Compiler())
    step = jax.jit(make_train_step(parts.model, parts.direction, parts.schedule))
    batch = jax.random.normal(jax.random.key(0), (8, 8, 8, 1)), jnp.arange(8)
    after = step(state, batch)
    assert int(after.totals.nonfinite) == 0
    before = dict(jax.tree_util.tree_leaves_with_path(state.params))
    for path, leaf in jax.tree_util.tree_leaves_with_path(after.params):
        assert bool(jnp.isfinite(leaf).all()), path
        assert bool((leaf != before[path]).any()), path


@pytest.mark.slow
def test_it_learns_random_labels_of_a_few_images():
    fields = {"train__num_steps": 60, "train__batch_size": 16, "optim__base_lr": 0.05}
    config = config_of(model__depth=2, model__width=48, **fields)
    parts = build_parts(config, need_data=False)
    state = create_state(parts, parallel.Compiler())
    step = jax.jit(make_train_step(parts.model, parts.direction, parts.schedule))
    images = jax.random.normal(jax.random.key(0), (16, 32, 32, 3))
    labels = jnp.arange(16) % 10
    for _ in range(60):
        state = step(state, (images, labels))
    logits = parts.model.apply(state.variables(), images, train=False)
    assert float((logits.argmax(-1) == labels).mean()) > 0.9


def test_bfloat16_computes_in_bfloat16_and_takes_the_softmax_in_float32():
    images = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
    variables = drawn(build(small()), images)
    net = build(small(model__dtype="bfloat16"))
    apply = functools.partial(
        net.apply, train=False, mutable=["intermediates"], capture_intermediates=True
    )
    logits, sown = jax.jit(apply)(variables, images)
    assert logits.dtype == jnp.float32
    block = sown["intermediates"]["block1"]
    assert block["__call__"][0].dtype == jnp.bfloat16
    assert block["attention"]["qkv"]["__call__"][0].dtype == jnp.bfloat16
    text = str(jax.make_jaxpr(lambda x: net.apply(variables, x, train=False))(images))
    exponentials = [line for line in text.splitlines() if " exp " in line]
    assert exponentials
    assert all("f32[" in line and "bf16[" not in line for line in exponentials)
    exact = logits_of(build(small()), variables, images)
    assert float(jnp.abs(logits - exact).max()) < 0.1 * float(jnp.abs(exact).max())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model__patch_size": 5}, "'model.patch_size' = 5 does not divide images of 32×32; n"),
        (
            {"model__num_heads": 5},
            "'model.num_heads' = 5 does not divide a width of 192; near",
        ),
        ({"model__pooling": "men"}, "unknown 'model.pooling' 'men'; did you mean 'mean'?"),
        (
            {"model__norm_position": "past"},
            "unknown 'model.norm_position' 'past'; did you mean 'po",
        ),
        ({"model__depth": 0}, "'model.depth' = 0 must be from 1"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(fields, message):
    with pytest.raises(UserError) as refused:
        build_parts(config_of(**fields), need_data=False)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("position", ["pre", "post"])
def test_folding_is_refused(position):
    net = build(small("batch_norm", model__norm_position=position))
    shapes = jax.eval_shape(
        lambda: net.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), train=False)
    )
    variables = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), shapes)
    with pytest.raises(UserError, match=r"cannot fold the normalizer 'block1/norm1': it does not"):
        fold(net, variables, (8, 8, 1))
