"""Deliver packed folders to a hub, each time in a process forked from one that has all imports.

Reads one JSON object a line: what `Job` says. Answers with two lines: the process id once it has
been forked, and what became of it: {"status": exit code or minus a signal, "said": its last line}.
"""

import json
import os
import resource
import signal
import sys
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.utils import http_backoff

from release_guard import hub_client
from release_guard.deliver import Delivery, deliver, open_candidate
from release_guard.errors import ReleaseGuardError
from release_guard.hubs import huggingface
from release_guard.hubs.huggingface import HuggingFace
from release_guard.signers.key import Key

REPO, TAG = "acme/model", "v1.0"
EVENTS, WRITTEN = ("open", "os.rename"), (".partial", ".state.json")  # where it may be killed


@dataclass(frozen=True)
class Job:
    """One delivery.

    Attributes:
        folder: The candidate.
        key: Private and public key, as paths.
        endpoint: The hub.
        now: The clock that it goes by.
        xet: Whether large files go over Xet.
        options: Further options of the hub.
        silence: Seconds after which a silent or dripping hub is given up.
        largest: Bytes that a file may have, as on a disk that is full.
        yes: Agrees to whatever is deleted.
        kill_at: It kills itself at this audited event of a file it writes, such as the journal.
    """

    folder: str
    key: tuple[str, str]
    endpoint: str
    now: str
    xet: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    silence: float = 20.0
    largest: int | None = None
    yes: bool = False
    kill_at: int | None = None


def main() -> None:
    hub_client._WAITS = (0.01, 0.02)
    huggingface._COMMIT_WAITS = (0.05, 0.1, 0.2)
    http_backoff.__kwdefaults__.update(base_wait_time=0.01, max_wait_time=0.02)
    os.environ["HF_TOKEN"] = "hf_test"  # noqa: S105
    for line in sys.stdin:
        job = Job(**json.loads(line))
        reader, writer = os.pipe()
        if (child := os.fork()) == 0:
            os.close(reader)
            run(job, writer)
        os.close(writer)
        print(child, flush=True)  # noqa: T201
        said = os.fdopen(reader).read()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(json.dumps({"status": status, "said": said}), flush=True)  # noqa: T201


def run(job: Job, writer: int) -> None:
    """Never returns: nothing may unwind into the parent's loop."""
    said, status = "published", 0
    try:
        push(job)
    except ReleaseGuardError as error:
        said, status = str(error), error.exit_code
    except BaseException as error:
        said, status = f"unexpected {error!r}", 99
    os.write(writer, said.encode())
    os._exit(status)


def push(job: Job) -> None:
    constants.HF_HUB_DISABLE_XET = not job.xet
    hub_client._SILENCE = job.silence
    packed = open_candidate(Path(job.folder))
    hub = HuggingFace(endpoint=job.endpoint, private=False, **job.options)
    private, public = job.key
    signer = Key(path=Path(private), public=Path(public))
    if job.largest is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (job.largest, hard))
    if job.kill_at is not None:
        die_at(job.kill_at, Path(job.folder).parent)
    head = hub.preflight(REPO)
    moment = datetime.fromisoformat(job.now)
    delivery = Delivery(REPO, hub, signer, head, lambda *_: None, lambda: moment, tag=TAG)
    deliver(packed, replace(delivery, agree=lambda _: None) if job.yes else delivery)


def die_at(event: int, folder: Path) -> None:
    """Kill this process at its N-th event that touches the folder where journal and files lie."""
    seen = 0

    def count(name: str, arguments: tuple[object, ...]) -> None:
        nonlocal seen
        where = str(arguments[0])
        if name in EVENTS and where.startswith(str(folder)) and where.endswith(WRITTEN):
            seen += 1
            if seen == event:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


if __name__ == "__main__":
    main()
