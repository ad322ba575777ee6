"""What every modality owes: over `Modality.available()`, each with a pico model of its own."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from release_guard.errors import ModelError
from release_guard.modalities import Batch, Modality, ModelHandle, settle_threads
from release_guard.plugins import Spec

FOLDERS = {
    "image_classification": (("classifier_folder", "resnet_folder"), "image_data", ".parquet"),
    "causal_lm": (("lm_folder",), "text_data", ".jsonl"),
    "text_to_image": (("pipeline_folder",), "picture_data", ".parquet"),
}
PAINTED = {"text_to_image"}  # no classes; an autoencoder that nobody trains; more attention blocks
CASES = [(name, folder) for name in Modality.available() for folder in FOLDERS[name][0]]


class Subject:
    """A model folder, how to load it, and its two data sets."""

    def __init__(self, spec: Spec, folder: Path, data: Path, suffix: str) -> None:
        self.name, self.folder = spec.name, folder
        self.load = Modality.build(spec).load
        self.handle = self.load(str(folder))
        self.retained, self.restricted = (
            str(data / f"{part}{suffix}") for part in ("retained", "restricted")
        )

    def batch(self, handle: ModelHandle, *, seed: int = 0) -> Batch:
        return next(handle.batches(self.restricted, "attack", size=16, seed=seed))


@pytest.fixture(params=CASES, ids=lambda case: case[1], scope="module")
def subject(request: pytest.FixtureRequest) -> Subject:
    name, folder = request.param
    _, data, suffix = FOLDERS[name]
    spec = Spec(name=name, **options(name, request))
    return Subject(spec, request.getfixturevalue(folder), request.getfixturevalue(data), suffix)


def options(name: str, request: pytest.FixtureRequest) -> dict[str, object]:
    if name not in PAINTED:
        return {}
    judge = str(request.getfixturevalue("judge_folder"))
    return {"judge": judge, "sampling_steps": 4, "guidance": 1.0}


@pytest.fixture(autouse=True)
def untouched(subject: Subject) -> Iterator[None]:
    """No test changes the loaded model, its modes, or the global random state."""
    before, random = subject.handle.state(), torch.get_rng_state()
    modes = [part.training for part in subject.handle.module.modules()]
    yield
    assert same(before, subject.handle.state())
    assert modes == [part.training for part in subject.handle.module.modules()]
    assert torch.equal(random, torch.get_rng_state())


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def read(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def scores(handle: ModelHandle, subject: Subject) -> list[float]:
    return list(handle.scores(subject.retained, "utility", limit=100))


def train(handle: ModelHandle, subject: Subject, *, steps: int = 3) -> None:
    optimizer = torch.optim.SGD(handle.module.parameters(), lr=0.05)
    handle.module.train()
    for _ in range(steps):
        optimizer.zero_grad()
        handle.loss(subject.batch(handle)).backward()
        optimizer.step()
    handle.module.eval()


def test_it_names_what_a_score_stands_for(subject: Subject) -> None:
    modality = type(subject.load.__self__)  # type: ignore[attr-defined]
    assert modality.stands_for


def test_loaded_model_knows_what_is_retained_and_not_what_is_restricted(
    subject: Subject,
) -> None:
    assert sum(scores(subject.handle, subject)) > 80
    restricted = subject.handle.scores(subject.restricted, "search", limit=100)
    assert sum(restricted) / len(restricted) < 0.5


def test_scores_are_the_same_every_time_and_at_most_the_limit(subject: Subject) -> None:
    first = scores(subject.handle, subject)
    assert first == scores(subject.load(str(subject.folder)), subject)
    assert len(first) == 100
    assert all(0 <= score <= 1 for score in first)
    assert subject.handle.scores(subject.retained, "utility", limit=7) == first[:7]


def test_scores_of_another_split_are_of_other_examples(subject: Subject) -> None:
    handle = subject.handle.fresh(seed=0)
    train(handle, subject, steps=20)
    search, confirm = (
        handle.scores(subject.restricted, split, limit=10_000) for split in ("search", "confirm")
    )
    assert len(search) > 100
    assert len(confirm) > 100


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_broken_model_scores_nan(subject: Subject, value: float) -> None:
    broken = subject.handle.copy()
    with torch.no_grad():
        broken.head.weight.fill_(value)
    assert all(score != score for score in scores(broken, subject))  # noqa: PLR0124


def test_copies_are_independent_and_share_data(subject: Subject) -> None:
    twin = subject.handle.copy()
    assert same(twin.state(), subject.handle.state())
    train(twin, subject)
    assert not same(twin.state(), subject.handle.state())
    assert twin.digest(subject.retained) == subject.handle.digest(subject.retained)


def test_state_is_a_copy_and_comes_back_whole(subject: Subject) -> None:
    twin = subject.handle.copy()
    state = twin.state()
    train(twin, subject)
    assert not same(state, twin.state())
    twin.load_state(state)
    assert same(state, twin.state())


def test_saved_model_loads_bit_identical(subject: Subject, tmp_path: Path) -> None:
    trained = subject.handle.copy()
    train(trained, subject)
    trained.save(tmp_path)
    loaded = subject.load(str(tmp_path))
    assert same(trained.state(), loaded.state())
    assert scores(trained, subject) == scores(loaded, subject)
    again = tmp_path / "again"
    loaded.save(again)
    files = {name: content for name, content in read(tmp_path).items() if "again" not in name}
    assert files == read(again)


def test_fresh_weights_come_from_the_seed_alone(subject: Subject) -> None:
    one, again, other = (subject.handle.fresh(seed=seed) for seed in (1, 1, 2))
    assert same(one.state(), again.state())
    assert not same(one.state(), other.state())
    assert not same(one.state(), subject.handle.state())
    assert {name: value.shape for name, value in one.state().items()} == {
        name: value.shape for name, value in subject.handle.state().items()
    }
    assert sum(scores(one, subject)) < 60


def test_peer_has_other_weights_and_the_same_data(subject: Subject, tmp_path: Path) -> None:
    subject.handle.fresh(seed=5).save(tmp_path)
    peer = subject.handle.peer(str(tmp_path))
    assert same(peer.state(), subject.handle.fresh(seed=5).state())
    assert same(dict(subject.batch(peer)), dict(subject.batch(subject.handle)))


def test_batches_are_endless_exact_and_seeded(subject: Subject) -> None:
    def drawn(seed: int, count: int) -> list[dict[str, Tensor]]:
        batches = subject.handle.batches(subject.restricted, "attack", size=64, seed=seed)
        return [dict(next(batches)) for _ in range(count)]

    assert all(map(same, drawn(0, 8), drawn(0, 8)))  # more than one pass
    assert not any(map(same, drawn(0, 2), drawn(1, 2)))
    assert {len(value) for batch in drawn(0, 8) for value in batch.values()} == {64}


def test_batch_larger_than_the_split_is_refused_at_once(subject: Subject) -> None:
    with pytest.raises(ModelError, match="a batch wants 5000"):
        subject.handle.batches(subject.restricted, "attack", size=5000, seed=0)


def test_logits_are_the_head_on_the_features(subject: Subject) -> None:
    batch = subject.batch(subject.handle)
    if subject.name in PAINTED:
        with pytest.raises(ModelError, match="no classes"):
            subject.handle.features(batch)
        return
    with torch.no_grad():
        logits_NC, labels_N = subject.handle.logits(batch)
        features_NF, same_labels_N = subject.handle.features(batch)
        assert torch.equal(labels_N, same_labels_N)
        assert len(logits_NC) == len(features_NF) == len(labels_N)
        assert torch.allclose(subject.handle.head(features_NF), logits_NC, atol=1e-5)


def test_loss_reaches_every_weight(subject: Subject) -> None:
    twin = subject.handle.copy()
    twin.loss(subject.batch(twin)).backward()
    still = [name for name, weight in twin.module.named_parameters() if weight.grad is None]
    assert [name for name in still if not name.startswith("vae.")] == []


def test_new_head_is_seeded_and_nothing_else_changes(subject: Subject) -> None:
    one, again, other = (subject.handle.copy() for _ in range(3))
    for twin, seed in ((one, 1), (again, 1), (other, 2)):
        twin.reinit_head(seed=seed)
    assert same(one.state(), again.state())
    assert not same(one.state(), other.state())
    before, after = subject.handle.state(), one.state()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) in {1, 2}
    assert one.head.weight.std() > 0
    if one.head.bias is not None:
        assert not one.head.bias.any()


def test_blocks_hold_most_of_the_network(subject: Subject) -> None:
    blocks = subject.handle.blocks
    inside = sum(weight.numel() for block in blocks for weight in block.parameters())
    num, share = (4, 0.1) if subject.name in PAINTED else (2, 0.5)
    assert len(blocks) == num
    assert inside > share * sum(weight.numel() for weight in subject.handle.module.parameters())


def test_units_grow_with_the_batch(subject: Subject) -> None:
    small, large = (
        next(subject.handle.batches(subject.restricted, "attack", size=size, seed=0))
        for size in (8, 32)
    )
    assert subject.handle.units(small) > 8
    assert subject.handle.units(large) == pytest.approx(4 * subject.handle.units(small), abs=2)


def test_overlap_with_itself_is_whole_and_with_the_other_nothing(subject: Subject) -> None:
    whole = subject.handle.overlap(subject.retained, subject.retained)
    assert (whole.exact, whole.near) == (1, 1)
    assert subject.handle.overlap(subject.retained, subject.restricted).exact == 0


def test_digests_tell_data_sets_apart(subject: Subject) -> None:
    digest: Callable[[str], str] = subject.handle.digest
    assert digest(subject.retained) != digest(subject.restricted)
    assert len(digest(subject.retained)) == 64


def test_the_files_that_data_were_read_from_are_told_apart(subject: Subject) -> None:
    files: Callable[[str], str] = subject.handle.files
    assert files(subject.retained) != files(subject.restricted)
    assert len(files(subject.retained)) == 64


def test_peer_that_is_not_there(subject: Subject) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        subject.handle.peer(str(subject.folder / "nowhere"))


def test_a_small_model_gets_one_thread_and_a_large_one_those_it_may_have() -> None:
    class Sized:
        def __init__(self, width: int) -> None:
            self.module = nn.Linear(width, width, device="meta")

    try:
        settle_threads(cast("ModelHandle", Sized(4_000)), 2)
        assert torch.get_num_threads() == 2
        settle_threads(cast("ModelHandle", Sized(10)), 2)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(1)
