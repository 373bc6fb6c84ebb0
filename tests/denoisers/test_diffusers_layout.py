"""Diffusion models in diffusers' layout, as diffusers writes them and as its hub has them."""

from __future__ import annotations

import json

import pytest
import torch

from ebm_defense.commands.options.shared import make_purifier
from ebm_defense.denoisers.diffusers_layout import write_diffusers
from ebm_defense.denoisers.read import open_denoiser
from ebm_defense.denoisers.unet import UNetDenoiser, UNetSettings
from ebm_defense.errors import UsageError
from ebm_defense.noise import KeyedNoise, chain_keys
from ebm_defense.purifiers.diffusion import DiffusionPurifier
from ebm_defense.storage.files import load_tensors, save_tensors

CONFIG = {
    "_class_name": "UNet2DModel", "_diffusers_version": "0.0.4", "act_fn": "silu",
    "attention_head_dim": None, "block_out_channels": [8, 16], "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "downsample_padding": 0,
    "flip_sin_to_cos": False, "freq_shift": 1, "in_channels": 3, "layers_per_block": 2,
    "mid_block_scale_factor": 1, "norm_eps": 1e-06, "norm_num_groups": 4, "out_channels": 3,
    "sample_size": 8, "time_embedding_type": "positional",
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}  # fmt: skip
"""The settings of google/ddpm-cifar10-32, smaller."""
SCHEDULER = {
    "_class_name": "DDPMScheduler", "beta_end": 0.02, "beta_schedule": "linear",
    "beta_start": 0.0001, "clip_sample": True, "num_train_timesteps": 1000,
    "trained_betas": None, "variance_type": "fixed_large",
}  # fmt: skip
OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.fixture(scope="module")
def theirs():
    from ebm_defense.denoisers.unet import make_unet

    torch.manual_seed(0)
    plain = {k: tuple(v) if isinstance(v, list) else v for k, v in CONFIG.items() if k[0] != "_"}
    return make_unet(plain)


@pytest.fixture
def folder(theirs, tmp_path):
    """As google/ddpm-cifar10-32 is: a pickle with attention's old names, all in one folder."""

    def old(key):
        return next((key.replace(new, name) for new, name in OLD.items() if new in key), key)

    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    state = {old(k): v for k, v in theirs.state_dict().items()}
    assert any(".query." in k for k in state)
    torch.save(state, tmp_path / "diffusion_pytorch_model.bin")
    return tmp_path


def asked(model, x, level):
    with torch.no_grad():
        return model(x, torch.tensor(level)).sample


def test_a_model_with_attentions_old_names_says_what_diffusers_does(theirs, folder):
    denoiser = open_denoiser(folder)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(denoiser.at(x, 37), asked(theirs, x, 37))
    assert denoiser.levels == 1000
    assert DiffusionPurifier(denoiser).image_shape == (3, 8, 8)


def test_a_pipeline_with_todays_names_is_read_too(theirs, tmp_path):
    for name in ("unet", "scheduler"):
        (tmp_path / name).mkdir()
    (tmp_path / "unet" / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    save_tensors(tmp_path / "unet" / "diffusion_pytorch_model.safetensors", theirs.state_dict())
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(open_denoiser(tmp_path).at(x, 5), asked(theirs, x, 5))


def patched() -> UNetDenoiser:
    torch.manual_seed(0)
    return UNetDenoiser(
        UNetSettings(
            channels=1, out_channels=4, image_size=8, patch=2, block_out_channels=(8, 8),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), layers_per_block=1,
            up_block_types=("AttnUpBlock2D", "UpBlock2D"), norm_num_groups=4,
            schedule="squaredcos_cap_v2", levels=50, prediction="v_prediction",
        )
    )  # fmt: skip


def test_what_is_written_is_read_back_and_is_diffusers_own(tmp_path):
    from diffusers import DDPMScheduler, UNet2DModel

    denoiser = patched()
    write_diffusers(denoiser, tmp_path)
    loaded = open_denoiser(tmp_path)
    assert loaded.settings == denoiser.settings
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(loaded.at(x, 7), denoiser.at(x, 7))
        model = UNet2DModel.from_pretrained(tmp_path)
        told = torch.nn.functional.pixel_shuffle(
            model(torch.nn.functional.pixel_unshuffle(x, 2), 7).sample, 2
        )
        scheduler = DDPMScheduler.from_pretrained(tmp_path)
        alpha = scheduler.alphas_cumprod[7]
        noise = alpha.sqrt() * told + (1 - alpha).sqrt() * x
        torch.testing.assert_close(noise, loaded.at(x, 7), rtol=1e-4, atol=1e-5)


