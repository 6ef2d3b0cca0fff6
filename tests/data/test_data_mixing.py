"""MixUp and CutMix, by hand and by their laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from normlab.data.mixing import box, mix, soft_targets

KEY = jax.random.key(0)
mixed = jax.jit(
    mix,
    static_argnums=3,
    static_argnames=("mixup_alpha", "mixup_share", "cutmix_alpha", "cutmix_share"),
)


def numbered(count: int, side: int = 8) -> jax.Array:
    """Image n has n + 1 in every pixel."""
    return jnp.broadcast_to(jnp.arange(1.0, count + 1)[:, None, None, None], (count, side, side, 1))


def test_a_target_has_both_labels_by_their_weights() -> None:
    # 0.75 of class 1 and 0.25 of class 0; twice the same class is that class.
    got = soft_targets(jnp.array([1, 2]), jnp.array([0, 2]), jnp.array([0.75, 0.4]), 3)
    np.testing.assert_allclose(got, [[0.25, 0.75, 0], [0, 0, 1]], rtol=1e-6)


@pytest.mark.parametrize(
    ("centre", "weight", "rows", "columns"),
    [
        ((4, 5), 0.75, (2, 6), (3, 7)),  # √(1/4) of 8 pixels is 4: two on either side
        ((0, 5), 0.75, (0, 2), (3, 7)),  # two rows are lost
        ((4, 5), 1.0, (4, 4), (5, 5)),  # nothing
        ((4, 4), 0.0, (0, 8), (0, 8)),  # everything
        ((4, 4), 0.6, (2, 6), (2, 6)),  # √0.4·8 = 5.06, so 5, and 5 // 2 on either side
    ],
)
def test_a_box_by_hand(
    centre: tuple[int, int], weight: float, rows: tuple[int, int], columns: tuple[int, int]
) -> None:
    expected = np.zeros((1, 8, 8), bool)
    expected[:, slice(*rows), slice(*columns)] = True
    got = box(jnp.array([centre]), jnp.array([weight]), 8, 8)
    np.testing.assert_array_equal(got, expected)


def test_mixup_mixes_pixels_as_it_mixes_labels() -> None:
    # Image n holds n + 1 and is of class n, so its mean must be the mean of (class + 1).
    images, targets = mixed(KEY, numbered(64), jnp.arange(64), 64, mixup_alpha=0.2)
    np.testing.assert_allclose(images[:, 0, 0, 0], targets @ jnp.arange(1.0, 65), rtol=1e-5)
    np.testing.assert_array_equal(images, jnp.broadcast_to(images[:, :1, :1], images.shape))
    np.testing.assert_allclose(jnp.sum(targets, 1), 1, rtol=1e-6)
    assert int(jnp.sum(jnp.max(targets, 1) < 1)) > 32


def test_cutmix_weighs_by_the_pixels_that_are_left() -> None:
    images, targets = mixed(
        KEY, numbered(64), jnp.arange(64), 64, mixup_alpha=None, cutmix_alpha=1.0
    )
    for n in range(64):
        own = float(jnp.mean(images[n] == n + 1))
        values = np.unique(images[n])
        assert len(values) <= 2
        assert float(targets[n, n]) == pytest.approx(own, abs=1e-6)
    # A box anywhere with λ uniform: most examples are mixed, and rarely as a whole.
    kept = np.diagonal(np.asarray(targets))
    assert 0.4 < kept.mean() < 0.9


def test_weights_of_mixup_are_betas() -> None:
    # Beta(α, α): mean 1/2, variance 1/(4(2α + 1)) = 0.1786 at α = 0.2; over 4000 draws within
    # 5 standard errors: √(0.1786/4000) = 0.0067 of the mean.
    _, targets = mixed(KEY, jnp.zeros((4000, 1, 1, 1)), jnp.arange(4000), 4000, mixup_alpha=0.2)
    weights = np.diagonal(np.asarray(targets))
    assert abs(weights.mean() - 0.5) < 0.034
    assert abs(weights.var() - 0.1786) < 0.01


@pytest.mark.slow
def test_each_share_is_exact_and_neither_moves_the_other() -> None:
    count = 40
    images = numbered(count)

    def change(**how: float | None) -> np.ndarray:
        got, _ = mixed(KEY, images, jnp.arange(count), count, **{"mixup_alpha": None, **how})
        return np.asarray(got - images)

    # α of 1000 makes each λ about 1/2, so what is chosen shows, unless it is its own partner.
    one = {"mixup_alpha": 1e3, "mixup_share": 0.25}
    other = {"cutmix_alpha": 1e3, "cutmix_share": 0.5}
    up, cut = change(**one), change(**other)
    touched = [np.any(changed, axis=(1, 2, 3)) for changed in (up, cut)]
    assert 8 <= touched[0].sum() <= 10
    assert 16 <= touched[1].sum() <= 20
    assert not np.any(touched[0] & touched[1])
    np.testing.assert_array_equal(change(**one, **other), up + cut)


def test_with_a_share_of_zero_nothing_is_mixed() -> None:
    images = numbered(64)
    got, targets = mixed(KEY, images, jnp.arange(64), 64, mixup_alpha=0.2, mixup_share=0.0)
    np.testing.assert_array_equal(got, images)
    np.testing.assert_array_equal(targets, jnp.eye(64))
