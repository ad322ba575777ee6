"""Everything that can go wrong while a candidate is delivered, one thing at a time.

A calm delivery tells which requests there are. Each fault then strikes at one of them: the first of
its route in its state. What the hub holds afterwards is judged, then the same delivery is run again
without the fault and judged too. docs/faults.py writes docs/faults.md from the same rows.
"""

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self
from unittest.mock import patch

import judged
from hubserver import Act, Answer, Blob, HubServer, Repository, Request, problem
from judged import NOW, fixed_key, judge

from release_guard.manifest import hash_directory
from release_guard.signers.key import Key

HERE = Path(__file__).parent
REPO, TAG = "acme/model", "v1.0"
LIMIT = {"RateLimit": '"api";r=0;t=0', "RateLimit-Policy": '"fixed window";"api";q=1;w=300'}
DRIP, SILENCE = 0.1, 0.4  # seconds between two bytes; seconds after which a drip is given up
XET_PATIENCE = {
    "HF_XET_CLIENT_RETRY_BASE_DELAY": "10ms",
    "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "2",
    "HF_XET_CLIENT_RETRY_MAX_DURATION": "1s",
}
Fault = Callable[[Request, Act], Answer | None]


def _status(status: int, **headers: str) -> Fault:
    return lambda request, act: replace(problem(status, f"a planted {status}"), headers=headers)


def _dripping(request: Request, act: Act) -> Answer | None:
    found = act()
    return None if found is None else replace(found, pause=DRIP)


def _wrong_etag(request: Request, act: Act) -> Answer | None:
    found = act()
    wrong = {"ETag": '"0"', "X-Linked-Etag": '"0"'}
    return None if found is None else replace(found, headers={**found.headers, **wrong})


def _wrong_content(request: Request, act: Act) -> Answer | None:
    found = act()
    return None if found is None else replace(found, body=b"not what is stored")


def _wrong_digest(request: Request, act: Act) -> Answer | None:
    """The server takes the commit, and puts another large file into it."""
    found = act()
    files = request.server.repositories[REPO].head.files
    name = next(name for name, blob in files.items() if blob.sha256)
    files[name] = Blob(files[name].size, sha256="f" * 64)
    return found


def _foreign(request: Request, act: Act) -> Answer | None:
    """Somebody else commits first."""
    request.server.add(REPO, "foreign.txt", b"from bob")
    return act()


@dataclass(frozen=True)
class Kind:
    """A fault: what happens to a request, and whether to all that follow as well."""

    name: str
    strike: Fault
    for_ever: bool = False
    only_at: tuple[str, ...] = ()
    silence: float = 20.0


KINDS = (
    Kind("connection dropped before", lambda request, act: None),
    Kind("connection dropped after", lambda request, act: (act(), None)[1]),
    Kind("connection dropped for ever", lambda request, act: None, for_ever=True),
    Kind("401, token expired", _status(401), for_ever=True),
    Kind("403", _status(403)),
    Kind("404", _status(404)),
    Kind("412", _status(412)),
    Kind("429 with RateLimit", _status(429, **LIMIT)),
    Kind("500 once", _status(500)),
    Kind("503 for ever", _status(503), for_ever=True),
    Kind("an answer of another shape", lambda request, act: Answer([["what?"]])),
    Kind("done, but an answer of another shape", lambda request, act: (act(), Answer([[0]]))[1]),
    Kind("an answer byte by byte", _dripping, silence=SILENCE),
    Kind("wrong ETag", _wrong_etag, only_at=("resolve", "lfs_put")),
    Kind("wrong content served", _wrong_content, only_at=("resolve",)),
    Kind("wrong sha256 accepted", _wrong_digest, only_at=("commit",)),
    Kind("somebody else commits first", _foreign, only_at=("preupload", "commit")),
)

