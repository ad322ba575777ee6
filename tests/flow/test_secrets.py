"""Secrets stay where they are: nothing that is said, written or sent repeats one.

Every variable that holds one gets a value of its own, which is then looked for everywhere, as it
is, percent-encoded and in base64.
"""

import base64
import contextlib
import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote

import pico
import psutil
import pytest
from evidence_builder import example_policy
from hubserver import HubServer
from judged import fixed_key, judge, write
from readers import require_plain

from release_guard.cli import main
from release_guard.deliver import open_candidate
from release_guard.errors import HubError, IntegrityError, PolicyError
from release_guard.gauging import GaugeRecord
from release_guard.hubs.huggingface import HuggingFace
from release_guard.keys import fingerprint, load_public_key
from release_guard.run import Run
from release_guard.signers.key import Key, generate_key

REPO = "acme/model"
PASSWORD = "canary-pass w\u00f6rd-8d1f"  # noqa: S105
CANARIES = {
    "HF_TOKEN": "hf_canary0aVx7yQ2bTz",
    "HUGGING_FACE_HUB_TOKEN": "hf_canary1kLm9pR4sWe",
    "HF_OIDC_ID_TOKEN": "eyJjYW5hcnkyIjoxfQ.eyJjYW5hcnkzIjoyfQ.c2lnbmF0dXJl",
    "ACTIONS_ID_TOKEN_REQUEST_TOKEN": "canary4-request-token",
    "AWS_SECRET_ACCESS_KEY": "canary5/aws+secret=",
    "GITHUB_TOKEN": "ghs_canary6canary6canary6",
    "WANDB_API_KEY": "canary7wandb",
    "SOME_SERVICE_PASSWORD": "canary8;service",
    "RELEASE_GUARD_KEY_PASSWORD": PASSWORD,
}


