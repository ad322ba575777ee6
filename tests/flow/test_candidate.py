"""`publish --candidate`: what another job packed is judged again, and nobody's word is taken."""

from pathlib import Path

import pytest
from judged import Judged
from packed import pack

from release_guard.cli import main
from release_guard.signers.key import Key, generate_key

REPO = "acme/model"


@pytest.fixture
def judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Judged:
    """Packed with a key whose files lie nowhere any more; the environment names the same key."""
    monkeypatch.chdir(tmp_path)
    private, public = generate_key(tmp_path / "owner")
    monkeypatch.setenv("RELEASE_GUARD_SIGNING_KEY", str(private))
    options = (
        f'hub = {{ name = "directory", path = "{tmp_path / "hub"}" }}\n'
        'signer = { name = "key", path = "gone.pem", public = "gone.pub" }'
    )
    return pack(tmp_path / "candidate", Key(path=private, public=public), options)


def publish(judged: Judged, *more: str, root: str | None = None) -> int:
    expected = root or judged.candidate.payload.root
    folder = str(judged.candidate.directory)
    command = ["publish", "--candidate", folder, "--repo", REPO, "--expect-root", expected]
    return main([*command, *more])


def test_it_is_signed_by_the_key_of_the_environment(judged: Judged, tmp_path: Path) -> None:
    assert publish(judged, "--expect-policy", judged.policy.digest) == 0
    key = str(tmp_path / "owner" / "key.pub")
    assert main(["verify", str(tmp_path / "hub" / REPO), "--key", key]) == 0


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("root", "not the files that were judged"),
        ("policy", "not packed by the policy that was asked for"),
        ("weights", "not the files that were judged"),
        ("key", "does not name"),
    ],
)
def test_anything_else_than_expected_publishes_nothing(
    judged: Judged,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    what: str,
    says: str,
) -> None:
    more, root = (), judged.candidate.payload.root
    if what == "root":
        root = "0" * 64
    elif what == "policy":
        more = ("--expect-policy", "0" * 64)
    elif what == "weights":
        (judged.candidate.directory / "model.safetensors").write_bytes(b"others")
    else:
        other, _ = generate_key(tmp_path / "other")
        monkeypatch.setenv("RELEASE_GUARD_SIGNING_KEY", str(other))
    assert publish(judged, *more, root=root) == 4
    assert says in capsys.readouterr().err
    assert not (tmp_path / "hub").exists()


@pytest.mark.parametrize("strict", [True, False])
def test_the_policy_that_is_named_is_the_one_that_must_have_judged(
    judged: Judged, tmp_path: Path, capsys: pytest.CaptureFixture[str], *, strict: bool
) -> None:
    packed = (judged.candidate.directory / ".release-guard/policy.toml").read_text()
    asked = tmp_path / "asked.toml"
    asked.write_text(packed.replace("kappa = 5.0", "kappa = 50.0") if strict else packed)
    assert publish(judged, "--policy", str(asked)) == (4 if strict else 0)
    err = capsys.readouterr().err
    assert ("not packed by the policy that was asked for" in err) == strict


HEX = "0" * 64
CANDIDATE = ["--candidate", "candidate", "--expect-root", HEX]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give SOURCE, or --candidate"),
        (["--candidate", "candidate"], "--candidate needs --expect-root"),
        (["--candidate", "candidate", "--expect-root", "zz"], "not a SHA-256"),
        ([*CANDIDATE, "--as-is"], "judged already; leave out --as-is"),
        (["model", *CANDIDATE], "judged already; leave out SOURCE"),
        ([*CANDIDATE, "--base", "b", "--dry-run"], "judged already; leave out --base, --dry-run"),
        (["model", "--policy", "policy.toml", "--expect-policy", HEX], "go with --candidate"),
        (["model"], "no policy: give one with --policy"),
    ],
)
def test_what_does_not_go_together(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["publish", "--repo", REPO, *arguments]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("command", ["attack", "immunize", "plan"])
def test_without_a_policy_nothing_is_tried(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([command, "model"]) == 2
    assert "no policy: give one with --policy" in capsys.readouterr().err
