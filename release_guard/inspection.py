"""What came of a verification: a document for programs, lines for people. Nothing is decided here.

Both are sorted by what a difference means: `signature`, `weights`, `configuration`,
`documentation`, `evidence`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from release_guard.errors import printable
from release_guard.manifest import classify
from release_guard.pins import Choice, Pins
from release_guard.verify import Finding, State, Verification

_STATES: Mapping[str, tuple[State, ...]] = {
    "signature": (State.UNSIGNED, State.WRONG_SIGNER),
    "weights": (State.WEIGHTS_CHANGED,),
    "configuration": (State.CONFIG_CHANGED,),
    "documentation": (State.DOCUMENTATION_CHANGED,),
    "evidence": (
        State.EVIDENCE_MISSING,
        State.EVIDENCE_INVALID,
        State.EVIDENCE_EXPIRED,
        State.NOT_PASSED,
    ),
}
_ELSEWHERE = "do not load it; fetch it again, and tell its publisher if that does not help"
_ADVICE: Mapping[State, str] = {
    State.UNSIGNED: "do not load it; ask its publisher for the signed release",
    State.WRONG_SIGNER: "do not load it; ask its publisher, elsewhere, who signs it",
    State.WEIGHTS_CHANGED: _ELSEWHERE,
    State.CONFIG_CHANGED: _ELSEWHERE,
    State.EVIDENCE_MISSING: "fetch it again; as it is, nothing shows what it resists",
    State.EVIDENCE_INVALID: "do not rely on what it claims to resist; tell its publisher",
    State.EVIDENCE_EXPIRED: "ask its publisher for newer evidence; attacks have moved on",
    State.NOT_PASSED: "do not rely on it; its own evidence says that it does not resist",
    State.DOCUMENTATION_CHANGED: "the model is as signed; trust its documents as you would others",
}
_PAYLOAD_CHANGED = frozenset({State.WEIGHTS_CHANGED, State.CONFIG_CHANGED})
_PULL = "run `git lfs pull` first; --partial checks all but the files that are not here"
_PARTIAL = "fetch the rest; or, if it is missing on purpose, add --partial"


def document(verification: Verification) -> dict[str, Any]:
    """Everything that was found, gravest state first."""
    claims, signed = verification.claims, verification.signed
    return {
        "exit_code": verification.exit_code,
        "states": [str(state) for state in verification.states],
        "classes": {name: _class(name, verification) for name in _STATES},
        "findings": [asdict(finding) for finding in verification.findings],
        "identity": verification.identity,
        "release_root": None if signed is None else signed.root,
        "verdict": None if claims is None else claims.result.name,
        "claim": None if claims is None else claims.claim,
        "policy_digest": None if claims is None else claims.policy,
        "suite": None if claims is None else claims.suite,
        "valid_until": None if claims is None else claims.valid_until.isoformat(),
        "notes": list(verification.notes),
        "checks": [
            {
                "name": check.name,
                "signed": check.signed and check.signed.name,
                "rejudged": check.found and check.found.name,
                "detail": check.detail,
            }
            for check in verification.rejudged
        ],
    }


def lines(verification: Verification, shown: str) -> Iterator[str]:
    """The states, a row or more for each kind of file, then what the signer claims.

    Args:
        verification: What was found.
        shown: What was looked at.
    """
    yield printable(f"{', '.join(verification.states)}: {shown}")
    for name in _STATES:
        for text in _rows(name, verification):
            yield _row(name, text)
    if (claims := verification.claims) is not None and verification.exit_code == 0:
        yield _row("claim", claims.claim)
        yield _row("valid until", f"{claims.valid_until:%Y-%m-%d}")
        yield _row("policy", f"sha256:{claims.policy}")
    if verification.signed is not None:
        yield _row("signer", verification.identity)


def rejudged_lines(verification: Verification) -> Iterator[str]:
    """Every check as the gate judges it now, and how it was signed if that differs."""
    if not verification.rejudged:
        yield "the gate was not run again: there is no evidence that could be trusted"
    for check in verification.rejudged:
        result = check.found.name if check.found else "gone"
        signed = "" if check.agrees else f" [signed {check.signed.name if check.signed else 'not'}]"
        yield printable(f"  {result}{signed} {check.name}: {check.detail}".rstrip(": "))


def advice(verification: Verification) -> str:
    """What to do about the gravest state; nothing if it is intact."""
    gravest = verification.states[0]
    if gravest in _PAYLOAD_CHANGED:
        how = {each.how for each in verification.findings if each.state in _PAYLOAD_CHANGED}
        if how == {"not pulled from Git LFS"}:
            return _PULL
        if "changed" not in how and "added" not in how:
            return _PARTIAL
    return _ADVICE.get(gravest, "")


def about_trust(
    choice: Choice, pins: Pins, place: str, verification: Verification
) -> Iterator[str]:
    """What must not be missed of where the trust comes from."""
    if choice.source == "first use" and verification.exit_code == 0:
        yield (
            f"trusted on first use: {choice.trusted}, now pinned for {place} in {pins.path}; only "
            "the release says whose that is, so compare it with what its publisher announces "
            "elsewhere"
        )
    if choice.source == "pin file" and State.WRONG_SIGNER in verification.states:
        yield (
            f"{pins.path} pins {choice.trusted} for {place}; change it there only if the publisher "
            "announced another signer elsewhere"
        )
    if verification.states == (State.DOCUMENTATION_CHANGED,):
        yield "documents are not those that were signed; --strict refuses that"


def _class(name: str, verification: Verification) -> dict[str, Any]:
    """Of one kind: how many files were signed, whether they hold (null: nobody can tell)."""
    found = _findings(name, verification)
    signed = _signed(name, verification)
    known = verification.signed is not None or bool(found)
    return {
        "holds": not found if known else None,
        "signed": len(signed),
        "differing": sorted({file for finding in found for file in finding.files}),
        "absent": [file for file in verification.absent if file in signed],
    }


def _rows(name: str, verification: Verification) -> Iterator[str]:
    if found := _findings(name, verification):
        yield from (finding.message for finding in found)
        return
    signed = _signed(name, verification)
    if not signed:
        return
    absent = sum(file in signed for file in verification.absent)
    here = len(signed) - absent
    text = f"{here} {'file' if here == 1 else 'files'} as signed"
    if absent:
        text += f", {absent} more not here"
    if name == "evidence" and verification.rejudged and verification.claims is not None:
        text += f"; judged again: {verification.claims.result.name}"
    yield text


def _findings(name: str, verification: Verification) -> list[Finding]:
    return [finding for finding in verification.findings if finding.state in _STATES[name]]


def _signed(name: str, verification: Verification) -> frozenset[str]:
    """Files of one kind that the signature lists; it cannot list itself."""
    if verification.signed is None:
        return frozenset()
    return frozenset(file for file in verification.signed.digests if classify(file) == name)


def _row(name: str, text: str) -> str:
    return printable(f"  {name:<13}  {text}")
