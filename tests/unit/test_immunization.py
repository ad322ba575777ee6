"""The training loop that stages share: resumed, guarded, in less memory, in lower precision."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pico
import pytest
import torch

from release_guard.errors import ImmunizationError, ModelError
from release_guard.evidence import Cost
from release_guard.immunization import Pace, Training, update
from release_guard.modalities import Modality, ModelHandle
from release_guard.policy import Policy
from release_guard.quantization import is_aware

State = dict[str, torch.Tensor]
PACE = Pace(steps=6, probe_every=2, keep_every=2, probed=40)


class Practice(Training):
    """Plain fine-tuning on the retained data; a step can be told to go wrong.

    Attributes:
        ruined: Steps, from 1, whose loss is NaN, or whose weights become infinite.
    """

    def __init__(self, base: ModelHandle, policy: Policy, *, rate: float = 1e-3) -> None:
        super().__init__("practice", f"{rate}", base, policy)
        self.ruined: Mapping[int, str] = {}
        self._rate = rate
        self._optimizer = torch.optim.Adam(self.theta.module.parameters())

    def advance(self) -> Mapping[str, float]:
        batch = self.batch(self.policy.retain.dataset, "retain", size=16, purpose="practice")
        loss = self.theta.loss(batch)
        loss.backward()
        update(self._optimizer, self._rate)
        how = self.ruined.get(self.step + 1)
        if how == "weights":
            with torch.no_grad():
                self.theta.head.weight[0, 0] = torch.inf
        return {"retained": float("nan") if how == "loss" else loss.item()}

    def changing(self) -> dict[str, Any]:
        return {"optimizer": self._optimizer.state_dict()}

    def restore(self, kept: Mapping[str, Any]) -> None:
        self._optimizer.load_state_dict(kept["optimizer"])


@pytest.fixture
def policy(tmp_path: Path, image_data: Path) -> Policy:
    return Policy.load(pico.pico_policy(tmp_path, image_data, retain={"margin": 0.5}))


@pytest.fixture
def text_policy(tmp_path: Path, text_data: Path) -> Policy:
    return Policy.load(
        pico.pico_policy(
            tmp_path,
            text_data,
            modality={"name": "causal_lm"},
            retain={"dataset": str(text_data / "retained.jsonl"), "margin": 0.5},
        )
    )


@pytest.fixture
def model(policy: Policy, classifier_folder: Path) -> ModelHandle:
    return Modality.build(policy.modality).load(str(classifier_folder))


def train(
    training: Training, folder: Path, pace: Pace = PACE, *, until: int | None = None
) -> tuple[State, list[int], list[Cost]]:
    """Train, or die after a step; what came out, the steps that were taken, what they cost."""

    class Killed(Exception):  # noqa: N818
        pass

    steps: list[int] = []
    spent: list[Cost] = []

    def progress(done: int, _: int, line: str) -> None:
        steps.append(done)
        assert "retained" in line
        if done == until:
            raise Killed

    folder.mkdir(parents=True, exist_ok=True)
    try:
        done = training.complete(pace, folder, progress, spent.append)
    except Killed:
        return {}, steps, spent
    return done.state(), steps, spent


def same(one: State, other: State) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("how", ["loss", "weights"])
def test_what_is_not_finite_stops_with_its_step_and_leaves_the_checkpoint_before_it(
    policy: Policy, model: ModelHandle, tmp_path: Path, how: str
) -> None:
    whole, _, _ = train(Practice(model, policy), tmp_path / "whole")
    ruined = Practice(model, policy)
    ruined.ruined = {4: how}
    what = "retained is not finite" if how == "loss" else "the weights are not finite"
    with pytest.raises(ImmunizationError, match=f"practice: {what} at step 4; lower the learning"):
        train(ruined, tmp_path / "cut")
    kept = torch.load(tmp_path / "cut" / "practice.pt", weights_only=True)
    assert kept["step"] == 2
    assert all(value.isfinite().all() for value in kept["theta"].values())
    resumed, steps, _ = train(Practice(model, policy), tmp_path / "cut")
    assert steps == [3, 4, 5, 6]
    assert same(whole, resumed)


def test_no_checkpoint_is_written_by_halves(
    policy: Policy, model: ModelHandle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(Practice(model, policy), tmp_path / "a", until=3)
    before = (tmp_path / "a" / "practice.pt").read_bytes()

    def full(state: Any, path: Path) -> None:
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OSError, match="No space left"):
            train(Practice(model, policy), tmp_path / "a")
    assert (tmp_path / "a" / "practice.pt").read_bytes() == before
    assert train(Practice(model, policy), tmp_path / "a")[1] == [3, 4, 5, 6]


def test_only_its_own_checkpoint_is_taken_up(
    policy: Policy, model: ModelHandle, tmp_path: Path
) -> None:
    train(Practice(model, policy), tmp_path / "a")
    _, steps, _ = train(Practice(model, policy, rate=2e-3), tmp_path / "a")
    assert steps[0] == 1


def test_what_was_spent_before_a_kill_is_counted(
    policy: Policy, model: ModelHandle, tmp_path: Path
) -> None:
    _, _, (whole,) = train(Practice(model, policy), tmp_path / "whole")
    train(Practice(model, policy), tmp_path / "cut", until=5)
    _, _, (resumed,) = train(Practice(model, policy), tmp_path / "cut")
    assert (resumed.steps, resumed.samples, resumed.flops) == (6, 96, whole.flops)
    assert whole.flops > 0


def practised(
    kind: str, request: pytest.FixtureRequest, folder: Path, pace: Pace, until: int | None = None
) -> State:
    names = {"vit": ("policy", "classifier_folder"), "llama": ("text_policy", "lm_folder")}
    policy, source = map(request.getfixturevalue, names[kind])
    model = Modality.build(policy.modality).load(str(source))
    return train(Practice(model, policy), folder, pace, until=until)[0]


def distance(one: State, other: State) -> float:
    """Largest difference between weights; key biases aside, which change nothing (Adam)."""
    names = [name for name in one if not name.endswith(("key.bias", "k_proj.bias"))]
    return max((one[name].float() - other[name].float()).abs().max().item() for name in names)


@pytest.mark.parametrize("kind", ["vit", "llama"])
def test_computing_activations_again_gives_the_same_weights(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    held = practised(kind, request, tmp_path / "held", PACE)
    pace = Pace(**{**vars(PACE), "checkpointing": True})
    again = practised(kind, request, tmp_path / "again", pace)
    assert distance(held, again) < 1e-5


def test_activations_are_computed_again_indeed(
    policy: Policy, model: ModelHandle, tmp_path: Path
) -> None:
    training, forward = Practice(model, policy), []
    parts = training.theta.blocks[0].modules()
    layer = next(part for part in parts if isinstance(part, torch.nn.Linear))
    layer.register_forward_pre_hook(lambda *_: forward.append(torch.is_grad_enabled()))
    pace = Pace(steps=1, probed=10, checkpointing=True)
    train(training, tmp_path / "a", pace)
    assert forward.count(True) == 2, "once forward, once in the backward pass"


def test_a_model_that_cannot_compute_them_again_is_refused(
    policy: Policy, resnet_folder: Path, tmp_path: Path
) -> None:
    model = Modality.build(policy.modality).load(str(resnet_folder))
    with pytest.raises(ImmunizationError, match="checkpointing: ResNetForImageClassification can"):
        train(Practice(model, policy), tmp_path / "a", Pace(steps=1, checkpointing=True))


@pytest.mark.parametrize("kind", ["vit", "llama"])
def test_lower_precision_gives_finite_weights_nearby_in_full_precision(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    full = practised(kind, request, tmp_path / "full", PACE)
    lower = practised(kind, request, tmp_path / "lower", Pace(**{**vars(PACE), "autocast": True}))
    assert all(value.isfinite().all() for value in lower.values())
    assert {value.dtype for value in lower.values()} == {value.dtype for value in full.values()}
    assert 0 < distance(full, lower) < 2 * PACE.steps * 1e-3, "Adam moves a rate a step"
    mean = torch.stack([(full[n] - lower[n]).float().abs().mean() for n in full]).mean()
    assert float(mean) < 1e-3


@pytest.mark.parametrize("option", ["checkpointing", "autocast"])
def test_a_resumed_run_is_the_same_under_each_option(
    option: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    pace = Pace(**{**vars(PACE), option: True})
    whole = practised("vit", request, tmp_path / "whole", pace)
    practised("vit", request, tmp_path / "cut", pace, until=3)
    assert same(whole, practised("vit", request, tmp_path / "cut", pace))


def aware_policy(policy: Policy, **given: Any) -> Policy:
    return policy.model_copy(update={"precisions": ("fp32", "nf4"), **given})


def test_a_policy_of_fp32_alone_trains_on_ordinary_layers(
    policy: Policy, model: ModelHandle, tmp_path: Path
) -> None:
    plain, _, _ = train(Practice(model, policy), tmp_path / "a")
    asked = policy.model_copy(update={"awareness": {"fp32": 2.0}})
    assert not is_aware(Practice(model, asked).theta)
    assert same(plain, train(Practice(model, asked), tmp_path / "b")[0])


def test_formats_are_drawn_with_the_policys_weights(policy: Policy, model: ModelHandle) -> None:
    training, drawn = Practice(model, aware_policy(policy)), []
    for training.step in range(1_000):
        drawn.append(training.form("step"))
    assert drawn.count("nf4") / len(drawn) == pytest.approx(3 / 4, abs=0.05)
    assert set(drawn) == {"fp32", "nf4"}


def test_an_aware_training_goes_on_as_if_it_had_never_been_killed(
    policy: Policy, model: ModelHandle, tmp_path: Path
) -> None:
    asked = aware_policy(policy)
    whole, _, _ = train(Practice(model, asked), tmp_path / "whole")
    train(Practice(model, asked), tmp_path / "killed", until=5)
    resumed, steps, _ = train(Practice(model, asked), tmp_path / "killed")
    assert steps == [5, 6]
    assert same(whole, resumed)


class Brittle(Practice):
    """Ruins the model where its weights are rounded, and next to nothing in fp32."""

    def advance(self) -> Mapping[str, float]:
        with torch.no_grad():
            for block in self.theta.blocks:
                norm: Any = block.layernorm_before
                norm.weight[0] = norm.bias[0] = 0  # this channel is 0, whatever goes in
                attention: Any = block.attention
                for layer in (attention.q_proj, attention.k_proj, attention.v_proj):
                    layer.weight[:, 0] = 1e4  # and is what a row's scale is made for
        return {"retained": 0.0}


@pytest.mark.parametrize(("precisions", "holds"), [(("fp32",), True), (("fp32", "int8"), False)])
def test_the_retained_score_must_hold_in_every_published_format(
    policy: Policy,
    model: ModelHandle,
    tmp_path: Path,
    precisions: tuple[str, ...],
    holds: bool,
) -> None:
    retain = policy.retain.model_copy(update={"margin": 0.1})
    asked = policy.model_copy(update={"precisions": precisions, "retain": retain})
    if holds:
        assert train(Brittle(model, asked), tmp_path)[1] == [1, 2, 3, 4, 5, 6]
        return
    with pytest.raises(ImmunizationError, match=r"retained score within retain\.margin"):
        train(Brittle(model, asked), tmp_path)


def test_a_format_that_would_round_nothing_is_refused(policy: Policy, resnet_folder: Path) -> None:
    resnet = Modality.build(policy.modality).load(str(resnet_folder))
    with pytest.raises(ModelError, match=r"^nf4: the model has no linear layer"):
        Practice(resnet, aware_policy(policy))
