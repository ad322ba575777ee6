"""A repository of a model, its remote and every state worth pushing, made once and copied."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import realgit
from judged import fixed_key, judge

ROOT = Path(__file__).parents[1]
CONTENTS = ("verified", "tampered", "forged", "no-evidence", "docs-only", "huge", "bad-ancestor")
GOOD = frozenset({"verified", "docs-only"})
ATTRIBUTES = "*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
FOREIGN = """#!/bin/sh
{ printf 'called with %s %s\\n' "$1" "$2"; cat; } >>foreign.log
exit "$(cat foreign.code 2>/dev/null || echo 0)"
"""
_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize {}\n"


@dataclass(frozen=True)
class Bench:
    """Where one test works.

    Attributes:
        folder: Holds everything.
        work: Top of the working tree.
        environment: For git and for us.
    """

    folder: Path
    work: Path
    environment: dict[str, str]

    @property
    def remote(self) -> Path:
        return self.folder / "remote dir.git"

    @property
    def url(self) -> str:
        return f"file://{self.remote}"

    def git(self, *arguments: str, at: Path | None = None, check: bool = True) -> str:
        done = self.call("git", *arguments, at=at)
        if check and done.returncode:
            raise AssertionError(f"git {' '.join(arguments)}: {done.stderr}")
        return done.stdout.strip()

    def push(self, *arguments: str, at: Path | None = None) -> subprocess.CompletedProcess[str]:
        return self.call("git", "push", "-q", "origin", *arguments, at=at)

    def guard(self, *arguments: str, at: Path | None = None) -> subprocess.CompletedProcess[str]:
        return self.python("release_guard", *arguments, at=at)

    def python(self, *arguments: str, at: Path | None = None) -> subprocess.CompletedProcess[str]:
        return self.call(sys.executable, "-P", "-m", *arguments, at=at)

    def call(self, *command: str, at: Path | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(  # noqa: S603
            command,
            cwd=at or self.work,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )

    def published(self) -> tuple[frozenset[str], frozenset[str]]:
        """Every ref of the remote with its id, and every LFS object there."""
        refs = self.git("for-each-ref", "--format=%(refname) %(objectname)", at=self.remote)
        objects = (path for path in (self.remote / "lfs").rglob("*") if path.is_file())
        return frozenset(refs.splitlines()), frozenset(path.name for path in objects)

    def commit(self, message: str = "a change") -> str:
        self.git("add", "-A")
        self.git("commit", "-q", "--allow-empty", "-m", message)
        return self.git("rev-parse", "HEAD")

    def copied(self, folder: Path) -> "Bench":
        """The same elsewhere; `folder` must not exist yet."""
        shutil.copytree(self.folder, folder, symlinks=True)
        made = bench(folder)
        made.git("config", "remote.origin.url", made.url)
        return made


def bench(folder: Path) -> Bench:
    """What lies in a folder that `stock` made, or a copy of it."""
    kept = {name: os.environ[name] for name in ("PATH", "OMP_NUM_THREADS") if name in os.environ}
    path = f"{folder / 'bin'}:/usr/local/bin:/usr/bin:/bin:{realgit.folder()}"
    environment = {
        **kept,
        "PATH": path,
        "HOME": str(folder / "home"),
        "PYTHONPATH": str(ROOT),
        "GIT_CONFIG_NOSYSTEM": "1",
        "PRE_COMMIT_HOME": str(folder / "home/pre-commit"),
    }
    return Bench(folder, folder / "a model", environment)


def stock(folder: Path) -> Bench:
    """Make it: the remote has release 1 on main; branches named as CONTENTS go on from there."""
    made = empty(folder)
    release(made, "1")
    made.git("push", "-q", "origin", "main")
    made.git("push", "-q", "origin", "main:refs/heads/old")
    for content in CONTENTS:
        made.git("checkout", "-q", "-b", content, "main")
        _CHANGES[content](made)
        made.git("tag", "-a", f"tag-{content}", "-m", content)
    made.git("checkout", "-q", "-b", "aside", "main")
    (made.work / "README.md").write_text("# Another direction\n")
    made.commit()
    made.git("checkout", "-q", "main")
    return made


def empty(folder: Path) -> Bench:
    """A repository without a commit, its remote, whom it trusts; no hook of ours yet."""
    for name in ("bin", "home", "a model"):
        (folder / name).mkdir(parents=True)
    tool = folder / "bin/release-guard"
    tool.write_text(f'#!/bin/sh\nexec "{sys.executable}" -P -m release_guard "$@"\n')
    tool.chmod(0o755)
    made = bench(folder)
    (folder / "home/.gitconfig").write_text(
        "[user]\nname = Somebody\nemail = somebody@example.org\n[init]\ndefaultBranch = main\n"
        "[advice]\nignoredHook = true\n"
    )
    made.git("lfs", "install", "--skip-repo", at=folder)
    made.git("init", "-q", "--bare", str(made.remote), at=folder)
    made.git("init", "-q", str(made.work), at=folder)
    made.git("remote", "add", "origin", made.url)
    made.git("lfs", "install", "--local")
    made.git("config", "gc.auto", "0")
    made.git("config", "release-guard.remotes", "origin")
    key = folder / "keys"
    fixed_key(key)
    made.git("config", "release-guard.key", "../keys/1.pub")
    (made.work / ".gitattributes").write_text(ATTRIBUTES)
    return made


def release(made: Bench, name: str) -> None:
    """A judged and signed release in the working tree, and its commit."""
    (made.work / "part.safetensors").write_bytes(name.encode() * 100)
    now = datetime.now(UTC) - timedelta(hours=1)
    for path in (made.work / "model.sig", made.work / ".release-guard"):
        shutil.rmtree(path, ignore_errors=True)
        path.unlink(missing_ok=True)
    signer = fixed_key(made.folder / "keys")
    judge(made.work, signer, started_at=now.isoformat(), finished_at=now.isoformat()).release()
    made.commit(f"release {name}")


def _tampered(made: Bench) -> None:
    (made.work / "model.safetensors").write_bytes(b"other weights")
    made.commit()


def _forged(made: Bench) -> None:
    """The pointer of the very file that was signed, but no attribute that makes it one."""
    pointer = made.git("show", "HEAD:model.safetensors") + "\n"
    (made.work / ".gitattributes").write_text("part.safetensors filter=lfs\n")
    (made.work / "model.safetensors").write_text(pointer)
    made.commit()


def _no_evidence(made: Bench) -> None:
    made.git("rm", "-q", "-r", "model.sig", ".release-guard")
    (made.work / "model.safetensors").write_bytes(b"new weights")
    made.commit()


def _docs_only(made: Bench) -> None:
    (made.work / "README.md").write_text("# A better card\n")
    made.commit()


def _huge(made: Bench) -> None:
    (made.work / "pytorch_model.bin").write_bytes(bytes((10 << 20) + 1))
    made.commit()


def _bad_ancestor(made: Bench) -> None:
    """What is pushed is the release as it was; on the way there lie the weights without defence."""
    (made.work / "undefended.safetensors").write_bytes(b"undefended")
    made.commit()
    made.git("rm", "-q", "undefended.safetensors")
    made.commit()


_CHANGES = {
    "verified": lambda made: release(made, "2"),
    "tampered": _tampered,
    "forged": _forged,
    "no-evidence": _no_evidence,
    "docs-only": _docs_only,
    "huge": _huge,
    "bad-ancestor": _bad_ancestor,
}
