"""What a hub answers, which is somebody else's word: understood, or told in our own words."""

from collections.abc import Iterator
from pathlib import Path

import hubserver
import pytest
from hubserver import Answer, HubServer, Request
from huggingface_hub import close_session, constants
from huggingface_hub.utils import http_backoff
from hypothesis import given
from hypothesis import strategies as st
from mutation import TEXTS, as_json, damaged, fuzzed, mutants
from readers import only_ours
from releases import FILES, make_release

from release_guard import hub_client
from release_guard.hubs import huggingface
from release_guard.hubs.huggingface import HuggingFace

REPO = "acme/model"
truthful = hubserver.answer


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    with pytest.MonkeyPatch.context() as patch, HubServer() as running:
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setitem(http_backoff.__kwdefaults__, "base_wait_time", 0.001)
        patch.setitem(http_backoff.__kwdefaults__, "max_wait_time", 0.002)
        patch.setattr(hub_client, "_WAITS", ())
        patch.setattr(huggingface, "_COMMIT_WAITS", (0.0,))
        patch.setenv("HF_TOKEN", "hf_canaryCanaryCanary")
        running.create(REPO)
        yield running
        close_session()


def look(hub: HuggingFace) -> None:
    only_ours(lambda: hub.preflight(REPO))
    tree = only_ours(lambda: hub.tree(REPO))
    if tree is not None:
        only_ours(lambda: [tree.read(entry.name) for entry in tree.manifest.entries])


@pytest.mark.filterwarnings("ignore:Generating overly large repr")
@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
@pytest.mark.parametrize("action", ["look", "push"])
def test_only_our_own_errors_come_of_it(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: str
) -> None:
    names = ("config.json", "model.sig", "model.safetensors")
    release = make_release(tmp_path / "release", {name: FILES[name] for name in names})
    hub = HuggingFace(endpoint=server.url)
    asked: list[Answer | None] = []
    planned: dict[int, Answer] = {}

    def answer(request: Request) -> Answer | None:
        asked.append(truthful(request))
        return planned.get(len(asked) - 1, asked[-1])

    def act() -> None:
        asked.clear()
        server.repositories[REPO].commits[1:] = []
        if action == "push":
            only_ours(lambda: hub.push(release, REPO))
        else:
            look(hub)

    monkeypatch.setattr(hubserver, "answer", answer)
    act()
    true = [found for found in asked if found is not None]

    @fuzzed(30)
    @given(st.data())
    def ask(data: st.DataObject) -> None:
        which = data.draw(st.integers(0, len(true) - 1))
        planned.clear()
        planned[which] = data.draw(answers(true[which]))
        act()

    ask()


@st.composite
def answers(draw: st.DrawFn, found: Answer) -> Answer:
    """Another body, another status, other words in the headers."""
    body = found.body if isinstance(found.body, bytes) else as_json(found.body)
    if not isinstance(found.body, bytes):
        body = draw(mutants(found.body).map(as_json) | damaged(body))
    status = draw(
        st.sampled_from([found.status] * 4 + [204, 400, 401, 403, 404, 409, 412, 418, 500])
    )
    plain = [text for text in TEXTS if text.isascii() and text.isprintable()]
    headers = dict(found.headers)
    for name in draw(st.sets(st.sampled_from(["X-Error-Message", "X-Error-Code", "Link"]))):
        headers[name] = draw(st.sampled_from(plain))
    return Answer(body, status, headers)