def test_the_command_lines_word_names_folder_and_settings(tmp_path):
    write_diffusers(patched(), tmp_path)
    usual = make_purifier(f"diffusion:{tmp_path}")
    assert (usual.start, usual.steps, usual.eta) == (5, 5, 1.0)  # a tenth of all levels
    made = make_purifier(f"diffusion:{tmp_path}(start=20, steps=4, eta=0.0)")
    assert made.numbers == {
        "start": 20, "steps": 4, "eta": 0.0, "guidance": 0.0, "clip": False
    }  # fmt: skip
    assert make_purifier(f"likelihood:{tmp_path}(steps=2)").steps == 2
    x, noise = torch.rand(1, 1, 8, 8), KeyedNoise(chain_keys(0, "cli", range(1), range(1))[0])
    assert made.purify(x, noise).shape == x.shape


def spoil_config(folder, **changes):
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))


def lose(name):
    return lambda folder: (folder / name).unlink()


def spoil_weights(folder):
    state = torch.load(folder / "diffusion_pytorch_model.bin", weights_only=True)
    state.pop("conv_in.weight")
    torch.save(state, folder / "diffusion_pytorch_model.bin")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lose("config.json"), "diffusers with its config.json"),
        (lose("scheduler_config.json"), "scheduler_config.json is missing"),
        (lose("diffusion_pytorch_model.bin"), "holds no weights"),
        (spoil_weights, "lacks conv_in.weight"),
        (lambda f: (f / "config.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "config.json").write_text("[1]"), "no settings by name"),
        (lambda f: spoil_config(f, _class_name="UNet2DConditionModel"), "holds a UNet2DCond"),
        (lambda f: spoil_config(f, num_class_embeds=10), "has a num_class_embeds"),
        (lambda f: spoil_config(f, norm_num_groups=3), "no such UNet2DModel"),
        (lambda f: spoil_config(f, layers_per_block="two"), "layers_per_block"),
        (lambda f: spoil_config(f, out_channels=5), "answers with as many"),
        (
            lambda f: (f / "scheduler_config.json").write_text('{"beta_schedule": "sigmoid"}'),
            "noise schedule is 'sigmoid'",
        ),
        (
            lambda f: (f / "scheduler_config.json").write_text('{"prediction_type": "flow"}'),
            "prediction is 'flow'",
        ),
    ],
)
def test_a_bad_folder_gets_one_sentence(folder, spoil, words):
    spoil(folder)
    with pytest.raises(UsageError, match=words) as error:
        open_denoiser(folder)
    assert "\n" not in str(error.value)


def test_unknown_words_are_refused(folder):
    with pytest.raises(UsageError, match="leave step out"):
        make_purifier(f"diffusion:{folder}(step=4)")
    with pytest.raises(UsageError, match="diffusion:FOLDER"):
        make_purifier("diffusion")
    with pytest.raises(UsageError, match="is no diffusion model"):
        make_purifier("diffusion:/nowhere")
    with pytest.raises(UsageError, match="holds a purifier langevin, not diffusion"):
        make_purifier("diffusion:fashion-mnist")
    with pytest.raises(UsageError, match="defense folder"):
        make_purifier("langevin:/nowhere")


def test_weights_of_another_precision_are_read(theirs, folder):
    """Folders of half precision are usual; the network stays in fp32."""
    file = folder / "diffusion_pytorch_model.safetensors"
    save_tensors(file, {k: v.half() for k, v in theirs.state_dict().items()})
    (folder / "diffusion_pytorch_model.bin").unlink()
    assert load_tensors(file)["conv_in.weight"].dtype == torch.float16
    x = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(
        open_denoiser(folder).at(x, 3), asked(theirs, x, 3), rtol=0.05, atol=0.01
    )
