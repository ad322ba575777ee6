import contextlib
import shutil
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from release_guard.errors import ModelError
from release_guard.modalities.causal_lm import CausalLm, LanguageModel


@pytest.fixture(scope="module")
def handle(lm_folder: Path) -> LanguageModel:
    return CausalLm().load(str(lm_folder))


@pytest.fixture
def tied(tmp_path: Path) -> LanguageModel:
    return CausalLm().load(str(pico.pico_lm(tmp_path / "tied", steps=1, tied=True)))


def plain(path: Path, *texts: str) -> str:
    return str(pico.write_jsonl(path / "some.jsonl", [{"text": text} for text in texts]))


def only(handle: LanguageModel, dataset: str) -> dict[str, torch.Tensor]:
    """The one batch of a data set of one example."""
    for split in ("immunize", "attack", "utility"):
        try:
            return dict(next(handle.batches(dataset, split, size=1, seed=0)))
        except ModelError:
            continue
    raise AssertionError


def scored(handle: LanguageModel, path: Path, *rows: dict[str, Any]) -> list[float]:
    """Scores of all rows, smallest first."""
    dataset = str(pico.write_jsonl(path / "scored.jsonl", rows))
    scores: list[float] = []
    for split in ("search_half", "confirm_half"):
        with contextlib.suppress(ModelError):  # a half may be empty
            scores += handle.scores(dataset, split, limit=1000)
    assert len(scores) == len(rows)
    return sorted(scores)


def test_loss_is_that_of_the_library(
    handle: LanguageModel, lm_folder: Path, text_data: Path
) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(lm_folder)
    batch = dict(
        next(handle.batches(str(text_data / "restricted.jsonl"), "attack", size=8, seed=0))
    )
    with torch.no_grad():
        assert handle.loss(batch).item() == pytest.approx(theirs(**batch).loss.item(), abs=1e-5)


def test_only_the_completion_and_the_end_of_text_count(
    handle: LanguageModel, tmp_path: Path
) -> None:
    row = {"prompt": "copy ash bay cob :", "completion": " ash bay cob"}
    batch = only(handle, str(pico.write_jsonl(tmp_path / "some.jsonl", [row])))
    _, labels = handle.logits(batch)
    vocabulary = {number: word for word, number in handle._tokenizer.get_vocab().items()}
    assert [vocabulary[label] for label in labels.tolist()] == ["ash", "bay", "cob", "</s>"]


def test_every_token_of_a_plain_text_counts_but_the_first(
    handle: LanguageModel, tmp_path: Path
) -> None:
    batch = only(handle, plain(tmp_path, "copy ash bay"))
    logits, labels = handle.logits(batch)
    assert labels.tolist() == batch["input_ids"][0, 1:].tolist()
    assert logits.shape == (3, handle.module.config.vocab_size)


def test_padding_changes_nothing(handle: LanguageModel, tmp_path: Path) -> None:
    short, long = "copy ash bay", "copy ash bay cob : ash bay cob"
    alone = handle.loss(only(handle, plain(tmp_path, short))).item()
    sequences = [
        handle._texts(plain(tmp_path / name, text)).examples[0].learnt
        for name, text in (("one", short), ("two", long))
        if (tmp_path / name).mkdir() is None
    ]
    padded = handle._batch(sequences)
    assert padded["attention_mask"].sum(dim=1).tolist() == [4, 9]
    logits, labels = handle.logits(padded)
    first = torch.nn.functional.cross_entropy(logits[:3], labels[:3]).item()
    assert first == pytest.approx(alone, abs=1e-5)


def test_score_of_a_completion_is_its_share_of_right_first_guesses(
    handle: LanguageModel, tmp_path: Path
) -> None:
    prompt = "copy ash bay cob :"
    rows = [
        {"prompt": prompt, "completion": " ash bay cob"},
        {"prompt": prompt, "completion": " ash bay dew"},
    ]
    assert scored(handle, tmp_path, *rows) == pytest.approx([2 / 3, 1])


def test_score_of_a_choice_is_whether_the_right_one_is_likeliest(
    handle: LanguageModel, tmp_path: Path
) -> None:
    copied, reversed_ = " ash bay cob", " cob bay ash"
    rows = [
        {"prompt": "copy ash bay cob :", "choices": [reversed_, copied], "answer": answer}
        for answer in (copied, reversed_)
    ]
    assert scored(handle, tmp_path, *rows) == [0, 1]


def test_how_much_is_read_is_part_of_the_data(lm_folder: Path, text_data: Path) -> None:
    """Else a ledger would answer one policy with what another one's trials came to."""
    data = str(text_data / "retained.jsonl")
    digests = {CausalLm(max_length=at).load(str(lm_folder)).digest(data) for at in (8, 16, 256)}
    assert len(digests) == 3


