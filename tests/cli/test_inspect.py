"""`normlab inspect --against`: two configs side by side, both of which must be sound."""

from normlab.cli import main
from normlab.config import load_config
from normlab.meanings import field_meanings

DIGITS = "configs/digits.py"


def test_an_absent_field_is_told_from_an_empty_one(capsys):
    command = ["inspect", f"--config={DIGITS}:norm=group_norm"]
    assert main([*command, f"--against={DIGITS}:norm=layer_norm"]) == 0
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    assert rows["norm.group_size"] == ["–", "none"]
    assert rows["norm.axes"] == ["all", "–"]


def test_either_config_is_refused_as_inspect_alone_would(capsys, tmp_path):
    command = ["inspect", f"--config={DIGITS}", f"--against={DIGITS}"]
    assert main([*command, "--config.eval.batch_size=0"]) == 2
    assert "'eval.batch_size' = 0 must be" in capsys.readouterr().err
    wrong = tmp_path / "wrong.py"
    with open(DIGITS, encoding="utf-8") as file:
        wrong.write_text(
            file.read().replace("    return config", "    config.seed = -1\n    return config")
        )
    assert main(["inspect", f"--config={DIGITS}", f"--against={wrong}"]) == 2
    assert "'seed' = -1 must be" in capsys.readouterr().err


def test_a_subclass_says_what_its_own_field_means():
    meaning = field_meanings(load_config("configs/digits.py:model=nf_resnet20"))
    assert meaning["model.skip_gain"] == "start of a learned scalar on each branch"
    base = field_meanings(load_config("configs/digits.py:model=preact_resnet20"))
    assert base["model.skip_gain"] == "start of a learned scalar on each branch; none: no scalar"
