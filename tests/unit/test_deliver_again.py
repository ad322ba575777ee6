"""A second delivery of the same files makes no second commit, whoever signs and however."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from judged import NOW, fixed_key, judge, write

from release_guard.changes import Changes
from release_guard.deliver import Delivery, Packed, deliver, foresee
from release_guard.dsse import Envelope, pae
from release_guard.errors import IntegrityError, PushRefusedError
from release_guard.hubs.directory import Directory
from release_guard.journal import Journal
from release_guard.manifest import SIGNATURE
from release_guard.signers.key import Key

REPO = "acme/model"


class Fickle(Key):
    """Signs the same bytes differently each time, as every keyless signer does."""

    def sign(self, statement: bytes) -> bytes:
        assert self.path is not None
        private = load_pem_private_key(self.path.read_bytes(), None)
        assert isinstance(private, ec.EllipticCurvePrivateKey)
        signature = private.sign(pae(statement), ec.ECDSA(hashes.SHA256()))
        material = Envelope.from_bytes(super().sign(statement)).material
        return Envelope(statement, signature, material).to_bytes()


@dataclass
class Desk:
    """Somebody who delivers from a folder to a hub."""

    folder: Path
    key: Key
    hub: Directory
    shown: list[Changes] = field(default_factory=list)

    def packed(self) -> Packed:
        made = judge(self.folder / "release", self.key)
        write(made.candidate.directory, "README.md", f"# By {self.key.identity}\n".encode())
        return Packed(made.candidate, made.policy, made.evidence)

    def deliver(self, packed: Packed, **more: object) -> str:
        head = self.hub.preflight(REPO)
        plain = Delivery(REPO, self.hub, self.key, head, lambda *_: None, lambda: NOW)
        done = deliver(packed, replace(plain, **{"agree": self.shown.append, **more}))  # type: ignore[arg-type]
        assert done.receipt is not None
        return done.receipt.revision

    def titles(self) -> Sequence[str]:
        return [revision.name for revision in self.hub.history(REPO)]


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    key = fixed_key(tmp_path)
    return Desk(tmp_path, Fickle(**key.model_dump()), Directory(path=tmp_path / "hub"))


def unsigned(packed: Packed) -> Packed:
    """As if it had just been packed again, perhaps on another machine."""
    folder = packed.candidate.directory
    for path in (folder / SIGNATURE, *folder.glob(".release-guard/*.sigstore.json")):
        path.unlink()
    Journal.beside(folder).path.unlink()
    return packed


def test_signatures_that_are_there_are_taken_over(desk: Desk) -> None:
    packed = desk.packed()
    first = desk.deliver(packed)
    signature = (packed.candidate.directory / SIGNATURE).read_bytes()
    assert desk.deliver(unsigned(packed)) == first
    assert (packed.candidate.directory / SIGNATURE).read_bytes() == signature
    assert desk.titles() == [first]
    assert [each.none for each in desk.shown] == [False, True]


def test_signatures_in_the_folder_are_kept_after_a_push_that_failed(desk: Desk) -> None:
    packed = desk.packed()

    def stop(_: Changes) -> None:
        raise PushRefusedError("not today")

    with pytest.raises(PushRefusedError, match="not today"):
        desk.deliver(packed, agree=stop)
    assert not Journal.beside(packed.candidate.directory).path.exists()
    signature = (packed.candidate.directory / SIGNATURE).read_bytes()
    desk.deliver(packed)
    assert (packed.candidate.directory / SIGNATURE).read_bytes() == signature


def test_a_signature_that_does_not_hold_is_made_anew(desk: Desk) -> None:
    packed = desk.packed()
    first = desk.deliver(packed)
    write(packed.candidate.directory, "README.md", f"# New, by {desk.key.identity}\n".encode())
    second = desk.deliver(packed)
    assert desk.titles() == [second, first]


@pytest.mark.parametrize("name", [SIGNATURE, ".release-guard/svr.sigstore.json", "README.md"])
def test_a_head_that_was_tampered_with_is_replaced(desk: Desk, name: str) -> None:
    packed = desk.packed()
    first = desk.deliver(packed)
    write(desk.hub.path / REPO, name, b"{}")
    second = desk.deliver(unsigned(packed))
    assert second != first
    assert desk.hub.tree(REPO).read(name) != b"{}"


def test_a_card_that_names_somebody_else_is_not_signed(desk: Desk) -> None:
    packed = desk.packed()
    write(packed.candidate.directory, "README.md", b"# By nobody\n")
    with pytest.raises(IntegrityError, match="does not name"):
        desk.deliver(packed)


def test_a_tag_names_what_was_delivered_and_nothing_else(desk: Desk) -> None:
    packed = desk.packed()
    first = desk.deliver(packed, tag="v1.0")
    assert desk.deliver(packed, tag="v1.0") == first
    assert desk.hub.tags(REPO) == {"v1.0": first}
    write(packed.candidate.directory, "README.md", f"# New, by {desk.key.identity}\n".encode())
    with pytest.raises(PushRefusedError, match=r"the tag v1\.0 is on"):
        desk.deliver(packed, tag="v1.0")
    assert desk.titles() == [first]
    second = desk.deliver(packed, tag="v1.1")
    assert desk.hub.tags(REPO) == {"v1.0": first, "v1.1": second}


def test_what_would_change_is_known_without_signing(desk: Desk) -> None:
    packed = desk.packed()
    assert len(foresee(packed, desk.hub, desk.key, REPO).new) == len(list(files(packed)))
    desk.deliver(packed)
    assert foresee(unsigned(packed), desk.hub, desk.key, REPO).none
    assert not (packed.candidate.directory / SIGNATURE).exists()


def files(packed: Packed) -> Sequence[Path]:
    return [path for path in packed.candidate.directory.rglob("*") if path.is_file()]
