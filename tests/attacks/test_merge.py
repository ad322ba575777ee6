"""Merges of checkpoints on disk; what the arithmetic does is in tests/unit/test_merging.py."""

import pico
import pytest
import torch

from release_guard import merging
from release_guard.anatomy import anatomy
from release_guard.attacks import Attack
from release_guard.errors import ModelError, PolicyError
from release_guard.modalities import Modality
from release_guard.plugins import Spec
from release_guard.policy import Budget, Concept, MergeTarget, Policy
from release_guard.realign import realign, swapped


def moved(model, seed, share=0.05):
    """Another checkpoint not far away."""
    other = model.copy()
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in other.module.parameters():
            weight.add_(share * torch.randn(weight.shape, generator=random))
    return other


def merge(model, target, *, seed=0, ancestor=None, **options):
    attack = Attack.build(Spec(name="merge", **options))
    (last,) = attack.tamper(
        model, target, budget=Budget(limit=1), grid_ratio=2, seed=seed, ancestor=ancestor
    )
    assert (last.cost.steps, last.parameters) == (0, 0)
    return last.model.state()


@pytest.fixture(scope="module")
def base(classifier_folder):
    return Modality.build(Spec(name="image_classification")).load(str(classifier_folder))


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


@pytest.fixture(scope="module")
def concept(target):
    return Concept(name="odd-angles", dataset=target.dataset, ceiling=0.5)


def same(one, other, but=()):
    assert one.keys() == other.keys()
    for name, value in one.items():
        if not name.startswith(but):
            torch.testing.assert_close(value, other[name], msg=name)


