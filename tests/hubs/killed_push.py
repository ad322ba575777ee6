"""Push to a directory hub again and again, killed at one file-system event later each time.

Run as `killed_push.py TEMPLATE RELEASE WORK`: copies the hub TEMPLATE to WORK/N, forks, and lets
the child push RELEASE there until its N-th audited event, at which it kills itself with SIGKILL.
Ends with the first N that the push outlives, and prints that number.
"""

import os
import shutil
import signal
import sys
from pathlib import Path

from releases import make_release

from release_guard.hubs.directory import Directory

WATCHED = ("open", "os.", "shutil.", "fcntl.", "ctypes.")


def push_until(event: int, hub: Path, release: Path) -> None:
    seen = 0

    def count(name: str, _: tuple[object, ...]) -> None:
        nonlocal seen
        if name.startswith(WATCHED):
            seen += 1
            if seen == event:
                os.kill(os.getpid(), signal.SIGKILL)

    prepared = make_release(release, {})
    sys.addaudithook(count)
    Directory(path=hub).push(prepared, "acme/model")


def outlives(event: int, hub: Path, release: Path) -> bool:
    child = os.fork()
    if child == 0:
        try:
            push_until(event, hub, release)
        except BaseException:  # nothing may unwind into the parent's loop
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status) != 0:
        sys.exit(f"the push failed at event {event}")
    return not os.WIFSIGNALED(status)


def main(template: Path, release: Path, work: Path) -> int:
    event = 0
    while True:
        event += 1
        hub = work / str(event)
        shutil.copytree(template, hub)
        if outlives(event, hub, release):
            return event


if __name__ == "__main__":
    print(main(*(Path(argument) for argument in sys.argv[1:])))  # noqa: T201
