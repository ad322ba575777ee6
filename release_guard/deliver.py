"""From a packed folder to a release on a hub. What it says is judged again here; nothing is tried.

No tensors: a job that holds credentials runs this alone, on a folder that another job packed.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from release_guard.attestation import (
    EVIDENCE_FILE,
    POLICY_FILE,
    PREDICATE_TYPES,
    attest,
    bundle_name,
)
from release_guard.changes import Changes, changes, require_known
from release_guard.errors import HubError, IntegrityError, PushRefusedError
from release_guard.evidence import Evidence
from release_guard.gate import judge_again
from release_guard.hubs import NOTHING, Hub, taken
from release_guard.journal import Journal
from release_guard.layout import artefacts, require_as_attacked
from release_guard.manifest import SIGNATURE, DirectoryTree, Tree, write_file
from release_guard.oms import sign
from release_guard.policy import Policy
from release_guard.release import Candidate, Receipt, Release, Verdict
from release_guard.run import saving
from release_guard.signers import Signer
from release_guard.verify import Trust, Verification, require_intact, verify

if TYPE_CHECKING:
    from release_guard.session import Progress


@dataclass(frozen=True)
class Packed:
    """A candidate and what it holds: the policy and the evidence that it was judged by."""

    candidate: Candidate
    policy: Policy
    evidence: Evidence


@dataclass(frozen=True)
class Delivery:
    """Where a candidate goes and who vouches for it.

    Attributes:
        repo: `owner/name` on the hub.
        hub: It takes the release.
        signer: It signs, and what was pushed must verify by it.
        head: The hub's head that this delivery was planned against.
        progress: Told about every step.
        now: The clock.
        agree: Shown what will change before anything is sent; raises to stop it.
        tag: Name for the revision that is made, such as `v1.0`.
    """

    repo: str
    hub: Hub
    signer: Signer
    head: str
    progress: "Progress"
    now: Callable[[], datetime]
    agree: Callable[[Changes], None] = require_known
    tag: str | None = None


@dataclass(frozen=True)
class Published:
    """What became of a candidate.

    Attributes:
        packed: The folder, published or not.
        receipt: None unless the gate passed and it was pushed.
        changes: What was, or in a dry run would be, changed on the hub; None where nobody asked.
    """

    packed: Packed
    receipt: Receipt | None = None
    changes: Changes | None = None

    @property
    def verdict(self) -> Verdict:
        """What the gate said."""
        return self.packed.candidate.verdict

    @property
    def candidate(self) -> Candidate:
        """The packed folder, published or not."""
        return self.packed.candidate

    @property
    def evidence(self) -> Evidence:
        """What was tried and what came of it."""
        return self.packed.evidence


def plugins(policy: Policy) -> tuple[Hub, Signer]:
    """Where the policy publishes and who signs."""
    return Hub.build(policy.hub, where="hub"), Signer.build(policy.signer, where="signer")


def check_credentials(hub: Hub, signer: Signer, repo: str) -> str:
    """See that we may sign and push: better known now than after hours. The hub's head."""
    signer.check()
    return hub.preflight(repo)


def open_candidate(
    folder: Path, *, root: str | None = None, policy_digest: str | None = None
) -> Packed:
    """Read a packed folder and judge its evidence again: its verdict is nobody's word.

    Args:
        folder: What `judge` packed, here or elsewhere.
        root: Payload root that it must have; whoever packed it said so by another way.
        policy_digest: SHA-256 of the policy that it must have been judged by: whoever packed it
            worked on models, and may have written a laxer one.

    Raises:
        PolicyError: Its policy cannot be read.
        IntegrityError: Its evidence cannot be read, or policy, evidence and weights do not belong
            together, or the root is another.
    """
    _tidy(folder)
    tree = DirectoryTree(folder)
    payload = tree.manifest.payload
    if root is not None and payload.root != root:
        raise IntegrityError(
            f"{folder}: its payload root is {payload.root}, not {root} as expected; these are not "
            "the files that were judged"
        )
    policy = Policy.parse(tree.read(POLICY_FILE), name=POLICY_FILE)
    if policy_digest is not None and policy.digest != policy_digest:
        raise IntegrityError(
            f"{folder}: not packed by the policy that was asked for; pack it again"
        )
    evidence = Evidence.from_jsonl(tree.read(EVIDENCE_FILE))
    if evidence.policy != policy.digest:
        raise IntegrityError(f"{folder}: its evidence is of another policy; publish again")
    verdict = judge_again(evidence, policy)
    digests = {entry.name: entry.digest for entry in payload.entries}
    require_as_attacked(digests, artefacts(evidence, verdict, policy))
    return Packed(Candidate(folder, verdict, payload), policy, evidence)


def _tidy(folder: Path) -> None:
    """Drop what an attempt that was killed while it signed had half written."""
    with saving(folder):
        for name in (SIGNATURE, *map(bundle_name, PREDICATE_TYPES)):
            if (partial := folder / f"{name}.partial").is_file():
                partial.unlink()


