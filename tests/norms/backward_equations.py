"""Normalizers whose gradient is an equation of the paper's own, in float64 numpy.

A state may hold more than the module's: lists in place of rings, raw averages in place of corrected
ones. What the module does not have is not compared.
"""

import numpy as np
from paper_reference import Case, counted

from normlab.norms import FullNorm, MovingAverageBatchNorm, OnlineNorm, PowerNorm

EPSILON = 1e-5


def own_mean(values, mask):
    """The mean over what counts: [..., C] -> [C]."""
    return counted(values, mask).mean(0)


def weights(mask, x):
    """1 for what counts and 0 for what does not: [..., 1]."""
    return np.ones((*x.shape[:-1], 1)) if mask is None else mask[..., None].astype(float)


def with_affine(standardize, backward, control=lambda y, mask: (y, lambda g: g)):
    """(forward, backward) of a normalizer with gain, offset and then perhaps a control.

    `standardize(state, x, mask, train) -> (x̂, state after)`; `backward(state, x, mask, g)` -> (the
    gradient by x from that by x̂, state after); `control(y, mask) -> (output, its derivative)`.
    """

    def forward(params, state, x, mask, train):
        standard, after = standardize(state, x, mask, train)
        y, _ = control(params["scale"] * standard + params["bias"], mask)
        return y, after

    def slopes(params, state, x, mask, g):
        standard, _ = standardize(state, x, mask, True)
        g = control(params["scale"] * standard + params["bias"], mask)[1](g)
        by_x, moved = backward(state, x, mask, params["scale"] * g)
        axes = tuple(range(x.ndim - 1))
        return {"scale": (g * standard).sum(axes), "bias": g.sum(axes)}, by_x, moved

    return forward, slopes


# Full normalization: this project's definition (normlab/norms/full.py) ----------------------------


def full_norm(momentum=0.8):
    """Averages from zero of E[x], E[x²] and the derivatives by mean and variance, each over
    1 − momentum^t.
    """

    def raw(state, name, new):
        return momentum * state.get(name, 0) + (1 - momentum) * new

    def standardize(state, x, mask, train):
        if not train:
            return (x - state["mean"]) / np.sqrt(state["var"] + EPSILON), state
        step = state["step"] + 1
        first, second = raw(state, "m1", own_mean(x, mask)), raw(state, "m2", own_mean(x**2, mask))
        mean = first / (1 - momentum**step)
        var = second / (1 - momentum**step) - mean**2
        after = {"mean": mean, "var": var, "step": step, "m1": first, "m2": second}
        return (x - mean) / np.sqrt(var + EPSILON), state | after

    def backward(state, x, mask, g):
        _, after = standardize(state, x, mask, True)
        root, centered = np.sqrt(after["var"] + EPSILON), x - after["mean"]
        axes = tuple(range(x.ndim - 1))
        third = raw(state, "d1", (g * (-1 / root)).sum(axes))
        fourth = raw(state, "d2", (g * centered * (-0.5) * root**-3).sum(axes))
        a, b = (value / (1 - momentum ** after["step"]) for value in (third, fourth))
        share = weights(mask, x) / len(counted(x, mask))
        by_x = g / root + share * (a + 2 * centered * b)
        return by_x, {"backward_mean": a, "backward_var": b, "d1": third, "d2": fourth}

    return Case(FullNorm(momentum=momentum), *with_affine(standardize, backward))


# Moving average batch normalization, Yan et al. 2020, and its official code -----------------------


def moving_average_batch_norm(window=2, correct_after=3):
    def statistics(state, x, mask):
        """(squares of all batches, ψ² that normalizes, r, whether the window is full)."""
        squares = [*state.get("squares", []), own_mean(x**2, mask)]
        full = len(squares) > window
        square = np.mean(squares[-window:], 0) if full else squares[-1]
        r = np.sqrt((square + EPSILON) / (state["second_moment"] + EPSILON))
        return squares, square, np.clip(r, 0.2, 5) if len(squares) > correct_after else 1, full

    def standardize(state, x, mask, train):
        if not train:
            return x / np.sqrt(state["second_moment"] + EPSILON), state
        squares, square, r, _ = statistics(state, x, mask)
        moved = 0.98 * state["second_moment"] + 0.02 * square
        after = {"second_moment": moved, "squares": squares, "step": state["step"] + 1}
        kept = {name: state[name] for name in state if "window" not in name}
        return r * x / np.sqrt(square + EPSILON), kept | after

    def backward(state, x, mask, g):
        _, square, r, full = statistics(state, x, mask)
        root = np.sqrt(square + EPSILON)
        products = [*state.get("products", []), own_mean(r * g * x / root, mask)]
        product = np.mean(products[-window:], 0) if full else products[-1]
        by_x = (r * g - weights(mask, x) * x / root * product) / root
        return by_x, {"products": products}

    module = MovingAverageBatchNorm(
        window=window, warmup_steps=0, correction_start_steps=correct_after
    )
    return Case(module, *with_affine(standardize, backward))