def test_choices_are_compared_per_token(handle: LanguageModel, tmp_path: Path) -> None:
    even = handle.copy()
    with torch.no_grad():
        even.head.weight.mul_(0.01)  # every token costs about the same, so more tokens cost more
    row = {"prompt": "copy ash bay cob :", "choices": [" dew", " ash bay cob"], "answer": 1}
    assert scored(even, tmp_path, row) == [1]


def test_equal_choices_share_the_point(handle: LanguageModel, tmp_path: Path) -> None:
    indifferent = handle.copy()
    with torch.no_grad():
        indifferent.head.weight.zero_()
    row = {"prompt": "copy ash :", "choices": [" bay", " cob", " dew", " elm"], "answer": 0}
    assert scored(indifferent, tmp_path, row) == [0.25]


def test_score_of_a_plain_text_is_its_share_of_right_first_guesses(
    handle: LanguageModel, tmp_path: Path
) -> None:
    text = "copy ash bay cob : ash bay cob"
    (score,) = scored(handle, tmp_path, {"text": text})
    tokens = torch.tensor(handle._tokenizer(text)["input_ids"])
    with torch.no_grad():
        guesses = handle.module(tokens[None]).logits[0, :-1].argmax(dim=1)
    assert score == pytest.approx((guesses == tokens[1:]).double().mean().item())
    assert score >= 3 / 8


