"""What a run takes from its surroundings: workers, a clock, somebody to tell."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from release_guard.confined import confined
from release_guard.engines import Engine
from release_guard.plugins import Spec

Progress = Callable[[str, int, int, str], None]
"""Phase, steps done, steps in all, and a line worth showing."""


@dataclass(frozen=True)
class Session:
    """What a run takes from its surroundings.

    Attributes:
        workers: How many trials run at once.
        progress: Told about every step.
        now: The clock; a function that another process can import.
        environment: Hardware and versions, for the record.
        engine: Where trials run.
    """

    workers: int
    progress: Progress
    now: Callable[[], datetime]
    environment: Mapping[str, str] = field(default_factory=dict)
    engine: Spec = field(default_factory=lambda: Spec(name="local"))

    def build_engine(self) -> Engine:
        """The engine, for that many trials at once; to be opened by who needs it."""
        engine = Spec(name=self.engine.name, workers=self.workers, **self.engine.options)
        return Engine.build(engine, where="engine")

    def apart(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """`work(*arguments, session)` in a process that has none of our credentials.

        Raises:
            ReleaseGuardError: What `work` raised, or its process died.
        """
        return confined(work, *arguments, self)
