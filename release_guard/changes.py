"""What a push would change in a repository, seen before anything is written there."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from release_guard.attestation import PREDICATE_TYPES, bundle_name
from release_guard.errors import IntegrityError, PushRefusedError, listed
from release_guard.hubs import NOTHING, Hub, Revision
from release_guard.manifest import SIGNATURE, FileEntry, Manifest, Tree
from release_guard.oms import from_statement
from release_guard.signers import Signer

_DEPTH = 20  # older revisions that are looked at
_SHORT = 12  # letters of a revision that people are shown


@dataclass(frozen=True)
class Changes:
    """The difference between what is there and what will be.

    Attributes:
        repo: `owner/name`.
        head: Revision it is compared with; `NOTHING` where nothing is.
        new: Files that are not there yet.
        changed: Files that are there with other content; sizes are those they will have.
        unchanged: Files that stay as they are.
        deleted: Files that are there and not in the release.
        foreign: Those of `deleted` that no signed release put there, or that somebody changed
            since: to delete them takes a word of consent.
        remarks: What somebody has to know before, one line each.
    """

    repo: str
    head: str
    new: tuple[FileEntry, ...]
    changed: tuple[FileEntry, ...]
    unchanged: tuple[FileEntry, ...]
    deleted: tuple[FileEntry, ...]
    foreign: tuple[FileEntry, ...]
    remarks: tuple[str, ...]

    @property
    def none(self) -> bool:
        """Whether the head holds these very files already."""
        return not (self.new or self.changed or self.deleted)


def changes(hub: Hub, repo: str, head: str, manifest: Manifest, signer: Signer) -> Changes:
    """Compare a release with the head of a repository; nothing is written.

    Args:
        hub: Where it is to go.
        repo: `owner/name`.
        head: What `hub.preflight` found.
        manifest: The files of the release; if it is not signed yet, signatures are left out of
            the comparison.
        signer: Whose signature tells what an earlier release put there.

    Raises:
        HubError: The hub does not say what is there.
    """
    tree = None if head == NOTHING else hub.tree(repo, head)
    there = Manifest(()) if tree is None else tree.manifest
    if manifest.get(SIGNATURE) is None:
        there = there.unsigned
    vouched = {} if tree is None else _vouched(tree, signer)
    both = [(entry, there.get(entry.name)) for entry in manifest.entries]
    deleted = tuple(entry for entry in there.entries if manifest.get(entry.name) is None)
    return Changes(
        repo,
        head,
        new=tuple(entry for entry, old in both if old is None),
        changed=tuple(entry for entry, old in both if old not in {None, entry}),
        unchanged=tuple(entry for entry, old in both if old == entry),
        deleted=deleted,
        foreign=tuple(entry for entry in deleted if vouched.get(entry.name) != entry.digest),
        remarks=(*hub.remarks(repo), *_of_history(hub, repo, head, signer)),
    )


def require_known(found: Changes) -> None:
    """Refuse to delete what no release put there: nobody has been asked.

    Raises:
        PushRefusedError: There is such a file.
    """
    if found.foreign:
        names = [entry.name for entry in found.foreign]
        raise PushRefusedError(
            f"{found.repo}: {listed(names)} would be deleted, and no signed release put that "
            "there; nothing was sent. Move it into the model's folder, or say --yes to have it "
            "deleted"
        )


def _vouched(tree: Tree, signer: Signer) -> dict[str, str]:
    """Digests by name of a release that passed, by its own signature; none if there is no such."""
    try:
        signed = from_statement(signer.verify(tree.read(SIGNATURE))).digests
    except IntegrityError:
        return {}
    proofs = {bundle_name(predicate) for predicate in PREDICATE_TYPES}
    return dict(signed) if proofs <= signed.keys() else {}


def _of_history(hub: Hub, repo: str, head: str, signer: Signer) -> Iterator[str]:
    """Whatever a push replaces can still be downloaded: say so of weights that never passed."""
    revisions = [] if head == NOTHING else hub.history(repo)
    found = list(_unproven(hub, repo, revisions[:_DEPTH], signer))
    if found:
        named = listed([f"{each.name[:_SHORT]} by {each.authors}" for each in found])
        yield (
            f"{repo}: weights without passing evidence stay in older revisions, where whoever may "
            f"read it can get them: {named}"
        )
    if len(revisions) > _DEPTH:
        yield f"{repo}: only the last {_DEPTH} of {len(revisions)} revisions were looked at"


def _unproven(
    hub: Hub, repo: str, revisions: Sequence[Revision], signer: Signer
) -> Iterator[Revision]:
    proven: set[str] = set()
    for revision in revisions:
        weights = {entry.digest for entry in hub.weights(repo, revision.name).entries}
        if not weights <= proven:
            proven |= set(_vouched(hub.tree(repo, revision.name), signer).values())
        if not weights <= proven:
            yield revision
