"""Normalizers with statistics over a batch, in float64 numpy from their papers' equations."""

import numpy as np
from paper_reference import Case, affine, counted, ghost_of, groups_of

from normlab.norms import (
    BatchGroupNorm,
    BatchLayerNorm,
    BatchNorm,
    BatchRenorm,
    CrossIterationBatchNorm,
    DecorrelatedBatchNorm,
    IterativeNorm,
    L1BatchNorm,
    MeanOnlyBatchNorm,
)

EPSILON = 1e-5


def average(old, new, momentum=0.9):
    """momentum·old + (1 − momentum)·new, of each entry that is new."""
    return old | {name: momentum * old[name] + (1 - momentum) * new[name] for name in new}


def of_groups(statistics, standardize, stored=None, ghost=None):
    """The forward function of: statistics of each group of examples, averaged with equal weight.

    `statistics(values [M, C]) -> dict`; `standardize(x, dict)`; `stored(dict, M)` is what enters
    the average in its place. A group of nothing has the running ones and enters no average.
    """

    def forward(params, state, x, mask, train):
        if not train:
            return affine(params, standardize(x, state)), state
        parts, new = [], []
        for rows in groups_of(len(x), ghost):
            values = counted(x[rows], None if mask is None else mask[rows])
            own = statistics(values) if len(values) else state
            parts.append(standardize(x[rows], own))
            if len(values):
                new.append(stored(own, len(values)) if stored else own)
        means = {name: np.mean([entry[name] for entry in new], 0) for name in new[0]}
        return affine(params, np.concatenate(parts)), average(state, means)

    return forward


# Batch normalization, Ioffe & Szegedy 2015, algorithm 1 -------------------------------------------


def mean_and_variance(values):
    return {"mean": values.mean(0), "var": values.var(0)}


def by_root(x, own):
    return (x - own["mean"]) / np.sqrt(own["var"] + EPSILON)


def bessel(own, m):
    """m/(m − 1)·σ², algorithm 2, line 10."""
    return own | {"var": own["var"] * m / max(m - 1, 1)}


def batch_norm(ghost=None, **fields):
    stored = bessel if fields.get("running_variance") == "unbiased" else None
    forward = of_groups(mean_and_variance, by_root, stored, ghost)
    return Case(BatchNorm(**ghost_of(ghost), **fields), forward)


# Batch renormalization, Ioffe 2017, algorithm 1 ---------------------------------------------------


def batch_renorm(ghost=None, ramp=(1, 5, 3)):
    """The limits go from 1 and 0 after `ramp[0]` updates to 3 and 5 after `ramp[1]` and [2]."""
    begin, r_end, d_end = ramp

    def corrections(state, x, mask):
        """(r, d) of each group."""
        grown = [np.clip((state["step"] - begin) / (end - begin), 0, 1) for end in (r_end, d_end)]
        r_max, d_max = np.float32(1 + 2 * grown[0]), 5 * grown[1]  # limits are float32, always
        for rows in groups_of(len(x), ghost):
            values = counted(x[rows], None if mask is None else mask[rows])
            if not len(values):
                yield 1, 0
                continue
            sigma = np.sqrt(values.var(0) + EPSILON)
            d = (values.mean(0) - state["mean"]) / state["sigma"]
            yield (
                np.clip(sigma / state["sigma"], 1 / r_max, r_max),
                np.clip(d, -d_max, d_max),
            )

    def forward(params, state, x, mask, train, held=None):
        if not train:
            return affine(params, (x - state["mean"]) / state["sigma"]), state
        parts, new = [], []
        held = held or list(corrections(state, x, mask))
        for rows, (r, d) in zip(groups_of(len(x), ghost), held, strict=True):
            values = counted(x[rows], None if mask is None else mask[rows])
            own = state
            if len(values):
                own = {"mean": values.mean(0), "sigma": np.sqrt(values.var(0) + EPSILON)}
                new.append(own)
            parts.append((x[rows] - own["mean"]) / own["sigma"] * r + d)
        means = {name: np.mean([entry[name] for entry in new], 0) for name in new[0]}
        after = average(state, means) | {"step": state["step"] + 1}
        return affine(params, np.concatenate(parts)), after

    def hold(params, state, x, mask):
        held = list(corrections(state, x, mask))
        return lambda *arguments: forward(*arguments, held=held)

    names = ("ramp_start_steps", "r_ramp_end_steps", "d_ramp_end_steps")
    module = BatchRenorm(**dict(zip(names, ramp, strict=True)), **ghost_of(ghost))
    return Case(module, forward, hold=hold)


# Cross-iteration, Yao et al. 2021, weights at rest: means of μ and max(ν, μ²) over batches -------


def cross_iteration_batch_norm(window=2):
    def forward(params, state, x, mask, train):
        if not train:
            return affine(params, by_root(x, state)), state
        values = counted(x, mask)
        means = [*state.get("means", []), values.mean(0)][-window:]
        squares = [*state.get("squares", []), (values**2).mean(0)][-window:]
        mean = np.mean(means, 0)
        own = {"mean": mean, "var": np.mean(np.maximum(squares, np.square(means)), 0) - mean**2}
        kept = {name: state[name] for name in state if "window" not in name}
        after = average(kept, own) | {"means": means, "squares": squares, "step": state["step"] + 1}
        return affine(params, by_root(x, own)), after

    return Case(CrossIterationBatchNorm(window=window), forward)


# L1, Hoffer et al. 2018: σ = √(π/2)·E|x − μ| ------------------------------------------------------


def mean_and_deviation(values):
    mean = values.mean(0)
    return {"mean": mean, "sigma": np.sqrt(np.pi / 2) * np.abs(values - mean).mean(0)}


