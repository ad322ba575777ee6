import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hubserver import Blob, HubServer
from huggingface_hub import constants
from huggingface_hub.utils import _xet, close_session, http_backoff
from releases import CHANGED, FILES, make_release

from release_guard.errors import (
    AuthenticationError,
    HubError,
    IntegrityError,
    PolicyError,
    PushRefusedError,
    ReleaseGuardError,
)
from release_guard.hubs import NOTHING, huggingface
from release_guard.hubs.huggingface import HuggingFace
from release_guard.release import Release

# The client itself, when it uploads over LFS.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPO = "acme/model"
TOKEN = "hf_canaryCanaryCanary"  # noqa: S105
LARGE = {**FILES, "model.safetensors": bytes(range(256)) * (44 << 10)}  # 11 MiB: sent by path
Serve = Callable[..., HubServer]


@pytest.fixture(params=["lfs", "xet"])
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def serve(transport: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Start a Hub for this transport; the client is the real one, made to use it."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", transport == "lfs")
    monkeypatch.setitem(http_backoff.__kwdefaults__, "base_wait_time", 0.01)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    _xet.XET_CONNECTION_INFO_CACHE.clear()  # a later server may get the same port
    running = []

    def start(mode: str = "normal") -> HubServer:
        store = tmp_path / "cas" if transport == "xet" else None
        running.append(HubServer(mode=mode, xet=store).__enter__())
        return running[-1]

    yield start
    close_session()
    for server in running:
        server.__exit__()


@pytest.fixture
def release(tmp_path: Path) -> Release:
    return make_release(tmp_path / "first")


@pytest.fixture
def other(tmp_path: Path) -> Release:
    return make_release(tmp_path / "second", CHANGED)


once = pytest.mark.parametrize("transport", ["lfs"], indirect=True)  # transport does not matter


def titles(server: HubServer) -> list[str]:
    return [commit.title for commit in server.repositories[REPO].commits]


def test_a_missing_repository_is_made_private(serve: Serve, tmp_path: Path) -> None:
    server = serve()
    hub, release = HuggingFace(endpoint=server.url), make_release(tmp_path / "large", LARGE)
    assert hub.preflight(REPO) == NOTHING
    assert server.writes() == []
    receipt = hub.push(release, REPO)
    repository = server.repositories[REPO]
    assert repository.private
    assert titles(server) == ["initial commit", "Publish with release-guard"]
    assert receipt.revision == repository.head.oid == hub.preflight(REPO)
    assert receipt.url == f"{server.url}/{REPO}/tree/{receipt.revision}"
    assert f"release-root: sha256:{release.manifest.root}" in repository.head.message
    assert "release-guard-run: " in repository.head.message
    assert {*repository.head.files} == {".gitattributes", *FILES}
    assert (server.posts("lfs/objects/batch") == 0) == (server.xet is not None)


def test_another_release_replaces_the_head(serve: Serve, release: Release, other: Release) -> None:
    server = serve()
    hub = HuggingFace(endpoint=server.url)
    first = hub.push(release, REPO)
    second = hub.push(other, REPO)
    assert {*server.repositories[REPO].head.files} == {".gitattributes", *CHANGED}
    assert hub.tree(REPO).manifest == hub.tree(REPO, second.revision).manifest == other.manifest
    assert hub.tree(REPO, first.revision).manifest == release.manifest


@once
def test_an_unchanged_head_is_not_written(serve: Serve, release: Release) -> None:
    server = serve()
    hub = HuggingFace(endpoint=server.url)
    first = hub.push(release, REPO)
    before = len(server.writes())
    assert hub.push(release, REPO) == first
    assert len(server.writes()) == before


@once
def test_only_what_differs_is_sent(serve: Serve, release: Release, tmp_path: Path) -> None:
    server = serve()
    hub = HuggingFace(endpoint=server.url)
    hub.push(release, REPO)
    server.bodies.clear()
    hub.push(make_release(tmp_path / "card", {**FILES, "README.md": b"# Another card\n"}), REPO)
    asked = next(body for body in server.bodies if b'"sample"' in body)
    assert b"README.md" in asked
    assert b"model.safetensors" not in asked


