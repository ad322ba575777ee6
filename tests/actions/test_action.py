"""action.yml, its shell really run: who may do what, and what they are told."""

from dataclasses import replace
from pathlib import Path

import pytest
from evidence_builder import POLICY
from fake_runner import Job, Runner
from hubserver import HubServer
from judged import Judged, write
from oidcserver import TrustedHub
from packed import pack

from release_guard.manifest import hash_directory

ROOT = Path(__file__).parents[2]
REPO = "acme/model"


def publish(runner: Runner, judged: Judged, **changes: str) -> Job:
    folder, payload = judged.candidate.directory, judged.candidate.payload
    inputs = {
        "mode": "publish",
        "repo": REPO,
        "candidate": str(folder),
        "policy": str(folder / ".release-guard/policy.toml"),
        "expect-root": payload.root,
    }
    return runner.use(ROOT, {**inputs, **changes})


def errors(job: Job) -> list[str]:
    return [data for ran in job.ran for kind, _, data in ran.commands if kind == "error"]


def test_trusted_publishing_needs_no_stored_token(
    runner: Runner, hub: TrustedHub, judged: Judged
) -> None:
    job = publish(runner, judged)

    assert job.outcome == "success", job.log
    assert hub.exchanges == [REPO], "asked once, for this repository alone"
    assert {*hub.arrived} == {f"Bearer {hub.given[0]}"}
    head = hub.repositories[REPO].head
    there = {entry.name for entry in hash_directory(judged.candidate.directory).entries}
    assert {*head.files} == {*there, ".gitattributes"}
    assert "model.sig" in head.files
    assert ".release-guard/resistance.sigstore.json" in head.files
    guard = job.step("guard")
    assert guard.outputs["verdict"] == "PASS"
    assert guard.outputs["payload-root"] == judged.candidate.payload.root
    assert guard.outputs["commit-url"] == f"{hub.url}/{REPO}/tree/{head.oid}"
    assert "**PASS**" in guard.summary
    assert guard.outputs["commit-url"] in guard.summary
    assert errors(job) == []


def test_no_token_is_told_to_anybody(
    runner: Runner, hub: TrustedHub, judged: Judged, tmp_path: Path
) -> None:
    job = publish(runner, judged)

    tokens = [*hub.given, *hub.identities, hub.request_token]
    assert len(tokens) == 3
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    told = b"\n".join([*written, job.log.encode()])
    assert [token for token in tokens if token.encode() in told] == []


def test_another_root_publishes_nothing(runner: Runner, hub: TrustedHub, judged: Judged) -> None:
    job = publish(runner, judged, **{"expect-root": "0" * 64})

    assert job.outcome == "failure"
    assert job.step("guard").code == 4
    assert hub.arrived == []
    assert "commit-url" not in job.step("guard").outputs
    assert len(errors(job)) == 1
    assert judged.candidate.payload.root in errors(job)[0]


@pytest.mark.parametrize("root", ["", " ", "*"])
def test_no_root_is_not_any_root(
    root: str, runner: Runner, hub: TrustedHub, judged: Judged
) -> None:
    job = publish(runner, judged, **{"expect-root": root})

    assert job.outcome == "failure"
    assert hub.arrived == []


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", ".release-guard/policy.toml"])
def test_what_changed_on_the_way_is_not_published(
    name: str, runner: Runner, hub: TrustedHub, judged: Judged
) -> None:
    path = judged.candidate.directory / name
    path.write_bytes(path.read_bytes() + b"\n")
    job = publish(runner, judged)

    assert job.step("guard").code == 4, job.log
    assert hub.writes() == []


def test_no_candidate_names_the_hub_that_gets_the_token(
    runner: Runner, hub: TrustedHub, judged: Judged, tmp_path: Path
) -> None:
    """Code of the model ran in the job that packed it and may have written the policy."""
    with HubServer() as thief:
        options = f'hub = {{ name = "huggingface", endpoint = "{thief.url}" }}'
        job = publish(runner, pack(tmp_path / "theft", judged.signer, options))

        assert job.step("guard").code == 2, job.log
        assert thief.requests == []
    assert hub.given == []


def test_a_publisher_that_the_hub_does_not_trust_is_not_authenticated(
    runner: Runner, hub: TrustedHub, judged: Judged
) -> None:
    hub.trusts = "acme/other"
    job = publish(runner, judged)

    assert job.step("guard").code == 6, job.log
    assert hub.writes() == ["/oauth/token"]
    assert hub.arrived == []
    assert "trusted publisher" in errors(job)[0]


def test_a_job_that_may_not_ask_for_an_identity_is_not_authenticated(
    runner: Runner, hub: TrustedHub, judged: Judged
) -> None:
    job = publish(replace(runner, identity={}), judged)

    assert job.step("guard").code == 6, job.log
    assert hub.requests == []


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        "HF_OIDC_ID_TOKEN",
        "SIGSTORE_ID_TOKEN",
        "RELEASE_GUARD_SIGNING_KEY",
    ],
)
def test_nothing_is_judged_where_a_credential_lies(
    name: str, runner: Runner, hub: TrustedHub
) -> None:
    poor = replace(runner, identity={}, variables={name: "canary"})
    job = poor.use(ROOT, {"mode": "judge", "repo": REPO, "model": "model"})

    assert job.step("guard").code == 2
    assert "must hold no token" in errors(job)[0]
    assert "::stop-commands::" not in job.log, "it was run all the same"


