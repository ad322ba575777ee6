"""Where each published precision lies in a release, and whether it is what was attacked.

The first lies at the top, every other one in a folder of its name; a release holds nothing beside.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from release_guard.errors import IntegrityError
from release_guard.manifest import PAYLOAD, classify, root_digest

if TYPE_CHECKING:
    from release_guard.evidence import Evidence
    from release_guard.policy import Policy
    from release_guard.release import Verdict


@dataclass(frozen=True)
class Artefact:
    """One precision of a release.

    Attributes:
        precision: Numeric format.
        folder: Where it lies, as `nf4/`; empty: at the top.
        root: Payload root of its own files.
    """

    precision: str
    folder: str
    root: str

    @property
    def where(self) -> str:
        """The folder in words."""
        return self.folder or "the top of the release"


def artefacts(evidence: "Evidence", verdict: "Verdict", policy: "Policy") -> tuple[Artefact, ...]:
    """What a release consists of: what may be published; if nothing may, all that was attacked.

    Evidence of before precisions had files of their own tells of one set of weights, at the top.

    Raises:
        IntegrityError: A precision that is to be published was not attacked, or fp32 is not what
            the stages made.
    """
    if not evidence.artefacts:
        return (Artefact(policy.precisions[0], "", evidence.immunized),)
    precisions: Sequence[str] = verdict.published(policy.precisions) or tuple(evidence.artefacts)
    roots = {str(each): root for each, root in evidence.artefacts.items()}
    if roots.get("fp32", evidence.immunized) != evidence.immunized:
        raise IntegrityError("the evidence is of another policy or other weights; publish again")
    if missing := [precision for precision in precisions if precision not in roots]:
        raise IntegrityError(f"{missing[0]}: no files of this precision were attacked")
    ordered = [precision for precision in policy.precisions if precision in precisions]
    return tuple(
        Artefact(precision, f"{precision}/" if place else "", roots[precision])
        for place, precision in enumerate(ordered)
    )


def owner(name: str, folders: Iterable[str]) -> str:
    """The folder of the artefact that a file of a release is part of."""
    return next((folder for folder in folders if folder and name.startswith(folder)), "")


def require_as_attacked(digests: Mapping[str, str], found: Sequence[Artefact]) -> None:
    """Refuse a release that does not consist of exactly these artefacts.

    Args:
        digests: SHA-256 of files by name; documentation and evidence among them do not count.
        found: What it must consist of.

    Raises:
        IntegrityError: One is missing, changed or in another's place, or has a file too many.
    """
    payload = sorted(name for name in digests if classify(name) in PAYLOAD)
    folders = [each.folder for each in found]
    for each in found:
        mine = [name for name in payload if owner(name, folders) == each.folder]
        if not mine:
            raise IntegrityError(f"{each.where}: the {each.precision} weights are missing")
        if root_digest(digests[name] for name in mine) != each.root:
            what = f"not the {each.precision} weights that were attacked, or not these alone"
            raise IntegrityError(f"{each.where}: {what}; publish again")
    if not found:
        raise IntegrityError("the release holds no weights that were attacked")
