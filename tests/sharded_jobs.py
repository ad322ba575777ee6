"""What every process of a test under torchrun does: `python -m torch.distributed.run THIS DIR`.

DIR holds the pico models and data, by the names below.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from evidence_builder import example_policy
from torch.distributed.tensor import DTensor

from release_guard import shards
from release_guard.errors import ImmunizationError, ModelError
from release_guard.immunization import recompute_activations
from release_guard.modalities import Modality, ModelHandle
from release_guard.plugins import Spec
from release_guard.preflight import check_stages
from release_guard.sharding import forms, gather, settled

KINDS = {"vit": ("image_classification", "images/retained.parquet"),
         "llama": ("causal_lm", "texts/retained.jsonl"),
         "tied": ("causal_lm", "texts/retained.jsonl")}  # fmt: skip
ROUNDING = {"rtol": 1e-4, "atol": 1e-6}


def main(folder: Path) -> None:
    """Raise if anything is not as in one process."""
    torch.set_num_threads(1)
    with shards.group():
        assert shards.world() == 2
        check_tensors()
        for name, (kind, data) in KINDS.items():
            plain = Modality.build(Spec(name=kind)).load(str(folder / name))
            parted = settled(plain.copy())
            assert "Sharded" in type(parted).__name__
            check_model(plain, parted, str(folder / data), folder / f"{name}-saved")
        check_refusal(folder / "resnet")


def check_tensors() -> None:
    rank = shards.rank()
    rows = torch.arange(3.0 * (1 + rank)).reshape(-1, 3).requires_grad_()
    together = shards.gathered(rows)
    assert together.shape == (3, 3)
    together.square().sum().backward()
    torch.testing.assert_close(rows.grad, 2 * 2 * rows.detach())  # summed over two that average
    assert shards.share(5) == (slice(0, 2), slice(2, 5))[rank]
    assert shards.share(1) == slice(0, 1)
    assert shards.agree(7)
    assert not shards.agree(rank)
    layer = torch.nn.Linear(2, 2)
    assert shards.are_finite(layer)
    with torch.no_grad():
        layer.weight[0, 0] = torch.nan if rank else 0.0
    assert not shards.are_finite(layer), "both must say so"


def check_model(plain: ModelHandle, parted: ModelHandle, data: str, saved: Path) -> None:
    weights = list(parted.module.parameters())
    assert all(isinstance(weight, DTensor) for weight in weights)
    held = sum(weight.to_local().numel() for weight in weights)
    assert held < 0.7 * sum(weight.numel() for weight in weights)
    assert parted.scores(data, "guard", limit=51) == plain.scores(data, "guard", limit=51)
    batch = next(plain.batches(data, "retain", size=13, seed=0))
    for model in (parted, parted.copy()):
        check_gradients(plain, model, batch)
    check_copy(parted, batch)
    check_state(plain, parted)
    check_update(plain, parted, batch)
    if shards.leads():
        gather_and_compare(plain, parted)
    else:
        assert gather(parted) is None
    parted.save(saved)
    shards.wait()
    assert parted.peer(str(saved)).scores(data, "guard", limit=9)


def check_gradients(plain: ModelHandle, parted: ModelHandle, batch: Any) -> None:
    """Of a loss that is no mean over examples, one after the head, and the task's own."""
    losses = []
    for model in (plain, parted):
        model.module.zero_grad()
        features_NF, labels_N = model.features(batch)
        logits_NC = model.head(features_NF)
        spread = (features_NF.T @ features_NF / len(features_NF)).square().mean()
        task = torch.nn.functional.cross_entropy(logits_NC, labels_N)
        loss = model.loss(batch) + 0.1 * spread + task
        loss.backward()
        losses.append(loss.item())
    assert abs(losses[0] - losses[1]) < 1e-5
    for one, other in zip(parted.module.parameters(), plain.module.parameters(), strict=True):
        torch.testing.assert_close(shards.whole(one.grad), other.grad, **ROUNDING)