def test_nothing_is_judged_where_an_identity_could_be_asked_for(
    runner: Runner, hub: TrustedHub
) -> None:
    job = replace(runner, variables={}).use(ROOT, {"mode": "judge", "repo": REPO, "model": "m"})

    assert job.step("guard").code == 2
    assert hub.requests == []


@pytest.mark.parametrize("mode", ["", "Judge", "judge publish", "$(touch owned)"])
def test_another_mode_installs_nothing(mode: str, runner: Runner) -> None:
    job = replace(runner, replaced={}).use(ROOT, {"mode": mode, "repo": REPO})

    assert job.step("install").code == 2
    assert job.skipped == ["guard"]
    assert [*job.workspace.iterdir()] == []


HOSTILE = [
    "a 'b\" $(touch owned) `touch owned` ; touch owned #",
    '"; touch owned; "',
    "a\ntouch owned\n::error title=owned::owned",
    "--output=owned",
    "*",
]


@pytest.mark.parametrize("value", [HOSTILE[0], HOSTILE[2]])
def test_no_input_is_shell(value: str, runner: Runner, hub: TrustedHub, judged: Judged) -> None:
    poor = replace(runner, identity={}, variables={"HF_ENDPOINT": hub.url})
    inputs = {"mode": "judge", "repo": REPO, "model": value, "policy": value}
    refused = poor.use(ROOT, inputs)
    elsewhere = replace(runner, folder=runner.folder.with_name("other"))
    published = publish(elsewhere, judged, repo=value, candidate=value)

    for job in (refused, published):
        assert job.step("guard").code in {1, 2, 4}, job.log
        assert [*job.workspace.iterdir()] == []
        obeyed = job.step("guard").commands
        assert {properties for _, properties, _ in obeyed} == {"title=release-guard"}
    assert hub.writes() == []


@pytest.mark.parametrize("value", HOSTILE)
def test_every_input_is_one_argument(value: str, runner: Runner, tmp_path: Path) -> None:
    record = f"""{runner.replaced["install"]}
cat > bin/release-guard <<'END'
#!/bin/sh
printf '%s\\0' "$HF_OIDC_RESOURCE" "$@" > "$RUNNER_TEMP/said"
END
"""
    policy = str(write(tmp_path / value, "policy.toml", POLICY.encode()))
    poor = replace(runner, identity={}, variables={}, replaced={"install": record})
    inputs = {"repo": value, "model": value, "policy": policy, "candidate": value}
    found = []
    for mode in ("judge", "publish"):
        each = replace(poor, folder=runner.folder / mode)
        job = each.use(ROOT, {**inputs, "mode": mode, "expect-root": value})
        said = (each.folder / "job" / "temp" / "said").read_text()
        found.append(said.removesuffix("\0").split("\0"))
        assert [*job.workspace.iterdir()] == []

    run = runner.folder / "judge" / "job" / "temp" / "release-guard-run"
    begin = ["publish", "--json", f"--repo={value}"]
    end = [f"--policy={policy}", f"--output={run}", "--stop-after=pack", "--", value]
    assert found[0] == ["", *begin, *end]
    expected = [f"--candidate={value}", f"--expect-root={value}", f"--policy={policy}"]
    assert found[1] == [value, *begin, *expected]


def test_what_a_model_prints_is_no_command(runner: Runner) -> None:
    said = "::set-output name=verdict::PASS\n::add-mask::a\n##[error]no\n::0123456789abcdef::\n"
    loud = f"""{runner.replaced["install"]}
cat > bin/release-guard <<'END'
#!/bin/sh
printf '{said}'
printf '{said}' >&2
exit 3
END
"""
    poor = replace(runner, identity={}, variables={}, replaced={"install": loud})
    write(tmp := runner.folder.with_name("model"), "policy.toml", POLICY.encode())
    job = poor.use(
        ROOT, {"mode": "judge", "repo": REPO, "model": str(tmp), "policy": f"{tmp}/policy.toml"}
    )

    assert "::add-mask::a" in job.log
    assert [kind for kind, _, _ in job.step("guard").commands] == ["error"]
    assert job.step("guard").outputs == {}
    assert job.outcome == "failure"


def test_the_install_takes_every_version_from_this_commit(tmp_path: Path) -> None:
    """Its shell, with a recorder in place of Python: names with spaces stay whole."""
    tools, action = tmp_path / "tools", tmp_path / "the action"
    write(action, "action.yml", (ROOT / "action.yml").read_bytes())
    record = b'#!/bin/sh\nprintf "%s|" "$@" "$PIP_CONSTRAINT" "$PIP_BUILD_CONSTRAINT" >> "$LOG"\n'
    write(
        tools,
        "python",
        record + b'[ "$3" != venv ] || { mkdir -p "$5/bin" && cp "$0" "$5/bin/python"; }\n',
    )
    (tools / "python").chmod(0o755)
    log = tmp_path / "log"
    runner = Runner(
        tmp_path / "runner",
        variables={"LOG": str(log), "PATH": f"{tools}:/usr/bin:/bin"},
        replaced={"guard": "true"},
    )
    job = runner.use(action, {"mode": "publish", "repo": REPO})

    assert job.outcome == "success", job.log
    venv = tmp_path / "runner" / "job" / "temp" / "release-guard"
    assert log.read_text() == (
        f"-I|-m|venv|--clear|{venv}|constraints.txt|constraints.txt|"
        f"-I|-m|pip|install|--quiet|.[sigstore]|constraints.txt|constraints.txt|"
    )
