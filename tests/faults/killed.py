"""`python killed.py PHASE SIGNAL PART JOURNAL -- ARGUMENTS`: normlab, which sends itself a signal.

It comes when the phase (training, evaluation, checkpoint; none: no signal) is entered for the third
time, after PART of the seconds that the phase took the time before, from a thread of its own. So
the moments spread over the phase, wherever the code then is. The phase that was met is written to
JOURNAL first. The run knows nothing of it.
"""

import functools
import os
import sys
import threading
import time
from pathlib import Path

from normlab.cli import main
from normlab.training import checkpoint, loop
from normlab.training.evaluate import Evaluator


class Killer:
    """Sends the signal, once."""

    def __init__(self, phase, number, part, journal):
        self.phase, self.number, self.part, self.journal = phase, number, part, journal
        self.now = "between"
        self.entered = 0
        self.took = 0.0

    def watch(self, phase, function):
        """Returns a function that is the phase."""

        @functools.wraps(function)
        def watched(*arguments, **settings):
            if phase == self.phase:
                self.entered += 1
                if self.entered == 3:
                    threading.Thread(target=self.kill, daemon=True).start()
            self.now, start = phase, time.perf_counter()
            try:
                return function(*arguments, **settings)
            finally:
                self.now = "between"
                if phase == self.phase:
                    self.took = time.perf_counter() - start

        return watched

    def kill(self):
        time.sleep(self.part * self.took)
        with self.journal.open("a") as file:
            file.write(f"{self.now} {self.number}\n")
        os.kill(os.getpid(), self.number)


if __name__ == "__main__":
    phase, number, part, journal, _, *arguments = sys.argv[1:]
    killer = Killer(phase, int(number), float(part), Path(journal))
    loop._Run._advance = killer.watch("training", loop._Run._advance)
    Evaluator.running = killer.watch("evaluation", Evaluator.running)
    checkpoint.save = killer.watch("checkpoint", checkpoint.save)
    sys.exit(main(arguments))
