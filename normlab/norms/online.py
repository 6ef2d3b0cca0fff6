"""Online Normalization. Chiley et al. 2019, arXiv:1905.05894.

Examples enter one after the other. Each is normalized by the running mean and variance of those
before it, which then take in its own moments (μ_t, σ²_t, over its positions), the variance with the
spread between means:

    x̂_t = (x_t − μ)/√(σ² + ε),
    σ² ← α σ² + (1 − α) σ²_t + α(1 − α)(μ_t − μ)²,    μ ← α μ + (1 − α) μ_t.

In the backward pass two accumulated errors, v and u, take the place of batch normalization's
projections, again example by example:

    x̃ = g − (1 − β)·v·x̂,    v ← v + E[x̃·x̂],
    ∂ℓ/∂x = x̃/√(σ² + ε) − (1 − β)·u,    u ← u + E[∂ℓ/∂x].

Last of all, after gain and offset, what drifts is held: by clamping, or by layer scaling (division
by the root mean square of the example). This follows the official code (Cerebras, whose numpy and
PyTorch modules clamp at 5); its streams start at 0 and 1, so the first examples pass nearly as
they are.

There is one stream for all devices and groups: the scope of batch statistics has no meaning here.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from normlab.norms.backward import kept_unless_finite
from normlab.norms.examples import position_axes, prepare
from normlab.norms.functional import (
    Moments,
    affine,
    blend_moments,
    expand_mask,
    masked_mean,
    mean_square,
    moments,
    statistics_dtype,
)
from normlab.norms.groups import (
    WholeBatchNormalizer,
    all_finite,
    gathers_moments,
    group_batch,
    sow_moments,
    whole_batch,
)
from normlab.norms.normalizer import (
    Facts,
    output_dtype,
    scale_and_bias,
)

CONTROLS = ("clamp", "scale", "none")


class OnlineNorm(WholeBatchNormalizer):
    """Normalizes each example by the running statistics of those before it.

    State: `mean`, `var`, `backward_mean` (u), `backward_projection` (v) [C], float32 at least. The
    second pair moves only as `backward.py` says.
    """

    momentum: float = 0.999  # weight of the old value in mean and variance, at each example
    backward_momentum: float = 0.99  # decay of the accumulated errors, at each example
    epsilon: float = 1e-5  # added to the variance, inside the root
    control: str = "clamp"  # what holds the output: clamp, scale (to mean square 1), none
    limit: float = 5.0  # largest output, where it is clamped

    stateful: ClassVar[bool] = True
    facts: ClassVar[Facts] = Facts(over="examples before", at_inference="running mean and variance")

    @nn.compact
    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """x [N, ..., C], mask [N] or [N, ...] -> y [N, ..., C].

        An example of nothing unmasked enters no stream. A statistic that is not finite leaves the
        whole state as it was. Raises ValueError for an unknown control.
        """
        if self.control not in CONTROLS:
            raise ValueError(f"control {self.control!r} is none of {', '.join(CONTROLS)}")
        channels = x.shape[-1]
        shape = (channels,), statistics_dtype(self.param_dtype)
        mean = self.variable("batch_stats", "mean", jnp.zeros, *shape)
        var = self.variable("batch_stats", "var", jnp.ones, *shape)
        u = self.variable("batch_stats", "backward_mean", jnp.zeros, *shape)
        v = self.variable("batch_stats", "backward_projection", jnp.zeros, *shape)
        scale, bias = scale_and_bias(self, (channels,))
        dtype = output_dtype(self, x)
        own_mask = expand_mask(mask, x.shape)
        x, layer_mask = prepare(x, mask)
        values = x.astype(statistics_dtype(x.dtype))

        if train:
            axis_name = whole_batch(self).axis_name
            own = moments(values, position_axes(x), own_mask)
            means, variances, (new_mean, new_var) = _stream(
                axis_name, mean.value, var.value, own, self.momentum
            )
            if gathers_moments(self):  # not those under the state that they are to replace
                batch = group_batch(self, values, mask, grouping=whole_batch(self))
                sow_moments(self, batch)
                means, variances = batch.moments.mean[0], batch.moments.var[0]
            moved = all_finite(self, {"mean": new_mean, "var": new_var})
            standard = _control(
                axis_name,
                values,
                jnp.broadcast_to(means, own.mean.shape),
                jnp.broadcast_to(jax.lax.rsqrt(variances + self.epsilon), own.mean.shape),
                own_mask,
                jnp.asarray(1 - self.backward_momentum, values.dtype),
                moved,
                u.value,
                v.value,
            )
            if not self.is_initializing():
                mean.value = jnp.where(moved, new_mean, mean.value)
                var.value = jnp.where(moved, new_var, var.value)
        else:
            standard = (values - mean.value) * jax.lax.rsqrt(var.value + self.epsilon)
        return self._hold(affine(standard, scale, bias), layer_mask).astype(dtype)

    def _hold(self, y: Array, mask: Array | None) -> Array:
        if self.control == "clamp":
            return jnp.clip(y, -self.limit, self.limit)
        if self.control == "scale":
            square = mean_square(y, tuple(range(1, y.ndim)), mask)
            return y * jax.lax.rsqrt(square + self.epsilon)
        return y

    def state_from_moments(self, moments: Moments) -> dict[str, Array]:
        """Returns the `batch_stats` entries that stand for population moments [C]."""
        return {"mean": moments.mean, "var": moments.var}


def _stream(
    axis_name: str | None, mean: Array, var: Array, own: Moments, momentum: float
) -> tuple[Array, Array, tuple[Array, Array]]:
    """Returns mean and variance [N, 1, ..., 1, C] before each example, and [C] after the last."""

    def enter(state: tuple[Array, Array], example: Moments) -> tuple[Any, Any]:
        mean, var = state
        old = Moments(count=jnp.ones_like(mean), mean=mean, var=var)
        weight = (1 - momentum) * (example.count > 0)
        after = blend_moments(old, jax.tree.map(lambda part: part.reshape(-1), example), weight)
        return (after.mean.astype(mean.dtype), after.var.astype(var.dtype)), state

    flat = jax.tree.map(lambda part: part.reshape(part.shape[0], -1), own)
    last, (means, variances) = _one_by_one(
        axis_name, enter, (mean, var), jax.lax.stop_gradient(flat)
    )
    return means.reshape(own.mean.shape), variances.reshape(own.mean.shape), last


def _one_by_one(
    axis_name: str | None, enter: Callable[..., Any], state: Any, examples: Any
) -> tuple[Any, Any]:
    """Returns `lax.scan(enter, state, examples)`, over the examples of all devices in their order.

    The state is after the last of all examples; what is stacked is of this device's own.
    """
    if axis_name is None:
        return jax.lax.scan(enter, state, examples)
    share = len(jax.tree.leaves(examples)[0])
    every = jax.tree.map(lambda part: jax.lax.all_gather(part, axis_name, tiled=True), examples)
    last, stacked = jax.lax.scan(enter, state, every)
    first = jax.lax.axis_index(axis_name) * share
    return last, jax.tree.map(
        lambda part: jax.lax.dynamic_slice_in_dim(part, first, share), stacked
    )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _control(
    axis_name: str | None,
    x: Array,
    mean: Array,
    inverse_std: Array,
    mask: Array | None,
    rate: Array,
    moved: Array,
    u: Array,
    v: Array,
) -> Array:
    """Returns (x − mean)·inverse_std, with mean and inverse_std [N, 1, ..., 1, C].

    Its gradient by x is the control process of the module's docstring; the cotangents of u and v
    [C] are their values after the last example. `rate` is 1 − β.
    """
    return (x - mean) * inverse_std


def _forward(axis_name: str | None, *arguments: Any) -> tuple[Array, tuple[Any, ...]]:
    return _control(axis_name, *arguments), arguments


def _backward(axis_name: str | None, arguments: tuple[Any, ...], g: Array) -> tuple[Any, ...]:
    x, mean, inverse_std, mask, rate, moved, u, v = arguments
    standard, axes = (x - mean) * inverse_std, position_axes(x)
    counted = jnp.ones_like(x[..., :1]) if mask is None else mask.astype(x.dtype)

    def average(values: Array) -> Array:
        return masked_mean(values, axes, mask).reshape(len(x), -1)

    terms = (
        average(g * standard),
        average(standard**2),
        average(g),
        average(standard),
        inverse_std.reshape(len(x), -1),
        counted.max(tuple(range(1, x.ndim))) > 0,  # an example that enters the streams
    )

    def enter(state: tuple[Array, Array], terms: tuple[Array, ...]) -> tuple[Any, Any]:
        (u, v), (product, square, slope, center, inverse, enters) = state, terms
        new_v = v + product - rate * v * square
        new_u = u + (slope - rate * v * center) * inverse - rate * u
        after = jnp.where(enters, new_u, u), jnp.where(enters, new_v, v)
        return jax.tree.map(lambda new, old: new.astype(old.dtype), after, state), state

    after, (us, vs) = _one_by_one(axis_name, enter, (u, v), terms)
    us, vs = us.reshape(mean.shape), vs.reshape(mean.shape)
    by_x = inverse_std * (g - counted * rate * vs * standard) - counted * rate * us
    kept = kept_unless_finite(moved, after, (u, v))
    return by_x.astype(x.dtype), None, None, None, None, None, *kept


_control.defvjp(_forward, _backward)
