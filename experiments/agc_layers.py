"""Brock, De, Smith & Simonyan 2021 (arXiv:2102.06171), section 4.1: which layers to clip.

An NF-ResNet-50 at batch 4096, λ = 0.01, learning rate 1.6, with layers left out of adaptive
gradient clipping. The paper says, without numbers: it is always better not to clip the final linear
layer; the stem can often go without; all four stages of residual blocks must be clipped to train
stably.
"""

from normlab.experiment import Experiment, Published, Scale, above, all_of, close, grid, settings

LEFT_OUT = {
    "nothing": (),
    "head": ("head/kernel",),
    "head, stem": ("head/kernel", "conv_stem/*"),
    "head, stage 1": ("head/kernel", "stage1_*"),
    "head, stage 2": ("head/kernel", "stage2_*"),
    "head, stage 3": ("head/kernel", "stage3_*"),
    "head, all stages": ("head/kernel", "stage*"),
}

RECIPE = {
    "optim.reference_batch_size": 256,
    "optim.nesterov": True,
    "optim.schedule": "cosine",
    "optim.weight_decay": 5e-5,
    "optim.warmup_epochs": 5.0,
    "optim.agc_clipping": 0.01,
}

EXPERIMENT = Experiment(
    claim=(
        "At a large batch the final linear layer is better not clipped, the stem need not be, and "
        "every stage of residual blocks must be."
    ),
    paper=Published(
        metric="test_accuracy",
        rows={},
        setting="ImageNet, NF-ResNet-50, batch 4096, λ = 0.01, learning rate 1.6",
        source="section 4.1",
        sure="words only: no number is printed in the paper",
    ),
    scales={
        "smoke": Scale(
            "configs/digits.py",
            {
                **RECIPE,
                "model.stage_sizes": (1, 1, 1),
                "model.width": 8,
                "train.batch_size": 1024,
                "train.num_epochs": 20.0,
                "optim.base_lr": 0.4,
            },
            cost="4 minutes on 2 cores",
        ),
        "cifar": Scale(
            "configs/cifar10.py",
            {
                **RECIPE,
                "train.batch_size": 4096,
                "train.num_epochs": 90.0,
                "optim.base_lr": 0.1,
            },
            cost="a GPU; 8 hours a run on 2 cores",
        ),
    },
    sweep=grid({"norm": ["none"]}, fixed={"model": "nf_resnet20"})
    * settings({name: {"optim.agc_exclude": paths} for name, paths in LEFT_OUT.items()}),
    seeds=3,
    verdict=all_of(
        above(("none", "head"), ("none", "nothing")),
        close(("none", "head, stem"), ("none", "head"), margin=1.0),
        above(("none", "head"), ("none", "head, all stages")),
        *(above(("none", "head"), ("none", f"head, stage {stage}")) for stage in (1, 2, 3)),
    ),
)
