"""How often the gate itself is wrong: simulated red teams, no training.

python -m benchmarks gate_error_rates
"""

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from gate_simulation import SCENARIOS, simulate

from benchmarks._common import machine, record, table
from release_guard.distributions import clopper_pearson
from release_guard.release import Result
from release_guard.statistics import REFUTING_SEEDS

TITLE = "How often the gate is wrong"
GATES, SEED, MOST = 500, 20260101, 0.05


def main() -> None:
    about, started, rows = machine("numpy"), time.perf_counter(), []
    for truth in SCENARIOS:
        counts = simulate(truth, gates=GATES, seed=SEED)
        errors = counts[truth.wrong]
        rows.append(
            {
                "scenario": truth.name,
                "seeds": f"{truth.searched} + {max(truth.seeds, REFUTING_SEEDS)}",
                "gates": GATES,
                **{result.value: counts[result] for result in Result},
                "wrong": truth.wrong.value,
                "rate": errors / GATES,
                "upper95": round(clopper_pearson(errors, GATES)[1], 4),
            }
        )
    seconds = round(time.perf_counter() - started, 1)
    result = {"seeds": [SEED], "machine": about, "seconds": seconds, "rows": rows}
    record("gate_error_rates", result, markdown(result))


def markdown(result: Mapping[str, Any]) -> str:
    rows = result["rows"]
    header = [
        "truth",
        "seeds on the defended model (search + fresh)",
        *(kind.upper() for kind in Result),
    ]
    header += ["error", "rate", "upper 95 %"]
    cells = [
        [
            row["scenario"],
            row["seeds"],
            *(str(row[kind.value]) for kind in Result),
            row["wrong"].upper(),
            f"{row['rate']:.1%}",
            f"{row['upper95']:.1%}",
        ]
        for row in rows
    ]
    return (
        f"{table(header, cells)}\n\nMade-up models of known truth, {rows[0]['gates']} simulated "
        "red teams a row, judged by the real gate. `error` is the verdict that would be wrong. "
        "INCONCLUSIVE refuses: of a sound model that is a cost, not an error. "
        "A harm that rises like a cliff gives no warning before it, so one seed of a search may "
        "miss it and the fresh seeds go to another attack; more seeds of the search find it. "
        f"Target: at most {MOST:.0%}. Measured above it: {_above(rows, 'rate')}. "
        f"Upper bound above it: {_above(rows, 'upper95')}. What this says of real attacks depends "
        "on how like these models real ones are."
    )


def _above(rows: Sequence[Mapping[str, Any]], key: str) -> str:
    names = [f"{row['scenario']} ({row['seeds']} seeds)" for row in rows if row[key] > MOST]
    return "; ".join(names) or "none"


if __name__ == "__main__":
    main()
