"""One process of a run that fails at a step: python cut_run.py FOLDER STEP FIELDS [PLACE]."""

import contextlib
import json
import sys

from normlab.config import load_config
from normlab.hosts import Place
from normlab.training.loop import train
from normlab.training.processes import joined


def main(folder, step, fields, *place):
    """Trains, and ends process 0 at the first line of metrics from `step` on."""

    def cut(here, _total, line):
        if line and here >= int(step):
            sys.exit("cut")

    config = load_config("configs/digits.py", json.loads(fields))
    coordinator, count, index = place or ("", "1", "0")
    with contextlib.ExitStack() as several:
        if int(count) > 1:
            several.enter_context(joined(Place(coordinator, int(count), int(index)), 60))
        train(config, folder, progress=cut if int(index) == 0 else None)


if __name__ == "__main__":
    main(*sys.argv[1:])
