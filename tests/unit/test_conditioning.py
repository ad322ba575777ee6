"""The laws of condition numbers, of what moves them, and of probes that feel them; in float64."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from release_guard import conditioning
from release_guard.conditioning import (
    Halves,
    Spectrum,
    cond_code,
    gram,
    halves,
    ill,
    ill_gradient,
    ill_step_bound,
    numerical_rank,
    spread,
    spread_gradient,
    well,
    well_gradient,
)
from release_guard.feature_maps import (
    GuardedDescent,
    Pencil,
    condition,
    map_gradient,
    most_ratio,
    preconditioned,
    seen_through,
    turned,
)
from release_guard.probing import ProbeTask, line_search_steps

WIDTH = 6
Regulariser = Callable[[Tensor], Tensor]


def rows(count: int = 80, width: int = WIDTH, seed: int = 0) -> Tensor:
    """Features whose directions have different sizes."""
    chance = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=chance, dtype=torch.double)
    return torch.randn(count, width, generator=chance, dtype=torch.double) @ mix


def cond(matrix: Tensor) -> float:
    scale = torch.linalg.svdvals(matrix)
    return float(scale[0] / scale[numerical_rank(scale, max(matrix.shape)) - 1])


def autograd(function: Regulariser, at: Tensor) -> Tensor:
    variable = at.clone().requires_grad_()
    return torch.autograd.grad(function(variable), variable)[0]


def same(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(
        found / expected.norm(), expected / expected.norm(), atol=tolerance, rtol=0
    )


@pytest.mark.parametrize(
    ("function", "analytic"),
    [(well, well_gradient), (ill, ill_gradient), (spread, spread_gradient)],
)
@pytest.mark.parametrize("seed", range(3))
def test_gradients_in_s_equal_autograd(
    function: Regulariser, analytic: Regulariser, seed: int
) -> None:
    gram_FF = gram(rows(seed=seed))
    same(analytic(gram_FF), autograd(function, gram_FF))


@pytest.mark.parametrize(("function", "analytic"), [(well, well_gradient), (ill, ill_gradient)])
def test_gradients_through_theta_equal_autograd(
    function: Regulariser, analytic: Regulariser
) -> None:
    gram_FF, map_FF = gram(rows(seed=1)), torch.eye(WIDTH).double() + 0.1 * rows(WIDTH, seed=2)
    seen_FF = seen_through(gram_FF, map_FF)
    expected = autograd(lambda theta: function(theta.T @ gram_FF @ theta), map_FF)
    same(map_gradient(gram_FF, map_FF, analytic(seen_FF)), expected)


def test_r_ill_of_a_matrix_without_full_rank_is_about_its_range() -> None:
    whole = gram(rows(width=4))
    padded = torch.zeros(WIDTH, WIDTH, dtype=torch.double)
    padded[:4, :4] = whole
    torch.testing.assert_close(ill(padded), ill(whole))
    same(ill_gradient(padded)[:4, :4], ill_gradient(whole))
    same(ill_gradient(padded), autograd(lambda s: ill(s, rank=4), padded))


@pytest.mark.parametrize("seed", range(5))
def test_bounds_of_both_regularisers(seed: int) -> None:
    for matrix in (rows(9, seed=seed), gram(rows(seed=seed))):
        scale = torch.linalg.svdvals(matrix)
        sides = min(matrix.shape)
        log_cond = math.log(float(scale[0] / scale[-1]))
        assert log_cond <= sides / float(scale[-1]) ** 2 * float(well(matrix))
        assert 1 / log_cond <= float(scale[0]) ** 2 * float(ill(matrix))
        assert float(ill(matrix)) >= 2 * sides / ((sides - 1) * float(scale[0]) ** 2)


def test_neither_regulariser_is_free_of_scale_and_spread_is() -> None:
    matrix = gram(rows())
    torch.testing.assert_close(well(3 * matrix), 9 * well(matrix))
    torch.testing.assert_close(ill(3 * matrix), ill(matrix) / 9)
    torch.testing.assert_close(spread(3 * matrix), spread(matrix))
    assert float((spread_gradient(matrix) * matrix).sum()) == pytest.approx(0, abs=1e-9)


def test_spread_is_the_mean_log_condition_number_over_all_quantiles() -> None:
    values = torch.linalg.eigvalsh(matrix := gram(rows()))
    expected = (values[-1] / values).log().mean()
    torch.testing.assert_close(spread(matrix, floor=0), expected)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_below_its_bound_a_step_on_r_ill_raises_the_condition_number_as_foretold(
    share: float,
) -> None:
    matrix = gram(rows())
    values = torch.linalg.eigvalsh(matrix)
    gap = float(values.square().mean() - values[0].square()) / 2
    eta = share * ill_step_bound(matrix)
    moved = torch.linalg.eigvalsh(matrix - eta * ill_gradient(matrix))
    factor = 1 - eta * (WIDTH - 1) / (WIDTH * gap**2)
    assert float(moved[0]) == pytest.approx(float(values[0]) * factor, rel=1e-9)
    assert cond(matrix - eta * ill_gradient(matrix)) > cond(matrix)


def test_small_steps_on_r_well_lower_the_condition_number_every_time() -> None:
    matrix = gram(rows())
    for _ in range(20):
        before, matrix = cond(matrix), matrix - 0.05 * well_gradient(matrix)
        assert cond(matrix) < before


def bracket(kind: str, values: Tensor) -> Tensor:
    """b_i of section 4.2, eigenvalues ascending."""
    size = len(values)
    if kind == "well":
        found = -values / size
        found[-1] += values[-1]
        return found
    gap = (values.square().mean() - values[0].square()) / 2
    found = -values / (size * gap**2)
    found[0] += values[0] / gap**2
    return found


@pytest.mark.parametrize(("kind", "slope"), [("well", well_gradient), ("ill", ill_gradient)])
def test_a_preconditioned_step_keeps_eigenvectors_and_moves_eigenvalues_as_foretold(
    kind: str, slope: Regulariser
) -> None:
    gram_FF, map_FF = gram(rows(seed=4)), torch.eye(WIDTH).double() + 0.1 * rows(WIDTH, seed=5)
    seen_FF = seen_through(gram_FF, map_FF)
    values, vectors = torch.linalg.eigh(seen_FF)
    eta = 0.2 / float(bracket(kind, values).abs().max())
    gradient = map_gradient(gram_FF, map_FF, slope(seen_FF))
    moved = seen_through(gram_FF, map_FF - eta * preconditioned(gram_FF, gradient))
    expected = values * (1 - 2 * eta * bracket(kind, values)).square()
    same(vectors.T @ moved @ vectors, torch.diag(expected))
    elsewhere = seen_through(gram_FF, map_FF - eta * preconditioned(gram_FF, gradient.T).T)
    mixed = vectors.T @ elsewhere @ vectors  # K^-1 on the side of the outputs
    assert (mixed - torch.diag(mixed.diagonal())).norm() > 1e-3 * mixed.norm()


def test_a_linear_layer_and_theta_take_the_same_preconditioned_step() -> None:
    data_NF = rows(seed=6)
    gram_FF, layer = gram(data_NF), nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.double)
    map_FF = layer.weight.detach().T.clone()
    well(gram(layer(data_NF))).backward()
    slope = well_gradient(seen_through(gram_FF, map_FF))
    theta_step = preconditioned(gram_FF, map_gradient(gram_FF, map_FF, slope))
    layer_step = preconditioned(gram_FF, layer.weight.grad.T).T
    same(layer_step, theta_step.T)


def test_condition_numbers_do_not_feel_scale_and_rotation() -> None:
    features = rows()
    rotation, _ = torch.linalg.qr(rows(WIDTH, seed=7))
    spectrum, moved = Spectrum.of(features), Spectrum.of(5 * features @ rotation)
    assert moved.cond() == pytest.approx(spectrum.cond(), rel=1e-9)
    assert moved.cond_quantile(0.05) == pytest.approx(spectrum.cond_quantile(0.05), rel=1e-9)
    assert moved.norm == pytest.approx(25 * spectrum.norm)


def test_features_without_full_rank_are_judged_on_their_range() -> None:
    features = rows(width=4)
    zero = torch.cat([features, torch.zeros(80, 1).double()], dim=1)
    repeated = torch.cat([features, features[:, :1]], dim=1)
    spectrum = Spectrum.of(zero)
    assert spectrum.rank == 4
    assert spectrum.cond() == pytest.approx(Spectrum.of(features).cond())
    assert Spectrum.of(repeated).rank == 4
    assert Spectrum.of(repeated.float()).rank == 4  # its own precision says what is rounding


def test_the_released_figure_is_about_rounding_and_ours_is_not() -> None:
    chance = torch.Generator().manual_seed(0)
    features = torch.randn(100, 512, generator=chance).double()  # as in the released evaluation
    assert Spectrum.of(features).cond() < 200
    assert cond_code(features) > 1e8


def test_a_vanished_direction_counts_with_what_rounding_left_of_it() -> None:
    before = rows()
    after = before @ torch.diag(torch.tensor([1, 1, 1, 1, 1, 0.0]).double())
    found = halves([(Spectrum.of(before), Spectrum.of(after))], [(Spectrum.of(before),) * 2])
    assert 1e6 < found["rank"].harm[0] < math.inf


def test_a_model_against_itself_has_ratio_one_and_ten_can_hide_a_failure() -> None:
    spectra = [(Spectrum.of(rows(seed=seed)),) * 2 for seed in range(3)]
    for found in halves(spectra, spectra).values():
        assert found.harm == found.keep == found.ratio == (1.0, 1.0, 1.0)
        assert not found.hold
    assert Halves((0.2,), (0.02,)).ratio[0] == pytest.approx(10)
    assert not Halves((0.2,), (0.02,)).hold
    assert Halves((1.2,), (1.0,)).hold


def test_a_repeated_extreme_eigenvalue_gives_a_finite_gradient() -> None:
    matrix = torch.diag(torch.tensor([3.0, 3.0, 2.0, 1.0, 1.0]).double())
    for function in (well_gradient, ill_gradient, spread_gradient):
        assert function(matrix).isfinite().all()
        assert autograd(getattr(conditioning, function.__name__[:-9]), matrix).isfinite().all()
    assert cond(matrix - 0.1 * ill_step_bound(matrix) * ill_gradient(matrix)) > cond(matrix)


def test_no_map_exceeds_the_bound_of_the_pencil_and_one_reaches_it() -> None:
    restricted, retained = gram(rows(seed=8)), gram(rows(seed=9))
    most = most_ratio(restricted, retained)

    def ratio(map_FF: Tensor) -> float:
        moved = [condition(seen_through(matrix, map_FF)) for matrix in (restricted, retained)]
        return moved[0] / moved[1] * condition(retained) / condition(restricted)

    assert all(ratio(rows(WIDTH, seed=seed)) <= most for seed in range(100))
    pencil = Pencil.of(restricted, retained)
    for power in (0.0, 0.3, 1.0):
        assert ratio(pencil.map(power)) == pytest.approx(most, rel=1e-6)
        moved = condition(seen_through(retained, pencil.map(power)))
        assert moved == pytest.approx(pencil.cond() ** power, rel=1e-6)


def test_the_pencil_map_keeps_both_halves_by_every_estimator() -> None:
    shares = (0.0, 0.05, 0.5)
    for one, other in itertools.permutations(range(4), 2):
        restricted, retained = gram(rows(seed=one)), gram(rows(seed=other))
        pencil = Pencil.of(restricted, retained)
        map_FF = pencil.map(pencil.power(restricted, retained, shares))
        for matrix, wanted in ((restricted, 1), (retained, -1)):
            grown = condition(seen_through(matrix, map_FF)) / condition(matrix)
            assert wanted * math.log(grown) > 0


def test_guarded_descent_makes_one_harder_and_the_other_no_worse() -> None:
    for one, other in itertools.permutations(range(3), 2):
        descent = GuardedDescent(gram(rows(seed=one)), gram(rows(seed=other)), room=0.8)
        for _ in range(60):
            descent.step()
        ((harm, keep),) = descent.halves()
        assert harm > 1
        assert keep <= 0.8
        assert harm / keep <= most_ratio(gram(rows(seed=one)), gram(rows(seed=other)))


def test_domains_that_are_one_cannot_be_told_apart() -> None:
    matrix = gram(rows())
    assert most_ratio(matrix, 3 * matrix) == pytest.approx(1)
    descent = GuardedDescent(matrix, matrix)
    for _ in range(20):
        descent.step()
    ((harm, keep),) = descent.halves()
    assert harm == pytest.approx(keep)


def probe(seed: int = 0) -> tuple[Tensor, Tensor]:
    features = rows(seed=seed)
    chance = torch.Generator().manual_seed(seed)
    return features, torch.randn(len(features), 2, generator=chance, dtype=torch.double)


def risk(features: Tensor, targets: Tensor, weight: Tensor) -> float:
    return float((features @ weight - targets).square().sum())


@pytest.mark.parametrize("share", [0.1, 0.01])
@pytest.mark.parametrize("seed", range(3))
def test_foretold_probe_steps_are_those_really_run(share: float, seed: int) -> None:
    features, targets = probe(seed)
    best = risk(features, targets, torch.linalg.lstsq(features, targets).solution)
    weight = torch.zeros(WIDTH, 2, dtype=torch.double)
    first = risk(features, targets, weight) - best
    rate = len(features) / float(torch.linalg.matrix_norm(features, 2)) ** 2
    taken = 0
    while risk(features, targets, weight) - best > share * first:
        weight -= rate * features.T @ (features @ weight - targets) / len(features)
        taken += 1
    assert ProbeTask.of(features, targets).steps(share) == taken


def test_foretold_steepest_descent_is_the_one_really_run() -> None:
    features, targets = probe()
    best = risk(features, targets, torch.linalg.lstsq(features, targets).solution)
    weight = torch.zeros(WIDTH, 2, dtype=torch.double)
    first = risk(features, targets, weight) - best
    task = ProbeTask.of(features, targets)
    for left in itertools.islice(task.line_search(), 15):
        slope = features.T @ (features @ weight - targets)
        weight -= float(slope.square().sum() / (features @ slope).square().sum()) * slope
        assert left == pytest.approx((risk(features, targets, weight) - best) / first, rel=1e-6)
    assert line_search_steps(task, 0.01, most=10_000) > 1
    assert line_search_steps(task, 1e-30, most=3) == math.inf


def test_an_invertible_map_leaves_the_best_error_of_both_domains() -> None:
    pencil = Pencil.of(gram(rows(seed=1)), gram(rows(seed=2)))
    for seed in (1, 2):
        features, targets = probe(seed)
        moved = features @ pencil.map(0.5)
        errors = [
            risk(each, targets, torch.linalg.lstsq(each, targets).solution)
            for each in (features, moved)
        ]
        assert errors[1] == pytest.approx(errors[0], rel=1e-10)


def test_a_rank_deficient_probe_task_leaves_out_what_holds_nothing() -> None:
    features, targets = probe()
    padded = torch.cat([features, torch.zeros(len(features), 2).double()], dim=1)
    assert ProbeTask.of(padded, targets).steps(0.01) == ProbeTask.of(features, targets).steps(0.01)


def test_turning_a_map_changes_no_condition_number_and_mixes_the_features() -> None:
    matrix = gram(rows(seed=3))
    _, vectors = torch.linalg.eigh(matrix)
    straight, bent = (seen_through(matrix, theta) for theta in (vectors, turned(vectors, seed=1)))
    assert condition(bent) == pytest.approx(condition(straight), rel=1e-9)
    assert (straight - torch.diag(straight.diagonal())).norm() < 1e-10 * straight.norm()
    assert (bent - torch.diag(bent.diagonal())).norm() > 0.1 * bent.norm()
