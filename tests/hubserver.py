"""A Hub on the loopback, for the real client: LFS objects in memory or a local Xet store.

    with HubServer(mode="stale", xet=tmp_path / "cas") as server:
        HuggingFace(endpoint=server.url).push(release, "acme/model")
        server.repositories["acme/model"].head.files

Modes say what goes wrong:
    normal      nothing
    stale       somebody else commits between a push's preupload and its commit
    lost        the commit is made, the connection closed without an answer
    late        the commit is answered with 504 and made a moment later, if nobody else was faster
    headless    the commit of a revision is not named
    deaf        503 for every commit, none is made
    flaky       500 once for every route
    busy        429 on the first door
    read-only   403 on every write
    unknown     401 on everything
    lying-tree  the first LFS file is listed with another digest
    bad-body    an LFS upload arrives with a flipped byte, and is stored
    no-xet      404 where a Xet token is asked for
    settings    403 on the settings alone
    deaf-settings  200 for the settings, which stay as they are
    echo        403 whose message repeats the token
"""

import base64
import contextlib
import hashlib
import json
import re
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, BinaryIO, Self
from urllib.parse import parse_qs, unquote, urlsplit

LFS_NAMES = (".safetensors", ".bin", ".gguf")
LFS_SIZE = 10 << 20
ATTRIBUTES = "".join(f"*{name} filter=lfs diff=lfs merge=lfs -text\n" for name in LFS_NAMES)


@dataclass(frozen=True)
class Blob:
    """What git would hold: the content, or the SHA-256 that stands for it."""

    size: int
    content: bytes = b""
    sha256: str | None = None

    @property
    def oid(self) -> str:
        if self.sha256 is not None:
            pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\n"
            return git_oid(f"{pointer}size {self.size}\n".encode())
        return git_oid(self.content)


@dataclass(frozen=True)
class Commit:
    oid: str
    title: str
    message: str
    author: str
    files: dict[str, Blob]


@dataclass
class Repository:
    private: bool
    gated: str | bool = False
    commits: list[Commit] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def head(self) -> Commit:
        return self.commits[-1]

    def at(self, revision: str) -> Commit | None:
        wanted = self.tags.get(revision, revision)
        if wanted == "main":
            return self.head
        return next((commit for commit in self.commits if commit.oid == wanted), None)

    def commit(self, files: dict[str, Blob], title: str, *, author: str, message: str = "") -> str:
        what = f"{len(self.commits)} {title} {sorted(files)}"
        oid = hashlib.sha1(what.encode(), usedforsecurity=False).hexdigest()
        self.commits.append(Commit(oid, title, message, author, files))
        return oid


class HubServer:
    def __init__(self, *, mode: str = "normal", xet: Path | None = None) -> None:
        self.mode = mode
        self.xet = xet
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.bodies: list[bytes] = []
        self.failed: set[str] = set()
        self.meanwhile: dict[str, Callable[[], object]] = {}  # done when a route is asked for
        self.routes = list(ROUTES)
        self.intercept: Intercept = lambda _, __, act: act()
        self.lock = threading.RLock()
        self._http = _Server(("127.0.0.1", 0), _handler(self))
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    def create(self, repo: str, *, private: bool = False) -> Repository:
        with self.lock:
            made = Repository(private)
            content = ATTRIBUTES.encode()
            files = {".gitattributes": Blob(len(content), content)}
            made.commit(files, "initial commit", author="hub")
            return self.repositories.setdefault(repo, made)

    def add(self, repo: str, path: str, content: bytes, *, author: str = "bob") -> str:
        """Commit one more regular file, as somebody else would."""
        with self.lock:
            repository = self.repositories[repo]
            files = {**repository.head.files, path: Blob(len(content), content)}
            return repository.commit(files, f"Add {path}", author=author)

    def admit(self, _: "Request") -> "Answer | None":
        """What a Hub that is choosy about who asks says instead of an answer."""
        return None

    def posts(self, part: str) -> int:
        return sum(method == "POST" and part in path for method, path in self.requests)

    def writes(self) -> list[str]:
        """Requests that may change something."""
        harmless = ("/paths-info/", "/validate-yaml")
        return [
            path
            for method, path in self.requests
            if method in {"POST", "PUT", "DELETE"} and not any(part in path for part in harmless)
        ]


@dataclass(frozen=True)
class Answer:
    body: Any
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    pause: float = 0.0  # seconds between two bytes of the body


