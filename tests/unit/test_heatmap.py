import pytest
from evidence_builder import Asked, example_policy, passing_evidence, record

from release_guard.heatmap import Grid, grids, section
from release_guard.plugins import Spec
from release_guard.sweep import Place, places

POLICY = example_policy()


def tried(costs: dict[float, float], arm: str = "defended") -> Place:
    """One fine-tuning attack for each learning rate, that breaches at a cost."""
    records = []
    for rate, btb in costs.items():
        attack = Spec.model_validate({"name": "finetune", "lr": rate})
        for model in {arm, "defended"}:
            asked = Asked(model, attack, "footwear", "fp32", 7, "search")
            records.append(record(POLICY, asked, btb, "listed"))
    (place,) = places(passing_evidence(POLICY, records=tuple(records)), POLICY)
    return place


def test_columns_double_up_to_the_budget_and_rows_are_half_decades():
    grid = grids(tried({1e-4: 1e4, 3e-4: 1e4, 1e-2: 1e4}), "finetune")["defended"]
    assert list(grid.costs) == [400 / 2**power for power in range(8, -1, -1)]
    assert grid.rates == pytest.approx([1e-4, 3.16e-4, 1e-3, 3.16e-3, 1e-2], rel=1e-2)
    assert list(grid.tried) == [0, 1, 4]
    assert set(grid.scores[2]) == {None}


def test_a_cell_holds_the_highest_score_reached_by_then():
    grid = grids(tried({1e-4: 1e4, 1e-3: 100}), "finetune")["defended"]
    row = [score or 0.0 for score in grid.scores[-1]]
    assert row == sorted(row)
    assert row[-1] > 0.5 > row[5]  # 100 steps are not enough, 400 are


@pytest.mark.parametrize(
    ("costs", "at_edge"),
    [({1e-4: 900, 1e-3: 500, 1e-2: 900}, False), ({1e-4: 900, 1e-3: 900, 1e-2: 500}, True)],
)
def test_the_best_rate_at_an_edge_is_said(costs, at_edge):
    place = tried(costs)
    assert grids(place, "finetune")["defended"].is_best_at_edge == at_edge
    evidence = passing_evidence(POLICY, records=place.records)
    assert ("at the edge of the range tried" in section(evidence, POLICY)) == at_edge


def test_a_breach_is_crossed():
    def crosses(costs: dict[float, float]) -> int:
        evidence = passing_evidence(POLICY, records=tried(costs).records)
        return section(evidence, POLICY).count('class="cross"') - 1  # one stands in the legend

    assert crosses({1e-4: 1e4, 1e-3: 1e4}) == 0
    assert crosses({1e-4: 1e4, 1e-3: 100}) == 2  # at 130 steps: the columns 200 and 400


def test_one_learning_rate_makes_no_picture():
    assert grids(tried({1e-3: 100}), "finetune") == {}
    assert grids(tried({1e-3: 100, 1e-4: 100}), "lora") == {}


def test_nothing_tried_has_no_best():
    empty = Grid([1e-3, 1e-2], [10.0], [[None], [None]])
    assert empty.best is None
    assert not empty.is_best_at_edge