def l1_batch_norm(ghost=None):
    def standardize(x, own):
        return (x - own["mean"]) / (own["sigma"] + EPSILON)

    forward = of_groups(mean_and_deviation, standardize, ghost=ghost)
    return Case(L1BatchNorm(**ghost_of(ghost)), forward)


# Mean-only, Salimans & Kingma 2016, section 3 -----------------------------------------------------


def mean_only_batch_norm(ghost=None):
    forward = of_groups(
        lambda values: {"mean": values.mean(0)}, lambda x, own: x - own["mean"], ghost=ghost
    )
    return Case(MeanOnlyBatchNorm(**ghost_of(ghost)), forward)


# Whitening: Huang et al. 2018, algorithm 1, and 2019, algorithm 1 ---------------------------------


def root_by_eigenvectors(sigma):
    values, vectors = np.linalg.eigh(sigma)
    return vectors @ np.diag(values**-0.5) @ vectors.T


def root_by_newton(sigma):
    trace = np.trace(sigma)
    p = np.eye(len(sigma))
    for _ in range(5):
        p = 0.5 * (3 * p - p @ p @ p @ sigma / trace)
    return p / np.sqrt(trace)


def whitening(cls, root, ghost, size):
    def statistics(values):
        mean = values.mean(0)
        groups = np.split((values - mean).T, values.shape[1] // size)
        sigmas = [g @ g.T / g.shape[1] + EPSILON * np.eye(size) for g in groups]
        return {"mean": mean, "whitening": np.stack([root(sigma) for sigma in sigmas])}

    def standardize(x, own):
        grouped = (x - own["mean"]).reshape(*x.shape[:-1], -1, size)
        return np.einsum("...gj,gij->...gi", grouped, own["whitening"]).reshape(x.shape)

    module = cls(group_size=size, **ghost_of(ghost))
    return Case(module, of_groups(statistics, standardize, ghost=ghost))


def decorrelated_batch_norm(ghost=None, size=2):
    return whitening(DecorrelatedBatchNorm, root_by_eigenvectors, ghost, size)


def iterative_norm(ghost=None, size=2):
    return whitening(IterativeNorm, root_by_newton, ghost, size)


# Batch/group hybrid, Summers & Dinneen 2020 -------------------------------------------------------


def batch_group_norm(ghost=None, groups=2):
    def pooled(first, second):
        """Mean and variance of groups of channels, from each channel's E[x] and E[x²]."""
        size = len(first) // groups
        mean, square = (np.repeat(m.reshape(groups, -1).mean(1), size) for m in (first, second))
        return {"mean": mean, "var": square - mean**2}

    def forward(params, state, x, mask, train):
        running = state["mean"], state["var"] + state["mean"] ** 2
        if not train:
            return affine(params, by_root(x, pooled(*running))), state
        parts = []
        for rows in groups_of(len(x), ghost):
            values = counted(x[rows], None if mask is None else mask[rows])
            own = (values.mean(0), (values**2).mean(0)) if len(values) else running
            parts.append(by_root(x[rows], pooled(*own)))
        values = counted(x, mask)
        first = 0.9 * running[0] + 0.1 * values.mean(0)
        second = 0.9 * running[1] + 0.1 * (values**2).mean(0)
        after = {"mean": first, "var": second - first**2}
        return affine(params, np.concatenate(parts)), after

    return Case(BatchGroupNorm(num_groups=groups, **ghost_of(ghost)), forward)


# Batch layer normalization, Ziaee & Çano 2022, and its official layer -----------------------------


def batch_layer_norm(ghost=None, delta_sign=-1, running_variance="unbiased"):
    def mixed(x, features, mean, var, m):
        over_batch = (x - mean) / np.sqrt(var + 1e-3)
        weights = 1 / m - 1e-4, 1 - 1 / m + delta_sign * 1e-4
        return (weights[0] * features + weights[1] * over_batch) / np.sqrt(x.shape[-1])

    def forward(params, state, x, mask, train):
        own_mean, own_var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        features = (x - own_mean) / np.sqrt(own_var + 1e-3)
        size = max(state["batch_size"], 1)
        if not train:
            return affine(params, mixed(x, features, state["mean"], state["var"], size)), state
        mask = np.ones(x.shape[:-1], bool) if mask is None else mask
        y, after = np.empty_like(x), {name: np.copy(value) for name, value in state.items()}
        sizes = []
        for place in np.ndindex(x.shape[1:-1]):  # each has statistics of its own
            new = []
            for rows in groups_of(len(x), ghost):
                at, there = (rows, *place), mask[(rows, *place)]
                values, m = x[at][there], there.sum()
                mean, var = state["mean"][place], state["var"][place]
                if m:
                    mean, var = values.mean(0), values.var(0)
                    correction = m / max(m - 1, 1) if running_variance == "unbiased" else 1
                    own = own_mean[at][there].mean(0), own_var[at][there].mean(0)
                    new.append((mean, var * correction, *own))
                    sizes.append(m)
                y[at] = mixed(x[at], features[at], mean, var, m or size)
            if new:
                for name, value in zip(
                    ("mean", "var", "feature_mean", "feature_var"),
                    map(lambda parts: np.mean(parts, 0), zip(*new, strict=True)),
                    strict=True,
                ):
                    after[name][place] = 0.9 * state[name][place] + 0.1 * value
        return affine(params, y), after | {"batch_size": max(sizes)}

    module = BatchLayerNorm(
        delta_sign=delta_sign, running_variance=running_variance, **ghost_of(ghost)
    )
    return Case(module, forward)