@dataclass
class Home:
    """A folder with an encrypted key and a candidate that passes, and a hub to push it to."""

    folder: Path
    server: HubServer
    root: str
    key: str
    environment: Mapping[str, str] = field(default_factory=dict)

    def run(self, *arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
        given = {**self.environment, **variables}
        return subprocess.run(  # noqa: S603
            [sys.executable, "-m", "release_guard", *arguments],
            capture_output=True,
            text=True,
            cwd=self.folder,
            env={name: value for name, value in given.items() if value},
            check=False,
        )

    def publish(self, **variables: str) -> "subprocess.CompletedProcess[str]":
        expected = ("--expect-root", self.root, "--repo", REPO, "-vv")
        return self.run("publish", "--candidate", "run/release", *expected, **variables)

    def leaks(self, done: "subprocess.CompletedProcess[str]", *more: str) -> list[str]:
        """Where a secret stands, that is not the place it is kept in."""
        places = {"stdout": done.stdout.encode(), "stderr": done.stderr.encode()}
        places |= {f"body {n}": body for n, body in enumerate(self.server.bodies)}
        places |= {
            f"request {n}": asked[1].encode() for n, asked in enumerate(self.server.requests)
        }
        for path in self.folder.rglob("*"):
            if path.is_file() and path.name != "key.pem":
                places[str(path)] = path.read_bytes()
        secrets = (*CANARIES.values(), *self.key.splitlines()[1:-1], *more)
        return [
            f"{place}: {secret}"
            for secret in secrets
            for spelling in spellings(secret)
            for place, content in places.items()
            if spelling in content
        ]


def spellings(secret: str) -> Iterator[bytes]:
    """As it is, percent-encoded, and as it stands in base64 after zero, one or two other bytes."""
    raw = secret.encode()
    yield from (raw, quote(secret, safe="").encode())
    for before in range(3):
        yield base64.b64encode(b"\0" * before + raw)[4 if before else 0 : -4]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    with HubServer() as server:
        yield make_home(tmp_path_factory.mktemp("home"), server)


@pytest.fixture
def home(made: Home) -> Home:
    """The same with a hub that holds nothing and is well."""
    server = made.server
    server.mode = "normal"
    for kept in (server.repositories, server.requests, server.bodies):
        kept.clear()
    return made


def make_home(folder: Path, server: HubServer) -> Home:
    environment = {
        **CANARIES,
        "PATH": os.environ["PATH"],
        "PYTHONPATH": os.pathsep.join((str(Path(__file__).parents[2]), *filter(None, sys.path))),
        "HF_HOME": str(folder / "hf"),
        "HF_DEBUG": "1",
        "HF_HUB_DISABLE_XET": "1",
        "HF_ENDPOINT": server.url,
    }
    home = Home(folder, server, "", "", environment)
    made = home.run("keygen", "-vv")
    assert made.returncode == 0, made.stderr
    home.key = (folder / "key.pem").read_text()
    assert not home.leaks(made)
    hub = f'hub = {{ name = "huggingface", endpoint = "{server.url}" }}'
    policy = example_policy(('hub = { name = "directory", path = "hub" }', hub))
    moment = datetime.now(UTC).isoformat()
    judged = judge(
        folder / "run" / "release",
        Key(public=folder / "key.pub"),
        policy=policy,
        started_at=moment,
        finished_at=moment,
    )
    mark = fingerprint(load_public_key(folder / "key.pub"))
    write(judged.candidate.directory, "README.md", f"# A model\n\nSigned by {mark}\n".encode())
    home.root = judged.candidate.payload.root
    home.environment = {**environment, "RELEASE_GUARD_SIGNING_KEY": home.key}
    return home


def test_what_is_looked_for_would_be_found(home: Home) -> None:
    """The search itself: each secret, in each spelling, in each place."""
    for secret in CANARIES.values():
        for spelling in spellings(secret):
            path = write(home.folder, "leak", b"x" + spelling)
            assert home.leaks(subprocess.CompletedProcess([], 0, "", "")), spelling
            path.unlink()
    assert home.leaks(subprocess.CompletedProcess([], 0, CANARIES["HF_TOKEN"], ""))


def test_a_release_goes_out_and_no_secret_with_it(home: Home) -> None:
    done = home.publish()
    assert done.returncode == 0, done.stderr
    assert "Send: curl" in done.stderr  # HF_DEBUG was heard
    assert home.server.repositories[REPO].head.files.keys() >= {"model.sig", "config.json"}
    assert not home.leaks(done)
    checked = home.run("verify", f"hf://{REPO}", "--key", "key.pub", "-vv")
    assert checked.stdout.startswith("intact"), checked.stderr
    assert not home.leaks(checked)


ONE_LINE, BASE64, CUT = "in one line", "in base64", "cut"
FAILURES: dict[
    str, tuple[str, dict[str, str], int]
] = {  # the mode of the hub, what differs, the exit code (0: any but that)
    "the hub repeats the token": ("echo", {}, 5),
    "the hub knows nobody": ("unknown", {}, 6),
    "the token may only read": ("read-only", {}, 5),
    "the token is no header": ("normal", {"HF_TOKEN": "hf_canary0 \n\u00e4"}, 1),
    "no such publisher": ("normal", {"HF_OIDC_RESOURCE": REPO}, 0),
    "a wrong password": ("normal", {"RELEASE_GUARD_KEY_PASSWORD": "other-canary9"}, 1),
    "no password": ("normal", {"RELEASE_GUARD_KEY_PASSWORD": ""}, 1),
    "a key in base64": ("normal", {"RELEASE_GUARD_SIGNING_KEY": BASE64}, 1),
    "a key in one line": ("normal", {"RELEASE_GUARD_SIGNING_KEY": ONE_LINE}, 1),
    "half a key": ("normal", {"RELEASE_GUARD_SIGNING_KEY": CUT}, 1),
    "a proxy that is gone": ("normal", {"HTTP_PROXY": "http://alice:tok-canary9@127.0.0.1:9"}, 1),
    "a proxy that is none": ("normal", {"HTTP_PROXY": "gopher://alice:tok-canary9@127.0.0.1"}, 1),
    "a proxy by SOCKS": ("normal", {"HTTP_PROXY": "socks5://alice:tok-canary9@127.0.0.1:9"}, 1),
}


@pytest.mark.parametrize("what", FAILURES)
def test_what_goes_wrong_is_told_without_a_secret(home: Home, what: str) -> None:
    mode, variables, code = FAILURES[what]
    body = "".join(home.key.splitlines()[1:-1])
    forms = {
        BASE64: base64.b64encode(home.key.encode()).decode(),
        ONE_LINE: body,
        CUT: home.key[: len(home.key) // 2],
    }
    home.server.mode = mode
    home.server.create(REPO)
    done = home.publish(**{name: forms.get(value, value) for name, value in variables.items()})
    if "HF_OIDC_RESOURCE" in variables:
        home.server.bodies.clear()  # where the hub is asked to exchange that token for its own
    assert done.returncode == code or (code == 0 != done.returncode), done.stderr
    assert "unexpected" not in done.stderr, done.stderr
    assert not home.leaks(done, "tok-canary9", "other-canary9", "hf_canary0 ", *forms.values())


def test_a_candidate_does_not_say_where_a_token_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was packed by whoever worked on models, policy and all."""
    monkeypatch.setenv("HF_TOKEN", CANARIES["HF_TOKEN"])
    hub = 'hub = { name = "huggingface", endpoint = "https://hub.example" }'
    policy = example_policy(('hub = { name = "directory", path = "hub" }', hub))
    packed = judge(tmp_path / "release", fixed_key(tmp_path), policy=policy).candidate
    expected = ["--expect-root", packed.payload.root, "--repo", REPO]
    assert main(["publish", "--candidate", str(packed.directory), *expected]) == 2
    assert "sends it to https://hub.example; if a token may go there" in capsys.readouterr().err


def test_a_candidate_of_another_policy_is_not_opened(tmp_path: Path) -> None:
    judged = judge(tmp_path / "release", fixed_key(tmp_path))
    folder, root = judged.candidate.directory, judged.candidate.payload.root
    assert open_candidate(folder, root=root, policy_digest=judged.policy.digest)
    asked = example_policy(("kappa = 5.0", "kappa = 50.0"))
    with pytest.raises(IntegrityError, match="not packed by the policy that was asked for"):
        open_candidate(folder, root=root, policy_digest=asked.digest)


@pytest.mark.parametrize(
    "asked",
    [["attack"], ["immunize"], ["publish", "--repo", REPO, "--dry-run"]],
    ids=lambda a: a[0],
)
def test_what_works_on_models_knows_no_secret(home: Home, asked: list[str]) -> None:
    """Each process below that of the command until the one is there that has all others below."""
    data = home.folder / "data"
    for name in ("retained", "restricted"):
        write(data, f"{name}.parquet", b"")  # no data, no model: the process is what counts
    policy = pico.pico_policy(home.folder / "policy", data, stages=[{"name": "sophon"}])
    command = [*asked, str(data), "--policy", str(policy), "--workers", "1"]
    environment = {**home.environment, "HF_TOKEN_PATH": "key.pem", "DB_URL": "x://a:canary9@b"}
    seen: dict[str, dict[str, str]] = {}
    with subprocess.Popen(  # noqa: S603
        [sys.executable, "-m", "release_guard", *command],
        cwd=home.folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as running:
        whole = psutil.Process(running.pid)
        while running.poll() is None and not any("spawn_main" in name for name in seen):
            time.sleep(0.05)
            for child in whole.children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    line = " ".join(child.cmdline())
                    if "multiprocessing" in line:  # before that it is a copy of its parent
                        seen[f"{child.pid} {line}"] = child.environ()
        running.kill()
    assert seen, "no process was seen at work"
    for known in seen.values():
        text = "\n".join(f"{name}={value}" for name, value in known.items())
        for secret in (*CANARIES.values(), *home.key.splitlines()[1:-1], "canary9"):
            assert not [True for each in spellings(secret) if each in text.encode()], secret
        assert known["HF_TOKEN_PATH"] == os.devnull
        assert known["HF_HUB_OFFLINE"] == "1"
        assert known["PATH"] == os.environ["PATH"]


def test_what_is_private_is_so_whatever_the_umask(tmp_path: Path) -> None:
    record = {
        "modality": {"name": "causal_lm"},
        "secret": "ab" * 32,
        "changes": ["neurons"],
        "style": "diagonal",
        "kept": {},
        "before": "1" * 64,
        "after": "2" * 64,
        "undefended": "3" * 64,
        "sketch": {},
    }
    before = os.umask(0)
    try:
        private, public = generate_key(tmp_path / "keys")
        folder = Run(tmp_path / "run").private
        (folder / "gauge.partial").touch(0o666)  # a killed run's
        GaugeRecord.model_validate(record).save(folder / "gauge.json")
    finally:
        os.umask(before)
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (private, folder, folder / "gauge.json")]
    assert modes == [0o600, 0o700, 0o600]
    assert stat.S_IMODE(public.stat().st_mode) == 0o644


ENDPOINTS = [
    "http://hub.example",
    "http://127.0.0.1.hub.example",
    "http://localhost.hub.example",
    "http://localhost@hub.example",
    "http://127.0.0.1:80@hub.example/",
    "http://0x7f000001",
    "http://2130706433",
    "http://0177.0.0.1",
    "http://127.1",
    "http://[::ffff:93.184.216.34]",
    "http://0.0.0.0",
    "http://[::]",
    "HTTP://hub.example",
    "http:/\\hub.example",
    "http://hub.example#@127.0.0.1",
    "http://hub.example\\@127.0.0.1",
    "http://alice:canary9@127.0.0.1",
    "https://alice:canary9@hub.example",
    "https://canary9@hub.example",
    "ftp://127.0.0.1",
    "file:///etc",
    "hub.example",
    "//127.0.0.1",
    "",
    "http://",
    "https://",
    "http://[",
    "http://127.0.0.1\n.hub.example",
    "http://loc\talhost",
    "\x1b[31mhttp://127.0.0.1",
]


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_no_token_goes_where_it_can_be_read(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the policy and by the environment alike; nothing is resolved or asked."""
    monkeypatch.setenv("HF_TOKEN", CANARIES["HF_TOKEN"])
    hubs = [HuggingFace(endpoint=endpoint)] if endpoint else []
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    for hub in [*hubs, HuggingFace()]:
        with pytest.raises(PolicyError) as refused:
            hub.preflight(REPO)
        assert "canary9" not in str(refused.value)
        require_plain(str(refused.value))


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_takes_no_token_along(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """To another origin; the first one may be redirected as it likes."""
    asked: list[str | None] = []

    class Second(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.headers["authorization"])
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_: object) -> None:
            pass

    class First(Second):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Location", f"http://localhost:{second.server_port}{self.path}")
            self.send_header("Content-Length", "0")
            self.end_headers()

    monkeypatch.setenv("HF_TOKEN", CANARIES["HF_TOKEN"])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with serving(Second) as second, serving(First) as first, contextlib.suppress(HubError):
        HuggingFace(endpoint=f"http://127.0.0.1:{first.server_port}").preflight(REPO)
    assert asked
    assert asked == [None] * len(asked)


@contextlib.contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
