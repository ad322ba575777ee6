"""Whom to trust for which model, remembered: a TOML file of the consumer's own.

[pins."hf://acme/classifier"]
fingerprint = "0bcc8908..."      # or key, or identity and issuer, as on the command line
"""

import fcntl
import json
import os
import stat
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from release_guard.durable import replace_file
from release_guard.errors import IntegrityError, PolicyError, ReleaseGuardError, printable
from release_guard.manifest import Tree
from release_guard.places import config_folder
from release_guard.trust import Trusted, first_seen

VARIABLE = "RELEASE_GUARD_PINS"
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_MAX_FILE = 1 << 20  # bytes


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    pins: Mapping[str, Trusted] = {}


@dataclass(frozen=True)
class Pins:
    """The pin file, read anew at every question.

    Attributes:
        path: Where it lies, or would.
    """

    path: Path

    @classmethod
    def default(cls) -> "Pins":
        """`RELEASE_GUARD_PINS`, else `release-guard/pins.toml` where configuration lies."""
        if given := os.environ.get(VARIABLE):
            return cls(Path(given))
        return cls(config_folder() / "pins.toml")

    def get(self, name: str) -> Trusted | None:
        """Whom to trust for a model; a key's path counts from the pin file.

        Raises:
            PolicyError: The file is not as it must be, or others can write it.
        """
        trusted = _parse(self._read(), self.path).pins.get(name)
        if trusted is not None and trusted.key is not None:
            return Trusted(key=self.path.parent / trusted.key)
        return trusted

    def add(self, name: str, trusted: Trusted) -> None:
        """Pin a signer for a model that has none; whole or not at all, for the owner's eyes only.

        Raises:
            IntegrityError: Somebody else was pinned meanwhile.
            ReleaseGuardError: The file cannot be written.
        """
        try:
            with self._locked():
                source = self._read()
                if (known := self.get(name)) is not None:
                    _require_same(known, trusted, name)
                    return
                content = source + _table(name, trusted).encode()
                if _parse(content, self.path).pins.get(name) != trusted:
                    raise PolicyError(f"{self.path}: cannot hold the name {name!a}")
                replace_file(self.path, content, mode=0o600)
        except OSError as error:
            raise ReleaseGuardError(
                f"{self.path}: cannot be written ({error.strerror}), so nothing is pinned"
            ) from None

    def _read(self) -> bytes:
        try:
            with self.path.open("rb") as file:
                if os.fstat(file.fileno()).st_mode & _OTHERS_WRITE:
                    raise PolicyError(
                        f"{self.path}: others can write it, so it says nothing about trust; check "
                        f"it, then run: chmod 600 {self.path}"
                    )
                content = file.read(_MAX_FILE + 1)
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise PolicyError(f"{self.path}: cannot be read ({error.strerror})") from None
        if len(content) > _MAX_FILE:
            raise PolicyError(f"{self.path}: larger than {_MAX_FILE >> 20} MiB; not read")
        return content

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self.path.with_name(f"{self.path.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


@dataclass(frozen=True)
class Choice:
    """Whom to trust for one model, and who says so.

    Attributes:
        trusted: The signer.
        source: Where that comes from.
    """

    trusted: Trusted
    source: Literal["command line", "pin file", "first use"]


def choose(place: str, tree: Tree, pins: Pins, *, given: Trusted | None, first_use: bool) -> Choice:
    """Whom to trust: who was named, else who is pinned, else (if asked for) who signed it.

    Args:
        place: What signers are pinned for.
        tree: The release.
        pins: The consumer's own.
        given: Who was named on the command line.
        first_use: Trust whoever signed it, where nobody is pinned.

    Raises:
        PolicyError: Nobody is trusted, or nobody can be.
    """
    if given is not None:
        return Choice(given, "command line")
    if (pinned := pins.get(place)) is not None:
        return Choice(pinned, "pin file")
    if first_use:
        return Choice(first_seen(tree), "first use")
    raise PolicyError(
        f"{place}: you trust nobody for it yet; give --key, --fingerprint, or --identity and "
        f"--issuer, or --trust-on-first-use to pin whoever signed it in {pins.path}"
    )


def _parse(content: bytes, path: Path) -> _File:
    try:
        return _File.model_validate(tomllib.loads(content.decode("utf-8")))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise PolicyError(printable(f"{path}: {where}: {first['msg']}")) from None
    except (ValueError, RecursionError) as error:  # not UTF-8, or not TOML
        raise PolicyError(printable(f"{path}: not TOML ({error})")) from None


def _require_same(known: Trusted, trusted: Trusted, name: str) -> None:
    if known != trusted:
        raise IntegrityError(f"{name}: pinned to {known} meanwhile; nothing was changed")


def _table(name: str, trusted: Trusted) -> str:
    """In TOML; what JSON escapes in a string, TOML reads the same."""
    given = trusted.model_dump(mode="json", exclude_none=True)
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in given.items()]
    return "\n".join([f"\n[pins.{json.dumps(name, ensure_ascii=False)}]", *lines, ""])
