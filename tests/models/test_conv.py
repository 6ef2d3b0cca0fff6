"""The convolution's written-out filter gradient against XLA's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from normlab.models.conv import conv_with_matmul_gradient, filter_gradient

DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def xla(x, kernel, strides, padding):
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=DIMENSIONS)


def test_the_filter_gradient_of_one_pixel_by_hand():
    # One pixel 2 with output gradient 3: only the centre tap meets it, 2·3 = 6.
    x, g = jnp.full((1, 1, 1, 1), 2.0), jnp.full((1, 1, 1, 1), 3.0)
    gradient = filter_gradient(x, g, (3, 3, 1, 1), ((1, 1), ((1, 1), (1, 1))))
    expected = np.zeros((3, 3))
    expected[1, 1] = 6.0
    np.testing.assert_array_equal(gradient[:, :, 0, 0], expected)


@pytest.mark.parametrize("size", [(3, 1), (1, 0), (3, 0), (2, 1)], ids=str)
@pytest.mark.parametrize("strides", [(1, 1), (2, 2), (2, 1), (1, 2)], ids=str)
@pytest.mark.parametrize("image", [(6, 6), (7, 5)], ids=str)
def test_it_equals_xlas(size, strides, image):
    side, pad = size
    padding = ((pad, pad), (pad, pad))
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(0), 3)
        x = jax.random.normal(keys[0], (2, *image, 3), jnp.float64)
        kernel = jax.random.normal(keys[1], (side, side, 3, 4), jnp.float64)

        def loss(conv, x, kernel):
            y = conv(x, kernel, strides, padding)
            return jnp.sum(jnp.sin(y) * jnp.arange(y.size).reshape(y.shape))

        ours = jax.jit(jax.grad(lambda *a: loss(conv_with_matmul_gradient, *a), (0, 1)))(x, kernel)
        theirs = jax.grad(lambda *a: loss(xla, *a), (0, 1))(x, kernel)
        for mine, its in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(mine, its, rtol=1e-10, atol=1e-10)


def test_bfloat16_gradients_are_summed_in_float32():
    x = jnp.ones((4, 32, 32, 1), jnp.bfloat16)
    g = jnp.ones((4, 32, 32, 1), jnp.bfloat16)
    gradient = filter_gradient(x, g, (1, 1, 1, 1), ((1, 1), ((0, 0), (0, 0))))
    # 4,096 ones: a bfloat16 sum would stop at 256.
    assert float(gradient[0, 0, 0, 0]) == 4096.0


@pytest.mark.parametrize(
    "other", [{"rhs_dilation": (2, 2)}, {"feature_group_count": 3}, {"padding": "SAME"}], ids=str
)
def test_what_it_does_not_cover_is_left_to_xla(other):
    x = jax.random.normal(jax.random.key(0), (1, 8, 8, 3))
    groups = other.get("feature_group_count", 1)
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 3 // groups, 3))
    arguments = {"padding": ((1, 1), (1, 1)), **other}
    padding = arguments.pop("padding")

    def loss(conv):
        return jax.grad(
            lambda k: jnp.sum(
                conv(x, k, (1, 1), padding, dimension_numbers=DIMENSIONS, **arguments) ** 2
            )
        )(kernel)

    np.testing.assert_array_equal(loss(conv_with_matmul_gradient), loss(lax.conv_general_dilated))
