import json
from pathlib import Path
from typing import Any

import pytest
from evidence_builder import POLICY
from fake_runner import Ran, read_outputs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from release_guard.github import annotations, main, outputs, summary

ROOT = "a" * 64
PUSHED: dict[str, Any] = {
    "verdict": "PASS",
    "payload_root": ROOT,
    "release": "/candidate",
    "report": "/report.html",
    "url": "https://hub.example/acme/model/tree/abc",
    "revision": "abc",
    "pushed": True,
    "checks": [],
    "warnings": [],
}


def obeyed(lines: list[str]) -> list[tuple[str, str, str]]:
    return Ran("step", 0, "".join(f"{line}\n" for line in lines), {}).commands


def test_outputs_are_what_the_action_promises() -> None:
    assert read_outputs(outputs(PUSHED)) == {
        "verdict": "PASS",
        "payload-root": ROOT,
        "candidate": "/candidate",
        "report": "/report.html",
        "commit-url": PUSHED["url"],
    }


@given(st.text())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_value_writes_another_output(value: str) -> None:
    found = read_outputs(outputs({**PUSHED, "verdict": f"{value}\ncommit-url=https://else.where"}))
    assert found["commit-url"] == PUSHED["url"]


def test_what_was_not_pushed_is_no_output_and_no_line() -> None:
    refused = {**PUSHED, "pushed": False, "url": None, "revision": None}
    assert "commit-url" not in outputs(refused)
    assert summary(refused) == ""
    assert PUSHED["url"] in summary(PUSHED)


def test_ten_annotations_at_most_say_how_many_are_left_out() -> None:
    checks = [{"name": f"c{n}", "result": "FAIL", "detail": "no"} for n in range(30)]
    passed = {"name": "good", "result": "PASS", "detail": "yes"}
    found = obeyed([*annotations({**PUSHED, "checks": [passed, *checks]})])
    assert len(found) == 10
    assert found[0] == ("error", "title=c0", "FAIL: no")
    assert found[-1][2].startswith("21 more")
    assert len(obeyed([*annotations({**PUSHED, "checks": checks[:10]})])) == 10


def test_errors_and_warnings_are_annotated() -> None:
    document = {"exit_code": 4, "errors": ["another root"], "warnings": ["slow"]}
    assert obeyed([*annotations(document)]) == [
        ("error", "title=release-guard", "another root"),
        ("warning", "title=release-guard", "slow"),
    ]


@given(st.text(), st.text())
def test_no_text_becomes_a_command_of_its_own(name: str, detail: str) -> None:
    check = {
        "name": f"a,b::{name}",
        "result": "FAIL",
        "detail": f"{detail}\n::set-output name=x::y",
    }
    found = obeyed([*annotations({**PUSHED, "checks": [check]})])
    assert [(kind, properties.count("=") >= 1) for kind, properties, _ in found] == [
        ("error", True)
    ]
    properties = found[0][1]
    assert "," not in properties
    assert ":" not in properties


def test_percent_signs_survive() -> None:
    check = {"name": "100%", "result": "FAIL", "detail": "50%0A"}
    (line,) = annotations({**PUSHED, "checks": [check]})
    assert line == "::error title=100%25::FAIL: 50%250A"


@pytest.mark.parametrize("content", [None, "", "{", "\xff"])
def test_a_missing_document_fails_the_step(
    content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "document.json"
    if content is not None:
        path.write_bytes(content.encode("latin-1"))
    assert main(["show", str(path)]) == 1
    assert capsys.readouterr().out.startswith("::error title=release-guard::")


def test_files_of_the_runner_are_added_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY"):
        (tmp_path / name).write_text("there=already\n")
        monkeypatch.setenv(name, str(tmp_path / name))
    path = tmp_path / "document.json"
    path.write_text(json.dumps(PUSHED))
    assert main(["show", str(path)]) == 0
    found = read_outputs((tmp_path / "GITHUB_OUTPUT").read_text())
    assert found["there"] == "already"
    assert found["payload-root"] == ROOT
    assert (tmp_path / "GITHUB_STEP_SUMMARY").read_text().count("\n") == 3


IDENTITY = "https://github.com/acme/training/.github/workflows/release-guard.yml@refs/heads/main"
GITHUB = "https://token.actions.githubusercontent.com"


@pytest.mark.parametrize(
    ("signer", "code"),
    [
        ('{ name = "key" }', 0),
        (f'{{ name = "sigstore", issuer = "{GITHUB}", identity = "{IDENTITY}" }}', 0),
        (f'{{ name = "sigstore", issuer = "{GITHUB}", identity = "{IDENTITY}2" }}', 2),
        (f'{{ name = "sigstore", issuer = "{GITHUB}" }}', 2),
        ('{ name = "sigstore", issuer = "https://gitlab.com", identity = "else" }', 0),
        ("{ name = ", 2),
    ],
)
def test_who_will_sign_is_known_before_the_work(
    signer: str,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("GITHUB_SERVER_URL", "https://github.com")
    monkeypatch.setenv("GITHUB_WORKFLOW_REF", IDENTITY.removeprefix("https://github.com/"))
    path = tmp_path / "policy.toml"
    path.write_text(f"signer = {signer}\n{POLICY}")
    assert main(["identity", str(path)]) == code
    assert (capsys.readouterr().out == "") == (code == 0)
