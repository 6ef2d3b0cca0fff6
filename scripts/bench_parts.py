"""What the benchmarks of training share: a run on random images, taken step by step."""

import jax
import numpy as np
from ml_collections import ConfigDict

from normlab.training import parallel
from normlab.training.examples import Resident
from normlab.training.setup import build_parts
from normlab.training.state import create_state
from normlab.training.step import how_to_step


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
        how = how_to_step(self.parts, self.mesh)
        self._take = parallel.take_steps(*how, self.compiler)

    def step(self) -> None:
        """Takes a step, on the same examples each time, and waits for it."""
        seed = parallel.seed_array(self.parts.config.seed)
        self.state = self._take(self.state, self.feed.examples, seed, self._rows)
        jax.block_until_ready(self.state)