def check_copy(parted: ModelHandle, batch: Any) -> None:
    """It has weights and modes of its own, and computes activations again if the other does."""
    parted.module.eval()
    for module in forms(parted):
        recompute_activations(module)
    twin = parted.copy()
    assert not any(part.training for part in twin.module.modules())
    assert getattr(twin.blocks[0], "gradient_checkpointing", False)
    twin.module.train()
    twin.loss(batch).backward()
    before = parted.state()
    with torch.no_grad():
        for parameter in twin.module.parameters():
            parameter.add_(1.0)
    after = parted.state()
    assert all(torch.equal(before[n].to_local(), after[n].to_local()) for n in parameters(parted))


def check_state(plain: ModelHandle, parted: ModelHandle) -> None:
    """In parts, and whole from a file and back; other weights are other weights."""
    kept = shards.portable({"weights": parted.state(), "step": [1, (2, "x")]})
    assert kept["step"] == [1, (2, "x")]
    full = {name: shards.whole(value) for name, value in parted.state().items()}
    for name, value in plain.state().items():
        assert torch.equal(full[name], value), name
    fresh = parted.fresh(seed=3)
    assert not torch.equal(shards.whole(fresh.head.weight.detach()), plain.head.weight)
    fresh.load_state(full)
    assert torch.equal(shards.whole(fresh.head.weight.detach()), plain.head.weight)
    marked = {"a": [{"sharded": torch.arange(10.0).reshape(5, 2)}]}
    (again,) = shards.parted(marked)["a"]
    assert isinstance(again, DTensor)
    assert torch.equal(again.full_tensor(), marked["a"][0]["sharded"])


def check_update(plain: ModelHandle, parted: ModelHandle, batch: Any) -> None:
    """Clipped, by an optimizer whose states go through a checkpoint; then a new head."""
    moved = []
    for model in (plain, parted):
        parameters = list(model.module.parameters())
        optimizer = torch.optim.Adam(parameters, lr=1e-3, fused=True)
        for _ in range(2):
            model.module.zero_grad()
            model.loss(batch).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 0.5)
            optimizer.step()
            kept: Mapping[str, Any] = shards.portable(optimizer.state_dict())
            if model is parted:
                states = [value for one in kept["state"].values() for value in one.values()]
                held = [one["sharded"] for one in states if isinstance(one, dict)]
                assert all((one is None) != shards.leads() for one in held)
                assert held
        model.module.zero_grad()
        moved.append(shards.whole(model.blocks[0].state_dict()[largest(model)]))
    torch.testing.assert_close(*moved, rtol=1e-3, atol=1e-5)
    for model in (plain, parted):
        model.load_state(plain.state())
        try:
            model.reinit_head(seed=3)
        except ModelError:
            assert model.head.weight is model.module.get_input_embeddings().weight
    assert torch.equal(shards.whole(parted.head.weight.detach()), plain.head.weight)


def gather_and_compare(plain: ModelHandle, parted: ModelHandle) -> None:
    whole = gather(parted)
    assert whole is not None
    assert type(whole) is type(plain)
    for name, value in plain.state().items():
        assert torch.equal(whole.state()[name], value), name


def check_refusal(folder: Path) -> None:
    model = Modality.build(Spec(name="image_classification")).load(str(folder))
    with pytest.raises(ModelError, match="batch normalisation"):
        settled(model)
    policy = example_policy(("sophon", "merge_guard"))
    with pytest.raises(ImmunizationError, match=r"stages\[0\]: merge_guard works in one process"):
        check_stages(model, policy)


def parameters(model: ModelHandle) -> list[str]:
    return [name for name, _ in model.module.named_parameters()]


def largest(model: ModelHandle) -> str:
    sizes = {name: value.numel() for name, value in model.blocks[0].named_parameters()}
    return max(sizes, key=lambda name: sizes[name])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
