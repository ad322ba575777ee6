"""The demo on several seeds, and the paper's form of its stage: what the gate says of each.

python -m benchmarks demo

The unprotected model is trained once; a seed changes immunization, attacks and order of the data.
Every run has a ledger of its own, so its seconds are those of a run from scratch.
"""

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks._common import demo_model, demo_policy, machine, record, session, table
from release_guard.deliver import Published
from release_guard.errors import ReleaseGuardError
from release_guard.policy import Policy
from release_guard.preflight import Order
from release_guard.publish import publish
from release_guard.release import Interval
from release_guard.statistics import retained_loss

TITLE = "Demo"
SEEDS = (0, 1, 2, 3, 4)
"""The options were tuned looking at 0, 1 and 2; never at 3 and 4."""
PAPER_STEPS = 32
"""Outer steps of the paper's variant, of 50 attacker steps each; the demo's stage takes longer."""
CAPTION = """\
`release-guard publish --dry-run` of the demo's model by the demo's policy: budget {budget:g}
steps, kappa at least {kappa:g} with a lower bound of at least {kappa_lower:g}, retained loss at
most {margin:.1%}. kappa: how many times the steps of the undefended model an attacker needs;
sigma: the same against a model that never knew the data; head start: never-knew against
undefended. `>=`: no attack breached within the budget, so the figure is a lower end. A refused
run stops at the first confirmed breach, before the controls, and then has neither kappa nor
sigma. The stage's options were tuned looking at seeds 0, 1 and 2, never at 3 and 4. The attacks
are those of the smoke sweep, at one precision, on one small model: what stronger or longer
attacks do is not shown here."""


class Variant(NamedTuple):
    """A run of the demo's publish flow."""

    stage: str
    seed: int
    replaced: tuple[tuple[str, str], ...] = ()


PAPER = (('variant = "hardened"', f'variant = "paper"\nouter_steps = {PAPER_STEPS}'),)
VARIANTS = (
    *(Variant("the demo's", seed) for seed in SEEDS),
    Variant(f"the paper's, {PAPER_STEPS} outer steps", SEEDS[0], PAPER),
)


def main() -> None:
    about = machine("torch", "transformers", "peft")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bar = demo_policy(folder)
        model = demo_model(folder)
        rows = [run(folder, model, variant) for variant in VARIANTS]
    result = {
        "seeds": SEEDS,
        "machine": about,
        "kappa": bar.gate.kappa,
        "kappa_lower": bar.gate.kappa_lower,
        "margin": bar.retain.margin,
        "budget": bar.red_team.budget.limit,
        "rows": rows,
    }
    record("demo", result, markdown(result))


def run(folder: Path, model: Path, variant: Variant) -> dict[str, Any]:
    """Immunize, attack and judge once; a stage that fails is a row too."""
    place = folder / f"{variant.stage}-{variant.seed}".replace(" ", "-")
    order = Order(str(model), "atelier/benchmark", policy_of(folder, variant), dry_run=True)
    started = time.perf_counter()
    row: dict[str, Any] = {"stage": variant.stage, "seed": variant.seed}
    try:
        row |= figures(publish(order, place / "run", session()))
    except ReleaseGuardError as error:
        row |= {"verdict": "error", "note": str(error).replace(str(folder), "DIR")}
    return row | {"seconds": round(time.perf_counter() - started, 1)}


def policy_of(folder: Path, variant: Variant) -> Policy:
    """The demo's policy file with a few words replaced, each of which must stand there once."""
    text = (folder / "policy.toml").read_text(encoding="utf-8")
    for old, new in (("seed = 0", f"seed = {variant.seed}"), *variant.replaced):
        if text.count(old) != 1:
            raise SystemExit(f"{old!r} does not stand in the demo's policy exactly once")
        text = text.replace(old, new)
    return Policy.parse(text.encode(), name="policy.toml", directory=folder)


def figures(published: Published) -> dict[str, Any]:
    """What the gate measured, and every check that did not pass."""
    (strength,) = published.verdict.strengths
    (kept,) = published.evidence.retention
    loss = retained_loss(kept.base, kept.immunized)
    sigma = strength.sigma or Interval(estimate=None, lower=None, upper=None)
    head_start = strength.head_start or Interval(estimate=None, lower=None, upper=None)
    return {
        "verdict": str(published.verdict.result),
        "kappa": strength.kappa.estimate,
        "kappa_lower": strength.kappa.lower,
        "kappa_censored": strength.kappa.censored,
        "sigma": sigma.estimate,
        "sigma_lower": sigma.lower,
        "sigma_censored": sigma.censored,
        "head_start": head_start.estimate,
        "retained_loss": loss.estimate,
        "retained_upper": loss.upper,
        "trials": len(published.evidence.records),
        "stage_seconds": sum(stage.seconds for stage in published.evidence.stages),
        "not_passed": [
            f"{check.name}: {check.result.upper()}, {check.detail}"
            for check in published.verdict.checks
            if check.result != "pass"
        ],
    }


def markdown(result: Mapping[str, Any]) -> str:
    rows = result["rows"]
    header = ["stage", "seed", "verdict", "kappa", "lower 95 %", "sigma", "lower 95 %"]
    header += ["head start", "retained loss", "upper 95 %", "trials", "stage s", "all s"]
    reasons = [
        f"- {row['stage']}, seed {row['seed']}: {reason}"
        for row in rows
        for reason in row.get("not_passed", [row.get("note", "")])
    ]
    ours = [row["verdict"] for row in rows if row["stage"] == VARIANTS[0].stage]
    return "\n\n".join(
        [
            table(header, [_cells(row) for row in rows]),
            f"The demo's own stage passed on {ours.count('pass')} of {len(ours)} seeds.",
            CAPTION.format(**result),
            "Checks that did not pass:",
            "\n".join(reasons) or "- none",
        ]
    )


def _cells(row: Mapping[str, Any]) -> list[str]:
    return [
        row["stage"],
        str(row["seed"]),
        row["verdict"].upper(),
        ratio(row, "kappa"),
        number(row, "kappa_lower", ".2f"),
        ratio(row, "sigma"),
        number(row, "sigma_lower", ".2f"),
        number(row, "head_start", ".1f"),
        number(row, "retained_loss", ".2%"),
        number(row, "retained_upper", ".2%"),
        number(row, "trials", "d"),
        number(row, "stage_seconds", ".0f"),
        number(row, "seconds", ".0f"),
    ]


def ratio(row: Mapping[str, Any], name: str) -> str:
    return (">= " if row.get(f"{name}_censored") else "") + number(row, name, ".2f")


def number(row: Mapping[str, Any], name: str, form: str) -> str:
    value = row.get(name)
    return "-" if value is None else format(value, form)


if __name__ == "__main__":
    main()
