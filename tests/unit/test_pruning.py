"""What pruners copy, cut and leave loadable."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import Attention

from release_guard import pipelines, pruning
from release_guard.errors import ModelError


def unet(layers: int = 2, *, seed: int = 0) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return diffusers.UNet2DConditionModel(
            sample_size=4,
            block_out_channels=(8, 16),
            layers_per_block=layers,
            cross_attention_dim=8,
            attention_head_dim=4,  # heads, as diffusers takes it
            norm_num_groups=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ).eval()


def denoised(module: Any) -> torch.Tensor:
    noise = torch.Generator().manual_seed(1)
    latents, context = (
        torch.randn(2, 4, 4, 4, generator=noise),
        torch.randn(2, 3, 8, generator=noise),
    )
    with torch.no_grad():
        return module(latents, torch.tensor([10, 900]), encoder_hidden_states=context).sample


@pytest.mark.parametrize("layers", [2, 3])
def test_depth_copies_every_tensor_from_the_layer_that_saw_its_inputs(layers: int) -> None:
    whole = unet(layers)
    cut = pruning.depth(whole)
    assert cut.config.layers_per_block == 1
    mine, theirs = cut.state_dict(), whole.state_dict()
    moved = {
        name: name.replace(f".{kind}.1.", f".{kind}.{layers}.")
        for name in mine
        for kind in ("resnets", "attentions")
        if name.startswith("up_blocks") and f".{kind}.1." in name
    }
    assert moved
    for name, value in mine.items():
        assert torch.equal(value, theirs[moved.get(name, name)]), name
        assert value.data_ptr() != theirs[moved.get(name, name)].data_ptr()
    assert pruning.macs(cut) < pruning.macs(whole)
    assert denoised(cut).isfinite().all()


def test_depth_keeps_what_is_computed_where_the_layers_it_cuts_do_nothing() -> None:
    """Up blocks read what down blocks skipped to them, so only the mid block's path is alike."""
    whole = unet()
    with torch.no_grad():
        for block in (*whole.down_blocks, *whole.up_blocks):
            for part in (block.resnets[1], *getattr(block, "attentions", [])[1:2]):
                for weight in (getattr(part, "conv2", None), getattr(part, "proj_out", None)):
                    if weight is not None:
                        weight.weight.zero_()
                        weight.bias.zero_()
    reached: list[torch.Tensor] = []
    for module in (whole, pruning.depth(whole)):
        hook = module.mid_block.register_forward_hook(lambda _, __, out: reached.append(out))
        denoised(module)
        hook.remove()
    torch.testing.assert_close(reached[0], reached[1])


def test_depth_refuses_what_has_no_layer_to_cut() -> None:
    with pytest.raises(ModelError, match="no layer to cut"):
        pruning.depth(unet(1))


def test_width_leaves_zeros_in_whole_units_and_what_stays_computes_as_before() -> None:
    whole = unet()
    cut = pruning.width(whole, share=0.25)
    attention = next(part for part in cut.modules() if isinstance(part, Attention))
    heads = attention.to_q.weight.unflatten(0, (4, -1)).flatten(1).norm(dim=1)
    assert heads.count_nonzero() == 3
    assert pruning.macs(cut) < pruning.macs(whole)
    # units that no longer write are not read either: putting anything back there changes nothing
    again = pruning.width(whole, share=0.25)
    with torch.no_grad():
        for name, hole in pruning.holes(cut).items():
            if name.endswith(("conv1.weight", "to_q.weight", "to_k.weight", "net.0.proj.weight")):
                weight = again.get_parameter(name)
                weight.add_((1 - hole) * 0.5)
    torch.testing.assert_close(denoised(again), denoised(cut))


def test_width_cuts_the_smallest_units() -> None:
    whole = unet()
    with torch.no_grad():
        reader = whole.down_blocks[0].resnets[0].conv2.weight  # 8 inner channels in 4 groups
        reader[:, 4:6] *= 1e-6
    cut = pruning.width(whole, share=0.25).down_blocks[0].resnets[0]
    assert not cut.conv2.weight[:, 4:6].any()
    assert not cut.conv1.weight[4:6].any()
    assert cut.conv2.weight[:, :4].all()


def test_nothing_is_a_hole_where_nothing_was_cut() -> None:
    assert pruning.holes(unet()) == {}


def test_macs_count_a_matrix_once_for_every_place() -> None:
    module = unet()
    before = pruning.macs(module)
    with torch.no_grad():
        module.conv_in.weight.zero_()
    assert before - pruning.macs(module) == 4 * 8 * 9 * 4 * 4  # inputs, outputs, kernel, places


@pytest.mark.parametrize("name", sorted(pruning.PRUNERS))
def test_a_pruned_folder_is_a_stock_pipeline(
    name: str, pipeline_folder: Path, tmp_path: Path
) -> None:
    source = tmp_path / "whole"
    pipeline = pipelines.load(str(pipeline_folder))
    config = {**pipeline.network.unet.config, "layers_per_block": 2}
    pipeline.network.unet = diffusers.UNet2DConditionModel.from_config(config)
    pipeline.save(source)
    before, after = pruning.prune(str(source), tmp_path / "cut", pruning.PRUNERS[name])
    assert after < before
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "cut")
    assert pruning.macs(theirs.unet) == after
    whole = pipelines.load(str(source)).network
    cut = pipelines.load(str(tmp_path / "cut")).network
    for part in ("vae", "text_encoder"):
        mine = getattr(cut, part).state_dict()
        assert all(
            torch.equal(value, mine[key])
            for key, value in getattr(whole, part).state_dict().items()
        )


def test_pico_has_nothing_to_cut(pipeline_folder: Path, tmp_path: Path) -> None:

    with pytest.raises(ModelError, match="layers_per_block is 1"):
        pruning.prune(str(pipeline_folder), tmp_path / "cut", pruning.depth)
    assert not (tmp_path / "cut").exists()