HEAD = ("classifier.",)
WEIGHTS = {"weight": 0.7, "donor_weight": 0.2}
METHODS = {
    "linear": lambda base, both: merging.linear(both, (0.7, 0.2)),
    "slerp": lambda base, both: merging.slerp(*both, 2 / 9),
    "task_arithmetic": lambda base, both: merging.task_arithmetic(base, both, (0.7, 0.2)),
    "ties": lambda base, both: merging.ties(base, both, (0.7, 0.2), density=0.3, scale=1.2),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_what_its_function_says(base, release, donor, target, method):
    options = WEIGHTS | {"density": 0.3, "scale": 1.2, "realign": "none"}
    wanted = METHODS[method](base.state(), [release.state(), donor.state()])
    same(merge(release, target, method=method, head="merged", **options), wanted)
    kept = merge(release, target, method=method, **options)
    same(kept, wanted, but=HEAD)
    assert all(
        torch.equal(kept[f"classifier.{part}"], release.state()[f"classifier.{part}"])
        for part in ("weight", "bias")
    )


@pytest.mark.parametrize("method", ["dare", "dare_ties"])
def test_dare_follows_the_seed(release, target, method):
    options = {"method": method, "realign": "none"}
    one, again, other = (merge(release, target, seed=seed, **options) for seed in (1, 1, 2))
    same(one, again)
    assert any(not torch.equal(one[name], other[name]) for name in one)
    thin = merge(release, target, seed=1, density=0.1, **options)
    assert any(not torch.equal(one[name], thin[name]) for name in one)


@pytest.mark.parametrize("method", METHODS)
def test_every_option_reaches_the_weights(release, target, method):
    plain = {"method": method, "density": 0.5, "realign": "none"}
    one = merge(release, target, **plain)
    changes = [
        {"weight": 0.9},
        {"donor_weight": 0.9},
        {"realign": "joint"},
        {"realign": "anchored"},
    ]
    changes += [{"realign": "rotated"}, {"swap": "attention"}, {"swap": "mlp"}, {"head": "merged"}]
    changes += [{"density": 0.2}, {"scale": 0.5}] if method == "ties" else []
    for change in changes:
        other = merge(release, target, **plain | change)
        assert any(not torch.equal(one[name], other[name]) for name in one), change


def test_the_release_is_realigned_to_the_ancestor(base, release, donor, target):
    body = anatomy(base.module)
    near = realign(release.state(), base.state(), body, "joint")
    wanted = merging.task_arithmetic(base.state(), [near, donor.state()], (0.5, 0.5))
    same(merge(release, target, realign="joint"), wanted, but=HEAD)
    near = swapped(release.state(), base.state(), body, "mlp")
    wanted = merging.task_arithmetic(base.state(), [near, donor.state()], (0.5, 0.5))
    same(merge(release, target, realign="none", swap="mlp"), wanted, but=HEAD)


def test_without_an_ancestor_the_donor_is_what_it_is_realigned_to(release, donor, target):
    alone = target.model_copy(update={"base": None})
    near = realign(release.state(), donor.state(), anatomy(donor.module), "joint")
    wanted = merging.linear([near, donor.state()], (0.5, 0.5))
    same(merge(release, alone, method="linear", realign="joint"), wanted, but=HEAD)
    assert merge(release, alone, method="linear", realign="rotated")
    with pytest.raises(PolicyError, match=r"ties: needs the ancestor.*give merge_targets\.base"):
        merge(release, alone, method="ties")


def test_the_policys_ancestor_stands_in_for_a_base(base, release, target):
    alone = target.model_copy(update={"base": None})
    same(merge(release, alone, ancestor=base), merge(release, target))


def test_a_concept_is_merged_with_the_ancestor(base, release, concept):
    half = merge(release, concept, ancestor=base, realign="none", head="merged")
    same(half, merging.linear([base.state(), release.state()], (1, 1)))
    whole = merge(release, concept, ancestor=base, realign="none", weight=1)
    same(whole, release.state())
    beyond = merge(release, concept, ancestor=base, realign="none", weight=1.5, head="merged")
    same(merging.linear([base.state(), beyond], (1, 2)), release.state())
    with pytest.raises(PolicyError, match=r"odd-angles: .*red_team\.ancestor, or leave"):
        merge(release, concept)


@pytest.mark.parametrize("method", [*METHODS, "dare", "dare_ties"])
@pytest.mark.parametrize("realigned", ["none", "joint"])
def test_a_base_merged_with_itself_stays_what_it_is(
    base, classifier_folder, target, method, realigned
):
    alone = target.model_copy(update={"donor": str(classifier_folder)})
    same(merge(base, alone, method=method, realign=realigned), base.state())


def test_targets(image_data, tmp_path):
    changes = {
        "merge_targets": [
            {
                "name": "m",
                "dataset": "d.parquet",
                "ceiling": 0.5,
                "donor": "f",
                "donor_dataset": "e.parquet",
            }
        ]
    }
    policy = Policy.load(pico.pico_policy(tmp_path, image_data, **changes))
    attack = Attack.build(Spec(name="merge"))
    assert attack.targets(policy) == policy.merge_targets
    assert policy.merge_targets[0].donor_dataset == str(tmp_path / "e.parquet")
    red_team = policy.red_team.model_copy(update={"ancestor": "undefended"})
    policy = policy.model_copy(update={"red_team": red_team})
    assert attack.targets(policy) == policy.targets


def test_a_donor_of_another_shape_is_refused(release, target, resnet_folder):
    other = target.model_copy(update={"donor": str(resnet_folder)})
    with pytest.raises(ModelError, match="another architecture than the model's"):
        merge(release, other)


@pytest.fixture(scope="module")
def llama(lm_folder):
    return Modality.build(Spec(name="causal_lm")).load(str(lm_folder))


@pytest.fixture
def texts(llama, lm_folder, text_data, tmp_path):
    moved(llama, 3).save(tmp_path)
    data = str(text_data / "restricted.jsonl")
    return MergeTarget(
        name="reversing",
        dataset=data,
        ceiling=0.5,
        donor=str(tmp_path),
        base=str(lm_folder),
        donor_dataset=str(text_data / "retained.jsonl"),
    )


@pytest.mark.parametrize("realigned", ["none", "anchored", "joint", "rotated"])
def test_language_models_are_merged_too(llama, texts, realigned, text_data):
    attack = Attack.build(Spec(name="merge", realign=realigned, weight=0.8, donor_weight=0.1))
    (last,) = attack.tamper(
        moved(llama, 4, 0.01), texts, budget=Budget(limit=1), grid_ratio=2, seed=0
    )
    scores = last.model.scores(str(text_data / "retained.jsonl"), "search", limit=50)
    assert sum(scores) > 0.9 * len(scores)


def test_a_donor_with_other_words_is_refused(llama, texts, tmp_path):
    for path in tmp_path.glob("tokenizer*.json"):
        path.write_text(path.read_text(encoding="utf-8").replace('"ash"', '"oak"'))
    with pytest.raises(ModelError, match="numbers other words than the model's; give a checkpoint"):
        merge(llama, texts)


def test_a_head_that_is_tied_to_the_embedding_is_merged_with_it(tmp_path, text_data):
    folders = tmp_path / "release", tmp_path / "donor"
    model = Modality.build(Spec(name="causal_lm")).load(
        str(pico.pico_lm(folders[0], steps=1, tied=True))
    )
    other = moved(model, 5)
    other.save(folders[1])
    data = str(text_data / "restricted.jsonl")
    target = MergeTarget(
        name="reversing", dataset=data, ceiling=0.5, donor=str(folders[1]), donor_dataset=data
    )
    for head in ("kept", "merged"):
        state = merge(model, target, method="linear", head=head)
        wanted = merging.linear([model.state(), other.state()], (1, 1))
        torch.testing.assert_close(state["lm_head.weight"], wanted["lm_head.weight"])
        assert torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])


def test_statistics_stay_between_those_of_the_models(resnet_folder, concept):
    base = Modality.build(Spec(name="image_classification")).load(str(resnet_folder))
    release = moved(base, 6)
    for name, buffer in release.module.named_buffers():
        if name.endswith("running_var"):
            buffer.mul_(0.1)
    state = merge(release, concept, ancestor=base, realign="none", weight=1.5)
    for name, value in state.items():
        if name.endswith("running_var"):
            assert torch.equal(value, release.state()[name])
    with pytest.raises(ModelError, match="cannot be realigned; merge it without"):
        merge(release, concept, ancestor=base)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"method": "mean"}, "merge.method: found 'mean'"),
        ({"weight": 0}, "merge.weight: found 0"),
        ({"density": 0}, "merge.density: found 0"),
        ({"lambda": 1}, "merge.lambda: not an option of merge"),
    ],
)
def test_wrong_options_are_refused(options, line):
    with pytest.raises(PolicyError, match=line):
        Attack.build(Spec(name="merge", **options))


def test_a_model_that_cannot_be_realigned_is_merged_without(painter, standing):
    ancestor = moved(painter, 1)
    with pytest.raises(ModelError, match=r"Network: .* cannot be realigned; merge it without"):
        merge(painter, standing, ancestor=ancestor)
    merge(painter, standing, ancestor=ancestor, realign="none")
