"""MixUp and CutMix: an example becomes two, and its target both labels. Pure, on the device.

MixUp (Zhang, Cissé, Dauphin & Lopez-Paz 2018, arXiv:1710.09412): λ·x + (1 − λ)·x', λ drawn from
Beta(α, α). CutMix (Yun et al. 2019, arXiv:1905.04899): a box of x' is pasted into x, its sides
√(1 − λ) of the image's and its centre uniform over the pixels; what is outside is lost, and the
weight of x is the part of it that is left. The target is weight·y + (1 − weight)·y'.

As in NFNets' code (deepmind-research/nfnets, dataset.py) each example has a λ of its own, where the
papers' code draws one a batch. Departures: the partner is an example of the same batch, by a
permutation as in the papers' code, so now and then the example itself (DeepMind takes two batches
for one); the examples that are mixed are a random part of the batch and not its first half, so that
ghost batches are alike.
"""

import jax
import jax.numpy as jnp
from jax import Array

from normlab.data.augmentation import rectangles
from normlab.data.draws import CUTMIX, MIXING, MIXUP


def mix(
    key: Array,
    images: Array,
    labels: Array,
    num_classes: int,
    *,
    mixup_alpha: float | None,
    mixup_share: float = 1.0,
    cutmix_alpha: float | None = None,
    cutmix_share: float = 1.0,
) -> tuple[Array, Array]:
    """Returns the images [N, H, W, C], some mixed, and their targets float32 [N, num_classes].

    `labels`: int32 [N]. An α that is None is off. A share is of the batch: round(share·N) examples;
    where both want an example, MixUp has it.
    """
    count, height, width, _ = images.shape
    place = jax.random.permutation(jax.random.fold_in(key, MIXING), count)
    partners, kept, weights = jnp.arange(count), jnp.ones((count, 1, 1)), jnp.ones(count)
    if cutmix_alpha is not None:
        # From the other end than MixUp, so that neither moves what the other takes.
        chosen = place >= count - round(count * cutmix_share)
        key_partners, key_weights, key_centres = jax.random.split(
            jax.random.fold_in(key, CUTMIX), 3
        )
        share = jax.random.beta(key_weights, cutmix_alpha, cutmix_alpha, (count,))
        centres = jax.random.randint(key_centres, (count, 2), 0, jnp.array([height, width]))
        inside = box(centres, share, height, width).astype(jnp.float32)
        partners = jnp.where(chosen, jax.random.permutation(key_partners, count), partners)
        kept = jnp.where(chosen[:, None, None], 1.0 - inside, kept)
        weights = jnp.where(chosen, 1.0 - jnp.mean(inside, (1, 2)), weights)
    if mixup_alpha is not None:
        chosen = place < round(count * mixup_share)
        key_partners, key_weights = jax.random.split(jax.random.fold_in(key, MIXUP))
        share = jax.random.beta(key_weights, mixup_alpha, mixup_alpha, (count,))
        partners = jnp.where(chosen, jax.random.permutation(key_partners, count), partners)
        kept = jnp.where(chosen[:, None, None], share[:, None, None], kept)
        weights = jnp.where(chosen, share, weights)
    return (
        blend(images, images[partners], kept[..., None]),
        soft_targets(labels, labels[partners], weights, num_classes),
    )


def box(centres: Array, weights: Array, height: int, width: int) -> Array:
    """Returns bool [N, height, width], true in a box of about 1 − weight of the image's area.

    `centres`: int32 [N, 2], row and column; `weights` [N]. A side of s = ⌊length·√(1 − weight)⌋
    pixels reaches from centre − ⌊s/2⌋ to before centre + ⌊s/2⌋, what is outside cut off.
    """
    sides = jnp.sqrt(1.0 - weights)[:, None] * jnp.array([height, width])
    half = jnp.floor(sides).astype(jnp.int32) // 2
    return rectangles(centres - half, 2 * half, height, width)


def blend(images: Array, others: Array, kept: Array) -> Array:
    """Returns kept·images + (1 − kept)·others, `kept` of any shape that fits, in [0, 1]."""
    return (kept * images + (1.0 - kept) * others).astype(images.dtype)


def soft_targets(labels: Array, others: Array, weights: Array, num_classes: int) -> Array:
    """Returns weight·one-hot(label) + (1 − weight)·one-hot(other): float32 [N, num_classes]."""
    first, second = (jax.nn.one_hot(x, num_classes, dtype=jnp.float32) for x in (labels, others))
    return weights[:, None] * first + (1.0 - weights[:, None]) * second
