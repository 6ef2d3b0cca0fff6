"""When runs in one process take their steps together, and when each by itself."""

import threading

import jax
import numpy as np
import pytest

from normlab.training import parallel
from normlab.training.replicas import Room, Seat, run_together
from normlab.training.signals import Signals


def asked(room, *counts):
    """What each run gets that asks for so many steps (None: it leaves), by place."""
    found = {}

    def run(place, count):
        if count is None:
            room.leave(place)
            return
        rows = np.zeros((count, 4), np.int32)
        state = {"weights": np.full(2, float(place)), "step": np.int32(0)}
        seed, compiler = np.uint32(place), parallel.Compiler()
        found[place] = room.take(place, program, compiler, (state, np.ones(2), seed, rows))

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(counts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return found


def program(state, data, seed, rows):
    return {"weights": state["weights"] + data + seed, "step": state["step"] + rows.shape[0]}


def test_what_all_take_is_compiled_as_each_would_be():
    seat = Seat(Room(jax.devices()[:1], Signals()), 0, parallel.Compiler())
    own = parallel.Compiler({"xla_disable_hlo_passes": "cse_barrier_expander"})
    seat.taking(program, program, own)
    assert seat.compiler.options == {"xla_disable_hlo_passes": "cse_barrier_expander"}


def test_a_run_alone_in_its_room_takes_its_steps_there():
    """Weights 0 + 1 + seed 0, after 3 steps."""
    state, seconds = asked(Room(jax.devices()[:1], Signals()), 3)[0]
    np.testing.assert_array_equal(state["weights"], [1, 1])
    assert int(state["step"]) == 3
    assert state["step"].shape == ()
    assert 0 < seconds < 60


def test_runs_that_ask_for_different_numbers_of_steps_go_on_by_themselves():
    assert asked(Room(jax.devices()[:1] * 2, Signals()), 5, 1) == {0: None, 1: None}


def test_when_one_has_left_the_others_go_on_by_themselves():
    room = Room(jax.devices()[:1] * 2, Signals())
    room.leave(0)
    assert asked(room, None, 5) == {1: None}


def test_who_waits_for_one_that_leaves_goes_on_alone():
    assert asked(Room(jax.devices()[:1] * 2, Signals()), 5, None) == {0: None}


def test_what_a_run_raises_is_raised_when_all_have_ended():
    def fail(seat):
        raise KeyError("lost")

    with pytest.raises(KeyError, match="lost"):
        run_together([fail], Signals())


def test_more_runs_than_devices_do_not_fit():
    works = [lambda seat: None] * (jax.local_device_count() + 1)
    with pytest.raises(ValueError, match="do not fit"):
        run_together(works, Signals())
