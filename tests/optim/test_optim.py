"""Schedules, roles and directions, against numbers worked out by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from normlab.config import load_config
from normlab.errors import UserError
from normlab.optim import build_direction, build_schedule, peak_learning_rate, role_mask, roles
from normlab.run_length import RunLength


def config_of(optimizer="sgd", **fields):
    names = {name.replace("__", "."): value for name, value in fields.items()}
    names.setdefault("train.num_steps", 100)
    return load_config(f"configs/digits.py:optimizer={optimizer}", names)


def rates(steps, **fields):
    config = config_of(optim__base_lr=1.0, **fields)
    schedule = build_schedule(config, RunLength.of(config))
    return [float(schedule(step)) for step in steps]


# Schedules


def test_constant():
    assert rates([0, 50, 99], optim__schedule="constant") == [1, 1, 1]


def test_cosine_goes_through_one_half_to_zero():
    # (1 + cos(π t/100)) / 2 at t = 0, 50, 100: 1, 1/2, 0.
    np.testing.assert_allclose(
        rates([0, 50, 100], optim__schedule="cosine"), [1, 0.5, 0], atol=1e-6
    )


def test_linear():
    np.testing.assert_allclose(
        rates([0, 25, 100], optim__schedule="linear"), [1, 0.75, 0], atol=1e-6
    )


def test_piecewise_divides_at_each_milestone():
    # Milestones at 50 and 75 of 100 steps, factor 0.1 each.
    got = rates([49, 50, 74, 75], optim__schedule="piecewise")
    np.testing.assert_allclose(got, [1, 0.1, 0.1, 0.01], rtol=1e-6)


def test_warmup_rises_to_the_peak_and_decay_starts_there():
    got = rates([0, 4, 9, 10, 55], optim__schedule="cosine", optim__warmup_steps=10)
    # 1/10, 5/10, 10/10 of the peak; then a cosine over the 90 steps left, half way at 55.
    np.testing.assert_allclose(got, [0.1, 0.5, 1, 1, 0.5], rtol=1e-6)


def test_the_peak_scales_with_the_batch_only_if_asked():
    # Goyal et al. 2017: 0.1 · 64 / 256 = 0.025.
    assert peak_learning_rate(config_of(optim__base_lr=0.1)) == 0.1
    scaled = config_of(optim__base_lr=0.1, optim__reference_batch_size=256)
    assert peak_learning_rate(scaled) == pytest.approx(0.025)


def test_the_recipe_of_nfnets_has_its_papers_schedule():
    """Brock et al. 2021: 360 epochs of 1,281,167 images at 4096, to 1.6 in 5 epochs, then to 0."""
    config = load_config("configs/nfnet_imagenet.py:model=resnet50")
    length = RunLength.of(config)
    assert length.num_steps == 112_602  # ⌊360 · 1,281,167 / 4096⌋ = ⌊112,602.6⌋
    assert peak_learning_rate(config) == pytest.approx(1.6)  # 0.1 · 4096 / 256
    schedule = build_schedule(config, length)
    # 5 epochs are 5 · 1,281,167 / 4096 = 1563.9 steps; the step after them has the peak, the middle
    # of the other 111,038 half of it, and the last one 1.6 · sin²(π/2 / 111,038) = 3.2e-10.
    got = [float(schedule(step)) for step in (0, 781, 1563, 1564, 57_083, 112_601)]
    expected = [1.6 / 1564, 1.6 * 782 / 1564, 1.6, 1.6, 0.8, 0]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7)
    # Half the batch has half the rate: it is derived when training starts.
    half = load_config("configs/nfnet_imagenet.py:model=resnet50", {"train.batch_size": 2048})
    assert peak_learning_rate(half) == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"optim__schedule": "cosin"}, "did you mean 'cosine'?"),
        ({"optim__base_lr": 0.0}, "must be above 0"),
        ({"optim__warmup_steps": 100}, "'optim.warmup' is 100 steps, but the run has 100"),
        ({"optim__reference_batch_size": 0}, "must be 1 or more"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(fields, expected):
    config = config_of(**fields)
    with pytest.raises(UserError) as caught:
        build_schedule(config, RunLength.of(config))
    assert expected in str(caught.value)


# Roles

PARAMS = {
    "conv1": {"kernel": 0, "bias": 0},
    "norm1": {"scale": 0, "bias": 0, "v": 0},
    "block": {"norm2": {"bias": 0}, "head": {"kernel": 0}},
    "cell": {"bias": 0, "hidden": {"kernel": 0}},
    "positions": 0,
    "skipping": {"skip_gain": 0, "conv1": {"kernel": 0, "gain": 0}},
    "fixup": {"bias1a": 0, "multiplier": 0, "conv1": {"kernel": 0}, "bias2": {"value": 0}},
    "scaled": {"skip_gain": 0},
}


def test_roles_come_from_places_not_from_ranks():
    assert roles(PARAMS) == {
        "conv1": {"kernel": "kernel", "bias": "bias"},
        "norm1": {"scale": "norm_scale", "bias": "norm_bias", "v": "norm_extra"},
        "block": {"norm2": {"bias": "norm_bias"}, "head": {"kernel": "kernel"}},
        "cell": {"bias": "bias", "hidden": {"kernel": "kernel"}},
        "positions": "embedding",
        "skipping": {
            "skip_gain": "skip_gain",
            "conv1": {"kernel": "kernel", "gain": "norm_scale"},
        },
        "fixup": {
            "bias1a": "bias",
            "multiplier": "skip_gain",
            "conv1": {"kernel": "kernel"},
            "bias2": {"value": "bias"},
        },
        "scaled": {"skip_gain": "skip_gain"},
    }


def test_a_mask_selects_roles():
    assert role_mask(PARAMS, ("kernel", "norm_bias")) == {
        "conv1": {"kernel": True, "bias": False},
        "norm1": {"scale": False, "bias": True, "v": False},
        "block": {"norm2": {"bias": True}, "head": {"kernel": True}},
        "cell": {"bias": False, "hidden": {"kernel": True}},
        "positions": False,
        "skipping": {"skip_gain": False, "conv1": {"kernel": True, "gain": False}},
        "fixup": {
            "bias1a": False,
            "multiplier": False,
            "conv1": {"kernel": True},
            "bias2": {"value": False},
        },
        "scaled": {"skip_gain": False},
    }
    with pytest.raises(UserError, match="did you mean 'kernel'"):
        role_mask(PARAMS, ("kernels",))


# Directions


def directions(config, gradients, params):
    """The directions for a list of gradients of one parameter tree that stands still."""
    transformation = build_direction(config)
    state = transformation.init(params)
    found = []
    for gradient in gradients:
        update, state = transformation.update(gradient, state, params)
        found.append(update)
    return found


def tree(kernel, scale=0.0):
    return {"dense": {"kernel": jnp.array([kernel])}, "norm": {"scale": jnp.array([scale])}}


def test_momentum_is_pytorchs():
    # v1 = 1; v2 = 0.9·1 + 1 = 1.9; Nesterov steps along g + 0.9·v: 1.9, 2.71.
    plain = directions(config_of(), [tree(1.0), tree(1.0)], tree(0.0))
    assert [float(d["dense"]["kernel"][0]) for d in plain] == pytest.approx([1, 1.9])
    nesterov = config_of(optim__nesterov=True)
    ahead = directions(nesterov, [tree(1.0), tree(1.0)], tree(0.0))
    assert [float(d["dense"]["kernel"][0]) for d in ahead] == pytest.approx([1.9, 2.71])


def test_coupled_decay_enters_the_velocity_and_spares_scales():
    # g + 0.1·w = 1 + 0.1·2 = 1.2 at first; then 0.9·1.2 + 1.2 = 2.28. The scale's stays 1, 1.9.
    config = config_of(optim__weight_decay=0.1)
    got = directions(config, [tree(1.0, 1.0)] * 2, tree(2.0, 2.0))
    assert [float(d["dense"]["kernel"][0]) for d in got] == pytest.approx([1.2, 2.28])
    assert [float(d["norm"]["scale"][0]) for d in got] == pytest.approx([1, 1.9])


def test_adamw_decays_beside_the_moments_and_adam_within():
    # First Adam step: m/√v = sign(g) = 1. AdamW adds 0.1·2; Adam's gradient 1.2 still has sign 1.
    decay = {"optim__weight_decay": 0.1}
    adamw = directions(config_of("adamw", **decay), [tree(1.0)], tree(2.0))[0]
    adam = directions(config_of("adam", **decay), [tree(1.0)], tree(2.0))[0]
    assert float(adamw["dense"]["kernel"][0]) == pytest.approx(1.2, rel=1e-4)
    assert float(adam["dense"]["kernel"][0]) == pytest.approx(1.0, rel=1e-4)


def test_lamb_scales_by_the_ratio_of_norms():
    # |w| / |update| = 2 / 1, so the direction is 2·1.
    got = directions(config_of("lamb"), [tree(1.0)], tree(2.0))[0]
    assert float(got["dense"]["kernel"][0]) == pytest.approx(2.0, rel=1e-4)


def test_clipping_bounds_the_global_norm():
    # Gradient (3, 4) has norm 5; clipped to 1: (0.6, 0.8).
    got = directions(config_of(optim__clip_norm=1.0), [tree(3.0, 4.0)], tree(0.0))[0]
    assert float(got["dense"]["kernel"][0]) == pytest.approx(0.6)
    assert float(got["norm"]["scale"][0]) == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"optim__weight_decay": -1.0}, "must be 0 or more"),
        ({"optim__clip_norm": 0.0}, "must be above 0"),
        ({"optim__decay_roles": ("all",)}, "unknown role"),
    ],
)
def test_a_direction_that_cannot_be_is_refused(fields, expected):
    with pytest.raises(UserError, match=expected):
        build_direction(config_of(**fields))
