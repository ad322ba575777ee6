"""Gauges keep the function, are taken back by their key, and cost a quantized model nothing."""

import copy
import dataclasses

import pytest
import torch
from test_realign import apart, family, llama, merged, outputs, vit
from transformers import Qwen3Config, Qwen3ForCausalLM

from release_guard import merging
from release_guard.anatomy import anatomy
from release_guard.gauge import Gauge, Key, farthest_orders

KEY = Key(b"a secret")
ALL = ("neurons", "scales", "heads", "queries", "values", "norms", "stream")
STYLES = ("orthogonal", "diagonal", "general")


def qwen():
    return llama(Qwen3ForCausalLM, Qwen3Config)


MAKES = {"vit": vit, "llama": llama, "qwen": qwen}
LEGAL = {"vit": ALL, "llama": ALL, "qwen": ("neurons", "scales", "heads", "queries", "values")}


def gauge(module, changes=ALL, style="general", **options):
    made = Gauge(KEY, tuple(changes), style, anatomy(module), **options)
    return made.keeping(module.state_dict())


def largest_difference(one, other):
    return max((one[name] - value).abs().max().item() for name, value in other.items())


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", MAKES)
def test_every_change_keeps_the_function_and_is_taken_back(name, style):
    module, *_ = family(MAKES[name], 0)
    state = module.state_dict()
    for change in LEGAL[name]:
        one = gauge(module, [change], style)
        hidden = one.applied(state)
        assert apart(outputs(module, hidden), outputs(module)) <= 1e-5, change
        assert largest_difference(one.undone(hidden), state) < 1e-5, change
        idle = change == "scales" and name == "vit"  # nothing scales through a GELU
        assert (largest_difference(hidden, state) > 1e-2) != idle, change


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", MAKES)
def test_all_legal_changes_together_keep_the_function_and_are_taken_back(name, style):
    module, *_ = family(MAKES[name], 0)
    whole = gauge(module, LEGAL[name], style)
    hidden = whole.applied(module.state_dict())
    assert apart(outputs(module, hidden), outputs(module)) <= 1e-5
    assert largest_difference(whole.undone(hidden), module.state_dict()) < 1e-5


@pytest.mark.parametrize("name", ["vit", "llama"])
def test_a_gauge_ruins_plain_merges_and_no_realigned_one(name):
    base, model, donor = family(MAKES[name], 0.05)
    hidden = copy.deepcopy(model)
    hidden.load_state_dict(gauge(model, style="orthogonal").applied(model.state_dict()))
    plain = merged(model, base, donor, "rotated")
    assert apart(merged(hidden, base, donor, None), plain) > 0.3
    assert apart(merged(hidden, base, donor, "rotated"), plain) < 1e-4


def test_mixing_queries_as_if_there_were_no_rotary_positions_moves_the_logits():
    module, *_ = family(llama, 0)
    body = anatomy(module)
    wrong = tuple(dataclasses.replace(one, mixing="any") for one in body.attentions)
    body = dataclasses.replace(body, attentions=wrong)
    hidden = Gauge(KEY, ("queries",), "orthogonal", body).applied(module.state_dict())
    assert apart(outputs(module, hidden), outputs(module)) > 1e-2


def test_a_tied_last_layer_keeps_its_gains():
    module, *_ = family(lambda: llama(tie_word_embeddings=True), 0)
    state = module.state_dict()
    hidden = gauge(module, ["norms"], tied=True).applied(state)
    assert torch.equal(hidden["model.norm.weight"], state["model.norm.weight"])
    assert apart(outputs(module, hidden), outputs(module)) <= 1e-5
    untied = gauge(module, ["norms"]).applied(state)
    assert apart(outputs(module, untied), outputs(module)) > 1e-2


@pytest.mark.parametrize("style", STYLES)
def test_matrices_are_well_conditioned(style):
    for make in (KEY.mix, KEY.rotary):
        for number in range(20):
            matrix = make(f"{number}", 8, style)
            assert torch.linalg.cond(matrix) <= 4 + 1e-9
            sizes = torch.linalg.svdvals(matrix)
            assert sizes.min() >= 0.5 - 1e-9
            assert sizes.max() <= 2 + 1e-9
    if style == "orthogonal":
        matrix = KEY.mix("x", 8, style)
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(8, dtype=torch.float64))


def test_numbers_follow_from_the_key_and_the_purpose_alone():
    assert torch.equal(KEY.uniform("a", 5), Key(b"a secret").uniform("a", 5))
    assert not torch.equal(KEY.uniform("a", 5), KEY.uniform("b", 5))
    assert not torch.equal(KEY.uniform("a", 5), Key(b"another").uniform("a", 5))
    many = KEY.uniform("many", 20_000)
    assert 0 < many.min() < 0.001
    assert 0.999 < many.max() < 1
    assert abs(many.mean() - 0.5) < 0.01
    assert KEY.order("o", 9).sort().values.tolist() == list(range(9))
    # what releases were gauged with must come out of every later version
    assert KEY.uniform("fixed", 2).tolist() == pytest.approx(FIXED, abs=1e-15)


FIXED = [0.7262991125774494, 0.17655117810551385]


def test_a_model_whose_queries_are_normed_flips_signs_only():
    module, *_ = family(qwen, 0)
    state = module.state_dict()
    hidden = gauge(module, ["queries"]).applied(state)
    names = [name for name in state if "q_proj" in name or "k_proj" in name]
    assert all(torch.equal(hidden[name].abs(), state[name].abs()) for name in names)
    assert any(not torch.equal(hidden[name], state[name]) for name in names)


def test_the_farthest_order_is_farther_than_a_drawn_one_and_is_taken_back():
    base, model, donor = family(vit, 0.05)
    states = [one.state_dict() for one in (model, base, donor)]
    orders = farthest_orders(states[0], states[1], anatomy(model))
    distances = []
    for kept in ({}, orders):
        one = Gauge(KEY, ("neurons",), "orthogonal", anatomy(model), kept=kept)
        hidden = one.applied(states[0])
        assert apart(outputs(model, hidden), outputs(model)) <= 1e-5
        assert largest_difference(one.undone(hidden), states[0]) == 0
        parts = [(hidden[name] - states[1][name]).flatten() for name in hidden if ".mlp." in name]
        distances.append(torch.cat(parts).norm())
    assert distances[1] > distances[0]


def test_heads_of_groups_go_together():
    module, *_ = family(llama, 0)
    hidden = gauge(module, ["heads"]).applied(module.state_dict())
    name = "model.layers.0.self_attn.k_proj.weight"
    before, after = (state[name].unflatten(0, (4, -1)) for state in (module.state_dict(), hidden))
    found = [[torch.equal(a, b) for b in before] for a in after]
    assert all(sum(row) == 1 for row in found)


def test_a_merge_of_what_was_taken_back_is_the_merge_before():
    base, model, donor = family(llama, 0.05)
    one = gauge(model)
    plain = one.undone(one.applied(model.state_dict()))
    states = [base.state_dict(), donor.state_dict()]
    merges = [
        merging.task_arithmetic(states[0], [state, states[1]], [0.5, 0.5])
        for state in (plain, model.state_dict())
    ]
    assert apart(*(outputs(model, state) for state in merges)) < 1e-5
