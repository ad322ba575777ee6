"""The whole path in this process: a policy and two models, attacked, judged. No workers."""

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pico
from engine_jobs import HereSession
from planting import PLAIN, Noted

from release_guard.evidence import Evidence, Record
from release_guard.gate import gate
from release_guard.ledger import Ledger
from release_guard.modalities import Modality, ModelHandle
from release_guard.policy import Policy
from release_guard.redteam import red_team
from release_guard.release import Result, Verdict
from release_guard.sham_weights import sham_of
from release_guard.subject import Subject

SMALL = {
    "budget": {"unit": "steps", "limit": 20},
    "search_examples": 100,
    "confirm_examples": 100,
    "long_run": 2.0,
    "grid_ratio": 2.0,
    "never_knew": "unavailable",
}


@dataclass(frozen=True)
class Ruling:
    """What was tried and what the gate made of it."""

    evidence: Evidence
    verdict: Verdict
    policy: Policy

    def named(self, result: Result) -> dict[str, str]:
        """Checks of a result, with their reasons."""
        return {item.name: item.detail for item in self.verdict.checks if item.result is result}

    @property
    def failed(self) -> dict[str, str]:
        return self.named(Result.FAIL)

    @property
    def unshown(self) -> dict[str, str]:
        return self.named(Result.INCONCLUSIVE)

    def of(self, arm: str, family: str) -> list[Record]:
        """Trials of an attack on an arm."""
        return [
            record
            for record in self.evidence.records
            if (record.trial.arm, record.trial.attack.family) == (arm, family)
        ]

    def best(self, family: str) -> float | None:
        """The highest score that a family reached on the defended model, if it was run."""
        curves = (record.outcome.curve for record in self.of("defended", family))
        return max((point.score for curve in curves for point in curve), default=None)

    def noted(self, defence: str, by: str) -> list[Noted]:
        """For the table: the family that was to catch the defence, and plain fine-tuning beside it.

        Args:
            defence: What was planted.
            by: Family of attacks; empty where no attack is to tell.
        """
        against = self.failed or self.unshown
        (ceiling,) = self.evidence.ceilings.values()
        budget = self.policy.red_team.budget
        families = {by: by or "no attack"} | ({"finetune": PLAIN} if by != "finetune" else {})
        return [
            Noted(
                defence=defence,
                by=shown,
                score=self.best(family),
                ceiling=ceiling,
                budget=f"{budget.limit:g} {budget.unit}",
                verdict=self.verdict.result.value,
                refused_by=tuple(against),
            )
            for family, shown in families.items()
        ]


def rule(
    folder: Path, data: Path, base: ModelHandle, defended: ModelHandle, /, **changes: Any
) -> Ruling:
    """Attack and judge as `publish` does, under the pico policy with these changes.

    Args:
        folder: New; keeps the models and the ledger.
        data: Where the pico data lie.
        base: The undefended model.
        defended: The one to be released.
        changes: Of the policy's top level, as in `pico.pico_policy`.
    """
    red = {**SMALL, **changes.pop("red_team", {})}
    policy = Policy.load(pico.pico_policy(folder, data, **changes, red_team=red))
    models = {"base": base, "defended": defended}
    if policy.red_team.sham:
        models["sham"] = sham_of(base, defended, policy, lambda *_: None)
    for name, model in models.items():
        model.save(folder / name)
    modality = Modality.build(policy.modality)
    artefacts = {each: folder / each for each in policy.precisions if each != "fp32"}
    for precision, target in artefacts.items():
        modality.save_at(folder / "defended", target, precision)
    subject = Subject(
        folder / "base",
        folder / "defended",
        modality.load(str(folder / "base")),
        modality.load(str(folder / "defended")),
        artefacts=artefacts,
        sham=folder / "sham" if "sham" in models else None,
        ancestor=folder / "base" if policy.red_team.ancestor == "undefended" else None,
    )
    session = HereSession(1, lambda *_: None, lambda: datetime(2026, 1, 2, tzinfo=UTC))
    ledger = Ledger(folder / "trials.jsonl", print)
    evidence = red_team(subject, policy, ledger, session)
    return Ruling(evidence, gate(evidence, policy), policy)
