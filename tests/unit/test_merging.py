"""Merges against their papers' laws, and against mergekit where it has the same method."""

import math

import numpy as np
import pytest
import torch

from release_guard import merging

SHAPES = {"layer.weight": (6, 5), "layer.bias": (6,), "norm.weight": (5,), "token": (1, 1, 5)}
WEIGHTS = [(0.5, 0.5), (0.3, 0.7), (1.2, 0.4)]


def state(seed, near=None, share=0.1):
    random = np.random.default_rng(seed)
    drawn = {
        name: torch.from_numpy(random.normal(size=shape)).float() for name, shape in SHAPES.items()
    }
    if near is not None:
        drawn = {name: near[name] + share * value for name, value in drawn.items()}
    return drawn | {"steps": torch.tensor(seed)}


@pytest.fixture
def base():
    return state(0)


@pytest.fixture
def models(base):
    return [state(1, base), state(2, base)]


def same(one, other, tolerance=1e-6):
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=0, atol=tolerance, msg=name)


def floats(one):
    return {name: value for name, value in one.items() if value.is_floating_point()}


class TestMergekit:
    """Both are given the same weights and must agree."""

    @pytest.fixture
    def theirs(self, base, models):
        kit = pytest.importorskip(
            "mergekit.merge_methods", reason="mergekit is an optional oracle, never a dependency"
        )
        named = {"base": floats(base), "a": floats(models[0]), "b": floats(models[1])}

        def merge(method, weights, *, ancestor="base", **parameters):
            models = named if ancestor == "base" else {name: named[name] for name in "ab"}
            parameters["weight"] = dict(zip("ab", weights, strict=True))
            with torch.no_grad():
                return kit.merge_state_dicts(models, method, parameters=parameters, base=ancestor)

        return merge

    @pytest.mark.parametrize("weights", WEIGHTS)
    def test_linear(self, models, theirs, weights):
        ours = merging.linear([floats(model) for model in models], weights)
        same(ours, theirs("linear", weights, ancestor=None))

    @pytest.mark.parametrize("weights", WEIGHTS)
    def test_task_arithmetic(self, base, models, theirs, weights):
        ours = floats(merging.task_arithmetic(base, models, weights))
        same(ours, theirs("task_arithmetic", weights))

    @pytest.mark.parametrize("weights", WEIGHTS)
    @pytest.mark.parametrize("density", [0.1, 0.5, 0.9, 1.0])
    @pytest.mark.parametrize("scale", [0.5, 1.0, 1.5])
    def test_ties(self, base, models, theirs, weights, density, scale):
        ours = merging.ties(base, models, weights, density=density, scale=scale)
        same(floats(ours), theirs("ties", weights, density=density, **{"lambda": scale}))

    @pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
    @pytest.mark.parametrize("ancestor", [False, True])
    def test_slerp(self, base, models, share, ancestor):
        kit = pytest.importorskip(
            "mergekit.merge_methods", reason="mergekit is an optional oracle, never a dependency"
        )
        one, other = (floats(part) for part in (models if ancestor else (base, state(9))))
        with torch.no_grad():
            theirs = kit.merge_state_dicts(
                {"one": one, "other": other}, "slerp", parameters={"t": share}, base="one"
            )
        same(merging.slerp(one, other, share), theirs)

    def test_dare_drops_the_same_weights_from_the_same_seed(self, base, models):
        kit = pytest.importorskip(
            "mergekit.merge_methods", reason="mergekit is an optional oracle, never a dependency"
        )
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(3)
            theirs = kit.merge_state_dicts(
                {"base": floats(base), "a": floats(models[0])},
                "dare_linear",
                # Scaled up by 1 / density, as in the paper; mergekit's own `rescale` keeps a norm.
                parameters={"weight": 1.0, "density": 0.4, "rescale": False, "lambda": 1 / 0.4},
                base="base",
            )
        ours = merging.dare(floats(base), floats(models[0]), density=0.4, seed=3)
        same(ours, theirs)