Act = Callable[[], Answer | None]
Intercept = Callable[["Request", str, Act], Answer | None]


def problem(status: int, message: str, code: str = "") -> Answer:
    headers = {"X-Error-Message": message}
    if code:
        headers["X-Error-Code"] = code
    return Answer({"error": message}, status, headers)


NO_REPOSITORY = problem(404, "Repository not found", "RepoNotFound")
Route = Callable[["Request", "re.Match[str]"], Answer | None]


@dataclass(frozen=True)
class Request:
    server: HubServer
    method: str
    path: str
    query: dict[str, list[str]]
    headers: Any
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def answer(request: Request) -> Answer | None:
    """What the Hub answers; None closes the connection without a word."""
    for method, pattern, route in request.server.routes:
        match = re.fullmatch(pattern, request.path)
        if method == request.method and match:
            return request.server.intercept(
                request, route.__name__, partial(_act, request, match, route)
            )
    return problem(404, f"no route for {request.method} {request.path}")


def _act(request: Request, match: "re.Match[str]", route: Route) -> Answer | None:
    request.server.meanwhile.pop(route.__name__, lambda: None)()
    refused = request.server.admit(request) or _faulty(request, route)
    return refused or route(request, match)


def _faulty(request: Request, route: Route) -> Answer | None:
    server, name = request.server, route.__name__
    token = request.headers["authorization"]
    limit = {"RateLimit": '"api";r=0;t=41', "RateLimit-Policy": '"fixed window";"api";q=1;w=300'}
    faults = [
        ("unknown", True, problem(401, "Invalid credentials in Authorization header")),
        ("busy", name == "auth_check", replace(problem(429, "slow down"), headers=limit)),
        ("echo", name == "auth_check", problem(403, f"no, {token}, not you")),
        ("settings", name == "settings", problem(403, "not your settings")),
        ("deaf-settings", name == "settings", Answer({})),
        ("deaf", name == "commit", problem(503, "not now")),
        ("read-only", name in WRITES, problem(403, "read-only token")),
        ("flaky", name not in server.failed, problem(500, "try again")),
    ]
    server.failed.add(name)
    return next((fault for mode, here, fault in faults if server.mode == mode and here), None)


def whoami(_: Request, __: "re.Match[str]") -> Answer:
    return Answer({"type": "user", "name": "alice", "orgs": [{"name": "acme"}]})


def auth_check(request: Request, match: "re.Match[str]") -> Answer:
    if request.headers["authorization"] is None:  # strangers are not told what there is
        return problem(401, "Invalid username or password.", "RepoNotFound")
    known = match["repo"] in request.server.repositories
    return Answer({}) if known else NO_REPOSITORY


def create(request: Request, _: "re.Match[str]") -> Answer:
    asked = request.json
    repo = f"{asked['organization']}/{asked['name']}"
    url = {"url": f"{request.server.url}/{repo}"}
    if repo in request.server.repositories:
        return Answer({**url, "error": "You already created this model repo"}, 409)
    request.server.create(repo, private=asked.get("visibility") == "private")
    return Answer(url)


def validate_yaml(_: Request, __: "re.Match[str]") -> Answer:
    return Answer({"errors": [], "warnings": []})


