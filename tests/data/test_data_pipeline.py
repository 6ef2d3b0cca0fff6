"""Which examples make a batch, and how they become floats."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from normlab.config import load_config
from normlab.data import (
    DatasetInfo,
    augmentation_hash,
    check_mixing,
    dropout_key,
    epoch_permutation,
    eval_indices,
    fetch,
    order_hash,
    pixels_of,
    step_key,
    train_indices,
    training_batch,
)
from normlab.data.randaugment import rand_augment
from normlab.errors import UserError


def test_an_order_is_the_ranks_of_philox_and_never_changes() -> None:
    # Literal values: a change of them would unpair every run made before it.
    assert epoch_permutation(0, 0, 10).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
    assert epoch_permutation(0, 1, 10).tolist() == [5, 3, 7, 8, 2, 4, 1, 0, 6, 9]
    assert epoch_permutation(7, 0, 10).tolist() == [8, 4, 1, 6, 3, 2, 7, 5, 9, 0]


def test_an_order_is_a_permutation_for_the_largest_seed_too() -> None:
    order = epoch_permutation(2**32 - 1, 3, 1000)
    assert order.dtype == np.int32
    np.testing.assert_array_equal(np.sort(order), np.arange(1000))


def test_steps_walk_through_the_epochs_and_drop_the_remainder() -> None:
    # 10 examples in batches of 3: an epoch is 3 steps, its tenth example is dropped.
    first, second = epoch_permutation(5, 0, 10), epoch_permutation(5, 1, 10)
    expected = np.concatenate([first[:9], second[:9]]).reshape(6, 3)
    indices = train_indices(5, 0, 6, 3, 10)
    assert indices.dtype == np.int32
    np.testing.assert_array_equal(indices, expected)


@pytest.mark.parametrize("first", [0, 1, 2, 3, 5, 299])
def test_a_resumed_run_asks_for_the_steps_it_would_have_taken(first: int) -> None:
    whole = train_indices(1, 0, 310, 4, 13)  # 3 steps an epoch
    np.testing.assert_array_equal(train_indices(1, first, 7, 4, 13), whole[first : first + 7])


def test_a_batch_may_be_the_whole_set() -> None:
    np.testing.assert_array_equal(train_indices(0, 1, 1, 10, 10)[0], epoch_permutation(0, 1, 10))


@pytest.mark.parametrize("batch_size", [0, 11])
def test_a_batch_that_the_set_cannot_fill_is_refused(batch_size: int) -> None:
    with pytest.raises(UserError, match=rf"^batch size {batch_size} must be from 1 to 10, "):
        train_indices(0, 0, 1, batch_size, 10)


def test_the_order_hash_tells_seed_batch_size_and_data_set_apart() -> None:
    base = order_hash(0, 64, 1437)
    assert base == "4bdac926f9b6"
    others = {order_hash(1, 64, 1437), order_hash(0, 32, 1437), order_hash(0, 64, 1438)}
    assert base not in others
    assert len(others) == 3


@pytest.mark.parametrize("batch_size", [1, 7, 128, 10_000])
@pytest.mark.parametrize("count", [360, 10_000])
def test_evaluation_covers_every_example_exactly_once(count: int, batch_size: int) -> None:
    indices, mask = eval_indices(count, batch_size)
    assert indices.shape == mask.shape == (-(-count // batch_size), batch_size)
    assert indices.dtype == np.int32
    assert mask.dtype == np.bool_
    np.testing.assert_array_equal(np.sort(indices[mask]), np.arange(count))
    assert not indices[~mask].any()  # padding is example 0


def test_fetch_standardizes_by_channel() -> None:
    info = DatasetInfo("two", (1, 2, 2), 3, 2, 1, (), (0.5, 0.2), (0.25, 0.1))
    images = np.array([[[[0, 0], [0, 0]]], [[[255, 51], [0, 102]]]], np.uint8)
    labels = np.array([2, 1], np.int32)
    indices = jnp.array([1, 0, 1])
    values, chosen = jax.jit(lambda *data: fetch(*data, info))((images, labels), indices)
    # 255 is 1.0: (1 − 0.5) / 0.25 = 2. 51 is 0.2: 0. 0 is −2 in either channel. 102 is 0.4: 2.
    np.testing.assert_allclose(values[0], [[[2, 0], [-2, 2]]], atol=1e-6)
    np.testing.assert_allclose(values[1], [[[-2, -2], [-2, -2]]], atol=1e-6)
    assert values.dtype == jnp.float32
    assert chosen.tolist() == [1, 2, 1]


def test_a_step_key_is_the_same_traced_and_differs_by_seed_and_step() -> None:
    def bits(seed: jax.Array | int, step: jax.Array | int) -> list[int]:
        return jax.random.key_data(step_key(seed, step)).tolist()

    traced = jax.jit(lambda seed, step: jax.random.key_data(step_key(seed, step)))
    seed = 2**32 - 1
    assert bits(seed, 3) == traced(jnp.uint32(seed), jnp.int32(3)).tolist()
    assert len({tuple(bits(seed, step)) for seed in (0, 1) for step in (0, 1)}) == 4


def test_dropout_draws_from_a_key_of_its_own() -> None:
    key = jax.random.key_data(dropout_key(0, 3)).tolist()
    assert key == jax.random.key_data(dropout_key(0, 3)).tolist()
    others = [dropout_key(0, 4), dropout_key(1, 3), step_key(0, 3)]
    others += [jax.random.fold_in(step_key(0, 3), kind) for kind in range(1, 8)]
    assert key not in [jax.random.key_data(other).tolist() for other in others]


# What a training batch is made of -----------------------------------------------------------------

INFO = DatasetInfo("colours", (8, 8, 3), 10, 20, 1, (), (0.5, 0.4, 0.3), (0.25, 0.2, 0.3))
PIXELS = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
EXAMPLES = (PIXELS, np.arange(20, dtype=np.int32) % 10)


def maker(**fields: object) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
    config = load_config("configs/digits.py", {f"data.{k}": v for k, v in fields.items()}).data
    return lambda rows: training_batch(EXAMPLES, config, INFO, 0, 3, rows)


def batch_of(**fields: object) -> tuple[jax.Array, jax.Array]:
    return jax.jit(maker(**fields))(jnp.arange(20))


def test_standardization_can_be_undone_to_the_pixel() -> None:
    images, labels = batch_of()
    np.testing.assert_array_equal(pixels_of(images, INFO), PIXELS)
    np.testing.assert_array_equal(labels, EXAMPLES[1])


def test_targets_are_soft_only_where_examples_are_mixed() -> None:
    rows = jnp.arange(20)
    for fields in ({"flip": True}, {"randaugment_layers": 2}):
        assert jax.eval_shape(maker(**fields), rows)[1].dtype == jnp.int32
    for name in ("mixup_alpha", "cutmix_alpha"):
        _, targets = jax.eval_shape(maker(**{name: 1.0}), rows)
        assert (targets.shape, targets.dtype) == ((20, 10), jnp.float32)


@pytest.mark.slow
def test_randaugment_comes_after_mixing_and_moves_no_other_draw() -> None:
    mixed, targets = batch_of(flip=True, mixup_alpha=0.2)
    both, same = batch_of(flip=True, mixup_alpha=0.2, randaugment_layers=1)
    np.testing.assert_array_equal(targets, same)
    pixels = pixels_of(mixed, INFO)
    expected = jax.jit(lambda x: rand_augment(step_key(0, 3), x, layers=1, magnitude=10))(pixels)
    assert np.any(expected != pixels)
    np.testing.assert_array_equal(pixels_of(both, INFO), expected)


def test_the_hash_tells_every_kind_of_augmentation_apart() -> None:
    def hash_of(**fields):
        config = load_config("configs/digits.py", {f"data.{k}": v for k, v in fields.items()})
        return augmentation_hash(0, config.data)

    on = {"mixup_alpha": 0.2, "cutmix_alpha": 1.0, "randaugment_layers": 2}
    details = {"mixup_share": 0.5, "cutmix_share": 0.5, "randaugment_magnitude": 5}
    hashes = {hash_of(), hash_of(flip=True), hash_of(**on)}
    hashes |= {hash_of(**{name: value}) for name, value in on.items()}
    hashes |= {hash_of(**on, **{name: value}) for name, value in details.items()}
    assert len(hashes) == 9
    # Details of what is off draw nothing.
    assert hash_of(**details) == hash_of()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mixup_alpha": 0.0}, "'data.mixup_alpha' = 0.0 must be above 0"),
        ({"cutmix_alpha": -1.0}, "'data.cutmix_alpha' = -1.0 must be above 0"),
        ({"mixup_alpha": 0.2, "cutmix_alpha": 1.0}, "are more than the batch; e.g. 0.5 each"),
        ({"randaugment_layers": 1, "binarize": True}, "would not stay 0 and 1"),
    ],
    ids=str,
)
def test_what_cannot_be_mixed_is_refused_in_one_line(
    fields: dict[str, object], message: str
) -> None:
    config = load_config("configs/digits.py", {f"data.{k}": v for k, v in fields.items()}).data
    with pytest.raises(UserError, match=message) as caught:
        check_mixing(config)
    assert "\n" not in str(caught.value)
