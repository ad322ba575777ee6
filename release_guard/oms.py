"""OMS v1.0: a manifest as the statement in `model.sig`, and back. One signature over every file.

Source: the OpenSSF model signing specification v1.0, method `files`, SHA-256.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from release_guard.dsse import Statement, Subject, as_digest, as_object, as_text
from release_guard.errors import IntegrityError
from release_guard.manifest import (
    IGNORED,
    SIGNATURE,
    Manifest,
    hash_directory,
    require_canonical,
    root_digest,
    write_file,
)
from release_guard.release import Attested, Release

if TYPE_CHECKING:
    from release_guard.signers import Signer

PREDICATE_TYPE = "https://model_signing/signature/v1.0"

_PREDICATE_KEYS = frozenset({"resources", "serialization"})
_SERIALIZATION_KEYS = frozenset({"method", "hash_type", "allow_symlinks", "ignore_paths"})


@dataclass(frozen=True)
class SignedFiles:
    """What a `model.sig` vouches for.

    Attributes:
        digests: SHA-256 of every file, by name.
        root: The subject's digest, recomputed from the files.
        ignored: Paths the signer left out. They excuse nothing: whoever compares must hold any
            file that is not in `digests` for added, or an entry here could hide it.
    """

    digests: Mapping[str, str]
    root: str
    ignored: tuple[str, ...]


def sign(attested: Attested, signer: "Signer", *, previous: str | None = None) -> Release:
    """Write `model.sig` over every file in the folder. The last step: nothing is written after it.

    Args:
        attested: Packed folder with its attestations.
        signer: Who vouches.
        previous: Head of the hub that this release was planned against.

    Raises:
        IntegrityError: Weights or configuration changed since they were judged.
    """
    found = hash_directory(attested.directory).without(SIGNATURE)
    if found.payload != attested.payload:
        raise IntegrityError(
            f"{attested.directory}: weights or configuration changed since they were judged; "
            "run publish again"
        )
    bundle = signer.sign(to_statement(found, name=attested.directory.resolve().name))
    write_file(attested.directory / SIGNATURE, bundle)
    return Release(
        directory=attested.directory,
        verdict=attested.verdict,
        payload=attested.payload,
        manifest=hash_directory(attested.directory),
        previous=previous,
    )


def to_statement(manifest: Manifest, *, name: str) -> bytes:
    """The exact bytes that `model.sig` signs.

    Args:
        manifest: Every file but `model.sig`; at least one.
        name: Of the model; informational.
    """
    if not manifest.entries:
        raise IntegrityError("there is no file to sign")
    predicate = {
        "resources": [
            {"name": entry.name, "digest": entry.digest, "algorithm": "sha256"}
            for entry in manifest.entries
        ],
        "serialization": {
            "method": "files",
            "hash_type": "sha256",
            "allow_symlinks": False,
            "ignore_paths": [*IGNORED, SIGNATURE],
        },
    }
    return Statement(PREDICATE_TYPE, [Subject(name, manifest.root)], predicate).to_bytes()


def from_statement(source: bytes) -> SignedFiles:
    """Read what was signed; only ever call it on bytes whose signature was verified.

    Raises:
        IntegrityError: Not OMS v1.0 by files and SHA-256, or a root that its files do not make.
    """
    statement = Statement.from_bytes(source)
    if statement.predicate_type != PREDICATE_TYPE:
        raise IntegrityError(f"{SIGNATURE}: signs {statement.predicate_type!r}, not a model")
    predicate = _exact(statement.predicate, _PREDICATE_KEYS, "predicate")
    ignored = _serialization(predicate.get("serialization"))
    resources = tuple(_resources(predicate.get("resources")))
    digests = dict(resources)
    if len(digests) != len(resources):
        raise IntegrityError(f"{SIGNATURE}: a file is listed twice")
    _require_order(list(digests))
    root = root_digest(digests.values())
    if [subject.digest for subject in statement.subjects] != [root]:
        raise IntegrityError(f"{SIGNATURE}: the root digest is not that of the files listed")
    return SignedFiles(digests, root, ignored)


def _serialization(value: Any) -> tuple[str, ...]:
    found = _exact(value, _SERIALIZATION_KEYS, "serialization")
    method, algorithm = found.get("method"), found.get("hash_type")
    if method != "files" or algorithm != "sha256":
        raise IntegrityError(
            f"{SIGNATURE}: signed by {method!r} and {algorithm!r}; only 'files' and 'sha256' "
            "can be verified"
        )
    if not isinstance(found.get("allow_symlinks"), bool):
        raise IntegrityError(f"{SIGNATURE}: `allow_symlinks` is not true or false")
    paths = found.get("ignore_paths", [])
    if not isinstance(paths, list):
        raise IntegrityError(f"{SIGNATURE}: `ignore_paths` is not a list")
    return tuple(as_text(path, f"{SIGNATURE}: ignore_paths") for path in paths)


def _resources(value: Any) -> Iterable[tuple[str, str]]:
    if not isinstance(value, list) or not value:
        raise IntegrityError(f"{SIGNATURE}: lists no file")
    for item in value:
        resource = as_object(item, f"{SIGNATURE}: resource")
        name = as_text(resource.get("name"), f"{SIGNATURE}: name")
        require_canonical(name)
        if resource.get("algorithm") != "sha256":
            raise IntegrityError(f"{SIGNATURE}: {name}: digest is not SHA-256")
        yield name, as_digest(resource.get("digest"), f"{SIGNATURE}: {name}: digest")


def _require_order(names: list[str]) -> None:
    """By code points, as specified, or by path components, as the reference implementation does."""
    if names not in (sorted(names), sorted(names, key=lambda name: name.split("/"))):
        raise IntegrityError(f"{SIGNATURE}: files are not sorted by name")


def _exact(value: Any, known: frozenset[str], what: str) -> Mapping[str, Any]:
    found = as_object(value, f"{SIGNATURE}: {what}")
    if unknown := sorted(set(found) - known):
        raise IntegrityError(f"{SIGNATURE}: {what}: unknown field {unknown[0]!r}")
    return found
