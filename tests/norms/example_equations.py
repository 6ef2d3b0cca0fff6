"""Normalizers with statistics within an example, or mixed, or none, in float64 numpy from their
papers' equations. Where no number of an equation is said, it is unverified.
"""

import functools
import math

import numpy as np
from batch_equations import average
from paper_reference import Case, affine, counted, each_example, ghost_of, groups_of

from normlab.models.activations import relu
from normlab.norms import (
    Derf,
    DynamicTanh,
    EvoNormB0,
    EvoNormS0,
    FilterResponseNorm,
    GroupNorm,
    Identity,
    InstanceNorm,
    LayerNorm,
    ProxyNorm,
    RMSNorm,
    SwitchableNorm,
)

EPSILON = 1e-5


def stateless(standardize):
    """The forward function of `standardize(params, x, mask)`, then gain and offset."""

    def forward(params, state, x, mask, train):
        return affine(params, standardize(params, x, mask)), state

    return forward


def of_examples(of_values):
    """`of_values(example, its values that count [M, C])`, for each example."""

    def standardize(params, x, mask):
        return np.stack([of_values(*pair) for pair in each_example(x, mask)])

    return standardize


def none():
    return Case(Identity(), lambda params, state, x, mask, train: (x, state))


# Layer normalization, Ba et al. 2016, eq. 3; RMSNorm, Zhang & Sennrich 2019, eq. 4 ----------------


def layer_norm(axes="all", elementwise=False):
    def over_all(example, values):
        return (example - values.mean()) / np.sqrt(values.var() + EPSILON)

    def over_channels(params, x, mask):
        mean = x.mean(-1, keepdims=True)
        return (x - mean) / np.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + EPSILON)

    standardize = of_examples(over_all) if axes == "all" else over_channels
    return Case(LayerNorm(axes=axes, elementwise=elementwise), stateless(standardize))


def rms_norm(axes="all"):
    def over_all(example, values):
        return example / np.sqrt((values**2).mean() + EPSILON)

    def over_channels(params, x, mask):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPSILON)

    standardize = of_examples(over_all) if axes == "all" else over_channels
    return Case(RMSNorm(axes=axes), stateless(standardize))


# Group normalization, Wu & He 2018, eq. 1 and 7; instance, Ulyanov et al. 2016 --------------------


def grouped(groups):
    def standardize(example, values):
        y, size = np.empty_like(example), example.shape[-1] // groups
        for group in range(groups):
            part = (..., slice(group * size, (group + 1) * size))
            y[part] = (example[part] - values[part].mean()) / np.sqrt(values[part].var() + EPSILON)
        return y

    return of_examples(standardize)


def group_norm(groups=2):
    return Case(GroupNorm(num_groups=groups), stateless(grouped(groups)))


def instance_norm():
    def standardize(example, values):
        return (example - values.mean(0)) / np.sqrt(values.var(0) + EPSILON)

    return Case(InstanceNorm(), stateless(of_examples(standardize)))


# Filter response normalization, Singh & Krishnan 2019 ---------------------------------------------


def filter_response_norm(learn_epsilon="single"):
    def forward(params, state, x, mask, train):
        def standardize(example, values):
            extra = abs(params.get("extra_epsilon", 0))
            return example / np.sqrt((values**2).mean(0) + 1e-6 + extra)

        y = affine(params, of_examples(standardize)(params, x, mask))
        return np.maximum(y, params["tau"]), state

    return Case(FilterResponseNorm(learn_epsilon=learn_epsilon), forward)


# EvoNorm, Liu et al. 2020, table 2 ----------------------------------------------------------------


