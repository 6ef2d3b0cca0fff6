"""Parameters that are set from the first batch, before step 0 (`conv.data_dependent`).

The batch is that of step 0, augmented as it will be trained on, so the start is a function of the
config alone, and a resumed run finds the same one.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax import Array

from normlab.data import train_indices, training_batch
from normlab.models.weight_space import START
from normlab.training import parallel
from normlab.training.examples import RunData
from normlab.training.setup import Parts
from normlab.training.state import TrainState


def start_from_data(
    parts: Parts, state: TrainState, data: RunData, compiler: parallel.Compiler
) -> TrainState:
    """Returns the state at step 0 with the gains and biases that the first batch calls for."""
    config, mesh = parts.config, parallel.make_mesh(parts.config)
    indices = train_indices(config.seed, 0, 1, parts.length.batch_size, len(data.train))

    def started(variables: Any, examples: Any, seed: Array, rows: Array) -> Any:
        rows = parallel.shard_rows(rows, mesh)
        step = jnp.zeros((), jnp.int32)
        images, _ = training_batch(examples, config.data, parts.info, seed, step, rows)
        images = parallel.shard_rows(images, mesh)
        collections = [START, "batch_stats"]  # the statistics of this pass are dropped
        _, found = parts.model.apply(variables, images, train=True, mutable=collections)
        return merged(variables["params"], found[START])

    variables = parallel.replicate(state.variables(), mesh)
    examples, rows = next(iter(data.train.steps(config.seed, 0, indices, 1)))
    arguments = (variables, examples, parallel.seed_array(config.seed), jnp.asarray(rows[0]))
    params = compiler("start", started, *arguments)(*arguments)
    if state.ema is None:
        return state.replace(params=params)
    # Arrays of their own: the state is donated, and a donated one must not be two.
    ema = {**state.ema, "params": jax.tree.map(jnp.copy, params)}
    return state.replace(params=params, ema=ema)


def merged(params: Any, found: Any) -> Any:
    """Returns the tree `params` with the arrays of the tree `found` in their places."""
    flat = traverse_util.flatten_dict(params)
    return traverse_util.unflatten_dict(flat | traverse_util.flatten_dict(found))
