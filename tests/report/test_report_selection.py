"""Each normalizer at its own best, chosen on the validation split."""

import json

from normlab.report import notes, tables
from normlab.report.rows import load

RATES = (0.1, 0.5)


def write_tuned(make_run, folder, validation, test):
    """Writes one normalizer at two rates and two seeds; the numbers are by rate."""
    entries = []
    for rate in RATES:
        for seed in (0, 1):
            run_id = f"r{rate}s{seed}".replace(".", "")
            path = make_run(folder / run_id, norm="none", seed=seed, accuracy=test[rate])
            result = json.loads((path / "result.json").read_text())
            if rate in validation:
                result["validation_accuracy"] = validation[rate] + 0.01 * seed
            (path / "result.json").write_text(json.dumps(result))
            labels = {"setting": "base", "norm": "none", "seed": seed}
            entries.append({"id": run_id, "labels": labels | {"tuned": {"optim.base_lr": rate}}})
    plan = {"schema_version": 1, "config": "c", "settings": {"base": {}}, "norms": ["none"]}
    (folder / "sweep.json").write_text(json.dumps(plan | {"seeds": [0, 1], "runs": entries}))
    return load(folder)


def test_the_best_on_validation_is_shown_though_another_is_better_on_the_test_set(
    make_run, tmp_path
):
    sweep = write_tuned(make_run, tmp_path, {0.1: 0.90, 0.5: 0.95}, {0.1: 0.99, 0.5: 0.93})
    assert str(tables.headline(sweep).rows[0][1]) == "93.00 n=2"
    # Means over the two seeds: (90 + 91)/2 and (95 + 96)/2.
    assert notes.choices(sweep) == [
        "none: base_lr=0.5, the best mean validation accuracy of base_lr=0.1 90.50, "
        "base_lr=0.5 95.50."
    ]


def test_every_candidate_stays_in_the_list_of_runs(make_run, tmp_path):
    sweep = write_tuned(make_run, tmp_path, {0.1: 0.90, 0.5: 0.95}, {0.1: 0.99, 0.5: 0.93})
    assert len(tables.run_list(sweep).rows) == 4


def test_a_candidate_with_missing_seeds_is_not_chosen_before_one_that_has_them(make_run, tmp_path):
    """The lucky seed of a rate whose other seed failed is no mean."""
    write_tuned(make_run, tmp_path, {0.1: 0.90, 0.5: 0.95}, {0.1: 0.99, 0.5: 0.93})
    plan = json.loads((tmp_path / "sweep.json").read_text())
    lost = next(
        entry["id"]
        for entry in plan["runs"]
        if entry["labels"]["tuned"] == {"optim.base_lr": 0.5} and entry["labels"]["seed"] == 0
    )
    (tmp_path / lost / "result.json").unlink()
    (tmp_path / lost / "status.json").write_text('{"status": "failed", "step": 1, "message": ""}')
    sweep = load(tmp_path)
    assert sweep.chosen["base", "none"].tuned == "base_lr=0.1"
    assert "base_lr=0.5 96.00 (1 of 2 seeds)" in notes.choices(sweep)[0]


def test_the_test_set_never_chooses(make_run, tmp_path):
    first = write_tuned(make_run, tmp_path / "a", {0.1: 0.9, 0.5: 0.8}, {0.1: 0.5, 0.5: 0.99})
    assert first.chosen["base", "none"].tuned == "base_lr=0.1"


def test_a_candidate_without_a_measurement_is_not_chosen(make_run, tmp_path):
    sweep = write_tuned(make_run, tmp_path, {0.5: 0.2}, {0.1: 0.99, 0.5: 0.93})
    assert sweep.chosen["base", "none"].tuned == "base_lr=0.5"
    assert "base_lr=0.1 –" in notes.choices(sweep)[0]