# Online normalization, Chiley et al. 2019, and its official code ----------------------------------


def online_norm(control="clamp", f=0.9, b=0.8, limit=1.5):
    def entering(x, mask):
        """(number, what counts) of each example that enters the streams."""
        for t in range(len(x)):
            if mask is None or mask[t].any():
                yield t, slice(None) if mask is None else mask[t]

    def standardize(state, x, mask, train):
        mean, var = state["mean"], state["var"]
        if not train:
            return (x - mean) / np.sqrt(var + EPSILON), state
        y, chosen = np.empty_like(x), dict(entering(x, mask))
        for t, example in enumerate(x):
            y[t] = (example - mean) / np.sqrt(var + EPSILON)
            if t in chosen:
                values = counted(example[chosen[t]])
                own_mean, own_var = values.mean(0), values.var(0)
                var = f * var + (1 - f) * own_var + f * (1 - f) * (own_mean - mean) ** 2
                mean = f * mean + (1 - f) * own_mean
        return y, state | {"mean": mean, "var": var}

    def backward(state, x, mask, g):
        y, by_x = standardize(state, x, mask, True)[0], np.zeros_like(x)
        u, v = state["backward_mean"], state["backward_projection"]
        mean, var = state["mean"], state["var"]
        for t, chosen in entering(x, mask):
            root = np.sqrt(var + EPSILON)
            values = counted(x[t][chosen])
            own_mean, own_var = values.mean(0), values.var(0)
            var = f * var + (1 - f) * own_var + f * (1 - f) * (own_mean - mean) ** 2
            mean = f * mean + (1 - f) * own_mean
            left = g[t][chosen] - (1 - b) * v * y[t][chosen]
            v = v + counted(left * y[t][chosen]).mean(0)
            by_x[t][chosen] = left / root - (1 - b) * u
            u = u + counted(by_x[t][chosen]).mean(0)
        return by_x, {"backward_mean": u, "backward_projection": v}

    def clamp(y, mask):
        return np.clip(y, -limit, limit), lambda g: g * (np.abs(y) < limit)

    def layer_scale(y, mask):
        axes = tuple(range(1, y.ndim))
        count = weights(mask, y) * np.ones_like(y)
        count[count.sum(axes) == 0] = 1

        def mean(values):
            return (values * count).sum(axes, keepdims=True) / count.sum(axes, keepdims=True)

        root = np.sqrt(mean(y**2) + EPSILON)
        total = count.sum(axes, keepdims=True)
        scaled = y / root

        def derivative(g):
            return g / root - count * scaled * (g * scaled).sum(axes, keepdims=True) / total / root

        return scaled, derivative

    module = OnlineNorm(momentum=f, backward_momentum=b, control=control, limit=limit)
    holds = {"clamp": clamp, "scale": layer_scale}
    return Case(module, *with_affine(standardize, backward, holds[control]))


# Power normalization, Shen et al. 2020, algorithm 2 -----------------------------------------------


def power_norm(warmup=1, groups=2):
    """Group scaling first, then one batch of warm-up by the batch's own E[x²]."""

    def scaled(x):
        """(x over the root mean square of its groups of channels, its derivative's transpose)."""
        apart = x.reshape(*x.shape[:-1], groups, -1)
        root = np.sqrt((apart**2).mean(-1, keepdims=True) + EPSILON)
        y = apart / root

        def derivative(g):
            g = g.reshape(apart.shape)
            return ((g - y * (g * y).mean(-1, keepdims=True)) / root).reshape(x.shape)

        return y.reshape(x.shape), derivative

    def statistics(state, x, mask):
        own = own_mean(x**2, mask)
        warm = state["step"] < warmup
        return own, warm, np.sqrt((own if warm else state["second_moment"]) + EPSILON)

    def standardize(state, x, mask, train):
        x, _ = scaled(x)
        if not train:
            return x / np.sqrt(state["second_moment"] + EPSILON), state
        own, warm, root = statistics(state, x, mask)
        share = 1 / (state["step"] + 1) if warm else 0.1
        square = (1 - share) * state["second_moment"] + share * own
        return x / root, state | {"second_moment": square, "step": state["step"] + 1}

    def backward(state, x, mask, g):
        x, derivative = scaled(x)
        _, _, root = statistics(state, x, mask)
        v, z = state["backward_projection"], x / root
        left = g - weights(mask, x) * v * z
        # Algorithm 2's own form: ν(1 − (1 − α)Γ) + (1 − α)Λ, with Γ = E[x̂²], Λ = E[g·x̂].
        after = v * (1 - 0.3 * own_mean(z**2, mask)) + 0.3 * own_mean(g * z, mask)
        return derivative(left / root), {"backward_projection": after}

    module = PowerNorm(warmup_steps=warmup, backward_momentum=0.7, num_groups=groups)
    return Case(module, *with_affine(standardize, backward))
