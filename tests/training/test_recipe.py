"""Runs with all that a normalizer-free recipe has: soft targets, dropout, clipping, an average."""

import jax
import pytest
from small_run import SMALL, final_parameters, lines

from normlab.config import load_config
from normlab.data import evaluated
from normlab.errors import UserError
from normlab.models import MLP, MODELS
from normlab.training.loop import train
from normlab.training.setup import build_parts

RECIPE = {
    "data.flip": True,
    "data.mixup_alpha": 0.2,
    "data.mixup_share": 0.5,
    "data.cutmix_alpha": 1.0,
    "data.cutmix_share": 0.5,
    "data.randaugment_layers": 1,
    "data.randaugment_magnitude": 5,
    "train.label_smoothing": 0.1,
    "train.ema_decay": 0.99999,
    "train.ema_warmup": True,
    "optim.agc_clipping": 0.01,
    "optim.sam_rho": 0.05,
    "optim.nesterov": True,
}


class DroppingMLP(MLP):
    """An MLP behind dropout of half of its input."""

    def __call__(self, x, *, train, mask=None):
        if train and self.has_rng("dropout"):
            x = 2 * x * jax.random.bernoulli(self.make_rng("dropout"), shape=x.shape)
        return super().__call__(x, train=train, mask=mask)


@pytest.fixture
def dropping(monkeypatch):
    monkeypatch.setitem(MODELS, "dropping_mlp", DroppingMLP)


def config_of(model="mlp", recipe=RECIPE, **fields):
    steps = {name: value for name, value in SMALL.items() if not name.startswith("model.")}
    names = {name.replace("__", "."): value for name, value in fields.items()}
    source = f"configs/digits.py:model={model},norm=batch_norm"
    return load_config(source, {**steps, "model.widths": (8,), **recipe, **names})


class Cut(Exception):
    pass


@pytest.mark.parametrize(
    "recipe", [{}, pytest.param(RECIPE, marks=pytest.mark.slow)], ids=["dropout", "recipe"]
)
def test_a_run_cut_off_ends_with_the_bytes_of_one_that_was_not(recipe, dropping, tmp_path):
    config = config_of("dropping_mlp", recipe)
    train(config, tmp_path / "whole")

    def cut(step, _total, line):
        if line and (step, line["split"]) == (10, "train"):
            raise Cut

    with pytest.raises(Cut):
        train(config, tmp_path / "cut", progress=cut)
    train(config, tmp_path / "cut")
    whole, resumed = ((tmp_path / name / "metrics.jsonl") for name in ("whole", "cut"))
    assert resumed.read_bytes() == whole.read_bytes()
    of_both = [final_parameters(tmp_path / name, config) for name in ("whole", "cut")]
    assert of_both[0] == of_both[1]


def test_a_run_gives_its_model_a_key_to_train_with_and_none_to_be_evaluated(dropping, tmp_path):
    for model in ("mlp", "dropping_mlp"):
        fields = {"train__num_steps": 1, "optim__base_lr": 1e-30}
        train(config_of(model, {}, **fields), tmp_path / model)
    plain, dropped = (lines(tmp_path / model) for model in ("mlp", "dropping_mlp"))
    assert plain[0]["split"] == "train"
    assert dropped[0]["loss"] != plain[0]["loss"]
    # The weights have not moved, but BatchNorm's averages have: batch statistics show the weights.
    name = "accuracy_batch_statistics"
    assert dropped[-1][name] == plain[-1][name]


def test_it_logs_how_much_was_clipped_by_parameter(tmp_path):
    train(config_of("mlp", {"optim.agc_clipping": 0.01}, train__num_steps=2), tmp_path)
    [line] = [line for line in lines(tmp_path) if line["split"] == "layers"]
    clipped = {name: value for name, value in line.items() if name.endswith("/clipped")}
    names = ("dense1/kernel", "norm1/scale", "norm1/bias", "head/bias")
    assert set(clipped) == {f"{name}/clipped" for name in names}
    assert all(0 <= value <= 1 for value in clipped.values())
    # Nothing has moved from zero but by clipped steps, and λ·ε = 1e-5 is little.
    assert clipped["norm1/bias/clipped"] == 1


@pytest.mark.slow
def test_the_recipe_learns(tmp_path):
    """Soft targets, noise and clipping and all: well above the 10% of chance."""
    fields = {"train__num_steps": 150, "eval__every_steps": 150, "checkpoint__every_steps": 150}
    result = train(config_of("mlp", optim__agc_clipping=0.1, **fields), tmp_path)
    assert result["test_accuracy"] > 0.5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data__mixup_share": 1.5}, r"'data\.mixup_share' = 1\.5 must be from 0\.0 to 1\.0"),
        ({"data__randaugment_layers": -1}, r"'data\.randaugment_layers' = -1 must be from 0"),
        ({"data__randaugment_magnitude": 31}, r"'data\.randaugment_magnitude' = 31 must be from"),
        ({"data__mixup_share": 0.6}, "are more than the batch; e.g. 0.5 each"),
        ({"data__eval_image_size": 16}, r"'data\.eval_image_size' = 16: the images of 'digits'"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_in_one_line(fields, message):
    with pytest.raises(UserError, match=message) as caught:
        build_parts(config_of("mlp", **fields))
    assert "\n" not in str(caught.value)


# configs/nfnet_imagenet.py


def recipe(model, **fields):
    names = {name.replace("__", "."): value for name, value in fields.items()}
    return load_config(f"configs/nfnet_imagenet.py:model={model}", names)


@pytest.mark.parametrize(
    ("model", "side", "magnitude"), [("resnet50", 224, 10), ("nfnet_f0", 192, 5)]
)
def test_the_config_is_the_papers(model, side, magnitude):
    config = recipe(model)
    assert (config.optim.momentum, config.optim.nesterov) == (0.9, True)
    assert (config.optim.weight_decay, config.optim.decay_roles) == (2e-5, ("kernel",))
    assert (config.optim.agc_clipping, config.optim.agc_epsilon) == (0.01, 1e-3)
    assert config.optim.agc_exclude == ("head/kernel",)
    assert (config.train.label_smoothing, config.train.batch_size) == (0.1, 4096)
    assert (config.train.ema_decay, config.train.ema_warmup) == (0.99999, True)
    assert (config.data.mixup_alpha, config.data.cutmix_alpha) == (0.2, 1.0)
    assert (config.data.mixup_share, config.data.cutmix_share) == (0.5, 0.5)
    assert config.data.randaugment_layers == 4
    assert config.data.randaugment_magnitude == magnitude
    assert config.model.dtype == "bfloat16"
    parts = build_parts(config, need_data=False)
    assert parts.info.image_shape == (side, side, 3)


def test_another_size_is_evaluated_and_refused_where_the_model_cannot_take_it():
    config = recipe("resnet50", data__eval_image_size=256)
    parts = build_parts(config, need_data=False)
    assert evaluated(parts.info, config.data).image_shape == (256, 256, 3)
    with pytest.raises(
        UserError, match=r"'data\.eval_image_size' = 256: model 'vit_tiny' made for"
    ):
        build_parts(recipe("vit_tiny", data__eval_image_size=256), need_data=False)
