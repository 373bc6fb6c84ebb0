"""Files of guided-diffusion, score_sde and EDM, written here, small, in the layouts of the field.

Each is held against a few lines that compute the network from the file's own keys.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from ebm_defense.commands.options.shared import make_purifier
from ebm_defense.defense import PurifiedClassifier
from ebm_defense.denoisers import read
from ebm_defense.denoisers.read import open_denoiser
from ebm_defense.errors import UsageError
from ebm_defense.storage.files import save_tensors
from ebm_defense.storage.folders import save_defense
from ebm_defense.storage.weights import load_purifier

GENERATOR = torch.Generator()
ROOT_HALF = math.sqrt(0.5)


def random(*shape):
    """Weights large enough for every part of a network to show in its answer."""
    return 0.3 * torch.randn(shape, generator=GENERATOR)


def images(channels, size):
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(5))


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# --- guided-diffusion --------------------------------------------------------------------------


def put(state, name, *shape):
    """Put a layer into a state_dict; one axis makes a normalisation."""
    state[f"{name}.weight"] = random(*shape) if len(shape) > 1 else 1 + random(*shape)
    state[f"{name}.bias"] = random(shape[0])


def put_residual(state, name, inside, outside, wide):
    put(state, f"{name}.in_layers.0", inside)
    put(state, f"{name}.in_layers.2", outside, inside, 3, 3)
    put(state, f"{name}.emb_layers.1", outside * (2 if wide else 1), 128)
    put(state, f"{name}.out_layers.0", outside)
    put(state, f"{name}.out_layers.3", outside, outside, 3, 3)
    if inside != outside:
        put(state, f"{name}.skip_connection", outside, inside, 1, 1)


def put_attention(state, name, width):
    put(state, f"{name}.norm", width)
    put(state, f"{name}.qkv", 3 * width, width, 1)
    put(state, f"{name}.proj_out", width, width, 1)


def guided_state(wide, residual):
    """Widths 32 and 64, two blocks each, attention at the lower resolution, a variance told too."""
    GENERATOR.manual_seed(0)
    state = {}
    put(state, "time_embed.0", 128, 32)
    put(state, "time_embed.2", 128, 128)
    put(state, "input_blocks.0.0", 32, 1, 3, 3)
    for k in (1, 2):
        put_residual(state, f"input_blocks.{k}.0", 32, 32, wide)
    if residual:
        put_residual(state, "input_blocks.3.0", 32, 32, wide)
    else:
        put(state, "input_blocks.3.0.op", 32, 32, 3, 3)
    for k, inside in ((4, 32), (5, 64)):
        put_residual(state, f"input_blocks.{k}.0", inside, 64, wide)
        put_attention(state, f"input_blocks.{k}.1", 64)
    for k in (0, 2):
        put_residual(state, f"middle_block.{k}", 64, 64, wide)
    put_attention(state, "middle_block.1", 64)
    for k, skip in enumerate((64, 64, 32)):
        put_residual(state, f"output_blocks.{k}.0", 64 + skip, 64, wide)
        put_attention(state, f"output_blocks.{k}.1", 64)
    if residual:
        put_residual(state, "output_blocks.2.2", 64, 64, wide)
    else:
        put(state, "output_blocks.2.2.conv", 64, 64, 3, 3)
    for k, inside in enumerate((96, 64, 64)):
        put_residual(state, f"output_blocks.{k + 3}.0", inside, 32, wide)
    put(state, "out.0", 32)
    put(state, "out.2", 2, 32, 3, 3)
    return state


class Guided:
    """guided-diffusion's network, computed from its state_dict."""

    def __init__(self, state, head):
        self.state, self.head = state, head

    def pair(self, name):
        return self.state[f"{name}.weight"], self.state[f"{name}.bias"]

    def norm(self, name, x):
        return F.group_norm(x, 32, *self.pair(name))

    def residual(self, name, x, emb, resize):
        h = resize(F.silu(self.norm(f"{name}.in_layers.0", x)))
        h = F.conv2d(h, *self.pair(f"{name}.in_layers.2"), padding=1)
        told = F.linear(F.silu(emb), *self.pair(f"{name}.emb_layers.1"))[:, :, None, None]
        if told.shape[1] == 2 * h.shape[1]:
            scale, shift = told.chunk(2, 1)
            h = self.norm(f"{name}.out_layers.0", h) * (1 + scale) + shift
        else:
            h = self.norm(f"{name}.out_layers.0", h + told)
        h = F.conv2d(F.silu(h), *self.pair(f"{name}.out_layers.3"), padding=1)
        x = resize(x)
        if f"{name}.skip_connection.weight" in self.state:
            x = F.conv2d(x, *self.pair(f"{name}.skip_connection"))
        return x + h

    def attention(self, name, x):
        flat = x.flatten(2)
        qkv = F.conv1d(self.norm(f"{name}.norm", flat), *self.pair(f"{name}.qkv"))
        q, k, v = qkv.reshape(-1, 3 * self.head, flat.shape[2]).split(self.head, 1)
        weights = torch.einsum("bct,bcs->bts", q, k).div(math.sqrt(self.head)).softmax(2)
        seen = torch.einsum("bts,bcs->bct", weights, v).reshape(flat.shape)
        return x + F.conv1d(seen, *self.pair(f"{name}.proj_out")).view_as(x)

    def block(self, name, x, emb, resize):
        """Whatever lies at a name, in its order; the last residual one of several may resize."""
        parts = sorted({k.split(".")[2] for k in self.state if k.startswith(f"{name}.")})
        for part in parts:
            at = f"{name}.{part}"
            if f"{at}.qkv.weight" in self.state:
                x = self.attention(at, x)
            elif f"{at}.op.weight" in self.state:
                x = F.conv2d(x, *self.pair(f"{at}.op"), stride=2, padding=1)
            elif f"{at}.conv.weight" in self.state:
                up = F.interpolate(x, scale_factor=2.0)
                x = F.conv2d(up, *self.pair(f"{at}.conv"), padding=1)
            else:
                changes = resize if part != "0" or name == "input_blocks.3" else (lambda h: h)
                x = self.residual(at, x, emb, changes)
        return x

    def __call__(self, x, level):
        angles = level * torch.exp(-math.log(10_000) * torch.arange(16) / 16)
        emb = torch.cat([angles.cos(), angles.sin()]).expand(len(x), -1)
        emb = F.linear(emb, *self.pair("time_embed.0"))
        emb = F.linear(F.silu(emb), *self.pair("time_embed.2"))
        x = F.conv2d(x, *self.pair("input_blocks.0.0"), padding=1)
        skips = [x]
        for k in range(1, 6):
            x = self.block(f"input_blocks.{k}", x, emb, lambda h: F.avg_pool2d(h, 2))
            skips.append(x)
        x = self.residual("middle_block.0", x, emb, lambda h: h)
        x = self.attention("middle_block.1", x)
        x = self.residual("middle_block.2", x, emb, lambda h: h)
        for k in range(6):
            joined = torch.cat([x, skips.pop()], 1)
            x = self.block(
                f"output_blocks.{k}", joined, emb, lambda h: F.interpolate(h, scale_factor=2.0)
            )
        return F.conv2d(F.silu(self.norm("out.0", x)), *self.pair("out.2"), padding=1)[:, :1]


