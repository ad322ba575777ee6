"""The laws of the merge layer, of its hypergradient, and of erasure in closed form."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from release_guard.concept_merge import ConceptMerge, erased

INPUTS, OUTPUTS, RATE = 9, 4, 0.3


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


REGULAR = drawn(40, INPUTS, seed=9)
ROWS = [drawn(2, INPUTS, seed=1), drawn(3, INPUTS, seed=2)]
ADAPTED = [drawn(OUTPUTS, INPUTS, seed=3), drawn(OUTPUTS, INPUTS, seed=4)]
BASE = drawn(OUTPUTS, INPUTS, seed=5)


def wanted(rows: Sequence[Tensor], adapted: Sequence[Tensor]) -> Tensor:
    """V^T: what each concept's weight makes of its own rows."""
    return torch.cat([row @ weight.T for row, weight in zip(rows, adapted, strict=True)])


def test_a_merge_is_the_minimum_under_its_constraint_and_keeps_every_row() -> None:
    found = ConceptMerge.of(ROWS, REGULAR)(ADAPTED, BASE)
    rows_MI = torch.cat(ROWS)
    gram_II = 2 * REGULAR.T @ REGULAR
    corner = torch.zeros(len(rows_MI), len(rows_MI), dtype=torch.float64)
    system = torch.cat(
        [torch.cat([gram_II, rows_MI.T], dim=1), torch.cat([rows_MI, corner], dim=1)]
    )
    side = torch.cat([gram_II @ BASE.T, wanted(ROWS, ADAPTED)])
    torch.testing.assert_close(found, torch.linalg.solve(system, side)[:INPUTS].T)
    torch.testing.assert_close(rows_MI @ found.T, wanted(ROWS, ADAPTED))


def test_nothing_new_gives_the_base_and_the_order_of_concepts_does_not_matter() -> None:
    merge = ConceptMerge.of(ROWS, REGULAR)
    torch.testing.assert_close(merge([BASE, BASE], BASE), BASE)
    other = ConceptMerge.of(ROWS[::-1], REGULAR)
    torch.testing.assert_close(other(ADAPTED[::-1], BASE), merge(ADAPTED, BASE))


def test_two_concepts_of_one_class_both_matter_and_shared_rows_are_averaged() -> None:
    alike = [ROWS[0], ROWS[0]]
    merge = ConceptMerge.of(alike, REGULAR)
    assert len(merge.rows) == len(ROWS[0])
    found = merge(ADAPTED, BASE)
    torch.testing.assert_close(ROWS[0] @ found.T, ROWS[0] @ (sum(ADAPTED) / 2).T)
    for number in (0, 1):
        changed = [weight + (place == number) for place, weight in enumerate(ADAPTED)]
        assert not torch.allclose(merge(changed, BASE), found)


def test_a_ridge_on_unrelated_rows_keeps_the_constraint() -> None:
    few = REGULAR[:3]
    with pytest.raises(ValueError, match="set regular_ridge"):
        ConceptMerge.of(ROWS, few)
    found = ConceptMerge.of(ROWS, few, regular_ridge=1e-3)(ADAPTED, BASE)
    torch.testing.assert_close(torch.cat(ROWS) @ found.T, wanted(ROWS, ADAPTED))


def test_a_ridge_on_the_rows_softens_the_constraint_by_its_law() -> None:
    ridge = 0.2
    merge = ConceptMerge.of(ROWS, REGULAR, ridge=ridge)
    rows_MI = merge.rows
    a_MM = rows_MI @ torch.linalg.inv(REGULAR.T @ REGULAR) @ rows_MI.T
    r = ridge * a_MM.diagonal().mean()
    order = torch.cat(merge.places)
    targets_MO = torch.empty(len(rows_MI), OUTPUTS, dtype=torch.float64)
    targets_MO[order] = wanted(ROWS, ADAPTED)
    missing_MO = targets_MO - rows_MI @ BASE.T
    eye = torch.eye(len(rows_MI), dtype=torch.float64)
    left_MO = targets_MO - rows_MI @ merge(ADAPTED, BASE).T
    torch.testing.assert_close(left_MO, r * torch.linalg.solve(a_MM + r * eye, missing_MO))


def test_nearly_equal_rows_and_too_many_are_refused() -> None:
    near = [ROWS[0], ROWS[0] + 1e-4 * drawn(2, INPUTS, seed=7)]
    with pytest.raises(ValueError, match="nearly the same"):
        ConceptMerge.of(near, REGULAR)
    tamed = ConceptMerge.of(near, REGULAR, ridge=1e-3)(ADAPTED, BASE)
    assert float((tamed - BASE).norm()) < 5 * float((ADAPTED[0] - BASE).norm())
    with pytest.raises(ValueError, match="name fewer concepts"):
        ConceptMerge.of([drawn(INPUTS, INPUTS)], REGULAR)


