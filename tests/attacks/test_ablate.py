import pico
import pytest
import torch

from release_guard.attacks import Attack
from release_guard.attacks.ablate import _activations, separating
from release_guard.engines import Job, run_trial
from release_guard.errors import ModelError, PolicyError
from release_guard.modalities import Modality
from release_guard.phases import SEARCH, Folders, Ground
from release_guard.plugins import Spec
from release_guard.policy import Budget, Concept, Policy
from release_guard.preflight import check_data


@pytest.fixture(scope="module")
def model(lm_folder):
    return Modality.build(Spec(name="causal_lm")).load(str(lm_folder))


@pytest.fixture(scope="module")
def concept(text_data):
    return Concept(name="reversing", dataset=str(text_data / "restricted.jsonl"), ceiling=0.5)


@pytest.fixture(scope="module")
def retained(text_data):
    return str(text_data / "retained.jsonl")


def ablated(model, concept, *, seed=0, **options):
    attack = Attack.build(Spec(name="ablate", **options))
    (only,) = attack.tamper(model, concept, budget=Budget(limit=9), grid_ratio=1.5, seed=seed)
    return only.model


def hidden(model, dataset, split="search"):
    """What stands behind each block at every place (L, N, F)."""
    return _activations(model, next(model.batches(dataset, split, size=16, seed=0)))


def test_the_first_direction_is_the_difference_of_means():
    generator = torch.Generator().manual_seed(0)
    neutral_NF = torch.randn(400, 5, generator=generator)
    shift_F = torch.tensor([0.0, 3.0, 0.0, 4.0, 0.0])
    restricted_NF = torch.randn(400, 5, generator=generator) + shift_F
    (direction_F,) = separating(restricted_NF, neutral_NF, 1)
    torch.testing.assert_close(direction_F, shift_F / 5, rtol=0, atol=0.05)
    found_F = restricted_NF.mean(0) - neutral_NF.mean(0)
    torch.testing.assert_close(direction_F, found_F / found_F.norm())


def test_further_directions_are_where_restricted_texts_differ_most():
    generator = torch.Generator().manual_seed(0)
    neutral_NF = torch.zeros(50, 6)
    restricted_NF = 0.01 * torch.randn(50, 6, generator=generator)
    restricted_NF[:, 0] += 5
    restricted_NF[:, 2] += torch.linspace(-2, 2, 50)
    restricted_NF[:, 4] += torch.linspace(-1, 1, 50).square() - 0.3470  # its mean
    found_KF = separating(restricted_NF, neutral_NF, 3)
    torch.testing.assert_close(found_KF @ found_KF.T, torch.eye(3), rtol=0, atol=1e-5)
    assert found_KF.abs().argmax(dim=1).tolist() == [0, 2, 4]


def test_equal_activations_give_a_finite_direction():
    same_NF = torch.ones(4, 3)
    assert separating(same_NF, same_NF, 1).isfinite().all()