@pytest.mark.parametrize(("wide", "residual"), [(True, True), (False, False)])
def test_guided_diffusions_files_say_what_their_network_does(wide, residual, tmp_path):
    state = guided_state(wide, residual)
    file = tmp_path / "8x8_diffusion_uncond.pt"
    torch.save(state, file)
    denoiser = open_denoiser(file, head_channels=32)
    x = images(1, 8)
    close(denoiser.at(x, 321), Guided(state, 32)(x, 321))
    assert denoiser.settings.image_size == 8
    # As a folder that holds it alone, and with the size said instead of named.
    file.rename(tmp_path / "model.pt")
    assert open_denoiser(tmp_path, head_channels=32, image_size=16).settings.image_size == 16


# --- score_sde and EDM -------------------------------------------------------------------------

SIZES, WIDTHS, BLOCKS, ATTENDS, EMBEDDING = (8, 4), (8, 16), 2, 4, 12
"""Two resolutions, of which the one of 4 pixels has attention."""


def score_modules():
    """Return score_sde's modules in their order: a kind and channels before and after."""
    found, skips = [("conv", 3, 8)], [8]
    inside = 8
    for size, width in zip(SIZES, WIDTHS, strict=True):
        if size != SIZES[0]:
            found.append(("down", inside, inside))
            skips.append(inside)
        for _ in range(BLOCKS):
            found.append(("block", inside, width))
            inside = width
            if size == ATTENDS:
                found.append(("attention", width, width))
            skips.append(width)
    found += [("block", inside, inside), ("attention", inside, inside), ("block", inside, inside)]
    for size, width in zip(SIZES[::-1], WIDTHS[::-1], strict=True):
        if size != SIZES[-1]:
            found.append(("up", inside, inside))
        for _ in range(BLOCKS + 1):
            found.append(("joined", inside + skips.pop(), width))
            inside = width
        if size == ATTENDS:
            found.append(("attention", width, width))
    return [*found, ("norm", inside, inside), ("conv", inside, 3)]