def evonorm_s0(groups=2):
    def standardize(params, x, mask):
        rows = []
        for example, values in each_example(x, mask):
            parts = np.split(values, groups, axis=1)
            # One value has no spread: see the module.
            deviations = [np.sqrt(g.var() + EPSILON) if g.size > 1 else 1 for g in parts]
            below = np.repeat(deviations, x.shape[-1] // groups)
            rows.append(example * (1 + np.tanh(params["v"] * example / 2)) / 2 / below)
        return np.stack(rows)

    return Case(EvoNormS0(num_groups=groups), stateless(standardize))


def evonorm_b0(ghost=None):
    def forward(params, state, x, mask, train):
        y, new = np.empty_like(x), []
        own = [np.sqrt(values.var(0) + EPSILON) for _, values in each_example(x, mask)]
        for rows in groups_of(len(x), ghost if train else None):
            values = counted(x[rows], None if mask is None else mask[rows])
            var = state["var"]
            if train and len(values):
                new.append(values.var(0))
                var = new[-1] if len(values) > 1 else 1  # as above
            for i in range(len(x))[rows]:
                right = params["v"] * x[i] + own[i]
                y[i] = x[i] / np.maximum(np.sqrt(var + EPSILON), right)
        return affine(params, y), average(state, {"var": np.mean(new, 0)} if train else {})

    return Case(EvoNormB0(**ghost_of(ghost)), forward)


# Switchable normalization, Luo et al. 2018, eq. 3 -------------------------------------------------


def switchable_norm(ghost=None):
    def softmax(logits):
        return np.exp(logits) / np.exp(logits).sum()

    def forward(params, state, x, mask, train):
        y, new = np.empty_like(x), []
        weights = softmax(params["mean_weight"]), softmax(params["var_weight"])
        pairs = list(each_example(x, mask))
        for rows in groups_of(len(x), ghost if train else None):
            values = counted(x[rows], None if mask is None else mask[rows])
            mean, var = state["mean"], state["var"]
            if train and len(values):
                mean, var = values.mean(0), values.var(0)
                new.append((mean, var))
            for i in range(len(x))[rows]:
                example, own = pairs[i]
                means, variances = [own.mean(), mean], [own.var(), var]
                if len(weights[0]) == 3:  # several positions
                    means, variances = [own.mean(0), *means], [own.var(0), *variances]
                mixed_mean, mixed_var = (
                    sum(w * part for w, part in zip(weight, parts, strict=True))
                    for weight, parts in zip(weights, (means, variances), strict=True)
                )
                y[i] = (example - mixed_mean) / np.sqrt(mixed_var + EPSILON)
        found = dict(zip(("mean", "var"), np.mean(new, 0), strict=True)) if train else {}
        return affine(params, y), average(state, found)

    return Case(SwitchableNorm(**ghost_of(ghost)), forward)


# Proxy normalization, Labatie et al. 2021 ---------------------------------------------------------


@functools.cache
def gaussian_quantiles(count=200):
    """By bisection of the distribution function."""
    low, high = np.full(count, -9.0), np.full(count, 9.0)
    for _ in range(60):
        middle = (low + high) / 2
        below = [0.5 * math.erfc(-z / math.sqrt(2)) for z in middle]
        under = np.array(below) < (np.arange(count) + 0.5) / count
        low, high = np.where(under, middle, low), np.where(under, high, middle)
    return low[:, None]


def proxy_norm(groups=1):
    quantiles = gaussian_quantiles()

    def forward(params, state, x, mask, train):
        y = np.maximum(affine(params, grouped(groups)(params, x, mask)), 0)
        z = (1 + params["proxy_scale"]) * quantiles + params["proxy_bias"]
        proxy = np.maximum(affine(params, z), 0)
        return (y - proxy.mean(0)) / np.sqrt(proxy.var(0) + 0.03), state

    return Case(ProxyNorm(num_groups=groups, activation=relu), forward)


# Dynamic tanh, Zhu et al. 2025, algorithm 1; dynamic erf, Chen et al. 2025 ------------------------


def dyt():
    return Case(DynamicTanh(), stateless(lambda params, x, mask: np.tanh(params["alpha"] * x)))


def derf():
    def standardize(params, x, mask):
        return np.vectorize(math.erf)(params["alpha"] * x + params["shift"])

    return Case(Derf(), stateless(standardize))
