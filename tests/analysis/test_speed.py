"""The arithmetic of the benchmark, by hand, and one measurement of everything at a tiny shape."""

import pytest

from normlab.analysis import speed
from normlab.errors import UserError
from normlab.norms import NORMS

MIB = 2**20
IMAGENET_EARLY = (64, 56, 56, 256)  # an example has 802,816 values, 3.06 MiB in float32


@pytest.mark.parametrize(
    ("norm", "fields", "passes"),
    [
        # Statistics: read x. Then read it again and write y. Backward: read x and dy for the sums;
        # then read both and write dx.
        ("batch_norm", {}, (3, 5)),
        ("switchable_norm", {}, (3, 5)),  # a third of it is batch normalization
        # The mean, then the mean distance from it, then y.
        ("l1_batch_norm", {}, (4, 5)),
        # dx = dy − mean(dy): read dy; read it and write dx.
        ("mean_only_batch_norm", {}, (3, 3)),
        # 56·56·256 values of 4 bytes are 3.06 MiB: the second pass comes from memory, too.
        ("layer_norm", {}, (3, 5)),
        ("proxy_norm", {}, (3, 5)),
        # A group of 8 channels is 98 KiB, a channel 12 KiB, a position 1 KiB.
        ("group_norm", {"num_groups": 32}, (2, 3)),
        ("instance_norm", {}, (2, 3)),
        ("filter_response_norm", {}, (2, 3)),
        ("layer_norm", {"axes": "channel"}, (2, 3)),
        ("rms_norm", {"axes": "channel"}, (2, 3)),
        ("dyt", {}, (2, 3)),
        ("derf", {}, (2, 3)),
        ("none", {}, None),
        ("online_norm", {}, None),
    ],
)
def test_least_passes_over_the_tensor(norm, fields, passes):
    assert speed.least_passes(norm, IMAGENET_EARLY, 4, fields, cache=MIB) == passes


def test_a_group_that_fits_in_the_cache_is_read_once():
    # 14·14·1024 values are 784 KiB in float32 and 392 in bfloat16.
    shape = (256, 14, 14, 1024)
    assert speed.least_passes("layer_norm", shape, 4, {}, cache=784 * 1024) == (2, 3)
    assert speed.least_passes("layer_norm", shape, 4, {}, cache=783 * 1024) == (3, 5)
    assert speed.least_passes("layer_norm", shape, 2, {}, cache=783 * 1024) == (2, 3)
    # Statistics over the batch do not care.
    assert speed.least_passes("batch_norm", (2, 4), 4, {}, cache=MIB) == (3, 5)


@pytest.mark.parametrize("norm", list(NORMS))
def test_every_normalizer_can_be_made_as_it_is_timed(norm):
    for shape in speed.SHAPES.values():
        speed.make(norm, speed.bench_fields(norm, shape))


def test_fields_are_the_defaults_save_for_tokens_and_few_channels():
    assert speed.bench_fields("layer_norm", (64, 197, 384)) == {"axes": "channel"}
    assert speed.bench_fields("layer_norm", (128, 32, 32, 16)) == {}
    assert speed.bench_fields("group_norm", (128, 32, 32, 16)) == {"num_groups": 8}
    assert speed.bench_fields("group_norm", (128, 8, 8, 64)) == {}
    assert speed.bench_fields("proxy_norm", (128, 32, 32, 16)) == {}  # one group is its default
    assert speed.bench_fields("group_norm", (2, 4, 4, 1)) == {"num_groups": 1}


def test_contenders_take_turns_and_a_turns_first_call_is_not_timed():
    calls = []

    def contender(name, seconds):
        def turn():
            calls.append(name)
            return seconds.pop(0)

        return turn

    # Slow enough for one timed call a turn; the first of each pair is thrown away.
    turns = {"a": contender("a", [9.0, 1.0, 9.0, 2.0]), "b": contender("b", [9.0, 3.0, 9.0, 4.0])}
    assert speed.take_turns(turns, rounds=2) == {"a": [1.0, 2.0], "b": [3.0, 4.0]}
    assert "".join(calls) == "aabbaabb"


def test_a_fast_contender_is_called_more_often_and_the_mean_counts():
    # 0.02 s a turn: four calls of 5 ms, the untimed one before them.
    seconds = [1.0, 0.005, 0.006, 0.004, 0.007, 99.0]
    assert speed.take_turns({"a": lambda: seconds.pop(0)}, rounds=1) == {"a": [0.0055]}
    assert seconds == [99.0]


def test_quotients_are_of_the_fastest_rounds():
    seconds = {
        "copy": [1.0, 5.0],
        "x forward": [8.0, 2.0, 4.0],
        "x forward torch 0": [4.0],
        "x forward torch 1": [3.0, 1.0],
    }
    pace = speed._pace(seconds, "x forward", 3, 100)
    assert (pace.seconds, pace.least_seconds, pace.bytes) == (4.0, 2.0, 300)
    # A copy has 2 passes in 1 s; here are 3 in 2 s.
    assert pace.share == 0.75
    assert (pace.torch_seconds, pace.torch_ratio) == (1.0, 2.0)


def test_a_measurement_at_a_tiny_shape():
    # 8·4·4·16 float32 are 8192 bytes.
    copy, batch, none = speed.measure(
        ["batch_norm", "none"], "tiny", (8, 4, 4, 16), "float32", rounds=2
    )
    assert (copy.norm, batch.norm, none.norm) == ("copy", "batch_norm", "none")
    assert copy.forward.share == 1.0
    assert (batch.forward.bytes, batch.both.bytes) == (3 * 8192, 8 * 8192)
    assert 0 < batch.forward.least_seconds <= batch.forward.seconds
    assert batch.forward.share > 0
    assert batch.forward.torch_ratio is None
    assert none.forward.share is None
    assert none.kept_bytes == 0


@pytest.mark.parametrize(
    "norm",
    [
        "batch_norm",
        "layer_norm",
        "rms_norm",
        "group_norm",
        "instance_norm",
        "filter_response_norm",
        "evonorm_b0",
        "evonorm_s0",
    ],
)
def test_the_gradient_keeps_x_and_statistics_and_no_other_tensor(norm):
    # 4·8·8·16 float32 are 16,384 bytes; a statistic of an example's channel is of 64 positions.
    shape = (4, 8, 8, 16)
    _, row = speed.measure([norm], "tiny", shape, "float32", rounds=1)
    # Of a batch in groups x itself is kept in another shape, and counts.
    whole = 16_384 if norm in ("batch_norm", "evonorm_b0") else 0
    assert whole <= row.kept_bytes < whole + 16_384 // 2


def test_shapes_have_names_or_sizes():
    assert speed.parse_shape("tokens") == (64, 197, 384)
    assert speed.parse_shape("8x4x4x16") == (8, 4, 4, 16)
    for wrong in ("8", "8x0x4", "8x", "-1x4", "token"):
        with pytest.raises(UserError, match=f"unknown shape '{wrong}'"):
            speed.parse_shape(wrong)


def test_the_cache_is_of_a_plausible_size():
    assert 2**16 <= speed.cache_bytes() <= 2**28
