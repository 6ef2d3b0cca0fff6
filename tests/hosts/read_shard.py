"""One process's share of a run's data: python read_shard.py CONFIG FIELDS PLACE.

Prints, as JSON, which images it decodes for two steps and for one batch of evaluation, and which
labels its devices get.
"""

import json
import sys

import numpy as np

from normlab.config import load_config
from normlab.data import Encoded
from normlab.hosts import Place
from normlab.training import parallel
from normlab.training.examples import load_data
from normlab.training.processes import joined


def main(source, fields, coordinator, count, index):
    """Reads the batches that the test asks for."""
    decoded = []
    whole = Encoded.decode

    def decode(self, i, channels):
        decoded.append(i)
        return whole(self, i, channels)

    Encoded.decode = decode
    config = load_config(source, json.loads(fields))
    with joined(Place(coordinator, int(count), int(index)), 60):
        data = load_data(config, parallel.make_mesh(config))
        rows = np.arange(16, dtype=np.int32).reshape(2, 8)
        trained = [own_labels(batch) for batch, _ in data.train.steps(0, 0, rows, 1)]
        seen, decoded[:] = sorted(decoded), []
        [(batch, _)] = data.evaluated["test"].batches([np.arange(5, dtype=np.int32)])
        found = {"trained": trained, "decoded": seen, "tested": own_labels(batch)}
        print(json.dumps({**found, "tested_decoded": sorted(decoded)}))


def own_labels(batch):
    """Returns the labels on each of the process's devices, one after another."""
    shards = sorted(batch.labels.addressable_shards, key=lambda shard: shard.index[0].start)
    return np.concatenate([shard.data for shard in shards]).tolist()


if __name__ == "__main__":
    main(*sys.argv[1:])
