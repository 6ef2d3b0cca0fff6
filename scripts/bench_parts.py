"""What the benchmarks of training share: a run on random images, taken step by step."""

from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from normlab.data import dropout_key, training_batch
from normlab.training import parallel
from normlab.training.examples import Resident
from normlab.training.loop import train_step_of
from normlab.training.setup import build_parts
from normlab.training.state import create_state
from normlab.training.step import Batch


class RandomTraining:
    """A config's training; no time depends on what is in the images, so they are random."""

    def __init__(self, config: ConfigDict) -> None:
        self.parts = build_parts(config, need_data=False)
        self.compiler = parallel.Compiler(parallel.in_order(config))
        self.mesh = parallel.make_mesh(config)
        info, random = self.parts.info, np.random.default_rng(0)
        images = random.integers(256, size=(info.num_train, *info.image_shape), dtype=np.uint8)
        labels = random.integers(info.num_classes, size=info.num_train, dtype=np.int32)
        self.feed = Resident(parallel.replicate((images, labels), self.mesh))
        self.state = parallel.replicate(create_state(self.parts, self.compiler), self.mesh)
        self._rows = np.arange(self.parts.length.batch_size, dtype=np.int32)[None]
        layout = parallel.make_layout(config)
        step = train_step_of(self.parts)
        self._take = parallel.take_steps(step, self._batch, layout, self.mesh, self.compiler)

    def step(self) -> None:
        """Takes a step, on the same examples each time, and waits for it."""
        seed = parallel.seed_array(self.parts.config.seed)
        self.state = self._take(self.state, self.feed.examples, seed, self._rows)
        jax.block_until_ready(self.state)

    def _batch(self, data: Any, seed: Any, step: Any, indices: Any) -> Batch:
        config, info = self.parts.config, self.parts.info
        made = training_batch(data, config.data, info, seed, step, indices)
        return Batch(*made, key=dropout_key(seed, step))
