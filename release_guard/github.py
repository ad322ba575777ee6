"""What a job of GitHub Actions asks beside the command itself: may it begin, what is there to show.

    python -m release_guard.github identity .github/release-guard.toml
    release-guard publish ... --json > document.json
    python -m release_guard.github show document.json

The result is shown by a process of its own once the command has ended, because the runner obeys
lines that begin with two colons, and a command may print what a model's code wants it to say. Here
all is escaped.
"""

import json
import os
import secrets
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

_OUTPUTS = {
    "verdict": "verdict",
    "payload-root": "payload_root",
    "candidate": "release",
    "report": "report",
    "commit-url": "url",
}  # of the step, by key of the document
_TITLE = "release-guard"
_ISSUER = "https://token.actions.githubusercontent.com"
_MOST_ANNOTATIONS = 10  # of a kind and step; GitHub drops the others without a word
_IN_DATA = {"%": "%25", "\r": "%0D", "\n": "%0A"}
_IN_PROPERTIES = {**_IN_DATA, ":": "%3A", ",": "%2C"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Do the one or the other; its exit code."""
    what, path = sys.argv[1:] if arguments is None else arguments
    return {"identity": require_identity, "show": show}[what](Path(path))


def require_identity(policy: Path) -> int:
    """See that the job that signs will be who the policy says; 2, in seconds, where it will not.

    A keyless identity names workflow and branch or tag: one that runs from elsewhere would learn
    hours later that it may not sign.
    """
    from release_guard.errors import PolicyError  # noqa: PLC0415
    from release_guard.policy import Policy  # noqa: PLC0415

    try:
        signer = Policy.parse(policy.read_bytes(), name=str(policy)).signer
    except (OSError, PolicyError) as error:
        _print(_annotation("error", _TITLE, line) for line in str(error).splitlines())
        return PolicyError.exit_code
    wanted = signer.options.get("identity")
    own = f"{os.environ['GITHUB_SERVER_URL']}/{os.environ['GITHUB_WORKFLOW_REF']}"
    if signer.options.get("issuer") != _ISSUER or wanted == own:
        return 0
    message = f"{policy}: signer.identity is {wanted}, but this workflow will sign as {own}"
    _print([_annotation("error", _TITLE, f"{message}; run it from there, or change the policy")])
    return PolicyError.exit_code


def show(path: Path) -> int:
    """Show the document of a command; 1 where there is none, as after a crash."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        _print([_annotation("error", _TITLE, "it ended without a result; see the log")])
        return 1
    _append("GITHUB_OUTPUT", outputs(document))
    _append("GITHUB_STEP_SUMMARY", summary(document))
    _print(annotations(document))
    return 0


def outputs(document: Mapping[str, Any]) -> str:
    """Outputs of the step, in the format of GITHUB_OUTPUT; no value can end its own block."""
    known = {name: document.get(key) for name, key in _OUTPUTS.items()}
    end = secrets.token_hex(16)
    return "".join(f"{name}<<{end}\n{value}\n{end}\n" for name, value in known.items() if value)


def annotations(document: Mapping[str, Any]) -> Iterator[str]:
    """A line for each error, check that did not pass and warning, as many as GitHub shows."""
    checks = [check for check in document.get("checks", ()) if check["result"] != "PASS"]
    errors = [(_TITLE, line) for line in document.get("errors", ())]
    failed = [(check["name"], f"{check['result']}: {check['detail']}") for check in checks]
    yield from _at_most("error", [*errors, *failed])
    yield from _at_most("warning", [(_TITLE, line) for line in document["warnings"]])


def summary(document: Mapping[str, Any]) -> str:
    """Where the release went, as Markdown; nothing if it went nowhere."""
    if not document.get("pushed"):
        return ""
    return (
        f"\nPublished and verified: <{document['url']}>, revision `{document['revision']}`, "
        f"payload root `{document['payload_root']}`.\n"
    )


def _at_most(kind: str, found: Sequence[tuple[str, str]]) -> Iterator[str]:
    shown = found if len(found) <= _MOST_ANNOTATIONS else found[: _MOST_ANNOTATIONS - 1]
    yield from (_annotation(kind, title, message) for title, message in shown)
    if len(found) > len(shown):
        more = f"{len(found) - len(shown)} more, see the summary and the report"
        yield _annotation(kind, _TITLE, more)


def _annotation(kind: str, title: str, message: str) -> str:
    return f"::{kind} title={_escaped(title, _IN_PROPERTIES)}::{_escaped(message, _IN_DATA)}"


def _escaped(text: str, codes: Mapping[str, str]) -> str:
    return "".join(codes.get(each, each) for each in text)


def _append(variable: str, text: str) -> None:
    with Path(os.environ[variable]).open("a", encoding="utf-8") as file:
        file.write(text)


def _print(lines: Iterable[str]) -> None:
    sys.stdout.writelines(f"{line}\n" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