def preupload(request: Request, match: "re.Match[str]") -> Answer:
    head = request.server.repositories[match["repo"]].head.files
    kept = head[".gitignore"].content.decode() if ".gitignore" in head else ""
    rules = request.json.get("gitIgnore", kept).splitlines()
    files = []
    for file in request.json["files"]:
        name, there = file["path"], head.get(file["path"])
        lfs = name.endswith(LFS_NAMES) or file["size"] > LFS_SIZE
        ignored = name in rules
        row = {"path": name, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": ignored}
        files.append(row if there is None else {**row, "oid": there.sha256 or there.oid})
    if request.server.mode == "stale":
        request.server.add(match["repo"], "foreign.txt", b"from bob")
    return Answer({"files": files})


def lfs_batch(request: Request, match: "re.Match[str]") -> Answer:
    server, base = request.server, f"{request.server.url}/lfs"
    objects = []
    for asked in request.json["objects"]:
        row = {"oid": asked["oid"], "size": asked["size"]}
        if asked["oid"] not in server.objects:
            upload = {"href": f"{base}/put/{asked['oid']}"}
            verify = {"href": f"{server.url}/{match['repo']}.git/info/lfs/verify"}
            row["actions"] = {"upload": upload, "verify": verify}
        objects.append(row)
    return Answer({"transfer": "basic", "objects": objects})


def lfs_put(request: Request, match: "re.Match[str]") -> Answer:
    body = request.body
    if request.server.mode == "bad-body":
        body = bytes([body[0] ^ 1]) + body[1:]
    elif hashlib.sha256(body).hexdigest() != match["oid"]:
        return problem(422, "the body is not what the oid says")
    request.server.objects[match["oid"]] = body
    return Answer({})


def lfs_verify(request: Request, _: "re.Match[str]") -> Answer:
    known = request.server.objects.get(request.json["oid"])
    fits = known is not None and len(known) == request.json["size"]
    return Answer({}) if fits else problem(404, "no such object")


def xet_token(request: Request, match: "re.Match[str]") -> Answer:
    server = request.server
    if server.xet is None or server.mode == "no-xet":
        return problem(404, "no Xet here")
    server.xet.mkdir(parents=True, exist_ok=True)
    token = {"casUrl": f"local://{server.xet}", "accessToken": match["kind"], "exp": 4102444800}
    headers = {
        "X-Xet-Cas-Url": str(token["casUrl"]),
        "X-Xet-Access-Token": str(token["accessToken"]),
        "X-Xet-Token-Expiration": str(token["exp"]),
    }
    return Answer(token, headers=headers)


def commit(request: Request, match: "re.Match[str]") -> Answer | None:
    server, repository = request.server, request.server.repositories[match["repo"]]
    lines = [json.loads(line) for line in request.body.splitlines()]
    header = lines[0]["value"]
    if header.get("parentCommit", repository.head.oid) != repository.head.oid:
        return problem(412, "A commit has happened since. Please refresh and try again.")
    files = dict(repository.head.files)
    for line in lines[1:]:
        refusal = _apply(server, files, line["key"], line["value"])
        if refusal is not None:
            return refusal

    def land() -> str:
        return repository.commit(
            files, header["summary"], author="alice", message=header["description"]
        )

    if server.mode == "late":
        server.mode = "normal"
        parent = repository.head.oid
        threading.Timer(0.15, lambda: repository.head.oid == parent and land()).start()
        return problem(504, "gateway timeout")
    oid = land()
    if server.mode == "lost":
        server.mode = "normal"
        return None
    url = f"{server.url}/{match['repo']}/commit/{oid}"
    return Answer({"success": True, "commitOid": oid, "commitUrl": url})


def _apply(server: HubServer, files: dict[str, Blob], key: str, value: Any) -> Answer | None:
    path = value["path"]
    if key == "file":
        content = base64.b64decode(value["content"])
        files[path] = Blob(len(content), content)
    elif key == "lfsFile":
        known = value["oid"] in (server.objects if server.xet is None else xet_files(server.xet))
        if not known:
            return problem(400, f"LFS object {value['oid']} was not uploaded")
        files[path] = Blob(value["size"], sha256=value["oid"])
    elif files.pop(path, None) is None:
        return problem(404, "A file with this name doesn't exist", "EntryNotFound")
    return None


def info(request: Request, match: "re.Match[str]") -> Answer:
    def see(repository: Repository, commit: Commit) -> Answer:
        found = {
            "id": match["repo"],
            "sha": None if request.server.mode == "headless" else commit.oid,
            "private": repository.private,
            "gated": repository.gated,
            "siblings": [{"rfilename": name} for name in commit.files],
            "tags": [],
        }
        return Answer(found)

    return _at(request, match, see)


def _at(
    request: Request, match: "re.Match[str]", see: Callable[[Repository, Commit], Answer]
) -> Answer:
    repository = request.server.repositories.get(match["repo"])
    if repository is None:
        return NO_REPOSITORY
    commit = repository.at(unquote(match.groupdict().get("revision") or "main"))
    if commit is None:
        return problem(404, "Invalid rev id", "RevisionNotFound")
    return see(repository, commit)


def tree(request: Request, match: "re.Match[str]") -> Answer:
    def see(_: Repository, commit: Commit) -> Answer:
        folders = {
            "/".join(name.split("/")[:depth])
            for name in commit.files
            for depth in range(1, name.count("/") + 1)
        }
        rows = [{"type": "directory", "path": name, "oid": "0" * 40} for name in sorted(folders)]
        files = [_row(name, blob) for name, blob in sorted(commit.files.items())]
        if request.server.mode == "lying-tree":
            lied = next((row for row in files if "lfs" in row), None)
            if lied is not None:
                lied["lfs"]["oid"] = "f" * 64
        return _page(request, rows + files)

    return _at(request, match, see)


def _row(name: str, blob: Blob) -> dict[str, Any]:
    row: dict[str, Any] = {"type": "file", "path": name, "size": blob.size, "oid": blob.oid}
    if blob.sha256 is not None:
        row["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": 134}
    return row


def _page(request: Request, rows: list[dict[str, Any]], size: int = 5) -> Answer:
    """Short pages, so that every listing has several."""
    start = int(request.query.get("cursor", ["0"])[0])
    headers = {}
    if start + size < len(rows):
        link = f"{request.server.url}{request.path}?recursive=True&cursor={start + size}"
        headers["Link"] = f'<{link}>; rel="next"'
    return Answer(rows[start : start + size], headers=headers)


def paths_info(request: Request, match: "re.Match[str]") -> Answer:
    def see(_: Repository, commit: Commit) -> Answer:
        asked = request.json["paths"]
        return Answer([_row(name, commit.files[name]) for name in asked if name in commit.files])

    return _at(request, match, see)


def commits(request: Request, match: "re.Match[str]") -> Answer:
    def see(repository: Repository, _: Commit) -> Answer:
        rows = [
            {
                "id": commit.oid,
                "authors": [{"user": commit.author}],
                "date": "2026-01-02T03:04:05.000Z",
                "title": commit.title,
                "message": commit.message,
            }
            for commit in reversed(repository.commits)
        ]
        return _page(request, rows)

    return _at(request, match, see)


def refs(request: Request, match: "re.Match[str]") -> Answer:
    def see(repository: Repository, commit: Commit) -> Answer:
        branch = {"name": "main", "ref": "refs/heads/main", "targetCommit": commit.oid}
        tags = [
            {"name": name, "ref": f"refs/tags/{name}", "targetCommit": oid}
            for name, oid in repository.tags.items()
        ]
        return Answer({"branches": [branch], "converts": [], "tags": tags})

    return _at(request, match, see)


def tag(request: Request, match: "re.Match[str]") -> Answer:
    def see(repository: Repository, commit: Commit) -> Answer:
        name = request.json["tag"]
        if name in repository.tags:
            return problem(409, f"Tag {name} exists")
        repository.tags[name] = commit.oid
        return Answer({})

    return _at(request, match, see)


def settings(request: Request, match: "re.Match[str]") -> Answer:
    def see(repository: Repository, _: Commit) -> Answer:
        if "visibility" in request.json:
            repository.private = request.json["visibility"] == "private"
        repository.gated = request.json.get("gated", repository.gated)
        return Answer({})

    return _at(request, match, see)


def resolve(request: Request, match: "re.Match[str]") -> Answer:
    def see(_: Repository, commit: Commit) -> Answer:
        blob = commit.files.get(unquote(match["path"]))
        if blob is None:
            return problem(404, "Entry not found", "EntryNotFound")
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{blob.oid}"'}
        if blob.sha256 is None:
            return Answer(blob.content, headers=headers)
        headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(blob.size)}
        return _large(request, match, blob, headers)

    return _at(request, match, see)


