import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from release_guard import __version__
from release_guard.errors import PolicyError
from release_guard.workflow import NAME, pinned_action, release_workflow

ROOT = Path(__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
ACTION = f"acme/model-release-guard@{COMMIT}"
TOOLS = Path(sys.executable).parent


def filled(**changes: str) -> str:
    values = {"model": "model", "policy": ".github/release-guard.toml", "repo": "acme/model"}
    return release_workflow(**{**values, "action": ACTION, **changes})


def jobs(text: str) -> dict[str, Any]:
    return yaml.safe_load(text)["jobs"]


def lint(folder: Path, text: str) -> tuple[str, str]:
    """What zizmor and actionlint find in a workflow of that text."""
    path = folder / ".github" / "workflows" / NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    commands = (
        ["zizmor", "--offline", "--quiet", "--no-progress", "--format=plain", str(path)],
        ["actionlint", "-shellcheck=", "-pyflakes=", str(path)],
    )
    found = []
    for name, *arguments in commands:
        done = subprocess.run(  # noqa: S603
            [TOOLS / name, *arguments], cwd=folder, capture_output=True, text=True, check=False
        )
        found.append(done.stdout if done.returncode else "")
    return found[0], found[1]


@pytest.mark.parametrize(
    "name",
    [
        "model",
        "models/a b",
        "__REPO__",
        'a"b',
        "it's",
        "$(touch x)",
        "a: b # c",
        "- x",
        "über",
        "\t\n",
    ],
)
def test_every_value_arrives_as_it_is(name: str) -> None:
    found = yaml.safe_load(filled(model=name, policy=name))["env"]
    assert found == {"MODEL": name, "POLICY": name, "REPO": "acme/model"}


def test_no_value_is_an_expression() -> None:
    with pytest.raises(PolicyError, match="expression"):
        filled(model="${{ github.token }}")


def test_the_action_is_pinned_with_its_version() -> None:
    assert filled().count(f"uses: {ACTION} # v{__version__}\n") == 2
    assert "__" not in filled()


def test_a_checkout_does_not_know_its_own_commit() -> None:
    assert pinned_action() is None
    text = release_workflow(model="m", policy="p", repo="acme/model")
    assert f"uses: OWNER/model-release-guard@{'0' * 40} # v0.0.0\n" in text


def test_the_judge_can_neither_sign_nor_push() -> None:
    document = yaml.safe_load(filled())
    judge = document["jobs"]["judge"]
    assert document["permissions"] == {}
    assert judge["permissions"] == {"contents": "read"}
    assert "environment" not in judge
    assert "secrets" not in filled()
    assert "cache" not in filled()


def test_who_publishes_checks_out_the_policy_alone_and_asks_for_approval() -> None:
    publish = jobs(filled())["publish"]
    assert publish["permissions"] == {"contents": "read", "id-token": "write"}
    assert publish["environment"]["name"] == "huggingface"
    assert publish["needs"] == "judge"
    used = [step["uses"].partition("@")[0] for step in publish["steps"]]
    assert used == ["actions/checkout", "actions/download-artifact", "acme/model-release-guard"]
    asked = publish["steps"][0]["with"]
    assert asked["sparse-checkout"] == "${{ env.POLICY }}"
    assert (asked["sparse-checkout-cone-mode"], asked["persist-credentials"]) == (False, False)
    assert publish["steps"][2]["with"]["policy"] == "asked/${{ env.POLICY }}"


def test_what_is_written_is_clean(tmp_path: Path) -> None:
    assert lint(tmp_path, filled()) == ("", "")


def test_inputs_and_outputs_are_those_of_the_action(tmp_path: Path) -> None:
    """Known to actionlint where the action lies in the same repository."""
    shutil.copy(ROOT / "action.yml", tmp_path)
    (tmp_path / ".git").mkdir()
    here = filled().replace(f"uses: {ACTION}", "uses: ./")
    assert lint(tmp_path, here)[1] == ""
    assert "expect-rot" in lint(tmp_path, here.replace("expect-root", "expect-rot"))[1]
    wrong = here.replace("publish.outputs.commit-url", "publish.outputs.commit_url")
    assert "commit_url" in lint(tmp_path, wrong)[1]


UNPINNED = ("actions/checkout@11bd71901bbe5b1630ceea73d27597364c9af683", "actions/checkout@v4")
INJECTED = (
    "      - id: judge\n",
    "      - run: echo ${{ github.event.issue.title }}\n      - id: judge\n",
)


@pytest.mark.parametrize(
    ("change", "zizmor", "actionlint"),
    [
        (UNPINNED, "unpinned-uses", ""),
        (INJECTED, "template-injection", "potentially untrusted"),
        (("          persist-credentials: false\n", ""), "artipacked", ""),
        (
            ("permissions:\n      contents: read\n      id-token: write", "permissions: write-all"),
            "excessive-permissions",
            "",
        ),
        (("    needs: judge\n", "    needs: jugde\n"), "", "jugde"),
        (("    timeout-minutes: 60", "    timeout-minute: 60"), "", "timeout-minute"),
        (("needs.judge.outputs.payload-root", "needs.judge.outputs.root"), "", '"root"'),
        (("id-token: write", "id-tokens: write"), "", "id-tokens"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_planted_faults_are_flagged(
    change: tuple[str, str], zizmor: str, actionlint: str, tmp_path: Path
) -> None:
    assert change[0] in filled()
    found = lint(tmp_path, filled().replace(*change))
    assert zizmor in found[0]
    assert actionlint in found[1]