_STATUSES: Mapping[str, frozenset[int]] = {
    "connection dropped before": frozenset({0, 1}),
    "connection dropped after": frozenset({0, 1}),
    "connection dropped for ever": frozenset({1}),
    "401, token expired": frozenset({6}),
    "403": frozenset({5, 6}),
    "404": frozenset({0, 1}),
    "412": frozenset({0, 5}),
    "429 with RateLimit": frozenset({0, 1}),
    "500 once": frozenset({0, 1}),
    "503 for ever": frozenset({1}),
    "an answer of another shape": frozenset({0, 1, 4, 5}),
    "done, but an answer of another shape": frozenset({0, 1, 4}),
    "an answer byte by byte": frozenset({0, 1}),
    "wrong ETag": frozenset({0}),
    "wrong content served": frozenset({0, 4}),
    "wrong sha256 accepted": frozenset({4}),
    "somebody else commits first": frozenset({5}),
    "SIGKILL": frozenset({-signal.SIGKILL}),
}
_STATES = {
    "auth_check": "look",
    "whoami": "look",
    "create": "make",
    "preupload": "upload",
    "lfs_batch": "upload",
    "lfs_put": "upload",
    "lfs_verify": "upload",
    "xet_token": "upload",
    "validate_yaml": "commit",
    "commit": "commit",
    "refs": "tag",
    "tag": "tag",
}


@dataclass(frozen=True)
class Place:
    """A request of a calm delivery.

    Attributes:
        number: From 1, over all requests.
        route: The server's name for it.
        state: What the push is at.
    """

    number: int
    route: str
    state: str


@dataclass(frozen=True)
class Row:
    """What a fault did.

    Attributes:
        fault: Its name.
        place: Where it struck.
        transport: How large files went.
        update: Whether an earlier release was there.
        status: Exit code of the delivery, or minus the signal.
        said: Its error, in words.
        left: What the hub held afterwards: nothing, old, new, or what it must never be.
        public: Whether everybody could see it.
        again: Exit code of the same delivery without the fault.
        end: What the hub held then.
        finished: Whether everybody could see it then, under its tag.
        commits: How many the two made in all.
    """

    fault: str
    place: Place
    transport: str
    update: bool
    status: int
    said: str
    left: str
    public: bool
    again: int
    end: str
    finished: bool
    commits: int


