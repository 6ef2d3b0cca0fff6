"""Which examples make a batch, as a pure function of (seed, step); and how they become floats.

There is no iterator and so no position to save: a resumed run asks for the batches of its next
steps, and every normalizer that shares a seed sees the same examples in the same order.
"""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from normlab.data.info import DatasetInfo


def epoch_permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """Returns the order of `count` examples in an epoch (from 0): int32 [count].

    The ranks of Philox's raw 64-bit output (Salmon et al. 2011) with the key (seed, epoch), which
    numpy keeps unchanged between versions, unlike its `permutation`.
    """
    raw = np.random.Philox(key=[seed, epoch]).random_raw(count)
    return np.argsort(raw, kind="stable").astype(np.int32)


def train_indices(
    seed: int, first_step: int, num_steps: int, batch_size: int, count: int
) -> np.ndarray:
    """Returns the examples of steps first_step, ..., + num_steps − 1: int32 [num_steps, batch_size].

    An epoch has count // batch_size steps; what is left of its order is dropped.
    """
    steps_per_epoch = count // batch_size
    steps = np.arange(first_step, first_step + num_steps)
    indices = np.empty((num_steps, batch_size), np.int32)
    for epoch in range(first_step // steps_per_epoch, -(-(first_step + num_steps) // steps_per_epoch)):
        order = epoch_permutation(seed, epoch, count)[: steps_per_epoch * batch_size]
        here = steps // steps_per_epoch == epoch
        batches = order.reshape(steps_per_epoch, batch_size)
        indices[here] = batches[steps[here] % steps_per_epoch]
    return indices


def order_hash(seed: int, batch_size: int, count: int) -> str:
    """Returns 12 hex digits that two runs share if, and only if, they see examples in one order.

    The digest is over the first two epochs; later ones follow from the same seed.
    """
    indices = train_indices(seed, 0, 2 * (count // batch_size), batch_size, count)
    return hashlib.sha256(indices.astype("<i4").tobytes()).hexdigest()[:12]


def eval_indices(count: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (indices int32, mask bool), each [batches, batch_size]: every example exactly once.

    The last batch is padded with example 0, masked out.
    """
    batches = -(-count // batch_size)
    indices = np.zeros(batches * batch_size, np.int32)
    indices[:count] = np.arange(count)
    mask = np.arange(batches * batch_size) < count
    return indices.reshape(batches, batch_size), mask.reshape(batches, batch_size)


def fetch(images: Array, labels: Array, indices: Array, info: DatasetInfo) -> tuple[Array, Array]:
    """Returns (images float32 [B, H, W, C] standardized per channel, labels [B]); runs on the device.

    `images` uint8 [N, H, W, C], `labels` int32 [N], `indices` int32 [B].
    """
    chosen = jnp.take(images, indices, axis=0).astype(jnp.float32) / 255
    mean, std = jnp.asarray(info.mean, jnp.float32), jnp.asarray(info.std, jnp.float32)
    return (chosen - mean) / std, jnp.take(labels, indices, axis=0)


def step_key(seed: Array | int, step: Array | int) -> Array:
    """Returns the random key of one step's augmentation; seed and step may be traced."""
    return jax.random.fold_in(jax.random.key(seed), step)
