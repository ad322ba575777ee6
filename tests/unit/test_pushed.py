import pytest
from hypothesis import given
from hypothesis import strategies as st

from release_guard.errors import ReleaseGuardError
from release_guard.pushed import Remote, Update, from_pre_commit, read_updates

ZEROS, ONES = "0" * 40, "1" * 40
IDS = st.from_regex(r"[0-9a-f]{40}|[0-9a-f]{64}", fullmatch=True)
REFS = st.text(
    st.characters(blacklist_characters=" \n\x00", blacklist_categories=["Cs"]), min_size=1
).map(lambda text: f"refs/{text}")
LOCALS = st.text(
    st.characters(blacklist_characters="\n\x00", blacklist_categories=["Cs"]), min_size=1
)


@given(st.binary())
def test_whatever_comes_is_read_or_refused(source: bytes) -> None:
    try:
        updates = read_updates(source)
    except ReleaseGuardError:
        return
    lines = [f"{u.local} {u.commit} {u.ref} {u.before}" for u in updates]
    assert source.decode("utf-8", "surrogateescape").removesuffix("\n") == "\n".join(lines)


@given(st.lists(st.tuples(LOCALS, IDS, REFS, IDS), min_size=1))
def test_what_git_writes_is_read_as_it_is(lines: list[tuple[str, str, str, str]]) -> None:
    moving = [line for line in lines if line[1].strip("0") or line[3].strip("0")]
    source = "".join(f"{' '.join(line)}\n" for line in moving)
    assert read_updates(source.encode()) == tuple(Update(*line) for line in moving)


@given(st.tuples(LOCALS, IDS, REFS, IDS), st.data())
def test_a_changed_character_never_hides_a_ref(line, data) -> None:
    text = f"{' '.join(line)}\n"
    at = data.draw(st.integers(0, len(text) - 2))
    changed = text[:at] + data.draw(st.sampled_from([" ", "\t", "x", "\r"])) + text[at + 1 :]
    try:
        (update,) = read_updates(changed.encode())
    except ReleaseGuardError:
        return
    assert f"{update.local} {update.commit} {update.ref} {update.before}\n" == changed


def test_the_local_side_may_be_any_expression() -> None:
    (update,) = read_updates(f"HEAD^{{/a b}} ~1 {ONES} refs/heads/main {ZEROS}\n".encode())
    assert update == Update("HEAD^{/a b} ~1", ONES, "refs/heads/main", ZEROS)
    assert update.creates
    assert not update.deletes


def test_deleting_is_told_apart() -> None:
    (update,) = read_updates(f"(delete) {ZEROS} refs/heads/main {ONES}\n".encode())
    assert update.deletes
    assert not update.creates


def test_nothing_is_nothing() -> None:
    assert read_updates(b"") == ()


@pytest.mark.parametrize(
    "source",
    [
        f"refs/heads/a {ONES} refs/heads/a {ZEROS} \n",
        f"refs/heads/a {ONES[1:]} refs/heads/a {ZEROS}\n",
        f"refs/heads/a {ONES.replace('1', 'A')} refs/heads/a {ZEROS}\n",
        f"refs/heads/a {ONES} heads/a {ZEROS}\n",
        f"refs/heads/a\t{ONES}\trefs/heads/a\t{ZEROS}\n",
        f"refs/heads/a {ONES} refs/heads/a {ZEROS}\n\n",
        f"\nrefs/heads/a {ONES} refs/heads/a {ZEROS}\n",
        f" {ONES} refs/heads/a {ZEROS}\n",
        f"(delete) {ZEROS} refs/heads/a {ZEROS}\n",
    ],
)
def test_lines_git_does_not_write_are_refused(source: str) -> None:
    with pytest.raises(ReleaseGuardError, match="standard input"):
        read_updates(source.encode())