def test_a_tree_needs_no_weights(serve: Serve, release: Release) -> None:
    server = serve()
    hub = HuggingFace(endpoint=server.url)
    hub.push(release, REPO)
    server.requests.clear()
    tree = hub.tree(REPO)
    assert tree.manifest == release.manifest
    assert tree.read("model.sig") == FILES["model.sig"]
    paths = [path for _, path in server.requests]
    assert not any(path.endswith("model.safetensors") or "/content/" in path for path in paths)
    assert tree.read("model.safetensors") == FILES["model.safetensors"]
    with pytest.raises(IntegrityError, match=r"missing\.json: not in acme/model"):
        tree.read("missing.json")


def test_a_commit_in_between_is_not_overwritten(serve: Serve, release: Release) -> None:
    server = serve("stale")
    server.create(REPO)
    with pytest.raises(
        PushRefusedError,
        match=r'moved .*\(1 revision by bob: "Add foreign.txt"; changed: foreign.txt\)',
    ) as refused:
        HuggingFace(endpoint=server.url).push(release, REPO)
    assert refused.value.exit_code == 5
    assert titles(server) == ["initial commit", "Add foreign.txt"]


@once
def test_a_push_planned_on_another_head_is_refused(
    serve: Serve, release: Release, tmp_path: Path
) -> None:
    server = serve()
    hub = HuggingFace(endpoint=server.url)
    planned = hub.push(release, REPO).revision
    server.add(REPO, "one.txt", b"1", author="bob")
    newest = server.add(REPO, "two.txt", b"2", author="carol")
    with pytest.raises(
        PushRefusedError, match=r"\(2 revisions by bob and carol: .*; changed: one.txt, two.txt\)"
    ):
        hub.push(make_release(tmp_path / "late", CHANGED, previous=planned), REPO)
    with pytest.raises(PushRefusedError, match="moved"):
        hub.push(make_release(tmp_path / "late", CHANGED, previous=NOTHING), REPO)
    assert server.repositories[REPO].head.oid == newest
    hub.push(make_release(tmp_path / "late", CHANGED, previous=newest), REPO)
    assert {*server.repositories[REPO].head.files} == {".gitattributes", *CHANGED}


@once
def test_what_others_wrote_does_nothing_to_a_terminal(serve: Serve, release: Release) -> None:
    server = serve()
    server.create(REPO)
    hub = HuggingFace(endpoint=server.url)
    planned = hub.push(release, REPO).revision
    files = dict(server.repositories[REPO].head.files)
    server.repositories[REPO].commit(files, "\x1b[2J\nerror: gone", author="eve\x1b]0;x\x07")
    with pytest.raises(PushRefusedError, match=r"by eve\\u001b\]0;x\\u0007") as refused:
        hub.push(make_release(release.directory, CHANGED, previous=planned), REPO)
    assert str(refused.value).isprintable()


@once
def test_planned_on_nothing_an_empty_repository_will_do(serve: Serve, tmp_path: Path) -> None:
    server = serve()
    server.create(REPO)
    HuggingFace(endpoint=server.url).push(make_release(tmp_path / "a", previous=NOTHING), REPO)
    assert len(titles(server)) == 2


@pytest.mark.parametrize("mode", ["lost", "late"])
def test_an_answer_that_never_came_commits_once(serve: Serve, release: Release, mode: str) -> None:
    server = serve(mode)
    server.create(REPO)
    receipt = HuggingFace(endpoint=server.url).push(release, REPO)
    assert titles(server) == ["initial commit", "Publish with release-guard"]
    assert receipt.revision == server.repositories[REPO].head.oid


@once
def test_an_answer_lost_to_a_foreign_commit(serve: Serve, release: Release) -> None:
    server = serve("late")
    server.create(REPO)
    overtake = threading.Timer(0.05, server.add, (REPO, "foreign.txt", b"from bob"))
    server.meanwhile["commit"] = overtake.start
    with pytest.raises(PushRefusedError, match="by bob"):
        HuggingFace(endpoint=server.url).push(release, REPO)
    assert titles(server) == ["initial commit", "Add foreign.txt"]


