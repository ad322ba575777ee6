"""What the gate says and what may be pushed: Verdict, Candidate -> Attested -> Release, Receipt."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum, auto
from pathlib import Path

from release_guard.errors import IntegrityError
from release_guard.manifest import Manifest


class Result(StrEnum):
    """Outcome of a check: only `PASS` counts as evidence, everything else refuses."""

    PASS = auto()
    FAIL = auto()
    INCONCLUSIVE = auto()


@dataclass(frozen=True)
class Check:
    """One judged claim.

    Attributes:
        name: Path-like, such as `resists/lora/footwear@nf4`.
        result: Pass, fail or inconclusive.
        detail: One sentence with the figures that decided.
    """

    name: str
    result: Result
    detail: str

    @property
    def precision(self) -> str:
        """The precision it is about, as in `...@nf4`; empty: it is about all of them."""
        kind, at = self.name.partition("/")[0], self.name.rpartition("@")
        return at[2] if at[1] and kind != "stages" else ""  # a stage's name is anybody's words


@dataclass(frozen=True)
class Interval:
    """A ratio with its bounds; None where nothing can be said.

    Attributes:
        estimate: Point estimate, or the value it is at least (`censored`).
        lower: One-sided 95 % lower bound.
        upper: One-sided 95 % upper bound.
        censored: The defended arm never breached, so the estimate is only a lower end.
    """

    estimate: float | None
    lower: float | None
    upper: float | None
    censored: bool = False


@dataclass(frozen=True)
class Strength:
    """Cost multipliers of one target at one precision.

    Attributes:
        target: Name of the concept or merge target.
        precision: Numeric format.
        kappa: BTB(defended) / BTB(undefended).
        sigma: BTB(defended) / BTB(never knew); None where that arm is unavailable.
        head_start: BTB(never knew) / BTB(undefended); below 3 a sigma says nothing.
        long_run: kappa when the best attackers get more than the budget and breach; reported,
            never judged. None: those few did not breach, which says nothing of the others.
        outside: BTB(defended) / the lesser of BTB(never knew) and BTB(ancestor): what the attacker
            saves by starting from the release; None where no ancestor was attacked.
        ancestor: BTB(ancestor) / BTB(undefended): what holds up whoever has the public ancestor.
        sham: Resistance index of the defended model less that of a sham that moved as far.
        rounding: kappa at the first precision / kappa here; None there, and where one is unknown.
    """

    target: str
    precision: str
    kappa: Interval
    sigma: Interval | None
    head_start: Interval | None
    long_run: Interval | None = None
    outside: Interval | None = None
    ancestor: Interval | None = None
    sham: Interval | None = None
    rounding: float | None = None


@dataclass(frozen=True)
class Verdict:
    """All checks together, and what may be said of them.

    Attributes:
        checks: Every judged claim; no check at all never passes.
        strengths: kappa and sigma for each target and precision.
        claim: The one generated sentence a card may carry.
        not_tested: What nobody tried, one sentence each.
        left_out: Precisions that are not published though the release is; their checks refuse
            nothing else.
    """

    checks: Sequence[Check]
    strengths: Sequence[Strength] = ()
    claim: str = ""
    not_tested: Sequence[str] = ()
    left_out: Sequence[str] = ()

    @property
    def counted(self) -> Sequence[Check]:
        """The checks of what is to be published: all, but those of precisions left out."""
        return tuple(check for check in self.checks if check.precision not in self.left_out)

    @property
    def result(self) -> Result:
        """FAIL if anything failed, PASS if there are checks and all passed."""
        results = {check.result for check in self.counted}
        if Result.FAIL in results:
            return Result.FAIL
        if self.left_out and not any(check.precision for check in self.counted):
            return Result.INCONCLUSIVE  # nothing is left to be published
        return Result.PASS if results == {Result.PASS} else Result.INCONCLUSIVE

    @property
    def passed(self) -> bool:
        """Non-empty and every check that counts PASS."""
        return self.result is Result.PASS

    def published(self, precisions: Sequence[str]) -> tuple[str, ...]:
        """Those of the policy's precisions that may go out; none unless it passed."""
        if not self.passed:
            return ()
        return tuple(each for each in precisions if each not in self.left_out)


@dataclass(frozen=True)
class Candidate:
    """A packed folder, judged: payload, card, policy, evidence, report; no proof yet."""

    directory: Path
    verdict: Verdict
    payload: Manifest


@dataclass(frozen=True)
class Attested(Candidate):
    """A candidate with its signed attestations written."""

    def __post_init__(self) -> None:
        if not self.verdict.passed:
            raise IntegrityError("only a model that passed its gate can be attested")


@dataclass(frozen=True)
class Release(Attested):
    """Attested, signed, complete: the only thing a hub accepts.

    Attributes:
        manifest: Every file.
        previous: Head of the repository that it was planned on; None: whatever is found there.
        run: Names the attempt to publish these weights, the same when it is made again: a hub
            writes it down, and knows by it what came of an attempt that got no answer.
    """

    manifest: Manifest
    previous: str | None = None
    run: str = field(default_factory=lambda: os.urandom(16).hex())


@dataclass(frozen=True)
class Receipt:
    """What a push returned: where it can be looked at, and the revision it made."""

    url: str
    revision: str