@pytest.mark.parametrize(
    "url",
    [
        "https://huggingface.co/acme/model",
        "https://me:hf_x@huggingface.co/acme/model",
        "https://HuggingFace.co:443/acme/model.git",
        "https://huggingface.co./acme/model",
        "https://huggingface%2Eco/acme/model",
        "https://hf.co/acme/model",
        "https://www.huggingface.co/acme/model",
        "http://huggingface.co/gpt2",
        "git@hf.co:acme/model",
        "git@hf.co:/acme/model",
        "hf.co:acme/model",
        "ssh://git@hf.co/acme/model",
        "ssh://git@hf.co:22/acme/model",
        "git+ssh://git@hf.co/acme/model",
        "lfs::https://huggingface.co/acme/model",
        "https://huggingface.co/datasets/../acme/model",
        "https://huggingface.co/spaces/%2e%2e/model",
        "https://huggingface.co/datasets/acme/../../acme/model",
        "https://huggingface.co//datasets/acme/model",
        "https://huggingface.co/datasets/acme",
        "https://huggingface.co/spaces",
        "https://huggingface.co/Datasets/acme/model",
        "https://huggingface.co",
        "https://[huggingface.co/acme/model",
    ],
)
def test_models_of_the_hub_are_watched(url: str) -> None:
    assert Remote("origin", url).is_watched((), None)


@pytest.mark.parametrize(
    "url",
    [
        "https://huggingface.co/datasets/acme/data",
        "https://huggingface.co/spaces/acme/app.git",
        "git@hf.co:datasets/acme/data",
        "ssh://git@hf.co/spaces/acme/app",
        "https://github.com/acme/model",
        "https://github.com/huggingface.co/model",
        "https://huggingface.co@github.com/acme/model",
        "https://nothuggingface.co/acme/model",
        "git@github.com:acme/huggingface.co",
        "/srv/huggingface.co/model",
        "../huggingface.co:model",
        "file:///srv/model",
    ],
)
def test_other_places_are_left_alone(url: str) -> None:
    assert not Remote("origin", url).is_watched((), None)
    assert Remote("origin", url).is_watched(("*",), None)
    assert Remote("origin", url).is_watched(("x", "ori?in"), None)
    assert not Remote("origin", url).is_watched(("ori", "Origin"), None)


@pytest.mark.parametrize(
    ("endpoint", "url", "watched"),
    [
        ("https://hub.example.org", "https://hub.example.org/a/b", True),
        ("https://hub.example.org/hf", "git@hub.example.org:a/b", True),
        ("http://127.0.0.1:8080", "http://127.0.0.1:9090/a/b", True),
        ("https://hub.example.org", "https://hub.example.org/datasets/a/b", False),
        ("https://hub.example.org", "https://huggingface.co/a/b", True),
        ("https://[", "https://github.com/a/b", True),
        ("nonsense", "/srv/a", False),
    ],
)
def test_another_hub_counts_as_one(endpoint: str, url: str, watched: bool) -> None:
    assert Remote("origin", url).is_watched((), endpoint) == watched


def test_secrets_of_a_url_are_never_shown() -> None:
    remote = Remote("https://me:hf_x@hf.co/a/b", "https://me:hf_x@hf.co/a/b")
    assert str(remote) == "https://hf.co/a/b"


def test_pre_commit_tells_one_ref() -> None:
    told = {
        "PRE_COMMIT_FROM_REF": ONES,
        "PRE_COMMIT_TO_REF": "2" * 40,
        "PRE_COMMIT_LOCAL_BRANCH": "refs/heads/a",
        "PRE_COMMIT_REMOTE_BRANCH": "refs/heads/b",
    }
    assert from_pre_commit(told) == Update("refs/heads/a", "2" * 40, "refs/heads/b", ONES)
    del told["PRE_COMMIT_FROM_REF"], told["PRE_COMMIT_TO_REF"]  # a first push of everything
    assert from_pre_commit(told) == Update("refs/heads/a", "refs/heads/a", "refs/heads/b", "0")
    for branch in ("", "--all"):
        with pytest.raises(ReleaseGuardError, match="pre-commit does not say"):
            from_pre_commit({**told, "PRE_COMMIT_LOCAL_BRANCH": branch})
