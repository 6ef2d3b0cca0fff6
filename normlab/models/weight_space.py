"""Convolutions and dense layers whose weights are a function of their parameters: `config.conv`.

The functions are those of `norms/weight_*.py` and `norms/scaled_weight_standardization.py`; here
they become layers. A layer's parameters are `kernel`, drawn by the same key as the plain layer's,
`bias`, and where the method has one `gain`, a number for each output unit.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from jax import Array
from jax.typing import DTypeLike

from normlab.models.conv import Padding, StandardConv, he_normal, lecun_normal, sides
from normlab.norms.normalizer import Initializer
from normlab.norms.scaled_weight_standardization import scaled_standardized_weights
from normlab.norms.weight_centering import centered_weights
from normlab.norms.weight_norm import data_dependent_start, normalized_weights, weight_norms
from normlab.norms.weight_standardization import standardized_weights

START = "data_dependent_start"
"""The collection that asks a layer for the gain and bias that the batch at hand calls for."""

FAN_IN = nn.initializers.variance_scaling(1.0, "fan_in", "normal")


class WeightSpaceLayer(nn.Module):
    """A convolution (with a kernel size) or dense layer with the weights that its method gives."""

    features: int
    method: "WeightSpaceConv"
    kernel_init: Callable[..., Array]
    use_bias: bool
    dtype: DTypeLike
    kernel_size: tuple[int, ...] = ()
    strides: int = 1
    padding: Padding = None
    groups: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x [N, H, W, C] -> [N, H', W', features], or x [..., C] -> [..., features]."""
        shape = (*self.kernel_size, x.shape[-1] // self.groups, self.features)
        params = {"kernel": self.param("kernel", self.kernel_init, shape)}
        bias = (
            self.param("bias", nn.initializers.zeros, (self.features,)) if self.use_bias else None
        )
        initial_gain = self.method.initial_gain(params["kernel"])
        if initial_gain is not None:
            params["gain"] = self.param("gain", lambda _: initial_gain)
        x, weights = promote_dtype(x, self.method.weights(params), dtype=self.dtype)
        y = self._linear(x, weights)
        if self.is_mutable_collection(START) and not self.is_initializing():
            gain, bias, y = data_dependent_start(y, params["gain"], bias)
            self.put_variable(START, "gain", gain)
            if bias is not None:
                self.put_variable(START, "bias", bias)
            return y
        return y if bias is None else y + bias.astype(y.dtype)

    def _linear(self, x: Array, weights: Array) -> Array:
        if not self.kernel_size:
            return jnp.dot(x, weights)
        return self.method.convolution()(
            x,
            weights,
            (self.strides, self.strides),
            sides(self.kernel_size[0], self.padding),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=self.groups,
        )


@dataclasses.dataclass(frozen=True)
class WeightSpaceConv(StandardConv):
    """Base of the methods: what their layers' weights are."""

    def weights(self, params: dict[str, Array]) -> Array:
        """Returns the weights of a layer with these parameters (`kernel`, perhaps `gain`)."""
        raise NotImplementedError

    def initial_gain(self, kernel: Array) -> Array | None:
        """Returns the gain [features] that a layer starts with; None for a method without."""
        return jnp.ones(kernel.shape[-1])

    def conv(
        self,
        features: int,
        kernel_size: int,
        *,
        name: str,
        strides: int = 1,
        padding: Padding = None,
        groups: int = 1,
        use_bias: bool = False,
        dtype: DTypeLike = "float32",
        kernel_init: Initializer | None = None,
    ) -> nn.Module:
        """Returns a square 2-D convolution, as `StandardConv.conv`."""
        return WeightSpaceLayer(
            features,
            self,
            kernel_init or self.kernel_init,
            use_bias,
            dtype,
            kernel_size=(kernel_size, kernel_size),
            strides=strides,
            padding=padding,
            groups=groups,
            name=name,
        )

    def dense(
        self,
        features: int,
        *,
        name: str,
        use_bias: bool = True,
        dtype: DTypeLike = "float32",
        kernel_init: Initializer = lecun_normal,
    ) -> nn.Module:
        """Returns a dense layer, as `StandardConv.dense`."""
        return WeightSpaceLayer(features, self, kernel_init, use_bias, dtype, name=name)

    @property
    def kernel_init(self) -> Callable[..., Array]:
        """The initializer of convolution kernels."""
        return he_normal


@dataclasses.dataclass(frozen=True)
class WeightNorm(WeightSpaceConv):
    """Weights g·v/‖v‖ for each unit (Salimans & Kingma 2016), the head's too."""

    data_dependent: bool = False  # start with gain and bias that give the first batch variance 1

    def weights(self, params: dict[str, Array]) -> Array:
        """Returns g·v/‖v‖."""
        return normalized_weights(params["kernel"], params["gain"])

    def initial_gain(self, kernel: Array) -> Array:
        """Returns ‖v‖: the layer starts as the plain one."""
        return weight_norms(kernel)

    def head(
        self,
        features: int,
        *,
        name: str,
        dtype: DTypeLike = "float32",
        kernel_init: Initializer = lecun_normal,
    ) -> nn.Module:
        """Returns the classifier: weight-normalized like every layer (paper, section 2)."""
        return self.dense(features, name=name, dtype=dtype, kernel_init=kernel_init)

    @property
    def starts_from_data(self) -> bool:
        """True if gains and biases are set from the first batch."""
        return self.data_dependent


@dataclasses.dataclass(frozen=True)
class WeightCentering(WeightSpaceConv):
    """Weights of mean 0 for each unit (Yan et al. 2020), for normalizers that center nothing."""

    def weights(self, params: dict[str, Array]) -> Array:
        """Returns W − μ."""
        return centered_weights(params["kernel"])

    def initial_gain(self, kernel: Array) -> None:
        """Returns None: there is no gain."""


@dataclasses.dataclass(frozen=True)
class WeightStandardization(WeightSpaceConv):
    """Weights of mean 0 and variance 1 for each unit (Qiao et al. 2019); a plain head."""

    variance: str = "biased"  # of the weights: biased (TensorFlow, big_vision), unbiased (PyTorch)
    epsilon: float = 1e-5  # added to the standard deviation, outside the root

    def weights(self, params: dict[str, Array]) -> Array:
        """Returns (W − μ)/(σ + ε)."""
        return standardized_weights(params["kernel"], self.variance, self.epsilon)

    def initial_gain(self, kernel: Array) -> None:
        """Returns None: there is no gain; the normalizer behind the layer has one."""


@dataclasses.dataclass(frozen=True)
class ScaledWeightStandardization(WeightSpaceConv):
    """Standardized weights over √fan-in, with a learned gain (Brock et al. 2021); a plain head."""

    epsilon: float = 1e-4  # 1e-4 as a floor (DeepMind), 1e-5 or 1e-6 added (timm)
    epsilon_form: str = "floor"  # floor: max(variance·fan-in, epsilon); added: variance + epsilon

    def weights(self, params: dict[str, Array]) -> Array:
        """Returns gain·(W − μ)/(σ√N)."""
        return scaled_standardized_weights(
            params["kernel"], params["gain"], self.epsilon, self.epsilon_form
        )

    @property
    def kernel_init(self) -> Callable[..., Array]:
        """N(0, 1/fan-in), as DeepMind's; it sets how far a step of the optimizer turns a kernel."""
        return FAN_IN


DEFINITIONS: dict[type[WeightSpaceConv], Callable[..., Array]] = {
    WeightNorm: normalized_weights,
    WeightCentering: centered_weights,
    WeightStandardization: standardized_weights,
    ScaledWeightStandardization: scaled_standardized_weights,
}
"""The function of each method; the file that it stands in gives definition and source."""


def weights_of(layer: nn.Module, params: dict[str, Array]) -> Array:
    """Returns what a convolution or dense layer with these parameters multiplies its input with."""
    if isinstance(layer, WeightSpaceLayer):
        return layer.method.weights(params)
    return params["kernel"]