def test_the_scale_of_unrelated_rows_cancels() -> None:
    for ridges in ({}, {"ridge": 0.1}, {"regular_ridge": 0.1}):
        one = ConceptMerge.of(ROWS, REGULAR, **ridges)(ADAPTED, BASE)
        other = ConceptMerge.of(ROWS, 7 * REGULAR, **ridges)(ADAPTED, BASE)
        torch.testing.assert_close(one, other)


def test_the_projector_is_one_onto_the_rows() -> None:
    merge = ConceptMerge.of(ROWS, REGULAR)
    projector_II = merge.projector
    torch.testing.assert_close(projector_II @ projector_II, projector_II)
    torch.testing.assert_close(projector_II @ merge.rows.T, merge.rows.T)
    assert float(projector_II.trace()) == pytest.approx(len(merge.rows))


def test_single_precision_weights_are_merged_in_double() -> None:
    merge = ConceptMerge.of([row.float() for row in ROWS], REGULAR.float())
    found = merge([weight.float() for weight in ADAPTED], BASE.float())
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found.double(), ConceptMerge.of(ROWS, REGULAR)(ADAPTED, BASE), atol=1e-5, rtol=1e-4
    )


def mean(adapted: Sequence[Tensor], base: Tensor) -> Tensor:
    return sum(adapted) / len(adapted)  # type: ignore[return-value]


def inner(number: int, theta: Tensor) -> Tensor:
    """A lower loss that is not quadratic, so that its Hessian depends on the weights."""
    return (theta @ drawn(INPUTS, 3, seed=20 + number)).sin().sum()


def upper(weight: Tensor) -> Tensor:
    return (weight @ drawn(INPUTS, 5, seed=30)).cos().sum()


def hypergradient(order: int, base: str, merge: Callable[..., Tensor], theta: Tensor) -> Tensor:
    """By autograd, as the stage does it: order 1 takes the inner gradients as numbers."""
    theta = theta.clone().requires_grad_()
    adapted = [
        theta - RATE * torch.autograd.grad(inner(n, theta), theta, create_graph=order == 2)[0]
        for n in (0, 1)
    ]
    merged = merge(adapted, theta if base == "current" else BASE)
    return torch.autograd.grad(upper(merged), theta)[0]


def bent(number: int, theta: Tensor, vector: Tensor) -> Tensor:
    """The lower loss's Hessian times a vector."""
    return torch.autograd.functional.hvp(lambda at: inner(number, at), theta, vector)[1]


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("base", ["current", "pretrained", "averaged"])
def test_the_six_cells_of_the_hypergradient(order: int, base: str) -> None:
    theta = drawn(OUTPUTS, INPUTS, seed=6)
    closed = ConceptMerge.of(ROWS, REGULAR)
    merge = mean if base == "averaged" else closed
    found = hypergradient(order, base, merge, theta)

    def merged(at: Tensor) -> Tensor:
        steps = [at - RATE * torch.func.grad(lambda x, n=n: inner(n, x))(at) for n in (0, 1)]
        return merge(steps, at if base == "current" else BASE)

    upper_OI = torch.func.grad(upper)(merged(theta))
    parts = [row.T @ closed.lift[place] for row, place in zip(ROWS, closed.places, strict=True)]
    shares = [torch.eye(INPUTS, dtype=torch.float64) / 2] * 2 if base == "averaged" else parts
    projected = upper_OI @ sum(parts).T if base == "pretrained" else upper_OI
    if order == 2:
        projected = projected - RATE * sum(
            bent(n, theta, upper_OI @ share.T) for n, share in enumerate(shares)
        )
    torch.testing.assert_close(found, projected)
    if order == 2:
        torch.autograd.gradcheck(
            lambda at: upper(merged(at)), (theta.clone().requires_grad_(),), raise_exception=True
        )


def test_erasing_answers_erased_rows_as_others_and_keeps_the_rest() -> None:
    forget, instead, keep = drawn(2, INPUTS, seed=1), drawn(2, INPUTS, seed=2), drawn(3, INPUTS)
    found = erased(BASE, forget, instead, keep, preserve=1.0, ridge=1e-9)
    torch.testing.assert_close(forget @ found.T, instead @ BASE.T, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(keep @ found.T, keep @ BASE.T, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(erased(BASE, keep, keep, forget), BASE)


def test_erasing_is_the_minimum_of_its_least_squares() -> None:
    forget, instead, keep = drawn(2, INPUTS, seed=1), drawn(2, INPUTS, seed=2), drawn(3, INPUTS)

    def cost(weight: Tensor) -> Tensor:
        return (
            ((forget @ weight.T) - instead @ BASE.T).square().sum()
            + 0.1 * (keep @ (weight - BASE).T).square().sum()
            + 0.5 * (weight - BASE).square().sum()
        )

    found = erased(BASE, forget, instead, keep)
    assert float(torch.func.grad(cost)(found).abs().max()) < 1e-10
