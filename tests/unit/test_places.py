"""Nothing is published by accident: where runs, data and policies may lie."""

from pathlib import Path

import pytest
from evidence_builder import example_policy

from release_guard.commands.options import _nearest_policy
from release_guard.commands.shared import default_run
from release_guard.errors import PolicyError
from release_guard.preflight import Order, check_order
from release_guard.starter import key_folder


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    return folder


def test_a_run_lies_beside_the_model_never_in_it(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert default_run("acme/vit", "model") == Path("runs/vit")
    monkeypatch.chdir(model)
    assert default_run("acme/vit", ".") == model.with_name("model-runs") / "vit"
    with pytest.raises(PolicyError, match="lies in the model's own folder"):
        check_order(Order(".", "acme/vit", example_policy()), Path("runs/vit"))


@pytest.mark.parametrize(("as_is", "refused"), [(True, True), (False, False)])
def test_data_do_not_go_out_with_a_model_that_is_published_as_it_is(
    model: Path, *, as_is: bool, refused: bool
) -> None:
    policy = example_policy()
    inside = policy.model_copy(
        update={"retain": policy.retain.model_copy(update={"dataset": "model/data.parquet"})}
    )
    order = Order("model", "acme/vit", inside, as_is=as_is)
    if refused:
        with pytest.raises(PolicyError, match=r"retain\.dataset: model/data\.parquet lies in"):
            check_order(order, Path("runs/vit"))
    else:
        check_order(order, Path("runs/vit"))


def test_the_nearest_policy_is_found_up_to_the_repository_s_top(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "release-guard.toml").touch()
    (model / ".git").mkdir()
    (model / "deep").mkdir()
    monkeypatch.chdir(model / "deep")
    assert _nearest_policy() is None  # another repository's, or nobody's, is not ours
    (model / ".github").mkdir()
    (model / ".github" / "release-guard.toml").touch()
    assert _nearest_policy() == model / ".github" / "release-guard.toml"
    (model / "release-guard.toml").touch()
    assert _nearest_policy() == model / "release-guard.toml"


@pytest.mark.parametrize(
    ("given", "folder"), [("/x", "/x"), ("", "/home/me/.config"), ("config", "/home/me/.config")]
)
def test_private_keys_lie_in_no_repository(
    given: str, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative folder of configuration would be one of the repository that is worked in."""
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("XDG_CONFIG_HOME", given)
    assert key_folder("acme/vit") == Path(folder, "release-guard/keys/acme--vit")
