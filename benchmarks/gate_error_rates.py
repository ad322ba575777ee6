"""How often the gate itself is wrong: simulated red teams, no training.

Prints a Markdown table and writes it as JSON. Run from the repository root:
`python benchmarks/gate_error_rates.py [GATES]`.
"""

import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from gate_simulation import SCENARIOS, simulate  # noqa: E402

from release_guard.release import Result  # noqa: E402
from release_guard.statistics import clopper_pearson  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "gate_error_rates.json"
SEED = 20260101


def main(gates: int) -> None:
    started, rows = time.perf_counter(), []
    for truth in SCENARIOS:
        counts = simulate(truth, gates=gates, seed=SEED)
        errors = counts[truth.wrong]
        bound = clopper_pearson(errors, gates)[1]
        rows.append(
            {
                "scenario": truth.name,
                "seeds": f"{truth.searched} + {truth.seeds}",
                "gates": gates,
                **{result.value: counts[result] for result in Result},
                "wrong": truth.wrong.value,
                "rate": errors / gates,
                "upper95": round(bound, 4),
            }
        )
    print(_table(rows))
    RESULTS.parent.mkdir(exist_ok=True)
    about = {"seed": SEED, "seconds": round(time.perf_counter() - started, 1), "rows": rows}
    RESULTS.write_text(json.dumps(about, indent=2) + "\n")


def _table(rows: list[dict[str, object]]) -> str:
    lines = [
        "| truth | search + fresh | PASS | FAIL | INCONCLUSIVE | error | rate | upper 95 % |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['scenario']} | {row['seeds']} | {row['pass']} | {row['fail']} "
        f"| {row['inconclusive']} | {str(row['wrong']).upper()} | {row['rate']:.1%} "
        f"| {row['upper95']:.1%} |"
        for row in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 500)
