"""The pre-push check: every ref that moves is a verified release, and brings nothing else along."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from threading import Thread

from release_guard.errors import IntegrityError, ReleaseGuardError
from release_guard.git import Repository
from release_guard.gittree import resolve, tree_of
from release_guard.history import Arrival, arrivals
from release_guard.hook_settings import Settings
from release_guard.manifest import Tree
from release_guard.pushed import Remote, Update
from release_guard.verify import State, Trust, Verification, verify

_SHOWN = 3  # files or commits in one message


@dataclass(frozen=True)
class Checked:
    """What was found about one ref.

    Attributes:
        update: The ref.
        commit: What it would point to; empty: nothing.
        states: As `verify` gives them.
        problems: Why it must not be pushed, one line each; none: it may.
        notes: What somebody may want to know of although it may be pushed.
        exit_code: 0, or that of the gravest problem.
    """

    update: Update
    commit: str = ""
    states: tuple[State, ...] = ()
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    exit_code: int = 0


def check_push(
    remote: Remote, updates: Sequence[Update], settings: Settings, now: datetime
) -> tuple[Checked, ...]:
    """Check every ref of a push; a deleted one publishes nothing.

    The gate is not run again: whoever is trusted here ran it before signing, and consumers do.

    Raises:
        ReleaseGuardError: Nobody is trusted here, so nothing can be verified.
    """
    moved = [update for update in updates if not update.deletes]
    if not moved:
        return tuple(map(Checked, updates))
    commits = [update.commit for update in moved]
    known = [update.before for update in updates if not update.creates]
    riding = _Riding(settings.repository, remote, commits, known)
    check = _Check(settings.repository, Trust(settings.signer(commits)), now, riding)
    return tuple(Checked(update) if update.deletes else check.update(update) for update in updates)


class _Riding:
    """What comes along with each commit: git is asked in a thread while we load and verify."""

    def __init__(
        self,
        repository: Repository,
        remote: Remote,
        commits: Sequence[str],
        known: Sequence[str],
    ) -> None:
        self._repository, self._remote, self._known = repository, remote, known
        self._found: dict[str, list[Arrival] | Exception] = {}
        self._asking = Thread(target=self._ask, args=(commits,))
        self._asking.start()

    def along_with(self, commit: str) -> list[Arrival]:
        """The files; raises what asking for them raised."""
        self._asking.join()
        found = self._found[commit]
        if isinstance(found, Exception):
            raise found
        return found

    def beyond_refs(self, commit: str) -> list[Arrival]:
        """The same less what the remote has on any other ref, which it is asked for.

        What tracking refs say is no answer: they stay when a ref is gone over there.
        """
        return arrivals(self._repository, commit, [*self._known, *self._advertised])

    @cached_property
    def _advertised(self) -> Sequence[str]:
        try:
            return self._repository.advertised(self._remote.url)
        except ReleaseGuardError as error:
            raise ReleaseGuardError(
                f"the push would bring files that no verified release holds, and {self._remote} "
                f"does not say whether it has them already ({error})"
            ) from None

    def _ask(self, commits: Sequence[str]) -> None:
        for commit in commits:
            try:
                self._found[commit] = arrivals(self._repository, commit, self._known)
            except Exception as error:
                self._found[commit] = error


@dataclass(frozen=True)
class _Check:
    repository: Repository
    trust: Trust
    now: datetime
    riding: _Riding
    seen: dict[str, Verification | IntegrityError] = field(default_factory=dict)

    def update(self, update: Update) -> Checked:
        """One ref: its own commit first, then what comes along with it."""
        try:
            commit = resolve(self.repository, update.commit)
            found = self._verified(commit)
            if found.exit_code:
                problems = tuple(f"{each.state}: {each.message}" for each in found.findings)
                return Checked(update, commit, found.states, problems, (), found.exit_code)
            problems = tuple(self._unvouched(commit, update.commit))
        except ReleaseGuardError as error:
            lines = tuple(str(error).splitlines())
            return Checked(update, problems=lines, exit_code=error.exit_code)
        notes = tuple(f"documentation {finding.message}" for finding in found.findings)
        code = IntegrityError.exit_code if problems else 0
        return Checked(update, commit, found.states, problems, notes, code)

    def _verified(self, commit: str) -> Verification:
        if commit not in self.seen:
            try:
                tree: Tree = tree_of(self.repository, commit)
                self.seen[commit] = verify(tree, self.trust, now=self.now, rejudge=False)
            except IntegrityError as error:
                self.seen[commit] = error
        found = self.seen[commit]
        if isinstance(found, IntegrityError):
            raise found
        return found

    def _unvouched(self, tip: str, pushed: str) -> list[str]:
        """Lines about files that no verified release holds: neither the newest nor their own."""
        lost = self._lost(tip, self.riding.along_with(pushed))
        if lost:
            lost = self._lost(tip, self.riding.beyond_refs(pushed))
        lines = [
            f"{arrival.commit[:12]}: {arrival.name!a}: the push would publish this file, which no "
            "verified release holds; leave the commit out (git rebase), or squash it"
            for arrival in lost[:_SHOWN]
        ]
        more = len(lost) - len(lines)
        return [*lines, f"and {more} more files like this"] if more else lines

    def _lost(self, tip: str, brought: Sequence[Arrival]) -> list[Arrival]:
        return [
            arrival
            for arrival in brought
            if not (self._vouches(tip, arrival) or self._vouches(arrival.commit, arrival))
        ]

    def _vouches(self, commit: str, arrival: Arrival) -> bool:
        try:
            found = self._verified(commit)
        except IntegrityError:  # that commit is no release at all
            return False
        signed = found.signed
        if found.exit_code or signed is None or arrival.digest is None:
            return False
        return arrival.digest in signed.digests.values()
