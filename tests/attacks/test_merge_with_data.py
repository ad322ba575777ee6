import math

import pytest
import torch

from release_guard.attacks import Attack
from release_guard.attacks.merge_with_data import _Student, entropy
from release_guard.errors import PolicyError
from release_guard.modalities import Modality
from release_guard.plugins import Spec
from release_guard.policy import Budget, MergeTarget


@pytest.fixture(scope="module")
def base(classifier_folder):
    return Modality.build(Spec(name="image_classification")).load(str(classifier_folder))


def moved(model, seed, share=0.1):
    other = model.copy()
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in other.module.parameters():
            weight.add_(share * torch.randn(weight.shape, generator=random))
    return other


@pytest.fixture(scope="module")
def release(base):
    return moved(base, 1)


@pytest.fixture(scope="module")
def donor(base):
    return moved(base, 2)


@pytest.fixture(scope="module")
def target(donor, image_data, classifier_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("donor")
    donor.save(folder)
    return MergeTarget(
        name="odd-angles",
        dataset=str(image_data / "restricted.parquet"),
        ceiling=0.5,
        donor=str(folder),
        base=str(classifier_folder),
        donor_dataset=str(image_data / "retained.parquet"),
    )


def merge(model, target, *, seed=0, **options):
    attack = Attack.build(Spec(name="merge_with_data", **{"realign": "none"} | options))
    (last,) = attack.tamper(model, target, budget=Budget(limit=1), grid_ratio=2, seed=seed)
    return last.model.state()


def student(model, target, count=3):
    batches = model.batches(target.dataset, "attack", size=32, seed=0)
    return _Student(model, tuple(next(batches) for _ in range(count)))


METHODS = {
    "regmean": ({"weight": 3.0}, {"keep": 0.2}, {"examples": 64}),
    "fisher": ({"weight": 3.0}, {"floor": 1.0}, {"examples": 64}),
    "adamerging": ({"start": 0.2}, {"lr": 0.1}, {"iterations": 9}, {"batch": 16}),
    "coefficients": ({"start": 0.2}, {"lr": 0.1}, {"iterations": 9}, {"batch": 16}),
}
QUICK = {"iterations": 4, "examples": 32}


@pytest.mark.parametrize("method", METHODS)
def test_every_option_reaches_the_weights_and_the_seed_fixes_them(release, target, method):
    plain = {"method": method, **QUICK}
    one = merge(release, target, **plain)
    again = merge(release, target, **plain)
    assert all(torch.equal(one[name], again[name]) for name in one)
    shared = ({"realign": "joint"}, {"swap": "mlp"}, {"head": "merged"})
    for change in (*METHODS[method], *shared):
        other = merge(release, target, **plain | change)
        assert any(not torch.equal(one[name], other[name]) for name in one), change


@pytest.mark.parametrize("method", ["regmean", "fisher"])
def test_a_base_merged_with_itself_stays_what_it_is(base, classifier_folder, target, method):
    alone = target.model_copy(update={"donor": str(classifier_folder)})
    merged = merge(base, alone, method=method, **QUICK)
    for name, value in base.state().items():
        torch.testing.assert_close(merged[name], value, rtol=1e-4, atol=1e-5)


def test_both_tasks_are_read_each_by_its_model_and_only_on_the_attackers_split(release, target):
    seen = []

    class Watched(type(release)):
        def batches(self, dataset, split, *, size, seed):
            seen.append((dataset, split))
            return super().batches(dataset, split, size=size, seed=seed)

    watched = release.copy()
    watched.__class__ = Watched
    merge(watched, target, **QUICK)
    assert seen == [(target.dataset, "attack"), (target.donor_dataset, "attack")]


def test_grams_are_those_of_the_rows_that_a_layer_reads(release, target):
    one = student(release, target)
    found = one.grams()["classifier"]
    rows = torch.cat([release.features(batch)[0] for batch in one.batches]).detach().double()
    rows = torch.cat([rows, torch.ones(len(rows), 1)], dim=1)
    torch.testing.assert_close(found, rows.T @ rows / len(rows))
    names = {
        name for name, part in release.module.named_modules() if isinstance(part, torch.nn.Linear)
    }
    assert set(one.grams()) == names


def test_padding_is_not_heeded(lm_folder, tmp_path):
    model = Modality.build(Spec(name="causal_lm")).load(str(lm_folder))
    tokens = torch.tensor([[0, 3, 6, 7], [0, 3, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    labels = torch.where(mask.bool(), tokens, -100)
    padded = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
    lone = [
        {name: value[row : row + 1, :end] for name, value in padded.items()}
        for row, end in ((0, 4), (1, 2))
    ]
    found, wanted = (_Student(model, tuple(batches)).grams() for batches in ([padded], lone))
    for name, gram in wanted.items():
        torch.testing.assert_close(found[name], gram, rtol=1e-4, atol=1e-5)


def test_information_is_the_expected_square_of_the_slope(release, target):
    """With labels drawn often enough, the squares come to the sum over all labels."""
    one = student(release, target, count=1)
    example = {name: value[:1] for name, value in one.batches[0].items()}
    often = _Student(
        release, ({name: value.repeat_interleave(600, 0) for name, value in example.items()},)
    )
    found = often.information(seed=0)["classifier.bias"] / 600
    chances = release.logits(example)[0].detach().softmax(dim=1)[0]
    wanted = sum(
        chance * (chances - torch.eye(8)[label]).square() for label, chance in enumerate(chances)
    )
    torch.testing.assert_close(found, wanted, rtol=0, atol=4 / math.sqrt(600) * 0.5)
    assert found.argmax() == wanted.argmax()


def test_coefficients_lower_the_loss_and_adamerging_the_entropy(base, release, target):
    for method, loss in (
        ("coefficients", torch.nn.functional.cross_entropy),
        ("adamerging", entropy),
    ):
        values = []
        for iterations in (1, 30):
            model = base.copy()
            model.load_state(
                merge(
                    release,
                    target,
                    method=method,
                    iterations=iterations,
                    head="merged",
                    lr=0.02,
                    examples=96,
                )
            )
            batches = [
                student(model, target).batches,
                student(model, target.model_copy(update={"dataset": target.donor_dataset})).batches,
            ]
            values.append(
                sum(loss(*model.logits(batch)).item() for some in batches for batch in some)
            )
        assert values[1] < values[0], method


def test_entropy():
    even, sure = torch.zeros(2, 4), torch.tensor([[99.0, 0, 0, 0]])
    assert entropy(even, torch.zeros(2)).item() == pytest.approx(math.log(4))
    assert entropy(sure, torch.zeros(1)).item() == pytest.approx(0, abs=1e-6)


def test_coefficients_stay_between_ancestor_and_models(base, release, donor, target):
    state = merge(
        release, target, method="coefficients", lr=5.0, iterations=5, examples=32, head="merged"
    )
    for name, _ in base.module.named_parameters():
        deltas = [model.state()[name] - base.state()[name] for model in (release, donor)]
        moves = torch.stack(
            [torch.zeros_like(deltas[0]), deltas[0], deltas[1], deltas[0] + deltas[1]]
        )
        move = state[name] - base.state()[name]
        assert (move <= moves.amax(0) + 1e-6).all()
        assert (move >= moves.amin(0) - 1e-6).all()


def test_what_works_on_differences_needs_an_ancestor(release, target):
    alone = target.model_copy(update={"base": None})
    assert merge(release, alone, **QUICK)
    with pytest.raises(PolicyError, match="adamerging: needs the ancestor"):
        merge(release, alone, method="adamerging", **QUICK)
