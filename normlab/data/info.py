"""Facts about data sets that need no data: shapes, sizes, classes, means. Imports nothing heavy."""

import dataclasses

from normlab.errors import unknown


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """A data set of images, as normlab sees it."""

    name: str
    image_shape: tuple[int, int, int]  # H, W, C, as the model gets them
    num_classes: int
    num_train: int
    num_test: int
    class_names: tuple[str, ...]  # may be empty: then nothing is known of them
    mean: tuple[float, ...]  # of each channel over the training pixels, in [0, 1]
    std: tuple[float, ...]  # standard deviation likewise
    one_size: bool = True  # all images have this shape; others are decoded and cropped by batches


_DIGITS = tuple("0123456789")
_CLOTHES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
_CIFAR10_NAMES = "airplane automobile bird cat deer dog frog horse ship truck"
_CIFAR100_NAMES = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus
    butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab
    crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard
    lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom
    oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
    possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake
    spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor
    train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""

_IMAGENETTE_NAMES = (
    "n01440764 n02102040 n02979186 n03000684 n03028079 n03394916 n03417042 n03425413 n03445777 "
    "n03888257"  # tench, springer, cassette player, chain saw, church, horn, truck, pump, ball, ...
)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# Means and deviations were computed from the training images, in float64, except CIFAR-100's,
# which are the usual published ones (e.g. weiaicunzai/pytorch-cifar100, conf/global_settings.py),
# and ImageNet's (those of torchvision's models).
DATASETS = {
    info.name: info
    for info in (
        DatasetInfo("digits", (8, 8, 1), 10, 1437, 360, _DIGITS, (0.3058,), (0.3761,)),
        DatasetInfo("mnist", (28, 28, 1), 10, 60_000, 10_000, _DIGITS, (0.1307,), (0.3081,)),
        DatasetInfo(
            "fashion_mnist", (28, 28, 1), 10, 60_000, 10_000, _CLOTHES, (0.2860,), (0.3530,)
        ),
        DatasetInfo(
            "cifar10",
            (32, 32, 3),
            10,
            50_000,
            10_000,
            tuple(_CIFAR10_NAMES.split()),
            (0.4914, 0.4822, 0.4465),
            (0.2470, 0.2435, 0.2616),
        ),
        DatasetInfo(
            "cifar100",
            (32, 32, 3),
            100,
            50_000,
            10_000,
            tuple(_CIFAR100_NAMES.split()),
            (0.5071, 0.4865, 0.4409),
            (0.2673, 0.2564, 0.2762),
        ),
        DatasetInfo(
            "imagenette",
            (224, 224, 3),
            10,
            9_469,
            3_925,
            tuple(_IMAGENETTE_NAMES.split()),
            IMAGENET_MEAN,
            IMAGENET_STD,
            one_size=False,
        ),
        DatasetInfo(
            "imagenet",
            (224, 224, 3),
            1000,
            1_281_167,
            50_000,
            (),
            IMAGENET_MEAN,
            IMAGENET_STD,
            one_size=False,
        ),
    )
}
"""Data sets by config name."""


def binary(info: DatasetInfo) -> DatasetInfo:
    """Returns the facts of a data set whose pixels are 0 and 255, to be read as 0 and 1."""
    channels = info.image_shape[-1]
    return dataclasses.replace(info, mean=(0.0,) * channels, std=(1.0,) * channels)


def dataset_info(name: str) -> DatasetInfo:
    """Returns the facts of the data set `name`; raises UserError if there is none."""
    if name not in DATASETS:
        raise unknown("data set", name, DATASETS)
    return DATASETS[name]
