"""What git tells a pre-push hook: the remote, and one line for each ref that moves."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from urllib.parse import unquote, urlsplit

from release_guard.errors import ReleaseGuardError

_FIELDS = 4
_OBJECT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_HELPER = re.compile(r"[A-Za-z0-9][A-Za-z0-9+.-]*::")  # git's `helper::address`
_SECRET = re.compile(r"(?<=://)[^/@]*@")  # name and password of a URL
_HOSTS = ("huggingface.co", "hf.co")
_OTHER_KINDS = re.compile(r"/?(?:datasets|spaces)/[\w-][\w.-]*/[\w-][\w.-]*/?", re.ASCII)


@dataclass(frozen=True)
class Update:
    """One ref that moves, as git says it.

    Attributes:
        local: What the user named: a ref, or any expression.
        commit: Object id that is pushed; zeros: the ref is deleted.
        ref: Name on the remote.
        before: Object id the remote has; zeros: the ref is new.
    """

    local: str
    commit: str
    ref: str
    before: str

    @property
    def deletes(self) -> bool:
        """Whether nothing is published, only a ref removed."""
        return not self.commit.strip("0")

    @property
    def creates(self) -> bool:
        """Whether the remote has no such ref yet."""
        return not self.before.strip("0")


@dataclass(frozen=True)
class Remote:
    """Where a push goes: the name git knows it by, which may be the URL itself, and the URL."""

    name: str
    url: str

    def __str__(self) -> str:
        return _SECRET.sub("", self.name)

    def is_watched(self, patterns: Iterable[str], endpoint: str | None) -> bool:
        """Whether pushes there must be verified: model repositories of the Hub, and what is named.

        A URL that nobody could read counts as the Hub's: rather one check too many.

        Args:
            patterns: Names, URLs or globs of further remotes; `*` is all.
            endpoint: Address of another Hub (`HF_ENDPOINT`).
        """
        bare = _SECRET.sub("", self.url)
        named = {str(self), bare}
        if any(fnmatchcase(name, pattern) for pattern in patterns for name in named):
            return True
        try:
            hosts = {*_HOSTS, _address(endpoint)[0]} if endpoint else {*_HOSTS}
            host, path = _address(bare)
        except ValueError:
            return True
        on_hub = any(host == known or host.endswith(f".{known}") for known in hosts if known)
        return on_hub and _OTHER_KINDS.fullmatch(path) is None


def read_updates(source: bytes) -> tuple[Update, ...]:
    """Every line of a pre-push hook's standard input; none if there is nothing to push.

    Raises:
        ReleaseGuardError: A line that git would not write.
    """
    text = source.decode("utf-8", "surrogateescape")
    lines = text.removesuffix("\n").split("\n") if text else []
    return tuple(_update(number, line) for number, line in enumerate(lines, start=1))


def from_pre_commit(variables: Mapping[str, str]) -> Update:
    """The ref of which pre-commit tells its hooks: the first of a push, and no other.

    Raises:
        ReleaseGuardError: It does not say what is pushed.
    """
    local = variables.get("PRE_COMMIT_LOCAL_BRANCH", "")
    commit = variables.get("PRE_COMMIT_TO_REF") or local  # a first push of everything has no TO
    if not commit or commit.startswith("-"):
        raise ReleaseGuardError("pre-commit does not say what is pushed; let git push call it")
    before = variables.get("PRE_COMMIT_FROM_REF", "")
    known = before if _OBJECT.fullmatch(before) else "0"
    return Update(local, commit, variables.get("PRE_COMMIT_REMOTE_BRANCH") or local, known)


def _update(number: int, line: str) -> Update:
    fields = line.rsplit(" ", maxsplit=_FIELDS - 1)
    fits = len(fields) == _FIELDS and fields[0] and fields[2].startswith("refs/")
    if not fits or not (_OBJECT.fullmatch(fields[1]) and _OBJECT.fullmatch(fields[3])):
        raise ReleaseGuardError(
            f"line {number} of standard input, {line[:80]!a}, is not what git tells a pre-push "
            "hook; let git call it"
        )
    update = Update(*fields)
    if update.deletes and update.creates:
        raise ReleaseGuardError(f"line {number} of standard input moves nothing to nothing")
    return update


def _address(url: str) -> tuple[str, str]:
    """Host in lower case and path of whatever git takes for a remote; ("", ...): this machine."""
    url = _HELPER.sub("", url)
    if "://" in url:
        parts = urlsplit(url)
        host, path = unquote(parts.hostname or ""), parts.path
    elif ":" in (before := url.partition("/")[0]):  # [user@]host:path
        host, path = before.partition(":")[0].rpartition("@")[2], url.partition(":")[2]
    else:
        host, path = "", url
    return host.lower().strip("[]").rstrip("."), path