def test_activations_are_those_the_first_answer_is_foretold_from(model, concept):
    batch = next(model.batches(concept.dataset, "attack", size=4, seed=0))
    found_LNF = _activations(model, batch)
    assert found_LNF.shape == (2, 4, 32)
    with torch.no_grad():
        logits_NV = model.head(model.module.model.norm(found_LNF[-1]))
        expected, _ = model.logits(batch)
    torch.testing.assert_close(logits_NV, expected.view(4, 4, -1)[:, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num", [1, 3])
@pytest.mark.parametrize("keep_norms", [False, True])
def test_nothing_is_written_along_the_directions_any_more(
    model, concept, retained, num, keep_norms
):
    options = {"block": 1, "neutral": retained, "directions": num, "keep_norms": keep_norms}
    restricted, neutral = (
        next(model.batches(dataset, split, size=64, seed=0))
        for dataset, split in ((concept.dataset, "attack"), (retained, "retain"))
    )
    directions_KF = separating(
        _activations(model, restricted)[1], _activations(model, neutral)[1], num
    )
    before, after = (
        hidden(model, concept.dataset),
        hidden(ablated(model, concept, **options), concept.dataset),
    )
    assert (before @ directions_KF.T).abs().mean() > 0.05
    assert (after @ directions_KF.T).abs().max() < 1e-5


def test_each_block_may_lose_directions_of_its_own(model, concept, retained):
    found = ablated(model, concept, per_layer=True, neutral=retained)
    before, after = model.state(), found.state()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {
        f"model.layers.{block}.{layer}.weight"
        for block in (0, 1)
        for layer in ("self_attn.o_proj", "mlp.down_proj")
    }


def test_lengths_are_kept_on_demand(model, concept, retained):
    for keep_norms in (True, False):
        found = ablated(model, concept, neutral=retained, keep_norms=keep_norms)
        before, after = (some.blocks[0].mlp.down_proj.weight.norm(dim=0) for some in (model, found))
        assert torch.allclose(before, after, rtol=1e-4) is keep_norms


def test_the_block_is_chosen_by_the_attacks_own_examples(model, concept, retained):
    batch = next(model.batches(concept.dataset, "attack", size=64, seed=0))
    losses = [
        ablated(model, concept, neutral=retained, block=block).loss(batch).item()
        for block in (0, 1)
    ]
    assert losses[0] != losses[1]
    chosen = ablated(model, concept, neutral=retained).loss(batch).item()
    assert chosen == pytest.approx(min(losses), rel=1e-6)


def test_texts_of_its_own_are_drawn_by_the_seed(model, concept):
    states = [ablated(model, concept, seed=seed).state() for seed in (1, 1, 2)]
    weights = [state["model.layers.0.mlp.down_proj.weight"] for state in states]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_block_that_is_not_there(model, concept, retained):
    with pytest.raises(PolicyError, match=r"ablate.block: found 7, but the model has 2"):
        ablated(model, concept, block=7, neutral=retained)


def test_a_model_whose_writers_are_not_known(model, concept, retained):
    strange = model.copy()
    for block in strange.blocks:
        block.self_attn.out, block.mlp.out = block.self_attn.o_proj, block.mlp.down_proj
        block.self_attn.o_proj = torch.nn.Sequential(block.self_attn.o_proj)
        block.mlp.down_proj = torch.nn.Sequential(block.mlp.down_proj)
    with pytest.raises(ModelError, match="no linear layer of LlamaDecoderLayer is known to write"):
        ablated(strange, concept, neutral=retained)


ALONE = {"name": "ablate", "neutral": "calm.jsonl"}
IN_A_CHAIN = {"name": "chain", "steps": [{"name": "quantize"}, ALONE]}


@pytest.fixture
def policies(text_data, tmp_path, monkeypatch):
    """Writes a policy with neutral prompts beside it; nobody works in its folder."""
    monkeypatch.chdir(text_data)

    def write(attack, *, calm):
        pico.write_jsonl(tmp_path / "calm.jsonl", pico.phrases("copy", count=300, seed=calm))
        changes = {
            "modality": {"name": "causal_lm"},
            "retain": {"dataset": str(text_data / "retained.jsonl")},
            "concepts": [
                {
                    "name": "reversing",
                    "dataset": str(text_data / "restricted.jsonl"),
                    "ceiling": 0.5,
                }
            ],
            "attacks": [attack],
        }
        return Policy.load(pico.pico_policy(tmp_path, text_data, **changes))

    return write


def trial_of(policy, lm_folder):
    model = Modality.build(policy.modality).load(str(lm_folder))  # a handle reads a file once
    ground = Ground.of(model, Folders(lm_folder, lm_folder), policy)
    (trial,) = ground.trials(SEARCH, "defended", *policy.concepts, policy.attacks, ("fp32",), 0.5)
    return trial


@pytest.mark.parametrize("attack", [ALONE, IN_A_CHAIN])
def test_neutral_prompts_are_seen_from_the_policy_file(policies, lm_folder, attack):
    policy = policies(attack, calm=1)
    outcome = run_trial(Job(trial_of(policy, lm_folder), str(lm_folder), policy))
    assert (outcome.ending, len(outcome.curve)) == ("survived", 1), outcome.note


@pytest.mark.parametrize("attack", [ALONE, IN_A_CHAIN])
def test_a_trial_tells_what_they_hold_but_not_where_they_lie(policies, lm_folder, attack, tmp_path):
    one, again, other = (trial_of(policies(attack, calm=calm), lm_folder) for calm in (1, 1, 2))
    assert one.key == again.key != other.key
    assert str(tmp_path) not in one.model_dump_json()
    assert "calm.jsonl" in one.attack.label


def test_neutral_prompts_that_cannot_be_read_stop_everything_before_it_starts(
    policies, lm_folder, tmp_path
):
    policy = policies(ALONE, calm=1)
    (tmp_path / "calm.jsonl").unlink()
    model = Modality.build(policy.modality).load(str(lm_folder))
    with pytest.raises(ModelError, match=r"^attacks\[0\]: .*calm\.jsonl: no such file or folder"):
        check_data(model, policy)


def test_too_few_examples_stop_everything_before_it_starts(policies, lm_folder):
    policy = policies({"name": "chain", "steps": [{"name": "ablate", "examples": 500}] * 2}, calm=1)
    model = Modality.build(policy.modality).load(str(lm_folder))
    with pytest.raises(ModelError, match=r"^attacks\[0\]: .* of 900 examples, a batch wants 500"):
        check_data(model, policy)