def _large(request: Request, match: "re.Match[str]", blob: Blob, headers: dict[str, str]) -> Answer:
    server, digest = request.server, str(blob.sha256)
    elsewhere = server.url.replace("127.0.0.1", "localhost")  # as the Hub's own storage is
    headers["Location"] = f"{elsewhere}/content/{digest}"
    if server.xet is not None:
        headers["X-Xet-Hash"] = xet_files(server.xet)[digest]
        token = f"{server.url}/api/models/{match['repo']}/xet-read-token/{match['revision']}"
        headers["Link"] = f'<{token}>; rel="xet-auth"'
    return Answer(b"", 302, headers)


def content(request: Request, match: "re.Match[str]") -> Answer:
    """Where a client without Xet is sent for the content of a large file."""
    server, digest = request.server, match["oid"]
    if server.xet is None:
        return Answer(server.objects[digest])
    return Answer(b"".join(xet_content(server.xet, digest)))


REPO = r"(?P<repo>[^/]+/[^/]+)"
MODEL = rf"/api/models/{REPO}"
REVISION = r"(?P<revision>[^/]+)"
ROUTES: list[tuple[str, str, Route]] = [
    ("GET", r"/api/whoami-v2", whoami),
    ("GET", rf"{MODEL}/auth-check(/write)?", auth_check),
    ("POST", r"/api/repos/create", create),
    ("POST", r"/api/validate-yaml", validate_yaml),
    ("POST", rf"{MODEL}/preupload/{REVISION}", preupload),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", lfs_batch),
    ("PUT", r"/lfs/put/(?P<oid>[0-9a-f]{64})", lfs_put),
    ("POST", rf"/{REPO}\.git/info/lfs/verify", lfs_verify),
    ("GET", rf"{MODEL}/xet-(?P<kind>read|write)-token/{REVISION}", xet_token),
    ("POST", rf"{MODEL}/commit/{REVISION}", commit),
    ("GET", rf"{MODEL}/revision/{REVISION}", info),
    ("GET", rf"{MODEL}/tree/{REVISION}", tree),
    ("POST", rf"{MODEL}/paths-info/{REVISION}", paths_info),
    ("GET", rf"{MODEL}/commits/{REVISION}", commits),
    ("GET", rf"{MODEL}/refs", refs),
    ("POST", rf"{MODEL}/tag/{REVISION}", tag),
    ("PUT", rf"{MODEL}/settings", settings),
    ("GET", MODEL, info),
    ("GET", rf"/{REPO}/resolve/{REVISION}/(?P<path>.+)", resolve),
    ("GET", r"/content/(?P<oid>[0-9a-f]{64})", content),
]
WRITES = {"auth_check", "create", "preupload", "lfs_batch", "lfs_put", "commit", "tag", "settings"}