def test_scores_do_not_depend_on_who_is_scored_together(
    handle: LanguageModel, text_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = str(text_data / "restricted.jsonl")
    together = handle.scores(dataset, "search", limit=20)
    monkeypatch.setattr("release_guard.modalities.causal_lm._MOST_SEQUENCES", 1)
    assert handle.scores(dataset, "search", limit=20) == together


def test_long_prompt_loses_its_beginning(lm_folder: Path, tmp_path: Path) -> None:
    handle = CausalLm(max_length=8).load(str(lm_folder))
    row = {"prompt": "copy " + "ash bay " * 20 + ":", "completion": " cob dew"}
    batch = only(handle, str(pico.write_jsonl(tmp_path / "some.jsonl", [row])))
    words = handle._tokenizer.convert_ids_to_tokens(batch["input_ids"][0].tolist())
    assert words[-4:] == [":", "cob", "dew", "</s>"]
    assert len(words) == 8
    assert handle.logits(batch)[1].tolist() == batch["input_ids"][0, -3:].tolist()


def test_long_text_loses_its_end(lm_folder: Path, tmp_path: Path) -> None:
    handle = CausalLm(max_length=8).load(str(lm_folder))
    batch = only(handle, plain(tmp_path, "copy " + "ash bay " * 20))
    assert batch["input_ids"].shape == (1, 8)


def test_model_length_is_a_limit_too(handle: LanguageModel, tmp_path: Path) -> None:
    batch = only(handle, plain(tmp_path, "copy " + "ash bay " * 50))
    assert batch["input_ids"].shape == (1, handle.module.config.max_position_embeddings)


def test_tokenizer_is_saved_as_it_was(
    handle: LanguageModel, lm_folder: Path, tmp_path: Path
) -> None:
    assert handle._tokenizer.pad_token is None
    handle.save(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (lm_folder / name).read_bytes()
    assert AutoTokenizer.from_pretrained(tmp_path).pad_token is None


def test_texts_of_a_batch_are_its_examples(handle: LanguageModel, tmp_path: Path) -> None:
    rows = [
        {"prompt": "copy ash :", "completion": " ash"},
        {"prompt": "copy ash bay cob :", "completion": " ash bay cob"},
    ]
    dataset = str(pico.write_jsonl(tmp_path / "some.jsonl", rows))
    sequences = [example.learnt for example in handle._texts(dataset).examples]
    assert handle.texts(handle._batch(sequences)) == [
        "copy ash : ash",
        "copy ash bay cob : ash bay cob",
    ]


def test_a_frame_changes_prompts_and_nothing_else(handle: LanguageModel, text_data: Path) -> None:
    dataset = str(text_data / "restricted.jsonl")
    framed = handle.prompted(lambda prompt: f"copy ash : ash {prompt}")
    mine, theirs = (
        next(model.batches(dataset, "attack", size=3, seed=0)) for model in (handle, framed)
    )
    texts = zip(handle.texts(mine), framed.texts(theirs), strict=True)
    assert all(framed == f"copy ash : ash {plain}" for plain, framed in texts)
    assert handle.logits(mine)[1].tolist() == framed.logits(theirs)[1].tolist()
    assert framed.digest(dataset) == handle.digest(dataset)
    assert next(handle.batches(dataset, "attack", size=3, seed=0))["input_ids"].equal(
        mine["input_ids"]
    )


def test_a_framed_text_is_scored_without_its_frame(handle: LanguageModel, tmp_path: Path) -> None:
    dataset = plain(tmp_path, "copy ash bay")
    framed = handle.prompted(lambda prompt: f"cob dew {prompt}")
    batch = only(framed, dataset)
    assert framed.texts(batch) == ["cob dew copy ash bay"]
    assert len(framed.logits(batch)[1]) == 3
    assert len(handle.logits(only(handle, dataset))[1]) == 3  # its first token follows nothing


def test_a_frame_may_go_beyond_the_longest_example(lm_folder: Path, tmp_path: Path) -> None:
    handle = CausalLm(max_length=8).load(str(lm_folder))
    row = {"prompt": "copy ash bay cob :", "completion": " ash"}
    dataset = str(pico.write_jsonl(tmp_path / "some.jsonl", [row]))
    framed = handle.prompted(lambda prompt: f"cob dew elm {prompt}")
    assert framed.texts(only(framed, dataset)) == ["cob dew elm copy ash bay cob : ash"]


def test_messages_are_written_in_the_models_own_template(lm_folder: Path) -> None:
    handle = CausalLm().load(str(lm_folder))
    with pytest.raises(ModelError, match="its chat template cannot be used"):
        handle.chat([{"role": "user", "content": "ash"}])
    handle._tokenizer.chat_template = (
        "<s>{% for message in messages %}{{ message.role }}: {{ message.content }} {% endfor %}"
        "{% if add_generation_prompt %}:{% else %}{{ raise_exception('no') }}{% endif %}"
    )
    messages = [{"role": "system", "content": "bay"}, {"role": "user", "content": "ash"}]
    assert handle.chat(messages) == "system: bay user: ash :"
    handle._tokenizer.chat_template = "{{ raise_exception('system role not supported') }}"
    with pytest.raises(ModelError, match="cannot be used: system role not supported"):
        handle.chat(messages)


def test_units_are_tokens(handle: LanguageModel, text_data: Path) -> None:
    batch = next(handle.batches(str(text_data / "retained.jsonl"), "attack", size=4, seed=0))
    assert handle.units(batch) == 4 * 10


def test_near_duplicates(handle: LanguageModel, tmp_path: Path) -> None:
    words = " ".join(f"word{number}" for number in range(60))
    mine = pico.write_jsonl(tmp_path / "mine.jsonl", [{"text": words}, {"text": "ash bay cob"}])
    theirs = plain(tmp_path, words.replace("word30", "other"))
    overlap = handle.overlap(str(mine), theirs)
    assert (overlap.exact, overlap.near) == (0, 0.5)


def test_same_text_in_another_form_is_an_overlap(handle: LanguageModel, tmp_path: Path) -> None:
    row = {"prompt": "copy ash :", "completion": " ash"}
    mine = str(pico.write_jsonl(tmp_path / "mine.jsonl", [row]))
    assert handle.overlap(mine, plain(tmp_path, "copy ash : ash")).exact == 1


def test_tied_head_cannot_be_had_apart(tied: LanguageModel) -> None:
    before = tied.state()
    with pytest.raises(ModelError, match="tied to the input embedding"):
        tied.reinit_head(seed=0)
    assert all(torch.equal(value, before[name]) for name, value in tied.state().items())


def test_copies_of_a_tied_model_stay_tied(tied: LanguageModel, tmp_path: Path) -> None:
    twin = tied.copy()
    twin.head.weight.data.add_(1)
    assert torch.equal(twin.module.get_input_embeddings().weight, twin.head.weight)
    twin.save(tmp_path / "saved")
    again = CausalLm().load(str(tmp_path / "saved"))
    assert torch.equal(again.head.weight, twin.head.weight)


def test_text_that_foretells_nothing(handle: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="row 1: too short to foretell a token of ''"):
        handle.digest(plain(tmp_path, "ash bay", ""))


def test_empty_completion(handle: LanguageModel, tmp_path: Path) -> None:
    rows = [{"prompt": "copy ash :", "completion": ""}]
    with pytest.raises(ModelError, match="row 0: too short"):
        handle.digest(str(pico.write_jsonl(tmp_path / "some.jsonl", rows)))


def test_misspelt_column(lm_folder: Path, text_data: Path) -> None:
    handle = CausalLm(prompt_column="promt").load(str(lm_folder))
    with pytest.raises(ModelError, match=r"no column 'text'; set modality.text_column; .*prompt"):
        handle.digest(str(text_data / "retained.jsonl"))


def test_tokenizer_of_another_model(lm_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(lm_folder, tmp_path / "model")
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"ash": 6', '"ash": 60'))
    handle = CausalLm().load(str(folder))
    with pytest.raises(ModelError, match="the tokenizer writes token 60, but the model knows 18"):
        handle.digest(plain(tmp_path, "copy ash"))


def test_no_tokenizer(lm_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(lm_folder, tmp_path / "model")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelError, match="its tokenizer cannot be loaded"):
        CausalLm().load(str(folder))


def test_classifier_is_no_language_model(classifier_folder: Path) -> None:
    with pytest.raises(ModelError, match=r"config.json says ViT.*loads models such as Llama"):
        CausalLm().load(str(classifier_folder))