MERGES = {
    "linear": lambda base, models: merging.linear(models, (0.3, 0.7)),
    "task_arithmetic": lambda base, models: merging.task_arithmetic(base, models, (0.5, 0.9)),
    "ties": lambda base, models: merging.ties(base, models, (0.5, 0.5), density=0.3),
    "dare": lambda base, models: merging.dare(base, models[0], density=0.3, seed=0),
    "slerp": lambda base, models: merging.slerp(*models, 0.3),
    "layerwise": lambda base, models: merging.layerwise(
        base, models, dict.fromkeys(SHAPES, (0.2, 0.6))
    ),
    "regmean": lambda base, models: merging.regmean(models, [GRAM, GRAM], (0.4, 0.6), keep=0.9),
    "fisher": lambda base, models: merging.fisher(models, [NEED, NEED], (1, 2), floor=1e-3),
}
ROWS = torch.from_numpy(np.random.default_rng(5).normal(size=(40, 6)))
GRAM = {"layer": ROWS.T @ ROWS / 40}
NEED = {
    name: torch.rand(shape, generator=torch.Generator().manual_seed(1))
    for name, shape in SHAPES.items()
}


@pytest.mark.parametrize("name", MERGES)
def test_a_base_merged_with_itself_is_itself(base, name):
    same(floats(MERGES[name](base, [base, base])), floats(base))


@pytest.mark.parametrize("name", MERGES)
def test_names_shapes_and_types_stay_and_nothing_given_is_changed(base, models, name):
    before = [{key: value.clone() for key, value in one.items()} for one in (base, *models)]
    merged = MERGES[name](base, models)
    assert list(merged) == list(base)
    assert all(merged[key].shape == value.shape for key, value in base.items())
    assert all(merged[key].dtype == value.dtype for key, value in base.items())
    merging.check_finite(merged)
    for one, was in zip((base, *models), before, strict=True):
        assert all(torch.equal(value, was[key]) for key, value in one.items())
    assert any(not torch.equal(merged[key], model[key]) for model in models for key in SHAPES)


@pytest.mark.parametrize("name", MERGES)
def test_gradients_reach_the_weights_that_are_merged(base, models, name):
    models[0] = {
        key: value.requires_grad_() if value.is_floating_point() else value
        for key, value in models[0].items()
    }
    merged = MERGES[name](base, models)
    sum(value.square().sum() for key, value in merged.items() if key in SHAPES).backward()
    assert models[0]["layer.weight"].grad.abs().sum() > 0


@pytest.mark.parametrize("name", [name for name in MERGES if name != "dare"])
def test_models_that_differ_are_refused(base, models, name):
    models[1].pop("token")
    with pytest.raises(ValueError, match="token is not in every model, or has another shape"):
        MERGES[name](base, models)
    models[1]["token"] = torch.zeros(5)
    with pytest.raises(ValueError, match="token is not in every model, or has another shape"):
        MERGES[name](base, models)


def test_a_mean_needs_a_sum():
    with pytest.raises(ValueError, match="must not add up to 0"):
        merging.linear([state(0), state(1)], (1, -1))
    with pytest.raises(ValueError, match="nothing to merge"):
        merging.linear([], (1,))


def test_broken_merges_are_refused(base):
    base["norm.weight"][2] = torch.nan
    with pytest.raises(ValueError, match=r"norm\.weight is not finite after the merge"):
        merging.check_finite(merging.linear([base, base], (1, 1)))


def test_ties_by_hand():
    def lone(*values):
        return {"w": torch.tensor(values)}

    base, models = lone(1.0, 1.0, 1.0, 1.0), [lone(3.0, 0.0, 1.1, 5.0), lone(2.0, 4.0, 1.0, -2.0)]
    # Differences 2, -1, .1, 4 and 1, 3, 0, -3. Half of each is kept: 2, 0, 0, 4 and 0, 3, 0, -3.
    merged = merging.ties(base, models, (1.0, 1.0), density=0.5, scale=0.5)
    torch.testing.assert_close(merged["w"], torch.tensor([2.0, 2.5, 1.0, 3.0]))


def test_trimming_keeps_the_largest_and_at_least_one():
    delta = torch.tensor([0.1, -3.0, 2.0, 0.0, -1.0])
    assert merging.trimmed(delta, 0.4).tolist() == [0, -3, 2, 0, 0]
    assert merging.trimmed(delta, 0.01).tolist() == [0, -3, 0, 0, 0]
    assert merging.trimmed(delta, 1.0) is delta


def test_dare_keeps_a_share_and_the_expectation():
    base, model = {"w": torch.zeros(50_000)}, {"w": torch.ones(50_000)}
    thin = merging.dare(base, model, density=0.2, seed=0)["w"]
    assert set(thin.tolist()) == {0.0, 5.0}
    assert thin.mean().item() == pytest.approx(1, abs=4 * math.sqrt(4 / 50_000))
    assert torch.equal(thin, merging.dare(base, model, density=0.2, seed=0)["w"])
    assert not torch.equal(thin, merging.dare(base, model, density=0.2, seed=1)["w"])