class Pusher:
    """The process that forks one for each delivery."""

    def __init__(self) -> None:
        path = (str(HERE), str(HERE.parent), *sys.path)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "0"}
        environment["PYTHONWARNINGS"] = "ignore::DeprecationWarning"
        environment |= XET_PATIENCE
        self._process = subprocess.Popen(  # noqa: S603
            [sys.executable, str(HERE / "pusher.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self.child = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def deliver(self, job: Mapping[str, Any]) -> tuple[int, str]:
        """Exit code and last words of one delivery."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        self.child = int(self._process.stdout.readline())
        answer = json.loads(self._process.stdout.readline())
        return answer["status"], answer["said"]


def candidate(folder: Path, key: Key, seed: int) -> Path:
    """A packed folder that passed, without any training."""
    files = {
        "README.md": f"# A model\n\nSigned by {key.identity}\n".encode(),
        "model.safetensors": bytes((seed + each) % 256 for each in range(2048)),
        f"only-{seed}.txt": b"payload of this seed alone",
    }
    with patch.dict(judged.FILES, files):
        judge(folder, key)
    return folder


@dataclass
class Scene:
    """A hub, a candidate to deliver, and perhaps an earlier release that is there already."""

    work: Path
    pusher: Pusher
    xet: bool = False
    update: bool = False
    _number: Iterator[int] = field(default_factory=itertools.count)
    _calm: list[Place] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.key = fixed_key(self.work)
        self.new = candidate(self.work / "new" / "release", self.key, 1)
        self.old = candidate(self.work / "old" / "release", self.key, 2)

    @property
    def transport(self) -> str:
        return "xet" if self.xet else "lfs"

    def server(self) -> HubServer:
        store = self.work / f"cas-{next(self._number)}" if self.xet else None
        return HubServer(xet=store)

    def job(self, folder: Path, server: HubServer, **more: Any) -> dict[str, Any]:
        keys = [str(self.key.path), str(self.key.public)]
        about = {"folder": str(folder), "key": keys, "endpoint": server.url, "xet": self.xet}
        return {**about, "options": {"gated": "manual"}, "now": NOW.isoformat(), **more}

    def prepared(self, server: HubServer) -> None:
        """The earlier release, where there is one: pushed, but under no tag that is in the way."""
        if self.update:
            status, said = self.pusher.deliver(self.job(self.old, server))
            assert status == 0, said
            server.repositories[REPO].tags.clear()
        server.requests.clear()

    def places(self) -> Sequence[Place]:
        """Every request of a calm delivery."""
        if not self._calm:
            with self.server() as server:
                self.prepared(server)
                seen: list[str] = []
                server.intercept = lambda request, route, act: (seen.append(route), act())[1]
                status, said = self.pusher.deliver(self.job(self.new, server))
                assert status == 0, said
                assert holds(server, self.new, self.old) == "new"
                self._calm += list(_placed(seen))
        return self._calm

    def firsts(self) -> Sequence[Place]:
        """The first request of every route in every state."""
        found: dict[tuple[str, str], Place] = {}
        for place in self.places():
            found.setdefault((place.state, place.route), place)
        return list(found.values())

    def row(self, kind: Kind, place: Place) -> Row:
        """Deliver with a fault, look, deliver without, look again."""
        with self.server() as server:
            self.prepared(server)
            before = _commits(server)
            server.intercept = _striking(kind, place)
            job = self.job(self.new, server, silence=kind.silence)
            status, said = self.pusher.deliver(job)
            return self._row(server, kind.name, place, status, said, before)

    def killed(self, place: Place) -> Row:
        """Kill the process that delivers when the server has its request and has not acted yet."""

        def kill(request: Request, act: Act) -> Answer | None:
            os.kill(self.pusher.child, signal.SIGKILL)
            return None

        return self.row(Kind("SIGKILL", kill), place)

    def _row(
        self, server: HubServer, fault: str, place: Place, status: int, said: str, before: int
    ) -> Row:
        left, public = holds(server, self.new, self.old), _public(server)
        server.intercept = lambda _, __, act: act()
        again, words = self.pusher.deliver(self.job(self.new, server, yes=left == "foreign"))
        return Row(
            fault,
            place,
            self.transport,
            self.update,
            status,
            said,
            left,
            public,
            again,
            holds(server, self.new, self.old) if again == 0 else words,
            _finished(server),
            _commits(server) - before,
        )


def wrong(row: Row) -> str:
    """What must never be, in words; empty if all is well."""
    lied = row.fault == "wrong sha256 accepted"
    foreign = row.fault == "somebody else commits first"
    left = {"something else"} if lied else {"foreign"} if foreign else {"nothing", "empty", "old"}
    checks = {
        "no exit code of ours": row.status not in _STATUSES[row.fault],
        "neither the old nor the new release": row.left not in {"new", *left},
        "published without the release": row.status == 0
        and (row.left, row.public) != ("new", True),
        "public before it was whole": row.public and not row.update and row.left != "new",
        "not finished by a second run": (row.again, row.end, row.finished) != (0, "new", True),
        "not one commit": row.commits != 1 + lied,
    }
    return "; ".join(words for words, bad in checks.items() if bad)


def _striking(kind: Kind, place: Place) -> Callable[[Request, str, Act], Answer | None]:
    numbers = itertools.count(1)

    def intercept(request: Request, route: str, act: Act) -> Answer | None:
        number = next(numbers)
        strikes = number >= place.number if kind.for_ever else number == place.number
        return kind.strike(request, act) if strikes else act()

    return intercept


def _placed(routes: Sequence[str]) -> Iterator[Place]:
    committed, settled = False, "look"
    for number, route in enumerate(routes, 1):
        settled = "compare" if committed and settled not in {"tag", "show"} else settled
        settled = _STATES.get(route, settled)
        if settled == "tag" and route not in {"refs", "tag"}:
            settled = "show"
        if route == "settings" and not committed:
            settled = "gate"
        committed = committed or route == "commit"
        yield Place(number, route, settled)


def _commits(server: HubServer) -> int:
    """Commits that are not the hub's own."""
    repository = server.repositories.get(REPO)
    return sum(commit.author == "alice" for commit in repository.commits) if repository else 0


def _finished(server: HubServer) -> bool:
    repository = server.repositories[REPO]
    return not repository.private and repository.tags == {TAG: repository.head.oid}


def _public(server: HubServer) -> bool:
    repository = server.repositories.get(REPO)
    return repository is not None and not repository.private


def holds(server: HubServer, new: Path, old: Path) -> str:
    """What the head of the hub is, by its digests alone."""
    repository = server.repositories.get(REPO)
    if repository is None:
        return "nothing"
    there = _digests(repository)
    if there.pop("foreign.txt", None):
        return "foreign"
    if not there:
        return "empty"
    for name, folder in (("new", new), ("old", old)):
        if there == {entry.name: entry.digest for entry in hash_directory(folder).entries}:
            return name
    return "something else"


def _digests(repository: Repository) -> dict[str, str]:
    from hashlib import sha256  # noqa: PLC0415

    return {
        name: blob.sha256 or sha256(blob.content).hexdigest()
        for name, blob in repository.head.files.items()
        if name != ".gitattributes"
    }
