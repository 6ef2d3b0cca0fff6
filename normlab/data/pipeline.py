"""Which examples make a batch, as a pure function of (seed, step); and how they become floats.

There is no iterator and so no position to save: a resumed run asks for the batches of its next
steps, and every normalizer that shares a seed sees the same examples in the same order.
"""

import hashlib
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from normlab.data.augmentation import augment
from normlab.data.draws import step_key
from normlab.data.info import DatasetInfo
from normlab.data.mixing import mix
from normlab.data.randaugment import rand_augment
from normlab.errors import UserError

Examples = tuple[Array, Array]  # images uint8 [N, H, W, C], labels int32 [N]


class Arranged(NamedTuple):
    """Examples that are the batch itself, in its order, and maybe padding behind it.

    Indices into them are counted and not looked at, so each may stay on the device that has it.
    """

    images: Array  # uint8 [B + padding, H, W, C]
    labels: Array  # int32 [B + padding]


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
    """Returns the examples of `num_steps` steps from `first_step`: int32 [num_steps, batch_size].

    An epoch has count // batch_size steps; what is left of its order is dropped. Raises UserError
    for a batch that is larger than the set.
    """
    if not 0 < batch_size <= count:
        raise UserError(f"batch size {batch_size} must be from 1 to {count}, the training examples")
    steps_per_epoch = count // batch_size
    epochs, places = np.divmod(np.arange(first_step, first_step + num_steps), steps_per_epoch)
    indices = np.empty((num_steps, batch_size), np.int32)
    for epoch in np.unique(epochs):
        order = epoch_permutation(seed, int(epoch), count)[: steps_per_epoch * batch_size]
        here = epochs == epoch
        indices[here] = order.reshape(steps_per_epoch, batch_size)[places[here]]
    return indices


def order_hash(seed: int, batch_size: int, count: int) -> str:
    """Returns 12 hex digits that two runs share if they see the same batches in the same order.

    The digest is over seed, batch size and the first two epochs' orders; later ones follow from the
    same seed.
    """
    digest = hashlib.sha256(f"{seed} {batch_size} {count}".encode())
    for epoch in (0, 1):
        digest.update(epoch_permutation(seed, epoch, count).astype("<i4").tobytes())
    return digest.hexdigest()[:12]


def augmentation_hash(seed: int, config: Any) -> str:
    """Returns 12 hex digits that two runs share if they draw the same augmentation.

    The draws are a function of (seed, step) and of the fields of `config`, the config's `data`,
    that the digest is over; of the batch size, too, which `order_hash` has. Fields of what is off
    are left out.
    """
    cropped = "image_size", "random_resized_crop", "crop_area", "eval_crop", "interpolation"
    optional = {
        "mixup_alpha": ("mixup_alpha", "mixup_share"),
        "cutmix_alpha": ("cutmix_alpha", "cutmix_share"),
        "randaugment_layers": ("randaugment_layers", "randaugment_magnitude"),
    }
    on = (name for switch, names in optional.items() if config[switch] for name in names)
    names = (*cropped, "crop_padding", "flip", "cutout_size", "binarize", *on)
    text = " ".join([str(seed), *(f"{name}={config[name]}" for name in names)])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def eval_indices(count: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (indices int32, mask bool), each [batches, batch_size]: every example exactly once.

    The last batch is padded with example 0, masked out.
    """
    batches = -(-count // batch_size)
    indices = np.zeros(batches * batch_size, np.int32)
    indices[:count] = np.arange(count)
    mask = np.arange(batches * batch_size) < count
    return indices.reshape(batches, batch_size), mask.reshape(batches, batch_size)


def fetch(examples: Examples, indices: Array, info: DatasetInfo) -> tuple[Array, Array]:
    """Returns (images float32 [B, H, W, C] standardized per channel, labels [B]); pure, jit-able.

    The values are (pixel / 255 − mean) / std, with the mean and std of `info`: the training set's,
    or ImageNet's of images of any size, whatever data set they are of.
    `indices`: int32 [B]; of `Arranged` examples they are all.
    """
    images, labels = examples
    if isinstance(examples, Arranged):
        count = len(indices)
        return standardized(images[:count], info), labels[:count]
    chosen = jnp.take(images, indices, axis=0)
    return standardized(chosen, info), jnp.take(labels, indices, axis=0)


def standardized(pixels: Array, info: DatasetInfo) -> Array:
    """Returns (pixel / 255 − mean) / std by channel, float32, of values from 0 to 255."""
    mean, std = jnp.asarray(info.mean, jnp.float32), jnp.asarray(info.std, jnp.float32)
    return (pixels.astype(jnp.float32) / 255 - mean) / std


def pixels_of(images: Array, info: DatasetInfo) -> Array:
    """Returns standardized images as uint8: the standardization undone, rounded."""
    mean, std = jnp.asarray(info.mean, jnp.float32), jnp.asarray(info.std, jnp.float32)
    return jnp.round(255 * jnp.clip(images * std + mean, 0, 1)).astype(jnp.uint8)


def training_batch(
    examples: Examples, config: Any, info: DatasetInfo, seed: Array, step: Array, indices: Array
) -> tuple[Array, Array]:
    """Returns (images, targets) of a step as the model gets them.

    Standardized; cropped, mirrored and cut out; mixed; then RandAugment on their pixels, after
    mixing as in NFNets' recipe. The targets are the labels, int32 [B]; where examples are mixed,
    float32 [B, K]. `config` is the config's `data`; `indices`: int32 [B]. Pure, jit-able.
    """
    images, targets = fetch(examples, indices, info)
    key = step_key(seed, step)
    images = augment(
        key,
        images,
        crop_padding=config.crop_padding,
        flip=config.flip,
        cutout_size=config.cutout_size,
    )
    if config.mixup_alpha is not None or config.cutmix_alpha is not None:
        images, targets = mix(
            key,
            images,
            targets,
            info.num_classes,
            mixup_alpha=config.mixup_alpha,
            mixup_share=config.mixup_share,
            cutmix_alpha=config.cutmix_alpha,
            cutmix_share=config.cutmix_share,
        )
    if config.randaugment_layers:
        pixels = rand_augment(
            key,
            pixels_of(images, info),
            layers=config.randaugment_layers,
            magnitude=config.randaugment_magnitude,
        )
        images = standardized(pixels, info)
    return images, targets
