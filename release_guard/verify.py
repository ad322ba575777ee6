"""The consumer's flow over any Tree: who signed, what changed, what was shown, is it still so."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Literal

from release_guard import SUITE
from release_guard.attestation import (
    EVIDENCE_FILE,
    POLICY_FILE,
    PREDICATE_TYPES,
    Claims,
    bundle_name,
    read_claims,
    subjects,
)
from release_guard.dsse import MAX_BUNDLE
from release_guard.errors import IntegrityError, PolicyError, ReleaseGuardError, listed
from release_guard.gittree import read_pointer
from release_guard.layout import artefacts, require_as_attacked
from release_guard.manifest import EVIDENCE_FOLDER, SIGNATURE, Manifest, Tree, classify
from release_guard.oms import SignedFiles, from_statement
from release_guard.release import Result, Verdict

if TYPE_CHECKING:
    from release_guard.policy import Policy
    from release_guard.signers import Voucher

MAX_EVIDENCE = 512 << 20  # bytes of one evidence file


class State(StrEnum):
    """What a consumer has to know, gravest first."""

    UNSIGNED = "unsigned"
    WRONG_SIGNER = "wrong-signer"
    WEIGHTS_CHANGED = "weights-changed"
    CONFIG_CHANGED = "config-changed"
    EVIDENCE_MISSING = "evidence-missing"
    EVIDENCE_INVALID = "evidence-invalid"
    EVIDENCE_EXPIRED = "evidence-expired"
    NOT_PASSED = "not-passed"
    DOCUMENTATION_CHANGED = "documentation-changed"
    INTACT = "intact"


_GRAVITY = tuple(State)
_EXIT_CODES = {State.INTACT: 0, State.DOCUMENTATION_CHANGED: 0, State.NOT_PASSED: 3}
_MAX_POINTER = 1024  # bytes
_BUNDLE = ".sigstore.json"
_MISMATCH = IntegrityError.exit_code


@dataclass(frozen=True)
class Trust:
    """What the caller takes on faith, never from the release itself.

    Attributes:
        signer: Whose signature counts; a `Signer` is one.
        policy_digest: SHA-256 of the policy it must have been judged by, byte for byte; None: the
            publisher's own is reported instead.
    """

    signer: "Voucher"
    policy_digest: str | None = None


How = Literal["changed", "missing", "not pulled from Git LFS", "added"]
_ABSENT: frozenset[How] = frozenset({"missing", "not pulled from Git LFS"})


@dataclass(frozen=True)
class Finding:
    """One state, why, the files that show it, and how they differ from what was signed."""

    state: State
    message: str
    files: tuple[str, ...] = ()
    how: How | None = None


@dataclass(frozen=True)
class Rejudged:
    """One check as it was signed, and as the signed evidence bears it out now.

    Attributes:
        name: Such as `resists/lora/footwear@nf4`.
        signed: What the attestation says; None if it does not name this check.
        found: What the gate says; None if it has no such check.
        detail: The gate's sentence.
    """

    name: str
    signed: Result | None
    found: Result | None
    detail: str = ""

    @property
    def agrees(self) -> bool:
        """Whether both say the same."""
        return self.signed is self.found


@dataclass(frozen=True)
class Verification:
    """All that was found.

    Attributes:
        findings: Everything that is not as it should be; empty means intact.
        identity: Whose signature was asked for.
        signed: What `model.sig` vouches for; None if nobody does.
        claims: What the attestations say; None unless all three hold.
        notes: Things ignored that somebody may want to know of.
        rejudged: Every check; none unless the gate was run again.
        absent: Files that are not here and, with `partial`, need not be.
        strict: A changed document counts as a mismatch.
    """

    findings: tuple[Finding, ...]
    identity: str
    signed: SignedFiles | None = None
    claims: Claims | None = None
    notes: tuple[str, ...] = ()
    rejudged: tuple[Rejudged, ...] = ()
    absent: tuple[str, ...] = ()
    strict: bool = False

    @property
    def states(self) -> tuple[State, ...]:
        """Every state, gravest first."""
        found = {finding.state for finding in self.findings}
        return tuple(state for state in _GRAVITY if state in found) or (State.INTACT,)

    @property
    def exit_code(self) -> int:
        """That of the gravest state: 0, 3 or 4."""
        if self.strict and State.DOCUMENTATION_CHANGED in self.states:
            return _MISMATCH
        return max(_EXIT_CODES.get(state, _MISMATCH) for state in self.states)


def verify(
    tree: Tree,
    trust: Trust,
    *,
    now: datetime,
    partial: bool = False,
    rejudge: bool = True,
    every_check: bool = False,
) -> Verification:
    """Check a release against what the caller trusts.

    Args:
        tree: The release: a folder, a git commit, a revision on a hub.
        trust: Whose signature counts and, if given, which policy.
        now: Moment to compare the expiry with; aware.
        partial: Missing weights, configuration and documents are no finding, as when only some
            files were fetched, or pointers of Git LFS stand for them. Missing evidence still is.
        rejudge: Run the gate again on the signed evidence and require that it agrees.
        every_check: It must agree check by check, not only in the verdict.
    """
    manifest = tree.manifest
    check = _Check(tree, trust, manifest)
    signed = check.signature()
    if signed is None:
        return Verification(tuple(check.findings), trust.signer.identity)
    check.files(signed, partial=partial)
    claims = check.attestations(signed)
    if claims is not None:
        check.claims(signed, claims, now)
    rejudged = check.judgement(signed, claims) if claims is not None and rejudge else ()
    if every_check:
        check.agreement(rejudged)
    notes = tuple(_notes(manifest))
    return Verification(
        tuple(check.findings),
        trust.signer.identity,
        signed,
        claims,
        notes,
        rejudged,
        tuple(check.absent),
    )


def require_intact(verification: Verification) -> None:
    """Refuse anything but an intact release.

    Raises:
        IntegrityError: One line with every finding.
    """
    if verification.findings:
        raise IntegrityError("; ".join(finding.message for finding in verification.findings))


@dataclass(frozen=True)
class _Check:
    tree: Tree
    trust: Trust
    manifest: Manifest
    findings: list[Finding] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)

    def signature(self) -> SignedFiles | None:
        """Step 1: `model.sig` is there, by the right signer, and lists files as it must."""
        if self.manifest.get(SIGNATURE) is None:
            self._find(State.UNSIGNED, f"{SIGNATURE}: missing, so nobody vouches for the files")
            return None
        try:
            statement = self.trust.signer.verify(self._read(SIGNATURE, MAX_BUNDLE))
        except IntegrityError as error:
            self._find(State.WRONG_SIGNER, f"{SIGNATURE}: {error}", SIGNATURE)
            return None
        try:
            return from_statement(statement)
        except IntegrityError as error:
            self._find(State.UNSIGNED, str(error), SIGNATURE)
            return None

    def files(self, signed: SignedFiles, *, partial: bool) -> None:
        """Step 2: nothing changed, nothing missing, nothing added; grouped by what it means."""
        found = {entry.name: entry.digest for entry in self.manifest.entries}
        del found[SIGNATURE]
        common = found.keys() & signed.digests.keys()
        differing = {name for name in common if found[name] != signed.digests[name]}
        pointers = {name for name in differing if self._points_to(name, signed.digests[name])}
        groups: dict[How, Iterable[str]] = {
            "changed": differing - pointers,
            "missing": signed.digests.keys() - found.keys(),
            "not pulled from Git LFS": pointers,
            "added": found.keys() - signed.digests.keys(),
        }
        for how, names in groups.items():
            grouped: dict[State, list[str]] = {}
            for name in sorted(names):
                grouped.setdefault(_state(name, how), []).append(name)
            for state, files in grouped.items():
                if partial and how in _ABSENT and state is not State.EVIDENCE_MISSING:
                    self.absent.extend(files)
                else:
                    text = f"{how}: {listed(files)}"
                    self.findings.append(Finding(state, text, tuple(files), how))

    def attestations(self, signed: SignedFiles) -> Claims | None:
        """Step 3: all three, by the same signer, about exactly these weights and configuration."""
        statements: dict[str, bytes] = {}
        for kind in PREDICATE_TYPES:
            name = bundle_name(kind)
            if name not in signed.digests:
                self._find(State.EVIDENCE_MISSING, f"{name}: not part of this release", name)
                continue
            if not self._as_signed(name, signed):
                continue
            try:
                bundle = self._signed_bytes(name, signed, MAX_BUNDLE)
                statements[kind] = self.trust.signer.verify(bundle)
            except IntegrityError as error:
                self._invalid(error, name)
        if len(statements) != len(PREDICATE_TYPES):
            return None
        try:
            claims = read_claims(statements, subjects(signed.digests))
            if claims.artefacts:
                require_as_attacked(signed.digests, claims.artefacts)
        except IntegrityError as error:
            self._invalid(error)
            return None
        return claims

    def claims(self, signed: SignedFiles, claims: Claims, now: datetime) -> None:
        """Step 4: judged by the policy that is required, on the evidence here, passed, valid."""
        for name in _swapped(signed, claims):
            self._find(State.EVIDENCE_INVALID, f"{name}: not the one that was attested", name)
        wanted = self.trust.policy_digest
        if wanted is not None and claims.policy != wanted:
            text = f"judged by the policy {claims.policy[:16]}..., not by yours, {wanted[:16]}..."
            self._find(State.EVIDENCE_INVALID, text, POLICY_FILE)
        if now >= claims.valid_until:
            text = (
                f"the claim expired on {claims.valid_until:%Y-%m-%d}; have the model judged again"
            )
            self._find(State.EVIDENCE_EXPIRED, text)
        if claims.suite.partition(".")[0] != SUITE.partition(".")[0]:
            text = f"judged by suite {claims.suite!a}, which suite {SUITE} has replaced"
            self._find(State.EVIDENCE_EXPIRED, text)
        if claims.result is not Result.PASS:
            self._find(State.NOT_PASSED, f"the gate said {claims.result.name}")

    def judgement(self, signed: SignedFiles, claims: Claims) -> tuple[Rejudged, ...]:
        """Step 5: the signed evidence, judged again, gives the signed verdict."""
        if _swapped(signed, claims) or not (
            self._as_signed(POLICY_FILE, signed) and self._as_signed(EVIDENCE_FILE, signed)
        ):
            return ()
        try:
            policy, verdict = self._judge(signed, claims)
        except (IntegrityError, PolicyError) as error:
            self._invalid(error, EVIDENCE_FILE)
            return ()
        if verdict.result is not claims.result:
            text = f"the evidence says {verdict.result.name}, the attestation {claims.result.name}"
            self._find(State.EVIDENCE_INVALID, text, EVIDENCE_FILE)
        elif verdict.passed and (lacking := claims.lacking(policy)):
            self._find(
                State.EVIDENCE_INVALID, f"svr: lacks {', '.join(lacking)}", bundle_name("svr")
            )
        return _side_by_side(claims, verdict)

    def agreement(self, rejudged: tuple[Rejudged, ...]) -> None:
        """Every check of the gate was signed as it comes out, and no other."""
        if differing := [check.name for check in rejudged if not check.agrees]:
            text = f"judged again, {len(differing)} checks differ: {listed(differing)}"
            self._find(State.EVIDENCE_INVALID, text, bundle_name("resistance"))

    def _judge(self, signed: SignedFiles, claims: Claims) -> tuple["Policy", Verdict]:
        from release_guard.evidence import Evidence  # noqa: PLC0415  a hook does without all this
        from release_guard.gate import judge_again  # noqa: PLC0415
        from release_guard.policy import Policy  # noqa: PLC0415

        source = self._signed_bytes(POLICY_FILE, signed, MAX_EVIDENCE)
        policy = Policy.parse(source, name=POLICY_FILE)
        evidence = Evidence.from_jsonl(self._signed_bytes(EVIDENCE_FILE, signed, MAX_EVIDENCE))
        if evidence.policy != policy.digest:
            raise IntegrityError(f"{EVIDENCE_FILE}: of another policy or other weights")
        verdict = judge_again(evidence, policy)
        parts = artefacts(evidence, verdict, policy)
        require_as_attacked(signed.digests, parts)
        if evidence.artefacts and parts != claims.artefacts:
            raise IntegrityError(f"{EVIDENCE_FILE}: of other artefacts than the attestation names")
        return policy, verdict

    def _points_to(self, name: str, digest: str) -> bool:
        """Whether a pointer of Git LFS lies there instead of the file with this digest."""
        entry = self.manifest.get(name)
        if entry is None or entry.size > _MAX_POINTER:
            return False
        pointer = read_pointer(self.tree.read(name))
        return pointer is not None and pointer.digest == digest

    def _as_signed(self, name: str, signed: SignedFiles) -> bool:
        """Whether a file is worth reading: one that is missing or changed was reported before."""
        entry = self.manifest.get(name)
        return entry is not None and entry.digest == signed.digests[name]

    def _signed_bytes(self, name: str, signed: SignedFiles, limit: int) -> bytes:
        """Bytes of a file as signed: what was read is compared, not what was hashed before."""
        content = self._read(name, limit)
        if hashlib.sha256(content).hexdigest() != signed.digests[name]:
            raise IntegrityError(f"{name}: not as signed")
        return content

    def _read(self, name: str, limit: int) -> bytes:
        entry = self.manifest.get(name)
        if entry is not None and entry.size > limit:
            raise IntegrityError(f"{name}: larger than {limit >> 20} MiB; not read")
        return self.tree.read(name)

    def _invalid(self, error: ReleaseGuardError, *files: str) -> None:
        self._find(State.EVIDENCE_INVALID, str(error).splitlines()[0], *files)

    def _find(self, state: State, message: str, *files: str) -> None:
        self.findings.append(Finding(state, message, files))


def _swapped(signed: SignedFiles, claims: Claims) -> tuple[str, ...]:
    """Policy and evidence, where the signed file is not the one that the attestations name."""
    named = {POLICY_FILE: claims.policy, EVIDENCE_FILE: claims.report}
    return tuple(name for name, digest in named.items() if signed.digests.get(name) != digest)


def _side_by_side(claims: Claims, verdict: Verdict) -> tuple[Rejudged, ...]:
    """The gate's checks in its own order, then those that only the attestation names."""
    found = [
        Rejudged(check.name, claims.checks.get(check.name), check.result, check.detail)
        for check in verdict.checks
    ]
    names = {check.name for check in verdict.checks}
    found += [
        Rejudged(name, claims.checks[name], None) for name in claims.checks if name not in names
    ]
    return tuple(found)


def _state(name: str, how: How) -> State:
    match classify(name):
        case "weights":
            return State.WEIGHTS_CHANGED
        case "configuration":
            return State.CONFIG_CHANGED
        case "documentation":
            return State.DOCUMENTATION_CHANGED
        case "evidence":
            return State.EVIDENCE_MISSING if how in _ABSENT else State.EVIDENCE_INVALID


def _notes(manifest: Manifest) -> Iterator[str]:
    known = {bundle_name(kind) for kind in PREDICATE_TYPES}
    for entry in manifest.entries:
        bundle = entry.name.startswith(f"{EVIDENCE_FOLDER}/") and entry.name.endswith(_BUNDLE)
        if bundle and entry.name not in known:
            yield f"{entry.name}: a kind of attestation this version does not read; ignored"
