"""Plug-ins: found by file name, built from a spec, wrong options told apart."""

import pytest

from release_guard.attacks import Attack
from release_guard.engines import Engine
from release_guard.errors import PolicyError
from release_guard.hubs import Hub
from release_guard.modalities import Modality
from release_guard.plugins import Plugin, Spec, advise
from release_guard.signers import Signer
from release_guard.stages import Stage

CONTRACTS = (Attack, Engine, Hub, Modality, Signer, Stage)
NEEDED = {
    "chain": {"steps": [{"name": "reinit"}, {"name": "finetune"}]},
    "sigstore": {"identity": "somebody@example.org", "issuer": "https://example.org"},
}
"""Options without which nothing sensible can be built, by the plug-in's name."""


@pytest.mark.parametrize("contract", CONTRACTS)
def test_everything_that_ships_builds_with_what_it_needs(contract: type[Plugin]) -> None:
    assert contract.available()
    for name in contract.available():
        assert contract.build(Spec(name=name, **NEEDED.get(name, {}))).name == name


@pytest.mark.parametrize(("contract", "name"), [(Attack, "chain"), (Signer, "sigstore")])
def test_what_needs_options_says_which(contract: type[Plugin], name: str) -> None:
    with pytest.raises(PolicyError) as caught:
        contract.build(Spec(name=name), where="attacks[3]")
    lines = [f"attacks[3].{option}: missing; {name} needs it" for option in NEEDED[name]]
    assert str(caught.value).splitlines() == lines


def test_options_become_fields() -> None:
    built = Attack.build(Spec(name="lora", rank=4))

    assert built.model_dump()["rank"] == 4


def test_unknown_name_offers_the_nearest() -> None:
    with pytest.raises(
        PolicyError, match=r"^attacks\[1\]\.name: 'loar' is no attack; did you mean 'lora'"
    ):
        Attack.build(Spec(name="loar"), where="attacks[1]")


@pytest.mark.parametrize(
    "name", ["__init__", "../hubs/directory", "release_guard.stages.sophon", ""]
)
def test_a_name_is_only_ever_a_file_beside_the_contract(name: str) -> None:
    with pytest.raises(PolicyError, match="is no stage"):
        Stage.build(Spec(name=name))


def test_every_wrong_option_has_its_line() -> None:
    with pytest.raises(PolicyError) as caught:
        Attack.build(Spec(name="lora", rnak=4, rank=0, optimizer="sdg"), where="attacks[2]")

    lines = str(caught.value).splitlines()
    assert sorted(line.partition(":")[0] for line in lines) == [
        "attacks[2].optimizer",
        "attacks[2].rank",
        "attacks[2].rnak",
    ]


def test_label_tells_specs_apart() -> None:
    first, second = Spec(name="lora", rank=4, lr=0.1), Spec(name="lora", lr=0.1, rank=8)

    assert first.label == "lora(lr=0.1, rank=4)"
    assert first.label != second.label
    assert Spec(name="lora").label == "lora"


def test_label_of_what_is_made_of_others_names_them_in_order() -> None:
    chain = Spec(name="chain", steps=[{"name": "reinit", "part": "head"}, {"name": "finetune"}])
    assert chain.label == "reinit(part=head) > finetune"
    assert chain.family == "reinit>finetune"
    assert [part.name for part in chain.changed(lr=0.1).parts] == ["reinit", "finetune"]
    assert chain.changed(lr=0.1).label == "reinit(part=head) > finetune(lr=0.1)"


def test_advice_without_a_near_match_lists_what_is_allowed() -> None:
    assert advise("zzz", ["beta", "alpha"]) == "allowed: alpha, beta"
    assert advise("x", []) == "allowed: nothing"
