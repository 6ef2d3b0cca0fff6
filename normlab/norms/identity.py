"""No normalization: the control of every comparison."""

from typing import ClassVar

from jax import Array

from normlab.norms.normalizer import Facts, Normalizer


class Identity(Normalizer):
    """Returns its input: y = x."""

    facts: ClassVar[Facts] = Facts()

    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """x [N, ..., C] -> x."""
        return x