def deliver(packed: Packed, delivery: Delivery) -> Published:
    """Attest, sign, push, verify what was pushed as a consumer would, and only then open it.

    Whatever stopped an earlier attempt at the same files, this goes on from it: signatures that
    hold are kept, and a head that is this release already is left as it is.

    Raises:
        IntegrityError: The verdict is not PASS, the card names another signer, something changed
            on the way, or the claim would not hold today.
        PushRefusedError: The hub's head moved, the tag is taken, or the hub refuses.
        HubError: Anything else the hub said or did not say.
    """
    hub, repo = delivery.hub, delivery.repo
    delivery.progress("publish", 0, 3, "signing")
    _require_named(packed, delivery.signer)
    release = _signed(packed, delivery)
    found = changes(hub, repo, delivery.head, release.manifest, delivery.signer)
    _require_free(delivery, found)
    delivery.agree(found)
    delivery.progress("publish", 1, 3, f"pushing to {repo}")
    receipt = hub.push(Journal.beside(release.directory).begin(release, repo), repo)
    delivery.progress("publish", 2, 3, "verifying what was pushed")
    with _pushed(receipt):
        _require_judged(hub.tree(repo, receipt.revision), packed, delivery)
    if delivery.tag is not None:
        hub.tag(repo, delivery.tag, receipt.revision)
    hub.show(repo)
    delivery.progress("publish", 3, 3, "verified")
    return Published(packed, receipt, found)


def foresee(packed: Packed, hub: Hub, signer: Signer, repo: str) -> Changes:
    """What a delivery would change, signatures apart; nothing is signed or written."""
    manifest = DirectoryTree(packed.candidate.directory).manifest.unsigned
    return changes(hub, repo, hub.preflight(repo), manifest, signer)


def _signed(packed: Packed, delivery: Delivery) -> Release:
    """As the head is signed already, as an earlier attempt signed the folder, or anew."""
    candidate = packed.candidate
    local = DirectoryTree(candidate.directory)
    _adopt(local, packed, delivery)
    if (local.directory / SIGNATURE).exists() and _intact(local, packed, delivery):
        kept = local.manifest
        if kept.payload == candidate.payload:
            return Release(
                candidate.directory, candidate.verdict, candidate.payload, kept, delivery.head
            )
    attested = attest(candidate, packed.policy, packed.evidence, delivery.signer)
    release = sign(attested, delivery.signer, previous=delivery.head)
    require_intact(_verified(local, packed, delivery))
    return release


def _adopt(local: DirectoryTree, packed: Packed, delivery: Delivery) -> None:
    """Take the head's signatures over, if they are ours and of these very files."""
    if delivery.head == NOTHING:
        return
    head = delivery.hub.tree(delivery.repo, delivery.head)
    if head.manifest.payload != packed.candidate.payload:
        return  # the common case, before the weights are hashed once more
    if head.manifest.unsigned == local.manifest.unsigned and _intact(head, packed, delivery):
        signatures = {*head.manifest.entries} - {*head.manifest.unsigned.entries}
        for entry in sorted(signatures):
            write_file(local.directory / entry.name, head.read(entry.name))


@contextmanager
def _pushed(receipt: Receipt) -> Iterator[None]:
    """Say of whatever goes wrong now that the push itself did not."""
    try:
        yield
    except (HubError, IntegrityError) as error:
        raise type(error)(f"{receipt.revision} was pushed but not verified: {error}") from None


def _require_free(delivery: Delivery, found: Changes) -> None:
    """A tag that another revision has is better known before the push."""
    if delivery.tag is None or delivery.head == NOTHING:
        return
    other = delivery.hub.tags(delivery.repo).get(delivery.tag)
    if other is not None and (other != delivery.head or not found.none):
        raise PushRefusedError(taken(delivery.repo, delivery.tag, other))


def _intact(tree: Tree, packed: Packed, delivery: Delivery) -> bool:
    return not _verified(tree, packed, delivery).findings


def _require_judged(tree: Tree, packed: Packed, delivery: Delivery) -> None:
    """Intact to a consumer, and not some other release that is intact as well."""
    require_intact(_verified(tree, packed, delivery))
    if tree.manifest.payload != packed.candidate.payload:
        raise IntegrityError(f"{delivery.repo}: other weights than those that were judged")


def _verified(tree: Tree, packed: Packed, delivery: Delivery) -> Verification:
    trust = Trust(delivery.signer, packed.policy.digest)
    return verify(tree, trust, now=delivery.now())


def _require_named(packed: Packed, signer: Signer) -> None:
    """The card was written before: it must not send readers to another signer."""
    folder = packed.candidate.directory
    if signer.identity.encode() not in DirectoryTree(folder).read("README.md"):
        raise IntegrityError(
            f"{folder / 'README.md'}: does not name {signer.identity} as the signer; sign with the "
            "one it was packed for, or pack it again"
        )
