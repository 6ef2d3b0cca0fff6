"""Cross-Iteration Batch Normalization (CBN). Yao, Cao, Zheng, Huang & Lin 2021, arXiv:2002.05712.

Statistics over the last k batches. Those of a past batch are compensated for what the weights θ of
the layer before have done since, to first order (eq. 5 to 8, numbers unverified):

    μ_{t−τ}(θ_t) ≈ μ_{t−τ} + ⟨∂μ_{t−τ}/∂θ, θ_t − θ_{t−τ}⟩,    likewise ν_{t−τ} = E[x²],
    μ̄ = mean_τ μ_{t−τ}(θ_t),    σ̄² = mean_τ max(ν_{t−τ}(θ_t), μ_{t−τ}(θ_t)²) − μ̄².

Gradients flow through the batch at hand alone. Derivatives by the weights of earlier layers are
left out, as the paper does, which finds them small.

Notes:
* The variance is compensated in place of ν, which is the same up to the square of the change of μ
  (and that is taken off here as there):
  ν' − μ'² = σ² + ⟨∂σ²/∂θ, Δθ⟩ − ⟨∂μ/∂θ, Δθ⟩². So nothing cancels where the mean is large.
* In the first steps of a run weights move too fast, hence `burn_in_steps` of plain batch
  normalization, as in the paper: some epochs; here 3% of the run (unverified).
* Of a layer with other parameters than its kernel (weight norm's gain) the kernel's change alone is
  compensated.
* Where no linear layer stands before it (after a sum, in a transformer) there is nothing to
  compensate with, and statistics of the past enter as they were.
* Running averages, for inference, are of μ̄ and σ̄² (unverified).

One window serves the whole batch, so the scope of batch statistics has no meaning here.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from normlab.norms.backward import share_of_mean
from normlab.norms.functional import Moments, normalize, pool_moments, statistics_dtype
from normlab.norms.groups import (
    GroupedBatch,
    WholeBatchNormalizer,
    all_finite,
    gathers_moments,
    group_batch,
    moving_averages,
    sow_moments,
    summed_over_devices,
    whole_batch,
)
from normlab.norms.normalizer import (
    Facts,
    LayerBefore,
    output_dtype,
    scale_and_bias,
)


class CrossIterationBatchNorm(WholeBatchNormalizer):
    """Normalizes each channel over the last batches, brought up to the weights of now.

    State: `mean`, `var` [C], `window_mean`, `window_var` [K, C] with K = window − 1, and after a
    layer with a kernel [..., C] `window_kernel`, `window_mean_slope`, `window_var_slope`
    [K, ..., C], all float32 at least; `step`, int32, the number of updates.
    """

    window: int = 8  # batches over which statistics are taken, the one at hand included
    momentum: float = 0.9  # weight of the old value in the running averages
    epsilon: float = 1e-5  # added to the variance, inside the root
    burn_in_steps: int = 0  # updates of plain batch normalization

    stateful: ClassVar[bool] = True
    facts: ClassVar[Facts] = Facts(
        over="N H W and past batches",
        at_inference="running mean and variance",
        passes=(3, 5),
        equals=(
            "batch_norm in training: window 1",
            "batch_norm of all batches of the window: weights at rest",
        ),
    )
    needs_layer: ClassVar[bool] = True
    fractions: ClassVar[Mapping[str, float]] = {"burn_in": 0.03}

    @nn.compact
    def __call__(
        self, x: Array, *, train: bool, mask: Array | None = None, layer: LayerBefore | None = None
    ) -> Array:
        """x [N, ..., C], mask [N] or [N, ...] -> y [N, ..., C]; `layer`: what x comes from.

        A batch of nothing unmasked is normalized by the running statistics and changes no state. A
        statistic that is not finite leaves the whole state as it was. Raises ValueError for a
        window of less than one batch.
        """
        if self.window < 1:
            raise ValueError(f"window {self.window} is not 1 or more")
        channels = x.shape[-1]
        state_dtype = statistics_dtype(self.param_dtype)

        def state(name: str, start: Any, *shape: int) -> Any:
            return self.variable("batch_stats", name, start, shape, state_dtype)

        mean, var = state("mean", jnp.zeros, channels), state("var", jnp.ones, channels)
        shapes: dict[str, tuple[int, ...]] = {"mean": (channels,), "var": (channels,)}
        if layer is not None:
            kernel = layer.kernel.shape
            shapes |= {"kernel": kernel, "mean_slope": kernel, "var_slope": kernel}
        past = {
            name: state(f"window_{name}", jnp.zeros, self.window - 1, *shape)
            for name, shape in shapes.items()
        }
        step = self.variable("batch_stats", "step", jnp.zeros, (), jnp.int32)
        scale, bias = scale_and_bias(self, (channels,))
        dtype = output_dtype(self, x)
        if not train:
            inverse_std = jax.lax.rsqrt(var.value + self.epsilon)
            return normalize(x, mean.value, inverse_std, scale, bias).astype(dtype)

        batch = group_batch(self, x, mask, grouping=whole_batch(self))
        filled = jnp.where(step.value < self.burn_in_steps, 0, step.value)
        if gathers_moments(self):  # not those of batches before
            filled = jnp.zeros_like(filled)
        values = {name: variable.value for name, variable in past.items()}
        together = _over_window(batch, values, filled, layer)
        batch_mean = batch.unless_empty(together.mean, mean.value)
        batch_var = batch.unless_empty(together.var, var.value)
        inverse_std = jax.lax.rsqrt(batch_var + self.epsilon)
        y = normalize(batch.values, batch_mean, inverse_std, scale, bias, batch.shift)

        if not self.is_initializing():
            sow_moments(self, batch)
            old = {"mean": mean.value, "var": var.value}
            new = {"mean": together.mean, "var": together.var}
            averages, moved = moving_averages(self, old, new, batch, self.momentum)
            remembered = _to_remember(batch, layer) if self.window > 1 else {}
            if remembered:  # their finiteness tells of padding that the layer before did not clean
                moved = moved & all_finite(self, remembered)
            mean.value = jnp.where(moved, averages["mean"], mean.value)
            var.value = jnp.where(moved, averages["var"], var.value)
            if remembered:
                slot = step.value % (self.window - 1)
                for name, value in remembered.items():
                    kept = past[name].value
                    past[name].value = kept.at[slot].set(jnp.where(moved, value, kept[slot]))
            step.value = step.value + moved.astype(jnp.int32)
        return y.reshape(x.shape).astype(dtype)

    def state_from_moments(self, moments: Moments) -> dict[str, Array]:
        """Returns the `batch_stats` entries that stand for population moments [C]."""
        return {"mean": moments.mean, "var": moments.var}


def _over_window(
    batch: GroupedBatch, past: dict[str, Array], filled: Array, layer: LayerBefore | None
) -> Moments:
    """Returns the moments over the batch and the first `filled` of the window, as the batch's."""
    mean, var = past["mean"], past["var"]
    if layer is not None:
        axes = tuple(range(1, past["kernel"].ndim - 1))
        change = layer.kernel - past["kernel"]
        shift = jnp.sum(past["mean_slope"] * change, axes)
        mean = mean + shift
        var = var + jnp.sum(past["var_slope"] * change, axes) - jnp.square(shift)
        var = jnp.maximum(var, 0)
    there = (jnp.arange(len(mean)) < filled)[:, None]
    one = jnp.ones_like(batch.moments.mean.reshape(1, -1))
    own = Moments(
        count=one, mean=batch.moments.mean.reshape(1, -1), var=batch.moments.var.reshape(1, -1)
    )
    # Batches have equal weight, and a place of the window that is still empty has none.
    before = jax.lax.stop_gradient(
        Moments(count=jnp.broadcast_to(there, mean.shape).astype(mean.dtype), mean=mean, var=var)
    )
    parts = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), own, before)
    shape = batch.moments.mean.shape
    return jax.tree.map(lambda part: part.reshape(shape), pool_moments(parts, (0,)))


def _to_remember(batch: GroupedBatch, layer: LayerBefore | None) -> dict[str, Array]:
    """Returns the batch's mean and variance [C] and, [..., C] as the kernel, their derivatives."""
    moments, values = jax.lax.stop_gradient((batch.moments, batch.values))
    found = {"mean": moments.mean.reshape(-1), "var": moments.var.reshape(-1)}
    if layer is None:
        return found
    kernel = jax.lax.stop_gradient(layer.kernel)
    output, pull = jax.vjp(layer.output, kernel)

    def slope(of_values: Array) -> Array:
        """Returns the kernel's derivative of Σ of_values·x."""
        own = pull(of_values.reshape(output.shape).astype(output.dtype))[0]
        return summed_over_devices(batch.grouping.axis_name, own)

    share = jnp.broadcast_to(share_of_mean(batch), values.shape).astype(moments.mean.dtype)
    return found | {
        "kernel": kernel,
        "mean_slope": slope(share),
        "var_slope": slope(2 * share * (values - moments.mean)),
    }