def test_slerp_keeps_the_norm_of_what_has_the_same_norm():
    one, other = (
        {"w": torch.nn.functional.normalize(state(seed)["layer.weight"].flatten(), dim=0)}
        for seed in (1, 2)
    )
    for share in (0.2, 0.5, 0.7):
        middle = merging.slerp(one, other, share)["w"]
        assert middle.norm().item() == pytest.approx(1)
    same(merging.slerp(one, other, 0.0), one)
    same(merging.slerp(one, other, 1.0), other)


def test_regmean_answers_as_each_model_on_its_own_inputs():
    """Two models whose inputs lie in different directions can both be had in full."""
    states = [{"layer.weight": state(seed)["layer.weight"].double()} for seed in (1, 2)]
    inputs = [torch.zeros(30, 5).double(), torch.zeros(30, 5).double()]
    inputs[0][:, :2] = ROWS[:30, :2]
    inputs[1][:, 2:] = ROWS[:30, 2:5]
    grams = [{"layer": rows.T @ rows / 30} for rows in inputs]
    merged = merging.regmean(states, grams, (1, 1), keep=1.0)
    for one, rows in zip(states, inputs, strict=True):
        wanted = rows @ one["layer.weight"].T
        torch.testing.assert_close(rows @ merged["layer.weight"].T, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("weights", [(1, 1), (0.25, 4)])
def test_regmean_is_the_least_squares_of_all_rows(models, weights):
    rows = [ROWS[:20], 3 * ROWS[20:]]
    grams = [{"layer": part.T @ part / 20} for part in rows]
    merged = merging.regmean(models, grams, weights, keep=1.0)
    both = [merging.with_bias(model, "layer").double() for model in models]
    scaled = [math.sqrt(weight) * part for weight, part in zip(weights, rows, strict=True)]
    sides = [part @ one.T for part, one in zip(scaled, both, strict=True)]
    wanted = np.linalg.lstsq(torch.cat(scaled).numpy(), torch.cat(sides).numpy())[0].T
    found = merging.with_bias(merged, "layer")
    torch.testing.assert_close(found.double(), torch.from_numpy(wanted), rtol=1e-4, atol=1e-5)
    same({"norm": merged["norm.weight"]}, {"norm": merging.linear(models, weights)["norm.weight"]})


def test_regmean_of_layers_that_saw_nothing_is_the_mean(models):
    blank = {"layer": torch.zeros(6, 6)}
    merged = merging.regmean(models, [blank, blank], (1, 3), keep=0.9)
    same(floats(merged), floats(merging.linear(models, (1, 3))))


def test_fisher_gives_each_weight_to_the_model_that_needs_it(models):
    needs = [
        {"norm.weight": torch.tensor([1.0, 0, 0, 0, 4.0])},
        {"norm.weight": torch.tensor([0, 2.0, 0, 0, 8.0])},
    ]
    merged = merging.fisher(models, needs, (1, 1), floor=1e-6)["norm.weight"]
    one, other = (model["norm.weight"] for model in models)
    torch.testing.assert_close(merged[:2], torch.stack([one[0], other[1]]), rtol=0, atol=1e-5)
    torch.testing.assert_close(merged[2:4], (one + other)[2:4] / 2)
    # Scaled to a mean of 1, both need the last as much: 4 of 5, 8 of 10.
    torch.testing.assert_close(merged[4], (one + other)[4] / 2)


def test_layerwise_leaves_what_is_not_named(base, models):
    merged = merging.layerwise(base, models, {"norm.weight": torch.tensor([0.0, 1.0])})
    same({"w": merged["norm.weight"]}, {"w": models[1]["norm.weight"]})
    assert torch.equal(merged["layer.weight"], base["layer.weight"])


def test_rows_with_a_bias_are_put_back(models):
    rows = merging.with_bias(models[0], "layer")
    assert rows.shape == (6, 6)
    twin = dict(models[1])
    merging.put_rows(twin, "layer", rows)
    same(
        {k: twin[k] for k in ("layer.weight", "layer.bias")},
        {k: models[0][k] for k in ("layer.weight", "layer.bias")},
    )
