"""What was tried, what came of it. One JSON line a record; the gate reads nothing else."""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from release_guard import SUITE
from release_guard.errors import IntegrityError
from release_guard.plugins import Shallow, Spec
from release_guard.policy import Budget, Precision, Unit
from release_guard.strict_json import canonical_json, loads

SCHEMA: Literal[3] = 3  # of evidence; 1 knew no effects of stages, 2 no artefacts

_ARTEFACTS_SINCE = 3

Arm = Literal["undefended", "defended", "never_knew", "sham", "ancestor"]
Ending = Literal["breached", "survived", "collapsed", "failed"]
Origin = Literal["listed", "tuned", "drawn", "searched", "confirming", "long_run"]
ScoredSplit = Literal["search", "confirm"]


Score = Annotated[float, Field(ge=0, le=1)]


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Cost(_Value):
    """What an attack has spent so far."""

    steps: int = Field(ge=0)
    samples: int = Field(ge=0)
    flops: float = Field(ge=0)
    seconds: float = Field(ge=0)

    def of(self, unit: Unit) -> float:
        """The amount in one unit."""
        return float(getattr(self, unit))

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            steps=self.steps + other.steps,
            samples=self.samples + other.samples,
            flops=self.flops + other.flops,
            seconds=self.seconds + other.seconds,
        )


class Point(_Value):
    """Held-out score in [0, 1] after a cost."""

    cost: Cost
    score: float = Field(ge=0, le=1)


class Trial(_Value):
    """All that fixes an outcome.

    Attributes:
        arm: Whose weights.
        precision: Numeric format they are run at.
        target: Name of the target, whose examples `data` digests.
        attack: Name and options.
        seed: Fixes batches, initialisation and order.
        budget: Where the attack ends.
        ceiling: The attack ends at the first score above it; None: it runs to the budget.
        split: Examples scored: `search`, or `confirm` which no search ever sees.
        examples: Most examples scored.
        grid_ratio: Ratio between the costs at which it is scored.
        weights: Payload root of the files attacked; of the configuration for fresh weights.
        data: Digest of the examples trained and scored on.
        ancestor: Payload root of the public ancestor, if the attack uses it; else empty.
        suite: Version of attacks and rules.
    """

    arm: Arm
    precision: Precision
    target: str
    attack: Spec
    seed: int
    budget: Budget
    ceiling: float | None
    split: ScoredSplit
    examples: int
    grid_ratio: float
    weights: str
    data: str
    ancestor: str = ""
    suite: str = SUITE

    @property
    def key(self) -> str:
        """SHA-256 of the canonical JSON: the same trial is never run twice."""
        return hashlib.sha256(canonical_json(self.model_dump(mode="json"))).hexdigest()


class Kept(_Value):
    """What a merge keeps of the donor's own task, in mean scores over the same examples.

    Attributes:
        merged: Of the merged model, with the donor's last layer if it does better with that.
        alone: Of the donor as it is.
        examples: How many there are.
    """

    merged: Score
    alone: Score
    examples: int = Field(ge=1)


class Outcome(_Value):
    """What came of a trial.

    Attributes:
        ending: `survived` is censored at the budget, `collapsed` is a non-finite model, `failed` a
            crash of the attack itself.
        curve: Points at growing cost.
        examples: How many examples each score is the mean of.
        parameters: How many parameters the attack trained.
        note: Why it failed or collapsed.
        kept: Of a merge target, what the copy that was scored last keeps of the donor's task.
    """

    ending: Ending
    curve: tuple[Point, ...] = ()
    examples: int = 0
    parameters: int = 0
    note: str = ""
    kept: Kept | None = None


class Record(_Value):
    """One line of the ledger and of the evidence.

    Attributes:
        trial: What was tried.
        outcome: What came of it.
        origin: Why it was tried; only `drawn` supports a bound on configurations.
        against: The stage the attack was written to break, if any.
        surgical: Whether it brings back what is hidden and teaches nothing, so that a breach
            counts without a control.
    """

    trial: Trial
    outcome: Outcome
    origin: Origin
    against: str | None = None
    surgical: bool = False


class Unattacked(_Value):
    """What a model scores on a concept before any attack, on the examples that confirm.

    Attributes:
        examples: How many the score is the mean of.
    """

    arm: Arm
    target: str
    precision: Precision
    score: Score
    examples: int = Field(ge=1)


class Retention(_Value):
    """Paired per-example scores on retained data, undefended against defended."""

    precision: Precision
    base: tuple[Score, ...]
    immunized: tuple[Score, ...]


class Change(_Value):
    """How far the defended weights are from the undefended, relative L2 by tensor."""

    identical: bool
    relative_l2: Mapping[str, float]


class Effect(_Value):
    """How much of a stage's own effect was in the weights after a later stage, or after itself.

    Attributes:
        after: Name of the stage after which it was looked at.
        value: 0 in the model that the stage was given; None: what it gave was no finite number.
    """

    after: str
    value: float | None


