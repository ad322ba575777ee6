"""The ways of pushing a state of `pushing`, and what must have come of each."""

from pushing import GOOD, Bench

PUSHES = ("new branch", "update", "force", "second bad", "delete", "tag", "up to date")
UNSENT = frozenset({"delete", "up to date"})  # whatever lies here, nothing of it is published


def pushed_as_it_must_be(bench: Bench, content: str, push: str, *, worktree: bool = False) -> None:
    at = None
    if worktree:
        at = bench.folder / "beside"
        bench.git("worktree", "add", "-q", "--detach", str(at), "main")
    refs = ready(bench, content, push)
    before = bench.published()
    done = bench.push(*refs, at=at)
    if content in GOOD or push in UNSENT:
        assert done.returncode == 0, done.stderr
        assert_arrived(bench, content, push)
    else:
        assert done.returncode == 1
        assert "error: nothing was pushed\n" in done.stderr
        assert bench.published() == before  # not one LFS object, no ref


def ready(bench: Bench, content: str, push: str) -> list[str]:
    """Bring the remote to where the push begins; what to push."""
    if push == "force":
        bench.git("push", "-q", "--no-verify", "origin", "aside:main", "--force")
    if push == "delete":
        bench.git("checkout", "-q", content)
    if push == "up to date":
        bench.git("push", "-q", "--no-verify", "origin", f"{content}:refs/heads/there")
        bench.git("lfs", "push", "--all", "origin", content)
    return {
        "new branch": [f"{content}:refs/heads/brand/new"],
        "update": [f"{content}:main"],
        "force": ["--force", f"{content}:main"],
        "second bad": ["docs-only:refs/heads/a", f"{content}:refs/heads/b"],
        "delete": ["--delete", "old"],
        "tag": [f"tag-{content}"],
        "up to date": [f"{content}:refs/heads/there"],
    }[push]


def assert_arrived(bench: Bench, content: str, push: str) -> None:
    refs, objects = bench.published()
    names = {line.split()[0]: line.split()[1] for line in refs}
    if push == "delete":
        assert "refs/heads/old" not in names
        return
    assert bench.git("rev-parse", content) in {
        bench.git("rev-parse", f"{commit}^{{commit}}") for commit in names.values()
    }
    assert push == "up to date" or len(objects) == (3 if content == "verified" else 2)
