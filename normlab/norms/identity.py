"""No normalization: the control of every comparison."""

from jax import Array

from normlab.norms.normalizer import Normalizer


class Identity(Normalizer):
    """Returns its input: y = x."""

    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """x [N, ..., C] -> x."""
        return x