def score_state():
    """Weights by score_sde's names, without what wraps them."""
    GENERATOR.manual_seed(1)
    state = {}
    put(state, "0", EMBEDDING, 8)
    put(state, "1", EMBEDDING, EMBEDDING)
    for n, (kind, inside, outside) in enumerate(score_modules(), 2):
        if kind == "conv":
            put(state, f"{n}", outside, inside, 3, 3)
        elif kind == "norm":
            put(state, f"{n}", outside)
        elif kind == "attention":
            put(state, f"{n}.GroupNorm_0", inside)
            for k in range(4):
                state[f"{n}.NIN_{k}.W"], state[f"{n}.NIN_{k}.b"] = (
                    random(inside, inside), random(inside),
                )  # fmt: skip
        else:
            put(state, f"{n}.GroupNorm_0", inside)
            put(state, f"{n}.Conv_0", outside, inside, 3, 3)
            put(state, f"{n}.Dense_0", outside, EMBEDDING)
            put(state, f"{n}.GroupNorm_1", outside)
            put(state, f"{n}.Conv_1", outside, outside, 3, 3)
            if inside != outside or kind in ("down", "up"):
                put(state, f"{n}.Conv_2", outside, inside, 1, 1)
    return state


class Score:
    """score_sde's DDPM++, computed from its weights."""

    def __init__(self, state):
        self.state = state

    def pair(self, name):
        return self.state[f"{name}.weight"], self.state[f"{name}.bias"]

    def norm(self, name, x):
        return F.group_norm(x, min(x.shape[1] // 4, 32), *self.pair(name), eps=1e-6)

    def residual(self, n, kind, x, emb):
        def resize(h):
            if kind == "down":
                return h.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).mean((3, 5))
            twice = 2 if kind == "up" else 1
            return h.repeat_interleave(twice, 2).repeat_interleave(twice, 3)

        h = F.conv2d(
            resize(F.silu(self.norm(f"{n}.GroupNorm_0", x))), *self.pair(f"{n}.Conv_0"), padding=1
        )
        h = h + F.linear(F.silu(emb), *self.pair(f"{n}.Dense_0"))[:, :, None, None]
        h = F.silu(self.norm(f"{n}.GroupNorm_1", h))
        h = F.conv2d(h, *self.pair(f"{n}.Conv_1"), padding=1)
        x = resize(x)
        if f"{n}.Conv_2.weight" in self.state:
            x = F.conv2d(x, *self.pair(f"{n}.Conv_2"))
        return (x + h) * ROOT_HALF

    def attention(self, n, x):
        def nin(k, y):
            mixed = torch.einsum("bchw,cd->bdhw", y, self.state[f"{n}.NIN_{k}.W"])
            return mixed + self.state[f"{n}.NIN_{k}.b"][:, None, None]

        y = self.norm(f"{n}.GroupNorm_0", x)
        q, k, v = (nin(i, y).flatten(2) for i in range(3))
        weights = (torch.einsum("bcq,bck->bqk", q, k) * x.shape[1] ** -0.5).softmax(2)
        return (x + nin(3, torch.einsum("bqk,bck->bcq", weights, v).view_as(x))) * ROOT_HALF

    def __call__(self, x, time):
        angles = time * torch.exp(-math.log(10_000) / 3 * torch.arange(4))
        emb = torch.cat([angles.sin(), angles.cos()]).expand(len(x), -1)
        emb = F.linear(F.silu(F.linear(emb, *self.pair("0"))), *self.pair("1"))
        skips, modules = [], list(enumerate(score_modules(), 2))
        for i, (n, (kind, _, _)) in enumerate(modules):
            following = modules[i + 1][1][0] if i + 1 < len(modules) else ""
            if kind == "conv":
                x = F.conv2d(x, *self.pair(f"{n}"), padding=1)
            elif kind == "norm":
                x = F.silu(self.norm(f"{n}", x))
            elif kind == "attention":
                x = self.attention(n, x)
            else:
                x = torch.cat([x, skips.pop()], 1) if kind == "joined" else x
                x = self.residual(n, kind, x, emb)
            if len(skips) < 6 and n < 10 and following != "attention":
                skips.append(x)
        return x


def alpha_at(level):
    t = (level + 1) / 1000
    return math.exp(-0.5 * t**2 * 19.9 - 0.1 * t)


def checkpoint(state):
    """As score_sde writes it: the model learns on, and the ordered list is the average."""
    model = {"module.sigmas": torch.ones(10)}
    model |= {f"module.all_modules.{k}": torch.zeros_like(v) for k, v in state.items()}
    ema = {"decay": 0.9999, "num_updates": 3, "shadow_params": list(state.values())}
    return {"optimizer": {"state": {}, "param_groups": []}, "model": model, "ema": ema, "step": 3}


def test_the_references_skips_are_those_of_the_way_down():
    """Guards the reference itself: all that was kept is used."""
    state = score_state()
    assert Score(state)(images(3, 8), 3.0).shape == (2, 3, 8, 8)


def test_score_sdes_checkpoint_is_read_by_its_ordered_average(tmp_path):
    state = score_state()
    torch.save(checkpoint(state), tmp_path / "checkpoint_8.pth")
    denoiser = open_denoiser(tmp_path, image_size=8)
    x = images(3, 8)
    close(denoiser.at(x, 123), Score(state)(x, 124 / 1000 * 999))
    assert denoiser.alphas[123] == pytest.approx(alpha_at(123))
    model = {f"module.all_modules.{k}": v for k, v in state.items()}
    torch.save({"model": model}, tmp_path / "checkpoint_8.pth")
    close(open_denoiser(tmp_path, image_size=8).at(x, 5), Score(state)(x, 6 / 1000 * 999))


NAMES = {
    "GroupNorm_0": "norm0", "Conv_0": "conv0", "Dense_0": "affine", "GroupNorm_1": "norm1",
    "Conv_1": "conv1", "Conv_2": "skip",
}  # fmt: skip


def edm_state(state):
    """score_sde's weights as EDM's networks have them, beside what EDM's have too."""
    found = {}
    for n, name in ((0, "map_layer0"), (1, "map_layer1")):
        found |= {f"{name}.{kind}": state[f"{n}.{kind}"] for kind in ("weight", "bias")}
    names = iter(
        ["enc.8x8_conv", "enc.8x8_block0", "enc.8x8_block1", "enc.4x4_down", "enc.4x4_block0",
         "enc.4x4_block1", "dec.4x4_in0", "dec.4x4_in1", "dec.4x4_block0", "dec.4x4_block1",
         "dec.4x4_block2", "dec.8x8_up", "dec.8x8_block0", "dec.8x8_block1", "dec.8x8_block2",
         "dec.8x8_aux_norm", "dec.8x8_aux_conv"]
    )  # fmt: skip
    for n, (kind, width, _) in enumerate(score_modules(), 2):
        if kind != "attention":
            name = next(names)
            for key in [k for k in state if k.startswith(f"{n}.")]:
                part = key.removeprefix(f"{n}.")
                head, _, tail = part.rpartition(".")
                found[f"{name}.{NAMES[head] + '.' if head else ''}{tail}"] = state[key]
            continue
        for tail in ("weight", "bias"):
            found[f"{name}.norm2.{tail}"] = state[f"{n}.GroupNorm_0.{tail}"]
        qkv, bias = torch.empty(3 * width, width, 1, 1), torch.empty(3 * width)
        for k in range(3):
            qkv[k::3, :, 0, 0] = state[f"{n}.NIN_{k}.W"].T
            bias[k::3] = state[f"{n}.NIN_{k}.b"]
        found |= {f"{name}.qkv.weight": qkv, f"{name}.qkv.bias": bias}
        found[f"{name}.proj.weight"] = state[f"{n}.NIN_3.W"].T[..., None, None]
        found[f"{name}.proj.bias"] = state[f"{n}.NIN_3.b"]
    extra = {f"enc.4x4_down.{c}.resample_filter": torch.full((1, 1, 2, 2), 0.25)
             for c in ("conv0", "skip")}  # fmt: skip
    extra["map_augment.weight"] = random(8, 9)
    return {f"model.{k}": v for k, v in (found | extra).items()}


def test_edms_networks_are_read_from_state_dicts_and_preconditioned(tmp_path):
    state = score_state()
    save_tensors(tmp_path / "edm.safetensors", edm_state(state))
    x, level = images(3, 8), 400
    alpha = alpha_at(level)
    sigma = math.sqrt((1 - alpha) / alpha)
    scaled = x / math.sqrt(alpha)
    total = sigma**2 + 0.25
    told = Score(state)(scaled / math.sqrt(total), math.log(sigma) / 4)
    image = 0.25 / total * scaled + 0.5 * sigma / math.sqrt(total) * told
    denoiser = open_denoiser(tmp_path / "edm.safetensors")
    close(denoiser.at(x, level), (scaled - image) / sigma)
    plain = open_denoiser(tmp_path / "edm.safetensors", preconditioning="vp")
    close(plain.at(x, level), Score(state)(x, (level + 1) / 1000 * 999))


def test_a_read_network_goes_into_a_defense_folder_and_back(tmp_path, tiny_classifier):
    torch.save(checkpoint(score_state()), tmp_path / "checkpoint_8.pth")
    purifier = make_purifier(f"diffusion:{tmp_path}(image_size=8, start=50, steps=2)")
    folder = save_defense(PurifiedClassifier(tiny_classifier, purifier), tmp_path / "defense")
    x = images(3, 8)
    with torch.no_grad():
        close(load_purifier(folder).denoiser.at(x, 9), purifier.denoiser.at(x, 9))


@pytest.fixture
def tiny_classifier():
    from ebm_defense.classifiers import WideResNet, WideResNetSettings, normalized

    return normalized(
        WideResNet(WideResNetSettings(channels=3, classes=2, depth=10, widen=1)), 0, 1
    )


def saved(content):
    return lambda folder: torch.save(content, folder / "w.pt")


def short_average():
    found = checkpoint(score_state())
    found["ema"]["shadow_params"].pop()
    return found


def shuffled_average():
    found = checkpoint(score_state())
    found["ema"]["shadow_params"].reverse()
    return found


def without(state, *names):
    return {k: v for k, v in state.items() if not any(name in k for name in names)}


BAD = {
    "empty": (lambda folder: None, {}, "is no diffusion model"),
    "pkl": (lambda folder: None, {}, "carries code"),
    "two": (
        lambda f: [torch.save({}, f / n) for n in ("a.pt", "b.pt")], {}, "several files",
    ),
    "classifier": (saved({"conv.weight": torch.ones(3)}), {}, "no layout that is known"),
    "garbage": (lambda f: (f / "w.pt").write_bytes(b"no"), {}, "truncated"),
    "size": (saved(guided_state(True, True)), {}, "give image_size"),
    "heads": (saved(guided_state(True, True)), {"image_size": 8, "head_channels": 48}, "no heads"),
    "classes": (
        saved(guided_state(True, True) | {"label_emb.weight": torch.ones(3, 3)}), {},
        "class-conditional",
    ),
    "guided half": (
        saved(without(guided_state(True, True), "out.2.bias")),
        {"image_size": 8, "head_channels": 32}, "lacks conv_out.bias",
    ),
    "setting": (saved(guided_state(True, True)), {"colour": 8}, "colour"),
    "short": (saved(short_average()), {}, "an average of"),
    "shuffled": (saved(shuffled_average()), {}, "an average of shape"),
    "score setting": (saved(checkpoint(score_state())), {"depth": 8}, "leave depth out"),
    "edm classes": (
        saved(edm_state(score_state()) | {"model.map_label.weight": torch.ones(2, 2)}), {},
        "class-conditional",
    ),
    "edm half": (saved(without(edm_state(score_state()), "aux_conv.bias")), {}, "lacks"),
    "edm preconditioning": (
        saved(edm_state(score_state())), {"preconditioning": "ve"}, "preconditioning is 've'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_gets_one_sentence(name, tmp_path):
    write, settings, words = BAD[name]
    write(tmp_path)
    with pytest.raises(UsageError, match=words) as error:
        open_denoiser(tmp_path / "net.pkl" if name == "pkl" else tmp_path, **settings)
    assert "\n" not in str(error.value)


def test_a_model_on_the_hub_is_downloaded_and_read(tmp_path, monkeypatch):
    asked = []

    def download(spec, patterns=()):
        asked.append((spec, patterns))
        return tmp_path

    torch.save(checkpoint(score_state()), tmp_path / "checkpoint_8.pth")
    monkeypatch.setattr(read.hub, "download", download)
    purifier = make_purifier("diffusion:hf://someone/score@main(image_size=8)")
    assert purifier.image_shape == (3, 8, 8)
    assert asked[-1] == ("hf://someone/score@main", read.HUB)