@once
def test_a_commit_that_is_never_taken(
    serve: Serve, release: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface, "_COMMIT_WAITS", (0.01, 0.01))
    server = serve("deaf")
    with pytest.raises(HubError, match="did not say whether it took the commit"):
        HuggingFace(endpoint=server.url).push(release, REPO)
    assert server.posts("/commit/") == 2
    server.mode = "normal"
    HuggingFace(endpoint=server.url).push(release, REPO)
    assert titles(server) == ["initial commit", "Publish with release-guard"]


@once
def test_a_hub_that_names_no_commit(serve: Serve, release: Release) -> None:
    server = serve("headless")
    with pytest.raises(HubError, match="names no commit for 'main'"):
        HuggingFace(endpoint=server.url).push(release, REPO)


@once
def test_a_commit_the_hub_cannot_make(serve: Serve, release: Release) -> None:
    server = serve()
    server.meanwhile["commit"] = server.objects.clear
    with pytest.raises(HubError, match="was not uploaded") as error:
        HuggingFace(endpoint=server.url).push(release, REPO)
    assert "\n" not in str(error.value)
    assert server.posts("/commit/") == 1


def test_a_hub_that_stumbles(serve: Serve, release: Release) -> None:
    server = serve("flaky")
    hub = HuggingFace(endpoint=server.url)
    hub.push(release, REPO)
    assert titles(server) == ["initial commit", "Publish with release-guard"]
    assert hub.tree(REPO).manifest == release.manifest
    assert {"auth_check", "create", "info", "tree", "commit", "resolve"} <= server.failed


@once
@pytest.mark.parametrize(
    ("mode", "kind", "says"),
    [
        ("unknown", AuthenticationError, "set HF_TOKEN"),
        ("read-only", PushRefusedError, r"refuses \(read-only token\)"),
        ("busy", HubError, "too many requests"),
        ("echo", PushRefusedError, r"no, Bearer <TOKEN>, not you"),
    ],
)
def test_a_hub_that_turns_us_away(
    serve: Serve, release: Release, mode: str, kind: type[ReleaseGuardError], says: str
) -> None:
    server = serve(mode)
    server.create(REPO)
    hub = HuggingFace(endpoint=server.url)
    with pytest.raises(kind, match=says) as early:
        hub.preflight(REPO)
    with pytest.raises(kind, match=says) as late:
        hub.push(release, REPO)
    assert early.type is late.type is kind
    for error in (early.value, late.value):
        assert "\n" not in str(error)
        assert TOKEN not in str(error)
    assert server.writes() == []