class _Server(ThreadingHTTPServer):
    def handle_error(self, *arguments: Any) -> None:
        """Clients that are killed or give up are what some tests are about."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(*arguments)


def _handler(server: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def respond(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = urlsplit(self.path)
            method = "GET" if self.command == "HEAD" else self.command
            with server.lock:
                server.requests.append((self.command, parts.path))
                server.bodies.append(body)
                found = answer(
                    Request(server, method, parts.path, parse_qs(parts.query), self.headers, body)
                )
            if found is None:
                self.close_connection = True
                return
            self.send(found)

        do_GET = do_HEAD = do_POST = do_PUT = respond  # noqa: N815

        def send(self, found: Answer) -> None:
            raw = found.body if isinstance(found.body, bytes) else json.dumps(found.body).encode()
            self.send_response(found.status)
            for name, value in found.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            if self.command != "HEAD":
                _write(self.wfile, raw, found.pause)

        def log_message(self, *_: object) -> None:
            """Keep quiet: the request list is the log."""

    return Handler


def _write(file: BinaryIO, raw: bytes, pause: float) -> None:
    """All at once, or one byte after the other until the client has had enough."""
    with contextlib.suppress(OSError):
        for part in [raw] if pause == 0 else [bytes([byte]) for byte in raw]:
            file.write(part)
            time.sleep(pause)


def git_oid(content: bytes) -> str:
    header = f"blob {len(content)}\0".encode()
    return hashlib.sha1(header + content, usedforsecurity=False).hexdigest()


def xet_files(store: Path) -> dict[str, str]:
    """Xet hash by SHA-256 of every file in a local Xet store, read from its shards."""
    found: dict[str, str] = {}
    for shard in store.glob("xet/xorbs/shards/*.mdb"):
        found |= dict(_shard_files(shard.read_bytes()))
    return found


def _shard_files(shard: bytes) -> Iterator[tuple[str, str]]:
    offset = 48  # the header
    while shard[offset : offset + 32] != b"\xff" * 32:
        words = struct.unpack_from("<4Q", shard, offset)
        flags, entries = struct.unpack_from("<2I", shard, offset + 32)
        offset += 48 + 48 * entries * (2 if flags & 1 << 31 else 1)
        if flags & 1 << 30:
            # the SHA-256 is kept as four little-endian words as well
            sha256 = struct.unpack_from("<4Q", shard, offset)
            yield _hex(sha256), _hex(words)
            offset += 48


def _hex(words: tuple[int, ...]) -> str:
    return "".join(f"{word:016x}" for word in words)


def xet_content(store: Path, digest: str) -> Iterator[bytes]:
    from hf_xet import XetFileInfo, XetSession  # noqa: PLC0415

    group = XetSession().new_download_stream_group(endpoint=f"local://{store}")
    yield from group.download_stream(XetFileInfo(xet_files(store)[digest], None))
