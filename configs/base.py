"""Every field of an experiment, with its meaning and unit; all other configs start from this one.

Choices (`model`, `norm`, `conv`, `optimizer`) decide which fields exist: `config.norm` holds `kind`
and the fields of the chosen normalizer's class, and likewise `config.model`, `config.conv` and the
optimizer's part of `config.optim`. Their meanings stand beside the fields of those classes.
"""

from ml_collections import ConfigDict

from normlab.config import add_duration, optional, parse_choices, section
from normlab.errors import unknown
from normlab.models import CONVS, INJECTED, MODELS, default_choices, norm_defaults
from normlab.norms import FACTORY_FIELDS, NORMS
from normlab.optim import OPTIMIZERS


def get_config(argument: str = "", **defaults: str) -> ConfigDict:
    """Returns the base config for the choices in `argument` (after the colon) over `defaults`."""
    choices = {"model": "cnn", "norm": "batch_norm", "conv": "standard", "optimizer": "sgd"}
    choices |= defaults
    chosen_model = parse_choices(argument, **choices)["model"]
    choices = parse_choices(argument, **(choices | default_choices(chosen_model)))
    model, norm, conv, optimizer = (choices[key] for key in ("model", "norm", "conv", "optimizer"))

    config = ConfigDict()
    config.seed = 0  # of initial values, data order and augmentation; variants that share it pair
    config.source = ""  # the config file and choices this came from (read-only)

    config.data = ConfigDict()
    config.data.name = "digits"  # `normlab list data`; of other folders, what you call them
    config.data.source = "sklearn"  # where bytes come from: sklearn (digits), archive, tfds, folder
    config.data.path = optional(str)  # the archive, the folder of images, the directory of tfds
    config.data.num_validation = 0  # training examples held out to choose on; 0: none
    config.data.binarize = False  # pixels become 0 below 128 and 1 from there, unscaled
    config.data.image_size = optional(int)  # side of images of any size, cropped; none: 224 pixels
    config.data.eval_image_size = optional(int)  # side when evaluated; none: as in training
    config.data.random_resized_crop = False  # train on random parts of such images, resized
    config.data.crop_area = (0.08, 1.0)  # least and largest such part, of the image's area
    config.data.eval_crop = 0.875  # side of the central part that is evaluated, of the shorter side
    config.data.interpolation = "bilinear"  # of resizing: bilinear, bicubic, lanczos, box, nearest
    config.data.crop_padding = 0  # pixels of zero padding before a random crop; 0: no crop
    config.data.flip = False  # mirror half of the training images left to right
    config.data.cutout_size = 0  # side of the square masked in each training image, pixels; 0: none
    config.data.mixup_alpha = optional(float)  # of Beta(α, α), a weight each; none: no MixUp
    config.data.mixup_share = 1.0  # part of a batch that MixUp mixes, another at each step
    config.data.cutmix_alpha = optional(float)  # of Beta(α, α), an area each; none: no CutMix
    config.data.cutmix_share = 1.0  # part of a batch that CutMix pastes into, none of it mixed up
    config.data.randaugment_layers = 0  # RandAugment operations on each training image; 0: none
    config.data.randaugment_magnitude = 10  # of each operation, 10 as the unit (docs/recipes.md)

    config.model = section(model, _choose("model", model, MODELS), leave_out=INJECTED)
    config.norm = section(norm, _choose("norm", norm, NORMS), leave_out=FACTORY_FIELDS)
    for name in norm_defaults(model).keys() & config.norm.keys():
        config.norm[name] = norm_defaults(model)[name]  # what a model of tokens has otherwise
    config.conv = section(conv, _choose("conv", conv, CONVS))
    for stem, part in NORMS[norm].fractions.items():
        add_duration(config, f"norm.{stem}", fraction=part)
    config.norm_overrides = ()  # pattern=kind of layers that differ, e.g. norm_stem=none

    config.batch_stats = ConfigDict()
    config.batch_stats.scope = "global"  # batch statistics over: global, device (share), ghost
    config.batch_stats.ghost_size = optional(int)  # consecutive examples in a group of scope ghost

    config.optim = section(optimizer, _choose("optimizer", optimizer, OPTIMIZERS))
    config.optim.base_lr = 0.1  # peak learning rate, at the reference batch size if one is set
    config.optim.reference_batch_size = optional(int)  # peak = base_lr * batch / this
    config.optim.schedule = "cosine"  # constant, piecewise, cosine, linear (to zero), after warmup
    add_duration(config, "optim.warmup", epochs=0.0)  # linear: step t (from 0) takes (t + 1)/warmup
    add_duration(config, "optim.milestones", fraction=(0.5, 0.75))  # piecewise: of decay
    config.optim.decay_factor = 0.1  # piecewise: factor at each milestone
    config.optim.weight_decay = 0.0  # coupled to the gradient (sgd, adam), decoupled (adamw, lamb)
    config.optim.decay_roles = ("kernel",)  # of kernel, bias, embedding, skip_gain, norm_scale, ...
    config.optim.clip_norm = optional(float)  # largest global L2 norm of a gradient; none: any
    config.optim.sam_rho = optional(float)  # radius of sharpness-aware minimization; none: without
    config.optim.agc_clipping = optional(float)  # of adaptive gradient clipping, λ; none: no AGC
    config.optim.agc_epsilon = 1e-3  # smallest norm of weights that AGC reckons with
    config.optim.agc_exclude = ("head/kernel",)  # patterns of parameters that AGC leaves alone
    config.optim.agc_groups = ()  # pattern=λ of parameters where it differs, e.g. stage1_*=0.02

    config.train = ConfigDict()
    config.train.batch_size = 128  # examples per step, over all devices
    add_duration(config, "train.num", ("steps", "epochs", "examples"), epochs=10.0)  # run length
    config.train.microbatches = 1  # parts of a batch whose gradients are accumulated one by one
    config.train.remat = False  # keep a residual block's input alone, and compute it again backward
    config.train.label_smoothing = 0.0  # probability mass spread evenly over the classes
    config.train.max_nonfinite = 10  # steps in a row with a non-finite value that end a run
    config.train.ema_decay = optional(float)  # of the moving average of weights and statistics
    config.train.ema_warmup = False  # its decay is at most (1 + t) / (10 + t) at step t from 0

    config.eval = ConfigDict()
    add_duration(config, "eval.every", epochs=1.0)  # between evaluations on the test set
    config.eval.batch_size = 1024  # examples at a time; no result depends on it
    config.eval.use_ema = True  # evaluate the moving average, where there is one

    config.probe = ConfigDict()
    config.probe.layer = optional(str)  # normalizer whose output is recorded at each evaluation
    config.probe.unit = 0  # its unit (channel), from 0
    config.probe.percentiles = (15.0, 50.0, 85.0)  # of that unit, and of the values of the layers
    config.probe.layers = ()  # patterns of normalizers watched at start and each log, as stage1_*
    config.probe.signals = False  # log the signals of each residual block there, too

    config.log = ConfigDict()
    add_duration(config, "log.every", epochs=1.0)  # between lines of training metrics
    config.log.tensorboard = True  # write the lines for TensorBoard, too: RUN/tensorboard/
    config.log.wandb_project = optional(str)  # send them to this project of Weights & Biases, too

    config.checkpoint = ConfigDict()
    add_duration(config, "checkpoint.every", fraction=0.1)  # between checkpoints; and at the end
    config.checkpoint.keep = optional(int)  # newest checkpoints to keep; none: all of them

    config.parallel = ConfigDict()
    config.parallel.mode = "jit"  # jit (one program over all devices) or pmap (a replica a device)
    config.parallel.num_devices = optional(int)  # devices that share a batch; none: all there are
    config.parallel.pad_batch = False  # pad and mask a batch that the devices do not divide
    config.parallel.steps_per_dispatch = optional(int)  # none: 1 on CPU, 50 on accelerators
    config.parallel.compilation_cache = optional(str)  # folder, or off; none: the user's cache
    return config


def _choose(what: str, name: str, registry: dict[str, type]) -> type:
    if name not in registry:
        raise unknown(what, name, registry)
    return registry[name]