@once
def test_nobody_asks(
    serve: Serve, release: Release, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server = serve()
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(AuthenticationError, match="set HF_TOKEN"):
        HuggingFace(endpoint=server.url).push(release, REPO)
    assert server.repositories == {}


@once
def test_nobody_answers(serve: Serve, release: Release) -> None:
    assert serve
    with HubServer() as server:
        url = server.url
    with pytest.raises(HubError, match=r"push failed: .*[Cc]onnection refused") as error:
        HuggingFace(endpoint=url).push(release, REPO)
    assert error.value.exit_code == 1


def test_a_tree_that_lies(serve: Serve, release: Release) -> None:
    server = serve("lying-tree")
    with pytest.raises(IntegrityError, match="is not what was pushed"):
        HuggingFace(endpoint=server.url).push(release, REPO)
    assert server.repositories[REPO].private


@once
def test_weights_that_are_not_what_the_tree_says(serve: Serve, release: Release) -> None:
    server = serve("bad-body")
    hub = HuggingFace(endpoint=server.url)
    hub.push(release, REPO)
    with pytest.raises(IntegrityError, match="another digest than it serves"):
        hub.tree(REPO).read("model.safetensors")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("change", ["changed", "gone"])
def test_files_changed_since_signing_are_not_pushed(
    serve: Serve, tmp_path: Path, name: str, change: str
) -> None:
    server = serve()
    server.create(REPO)
    release = make_release(tmp_path / "large", LARGE)
    if change == "gone":
        (release.directory / name).unlink()
    else:
        (release.directory / name).write_bytes(b"\xff" * len(LARGE[name]))
    with pytest.raises(IntegrityError, match=name):
        HuggingFace(endpoint=server.url).push(release, REPO)
    assert titles(server) == ["initial commit"]


def test_weights_changed_while_they_are_sent(serve: Serve, tmp_path: Path, transport: str) -> None:
    server = serve()
    release = make_release(tmp_path / "large", LARGE)

    def overwrite() -> None:
        with (release.directory / "model.safetensors").open("r+b") as weights:
            weights.write(b"\xff")

    server.meanwhile["lfs_batch" if transport == "lfs" else "xet_token"] = overwrite
    with pytest.raises(IntegrityError, match="changed while it was uploaded"):
        HuggingFace(endpoint=server.url).push(release, REPO)
    assert titles(server) == ["initial commit"]


@pytest.mark.parametrize("transport", ["xet"], indirect=True)
def test_a_hub_without_xet(serve: Serve, release: Release) -> None:
    server = serve("no-xet")
    with pytest.raises(HubError, match="set HF_HUB_DISABLE_XET=1"):
        HuggingFace(endpoint=server.url).push(release, REPO)


@once
def test_a_gitignore_on_the_hub_drops_nothing(serve: Serve, release: Release) -> None:
    server = serve()
    server.create(REPO)
    server.add(REPO, ".gitignore", b"model.safetensors\nconfig.json\n")
    HuggingFace(endpoint=server.url).push(release, REPO)
    assert {*server.repositories[REPO].head.files} == {".gitattributes", ".gitignore", *FILES}


@once
def test_public_comes_last(serve: Serve, release: Release) -> None:
    server = serve()
    hub = HuggingFace(endpoint=server.url, private=False)
    hub.push(release, REPO)
    assert server.repositories[REPO].private
    hub.show(REPO)
    assert not server.repositories[REPO].private
    assert server.requests[-2] == ("PUT", f"/api/models/{REPO}/settings")
    before = len(server.writes())
    hub.push(release, REPO)
    hub.show(REPO)
    assert len(server.writes()) == before


@once
def test_what_to_know_before_a_push(serve: Serve, release: Release) -> None:
    server = serve()
    hidden, open_ = (
        HuggingFace(endpoint=server.url),
        HuggingFace(endpoint=server.url, private=False),
    )
    assert hidden.remarks(REPO) == (f"{REPO} does not exist yet; it will be made, private",)
    assert "until what was pushed is verified" in open_.remarks(REPO)[0]
    hidden.push(release, REPO)
    assert hidden.remarks(REPO) == ()
    assert "public once the push is verified" in open_.remarks(REPO)[0]
    server.repositories[REPO].private = False
    assert "the commit can be seen at once" in hidden.remarks(REPO)[0]
    assert server.writes()[-1].endswith("/commit/main")


@once
@pytest.mark.parametrize("gated", ["auto", "manual"])
def test_gated_before_anything_is_sent(serve: Serve, release: Release, gated: str) -> None:
    server = serve()
    HuggingFace(endpoint=server.url, gated=gated).push(release, REPO)
    assert server.repositories[REPO].gated == gated
    writes = [path.rpartition("/")[2] for path in server.writes()]
    assert writes.index("settings") < writes.index("main")


@once
def test_opened_to_all_only_at_the_end(serve: Serve, release: Release) -> None:
    server = serve()
    server.create(REPO).gated = "manual"
    hub = HuggingFace(endpoint=server.url, gated=False)
    hub.push(release, REPO)
    assert server.repositories[REPO].gated == "manual"
    hub.show(REPO)
    assert server.repositories[REPO].gated is False


@once
@pytest.mark.parametrize("mode", ["settings", "deaf-settings"])
def test_what_cannot_be_gated_is_not_pushed(serve: Serve, release: Release, mode: str) -> None:
    server = serve(mode)
    with pytest.raises(PushRefusedError, match=r"gate.*nothing was committed"):
        HuggingFace(endpoint=server.url, gated="manual").push(release, REPO)
    assert titles(server) == ["initial commit"]
    assert server.repositories[REPO].private


@once
def test_a_hub_that_says_yes_and_opens_nothing(serve: Serve, release: Release) -> None:
    server = serve("deaf-settings")
    hub = HuggingFace(endpoint=server.url, private=False)
    hub.push(release, REPO)
    with pytest.raises(PushRefusedError, match="did not open it as it was told"):
        hub.show(REPO)


@once
def test_an_earlier_attempt_with_other_signatures_is_known_again(
    serve: Serve, release: Release, tmp_path: Path
) -> None:
    """Its commit lands late, between the look of the second attempt and its commit."""
    server = serve()
    server.create(REPO)
    early = make_release(tmp_path / "early", {**FILES, "model.sig": b"signed a minute before"})
    early = replace(early, run=release.run)
    hub = HuggingFace(endpoint=server.url)
    landed: list[str] = []
    server.meanwhile["preupload"] = lambda: landed.append(put(server, early))
    assert hub.push(release, REPO).revision == landed[0]
    assert len(titles(server)) == 2
    other = make_release(tmp_path / "other", CHANGED)
    server.meanwhile["preupload"] = lambda: put(server, replace(early, run=other.run))
    with pytest.raises(PushRefusedError, match="moved"):  # same name, other files
        hub.push(other, REPO)


def put(server: HubServer, release: Release) -> str:
    """A commit of the release as our own client would have described it."""
    files = {
        entry.name: Blob(entry.size, (release.directory / entry.name).read_bytes())
        if not entry.name.endswith(".safetensors")
        else Blob(entry.size, sha256=entry.digest)
        for entry in release.manifest.entries
    }
    message = f"release-guard-run: {release.run}"
    return server.repositories[REPO].commit(files, "Publish", author="alice", message=message)


@once
def test_public_is_refused(serve: Serve, release: Release) -> None:
    server = serve("settings")
    hub = HuggingFace(endpoint=server.url, private=False)
    hub.push(release, REPO)
    with pytest.raises(PushRefusedError, match=r"not opened .*; it stays as it was"):
        hub.show(REPO)
    assert server.repositories[REPO].private
    assert len(titles(server)) == 2


@once
def test_unknown_repositories_and_revisions(serve: Serve) -> None:
    server = serve()
    hub = HuggingFace(endpoint=server.url)
    with pytest.raises(HubError, match="no such repository or revision"):
        hub.tree(REPO)
    server.create(REPO)
    with pytest.raises(HubError, match="no such repository or revision"):
        hub.tree(REPO, "v9")
    with pytest.raises(PolicyError, match="not a repository id"):
        hub.tree("model")


@pytest.mark.parametrize(
    ("endpoint", "says"),
    [
        ("http://hub.example", "is not https"),
        ("ftp://127.0.0.1", "is not https"),
        ("https://alice:s3cret@hub.example", "holds a name or password"),
    ],
)
def test_endpoints_that_would_give_the_token_away(endpoint: str, says: str) -> None:
    with pytest.raises(PolicyError, match=says) as refused:
        HuggingFace(endpoint=endpoint).preflight(REPO)
    assert "s3cret" not in str(refused.value)


def test_a_process_of_its_own_leaks_no_token(serve: Serve, tmp_path: Path, transport: str) -> None:
    """The client as a user runs it: its switches from the environment, its log at its loudest."""
    server = serve()
    code = (
        "import sys; from pathlib import Path; from releases import *\n"
        "from release_guard.hubs.huggingface import HuggingFace\n"
        "hub = HuggingFace(endpoint=sys.argv[1])\n"
        "receipt = hub.push(make_release(Path(sys.argv[2])), 'acme/model')\n"
        "print(receipt, hub.tree('acme/model').manifest)\n"
    )
    path = (str(Path(__file__).parent.parent), *sys.path)
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": os.pathsep.join(path),
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": TOKEN,
        "HF_DEBUG": "1",
        **({"HF_HUB_DISABLE_XET": "1"} if transport == "lfs" else {}),
    }
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", code, server.url, tmp_path / "release"],
        check=False,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert "Send: curl" in done.stderr
    assert TOKEN not in done.stdout + done.stderr
    assert all(TOKEN.encode() not in body for body in server.bodies)
    assert "\r" not in done.stderr  # no progress bar where nobody looks
    assert (server.posts("lfs/objects/batch") == 0) == (transport == "xet")
