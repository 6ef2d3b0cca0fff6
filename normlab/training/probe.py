"""What flows through one unit: percentiles of a normalizer's output, which is the input of the
activation behind it, over the test set. Ioffe & Szegedy 2015 (arXiv:1502.03167), figure 1 (b, c).

Measured as the network would be used, with running statistics; the paper does not say on which
images its percentiles are. Of a normalizer that takes the activation's place (EvoNorm, filter
response and proxy normalization) they are behind the activation.
"""

from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax import Array
from ml_collections import ConfigDict

from normlab.data import DatasetInfo, Examples, eval_indices, fetch
from normlab.errors import UserError, unknown
from normlab.models.layers import norm_layers
from normlab.training.examples import Feed
from normlab.training.parallel import Compiler


def check_probe(config: ConfigDict, model: nn.Module, info: DatasetInfo) -> None:
    """Raises UserError for a layer or a unit that the model does not have."""
    if config.probe.layer is None:
        return
    channels = {x.path: x.shape[-1] for x in norm_layers(model, info.image_shape)}
    if config.probe.layer not in channels:
        raise unknown("'probe.layer'", config.probe.layer, channels)
    units = channels[config.probe.layer]
    if not 0 <= config.probe.unit < units:
        raise UserError(
            f"config field 'probe.unit' = {config.probe.unit} must be from 0 to {units - 1}"
        )
    for percentile in config.probe.percentiles:
        if not 0 <= percentile <= 100:
            raise UserError(
                f"config field 'probe.percentiles' has {percentile}; it must be from 0 to 100"
            )


def unit_percentiles(
    config: ConfigDict,
    model: nn.Module,
    info: DatasetInfo,
    compiler: Compiler,
    variables: dict[str, Any],
    examples: Feed,
) -> dict[str, float]:
    """Returns {"p15": value, ...} of the unit `config.probe` names, over all examples."""
    layer, unit = config.probe.layer, config.probe.unit

    def outputs(variables: dict[str, Any], data: Examples, rows: Array) -> Array:
        images, _ = fetch(data, rows, info)
        _, sown = model.apply(
            variables,
            images,
            train=False,
            capture_intermediates=lambda module, _: "/".join(module.path) == layer,
            mutable=["intermediates"],
        )
        [y] = jax.tree.leaves(sown["intermediates"])
        return y[..., unit]

    found = []
    indices, masks = eval_indices(len(examples), config.eval.batch_size)
    for (data, rows), mask in zip(examples.batches(indices), masks, strict=True):
        arguments = (variables, data, jax.numpy.asarray(rows))
        values = np.asarray(compiler("probe", outputs, *arguments)(*arguments), np.float64)
        found.append(values[mask].ravel())
    values = np.concatenate(found)
    percentiles = config.probe.percentiles
    return {f"p{p:g}": float(np.percentile(values, p)) for p in percentiles}
