"""The convolution's split filter gradient against the derivative of the plain convolution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from normlab.errors import UserError
from normlab.models import conv
from normlab.models.conv import StandardConv, conv_with_split_gradient, num_pieces

DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def plain(x, kernel, strides, padding):
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=DIMENSIONS)


def split(x, kernel, strides, padding):
    return conv_with_split_gradient(x, kernel, strides, padding, dimension_numbers=DIMENSIONS)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Pieces of two examples of 6×6×3 float64, so that small batches are split."""
    monkeypatch.setattr(conv, "_PIECE_BYTES", 2 * 6 * 6 * 3 * 8)


def values(image=(6, 6), side=3, batch=8, dtype=jnp.float64):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (batch, *image, 3), dtype)
    kernel = jax.random.normal(keys[1], (side, side, 3, 4), dtype)
    return x, kernel


def test_the_filter_gradient_of_one_pixel_by_hand():
    # Pixels 2 and 5, in two pieces, with output gradients 3 and 1: only the centre tap meets
    # them, 2·3 + 5·1 = 11.
    x = jnp.asarray([2.0, 5.0]).reshape(2, 1, 1, 1)
    g = jnp.asarray([3.0, 1.0]).reshape(2, 1, 1, 1)
    padding = ((1, 1), (1, 1))
    _, back = jax.vjp(lambda k: split(x, k, (1, 1), padding), jnp.zeros((3, 3, 1, 1)))
    expected = np.zeros((3, 3))
    expected[1, 1] = 11.0
    np.testing.assert_array_equal(back(g)[0][:, :, 0, 0], expected)


@pytest.mark.parametrize(
    "size", [(3, 1), (1, 0), pytest.param((7, 3), marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize("strides", [(1, 1), (2, 2)], ids=str)
def test_it_equals_xlas_forward_and_backward(size, strides):
    side, pad = size
    padding = ((pad, pad), (pad, pad))
    with jax.enable_x64(True):
        x, kernel = values(side=side)
        assert num_pieces(x) == 4

        def loss(conv, x, kernel):
            y = conv(x, kernel, strides, padding)
            return jnp.sum(jnp.sin(y) * jnp.arange(y.size).reshape(y.shape))

        for transform in (jax.grad, jax.jacfwd):
            expected = transform(lambda *args: loss(plain, *args), (0, 1))(x, kernel)
            found = transform(lambda *args: loss(split, *args), (0, 1))(x, kernel)
            for a, b in zip(found, expected, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)
            assert not jnp.allclose(expected[1], jnp.zeros_like(expected[1]))


def test_second_derivatives_and_vmap_go_through():
    with jax.enable_x64(True):
        x, kernel = values(batch=4)

        def loss(conv, kernel):
            return jnp.sum(jnp.sin(conv(x, kernel, (1, 1), ((1, 1), (1, 1)))))

        def curvature(conv):
            gradient = jax.grad(lambda kernel: loss(conv, kernel))
            return jax.jvp(gradient, (kernel,), (kernel,))[1]

        np.testing.assert_allclose(curvature(split), curvature(plain), rtol=1e-9)
        stacked = jnp.stack([kernel, 2 * kernel])
        np.testing.assert_allclose(
            jax.vmap(jax.grad(lambda kernel: loss(split, kernel)))(stacked),
            jax.vmap(jax.grad(lambda kernel: loss(plain, kernel)))(stacked),
            rtol=1e-9,
        )


@pytest.mark.parametrize(
    ("batch", "pieces"),
    [(8, 4), (6, 2), (7, 1), (1, 1), (64, 16)],  # a power of two that divides, 16 at most
)
def test_pieces_divide_the_batch(batch, pieces):
    assert num_pieces(jnp.zeros((batch, 6, 6, 6), jnp.float32)) == pieces


def test_pieces_of_bfloat16_are_summed_in_float32():
    x, kernel = values(batch=32, dtype=jnp.float32)
    exact = jax.grad(lambda k: jnp.sum(jnp.sin(plain(x, k, (1, 1), ((1, 1), (1, 1))))))(kernel)

    def error(conv):
        def loss(kernel):
            y = conv(x.astype(jnp.bfloat16), kernel, (1, 1), ((1, 1), (1, 1)))
            return jnp.sum(jnp.sin(y.astype(jnp.float32)))

        gradient = jax.grad(loss)(kernel.astype(jnp.bfloat16)).astype(jnp.float32)
        return float(jnp.linalg.norm(gradient - exact) / jnp.linalg.norm(exact))

    assert num_pieces(x.astype(jnp.bfloat16)) > 1
    assert error(split) < 1.3 * error(plain)


@pytest.mark.parametrize("choice", ["whole", "split"])
def test_the_choice_is_a_field(choice):
    found = StandardConv(filter_gradient=choice).convolution()
    assert (found is conv_with_split_gradient) == (choice == "split")


@pytest.mark.parametrize(("strides", "padding"), [((1, 1), ((1, 1), (1, 1))), ((2, 2), "SAME")])
def test_a_circular_boundary_is_the_image_repeated(strides, padding):
    """Of nine copies side by side the one in the middle sees nothing but copies."""
    x = jax.random.normal(jax.random.key(0), (2, 6, 6, 3))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 3, 4))
    dims = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    found = StandardConv(boundary="circular").convolution()(x, kernel, strides, padding, **dims)
    tiled = jnp.tile(x, (1, 3, 3, 1))
    expected = lax.conv_general_dilated(tiled, kernel, strides, padding, **dims)
    size = found.shape[1]
    assert size == 6 // strides[0]
    np.testing.assert_allclose(found, expected[:, size : 2 * size, size : 2 * size], atol=1e-4)
    # Moving the image moves the output, and nothing else: there is no border.
    moved = StandardConv(boundary="circular").convolution()(
        jnp.roll(x, 2, 1), kernel, strides, padding, **dims
    )
    np.testing.assert_allclose(moved, jnp.roll(found, 2 // strides[0], 1), atol=1e-4)


def test_an_unknown_boundary_is_refused():
    with pytest.raises(UserError, match=r"unknown 'conv\.boundary' 'zero'; did you mean 'zeros'"):
        StandardConv(boundary="zero").convolution()
