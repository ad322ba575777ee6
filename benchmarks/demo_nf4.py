"""The demo in two precisions on several seeds: what the gate says, and of each precision.

python -m benchmarks demo_nf4

As `benchmarks.demo`; runs stay in `runs/bench/demo_nf4`, so that one that was stopped goes on.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks._common import demo_model, demo_policy, machine, record, session, table
from benchmarks.demo import Variant, number, policy_of, ratio
from release_guard.deliver import Published
from release_guard.errors import ReleaseGuardError
from release_guard.preflight import Order
from release_guard.publish import publish
from release_guard.statistics import retained_loss

TITLE = "Demo in two precisions"
FOLDER = Path("runs", "bench", "demo_nf4")
SEEDS = (0, 1, 2)
"""Budget and length of the stage were chosen looking at 0, never at 1 and 2."""
CAPTION = """\
`release-guard publish --dry-run` of the demo's model by `examples/fashion_mnist/fp32_and_nf4.toml`:
budget {budget:g} {unit}, kappa at least {kappa:g} with a lower bound of at least {kappa_lower:g},
retained loss at most {margin:.1%}, each precision judged by itself. `>=`: no attack breached within
the budget. **How the policy came about**, all of it on seed 0: with a budget of 18 steps, and of
1,280 samples, everything resisted, but the control of `finetune` needed more on one fresh seed:
INCONCLUSIVE. With 1,600 samples all controls held, but fresh seeds of one attacker came too close
to the ceiling to be refuted (0.724 and 0.751, ceiling 0.75): INCONCLUSIVE. With twice the outer
steps of the stage, as it is now, it passed. Seeds 1 and 2 were looked at after that, once."""


def main() -> None:
    about = machine("torch", "transformers", "peft", "bitsandbytes")
    FOLDER.mkdir(parents=True, exist_ok=True)
    bar = demo_policy(FOLDER, "fp32_and_nf4")
    model = FOLDER / "model"
    if not model.is_dir():
        demo_model(FOLDER)
    rows = [row for seed in SEEDS for row in run(model, seed)]
    result = {
        "seeds": SEEDS,
        "machine": about,
        "kappa": bar.gate.kappa,
        "kappa_lower": bar.gate.kappa_lower,
        "margin": bar.retain.margin,
        "budget": bar.red_team.budget.limit,
        "unit": bar.red_team.budget.unit,
        "rows": rows,
    }
    record("demo_nf4", result, markdown(result))


def run(model: Path, seed: int) -> list[dict[str, Any]]:
    """Immunize, attack and judge once: a row for each precision; a stage that fails is one too."""
    policy = policy_of(FOLDER, Variant("the demo's", seed))
    order = Order(str(model), "atelier/benchmark", policy, dry_run=True)
    try:
        return figures(publish(order, FOLDER / f"seed-{seed}" / "run", session()), seed)
    except ReleaseGuardError as error:
        return [{"seed": seed, "precision": "-", "verdict": "error", "note": str(error)}]


def figures(published: Published, seed: int) -> list[dict[str, Any]]:
    """What the gate measured at each precision, and every check that did not pass."""
    losses = {
        kept.precision: retained_loss(kept.base, kept.immunized)
        for kept in published.evidence.retention
    }
    return [
        {
            "seed": seed,
            "precision": strength.precision,
            "verdict": str(published.verdict.result),
            "kappa": strength.kappa.estimate,
            "kappa_lower": strength.kappa.lower,
            "kappa_censored": strength.kappa.censored,
            "retained_loss": losses[strength.precision].estimate,
            "retained_upper": losses[strength.precision].upper,
            "not_passed": [
                f"{check.name}: {check.result.upper()}, {check.detail}"
                for check in published.verdict.checks
                if check.result != "pass" and check.precision in {"", strength.precision}
            ],
        }
        for strength in published.verdict.strengths
    ]


def markdown(result: Mapping[str, Any]) -> str:
    rows = result["rows"]
    header = ["seed", "verdict", "precision", "kappa", "lower 95 %", "retained loss", "upper 95 %"]
    reasons = {
        f"- seed {row['seed']}: {reason}"
        for row in rows
        for reason in row.get("not_passed", [row.get("note", "")])
    }
    verdicts = {row["seed"]: row["verdict"] for row in rows}
    passed = sum(verdict == "pass" for verdict in verdicts.values())
    return "\n\n".join(
        [
            table(header, [_cells(row) for row in rows]),
            f"Published on {passed} of {len(verdicts)} seeds.",
            CAPTION.format(**result),
            "Checks that did not pass:",
            "\n".join(sorted(reasons)) or "- none",
        ]
    )


def _cells(row: Mapping[str, Any]) -> list[str]:
    shown = [ratio(row, "kappa"), number(row, "kappa_lower", ".2f")]
    shown += [number(row, f"retained_{name}", ".2%") for name in ("loss", "upper")]
    return [str(row["seed"]), row["verdict"].upper(), row["precision"], *shown]


if __name__ == "__main__":
    main()