class StageReport(_Value):
    """A stage that ran: its own measures are reported, never judged.

    Attributes:
        name: Of the stage.
        paper: Where it comes from.
        options: All of them.
        measures: The paper's own figures.
        seconds: Measuring included.
        cost: What training took, by the stage's own count.
        caveats: What it left out on this model.
        effects: How much of what it is for was there after itself and after each later stage.
    """

    name: str
    paper: str
    options: Mapping[str, Shallow]
    measures: Mapping[str, float]
    seconds: float
    cost: Cost | None = None
    caveats: tuple[str, ...] = ()
    effects: tuple[Effect, ...] = ()

    @classmethod
    def of(cls, *, measures: Mapping[str, float], caveats: Sequence[str], **others: Any) -> Self:
        """A report whose measures are finite: of those that are not, a caveat tells."""
        finite = {name: value for name, value in measures.items() if math.isfinite(value)}
        strange = [f"{name}: not a finite number" for name in measures if name not in finite]
        return cls(measures=finite, caveats=(*caveats, *strange), **others)

    def seen(self, after: str, value: float) -> Self:
        """The same, with one more look at its effect."""
        look = Effect(after=after, value=value if math.isfinite(value) else None)
        return self.model_copy(update={"effects": (*self.effects, look)})


class Evidence(_Value):
    """Everything the gate may look at.

    Attributes:
        policy: Digest of the policy file.
        base: Payload root of the undefended files.
        immunized: Payload root of what the stages made, in full precision.
        artefacts: Payload root of each precision's own files, in full precision those; names count
            from their own folder. Empty in old evidence, which is about one set of files.
        ceilings: Resolved ceiling of each target.
        change: Distance between the two.
        unavailable: Arms that could not be had, and why.
        unrunnable: Precisions that could not be run where this was gathered, and why.
        overlap: Share of each target's examples that stand in the retained data too: exact and
            near duplicates.
        near_overlap: The same for near duplicates.
        planned: How many trials had to end; fewer records never pass.
        unattacked: Of the undefended and the defended model, at each concept and precision.
        retention: Utility at each precision.
        stages: What each stage said of itself, in their order.
        as_is: No stage was to be applied, whatever the policy lists.
        records: Every trial, in any order.
        environment: Hardware and versions.
    """

    schema_version: Literal[1, 2, 3] = SCHEMA
    suite: str = SUITE
    tool: str
    policy: str
    base: str
    immunized: str
    artefacts: Mapping[Precision, str] = {}
    ceilings: Mapping[str, float]
    change: Change
    unavailable: Mapping[Arm, str] = {}
    unrunnable: Mapping[Precision, str] = {}
    overlap: Mapping[str, float] = {}
    near_overlap: Mapping[str, float] = {}
    planned: int = Field(ge=0)
    unattacked: tuple[Unattacked, ...] = ()
    retention: tuple[Retention, ...] = ()
    stages: tuple[StageReport, ...] = ()
    as_is: bool = False
    records: tuple[Record, ...] = ()
    started_at: str
    finished_at: str
    environment: Mapping[str, str] = {}

    def defended(self, precision: Precision) -> str:
        """Payload root of the files attacked as the defended arm at a precision; empty: none were.

        Old evidence rounded one set of files in memory.
        """
        if self.schema_version < _ARTEFACTS_SINCE and not self.artefacts:
            return self.immunized
        return self.artefacts.get(precision, "")

    def to_jsonl(self) -> bytes:
        """Header line, then one line a retention, then one line a record in the order of keys."""
        header = self.model_dump(mode="json", exclude={"records", "retention"})
        lines = [{"header": header}]
        lines += [{"retention": item.model_dump(mode="json")} for item in self.retention]
        ordered = sorted(self.records, key=lambda record: record.trial.key)
        lines += [{"record": record.model_dump(mode="json")} for record in ordered]
        return b"".join(canonical_json(line) + b"\n" for line in lines)

    @classmethod
    def from_jsonl(cls, source: bytes, *, name: str = "evidence.jsonl") -> Self:
        """Read what `to_jsonl` wrote; errors call it `name`.

        Raises:
            IntegrityError: Anything else.
        """
        parts: dict[str, list[Any]] = {"header": [], "retention": [], "record": []}
        try:
            for line in source.splitlines():
                ((kind, value),) = loads(line).items()
                parts[kind].append(value)
            (header,) = parts["header"]
            return cls.model_validate(
                {**header, "retention": parts["retention"], "records": parts["record"]}
            )
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            reason = "fields differ" if isinstance(error, ValidationError) else error
            raise IntegrityError(f"{name}: not evidence of this version ({reason})") from None

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read an evidence file."""
        try:
            return cls.from_jsonl(path.read_bytes(), name=str(path))
        except OSError as error:
            raise IntegrityError(f"{path}: cannot be read ({error.strerror})") from None


def select(
    records: Iterable[Record],
    *,
    arm: Arm,
    precision: Precision,
    target: str,
    origins: Sequence[Origin] = get_args(Origin),
) -> tuple[Record, ...]:
    """The records of one arm, precision and target, in the order of their keys."""
    found = (
        record
        for record in records
        if (record.trial.arm, record.trial.precision, record.trial.target)
        == (arm, precision, target)
        and record.origin in origins
    )
    return tuple(sorted(found, key=lambda record: record.trial.key))


def next_cost(cost: int, ratio: float) -> int:
    """The cost after `cost` at which an attack is scored again."""
    return math.ceil(ratio * cost)


def cost_grid(limit: int, ratio: float) -> tuple[int, ...]:
    """Costs at which an attack is scored: 1, 2, 3, 5, 8, 12 ... for a ratio of 1.5, then `limit`.

    Args:
        limit: Where it ends, at least 1.
        ratio: More than 1.
    """
    costs = [1]
    while (following := next_cost(costs[-1], ratio)) < limit:
        costs.append(following)
    return (*costs, limit) if limit > 1 else (1,)
