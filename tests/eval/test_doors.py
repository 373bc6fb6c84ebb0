"""What people bring is taken at every public door alike, or refused in one sentence at once."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from ebm_defense import (
    ConvEnergy,
    ConvEnergySettings,
    LangevinPurifier,
    PurifiedClassifier,
    UsageError,
)
from ebm_defense.attacks import (
    APGD,
    DLR,
    PGD,
    FoolboxAttack,
    Full,
    Smoothed,
    Square,
    TargetedAPGD,
    ThreatModel,
    TorchattacksAttack,
    Towards,
    Transfer,
)
from ebm_defense.defense import as_defense
from ebm_defense.eval import benchmark, evaluate, get_protocol, judge_images
from ebm_defense.purifiers.baselines import Jpeg
from ebm_defense.purifiers.foreign import ForeignPurifier

COUNT, CLASSES = 6, 3
THREAT = ThreatModel(eps=0.1)
ATTACK = PGD(threat=THREAT, steps=2, step_size=0.05, replicates=2)


def network(classes=CLASSES):
    with torch.random.fork_rng():
        torch.manual_seed(5)
        layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten()]
        return nn.Sequential(*layers, nn.Linear(144, classes)).eval()


IMAGES = torch.rand((COUNT, 1, 8, 8), generator=torch.Generator().manual_seed(0))
LABELS = network()(IMAGES).argmax(1)


class Pairs(Dataset):
    """A data set of no library: indexed pairs."""

    def __len__(self):
        return COUNT

    def __getitem__(self, i):
        return IMAGES[i], int(LABELS[i])


# Public doors: each gives numbers that must not depend on how its input was brought.


def by_evaluate(model, images, labels):
    report = evaluate(model, images, labels, attacks=[ATTACK], judge_replicates=2)
    return report.records[["0 PGD-2: stands", "clean", "label"]].to_numpy()


def by_judge(model, images, labels):
    return judge_images(model, images, IMAGES, labels, threat=THREAT, replicates=2).stands.numpy()


def by_attack(model, images, labels):
    return (255 * ATTACK(model, images, labels).double()).round().numpy()


def by_foolbox(model, images, labels):
    attack = FoolboxAttack(attack="LinfPGD", threat=THREAT, replicates=1, parameters="steps=1")
    return (255 * attack(model, images, labels).double()).round().numpy()


def by_benchmark(model, images, labels):
    own = images if labels is None else list(zip(images, labels, strict=True))
    found = benchmark(model, COUNT, own, eps="0.1", protocol="quick")
    return np.array([found.clean, found.robust])


DOORS = {
    "evaluate": by_evaluate,
    "judge_images": by_judge,
    "an attack": by_attack,
    "foolbox": by_foolbox,
    "benchmark": by_benchmark,
}
EXPECTED = {name: door(network(), IMAGES, LABELS) for name, door in DOORS.items()}


@pytest.fixture(params=DOORS)
def door(request):
    """A door, as a function that asserts that it gives what it gives for plain tensors."""

    def check(model, images=IMAGES, labels=LABELS):
        np.testing.assert_array_equal(
            DOORS[request.param](model, images, labels), EXPECTED[request.param]
        )

    return check


LABELS_AS = {
    **{str(t): partial(LABELS.to, t) for t in (torch.int32, torch.int16, torch.int8, torch.uint8)},
    "numpy": LABELS.numpy,
    "numpy uint16": lambda: LABELS.numpy().astype(np.uint16),
    "list": LABELS.tolist,
    "list of scalars": lambda: [np.int64(label) for label in LABELS],
    "a column": lambda: LABELS[:, None],
    "one-hot": lambda: nn.functional.one_hot(LABELS, CLASSES),
    "whole floats": LABELS.double,
}


@pytest.mark.parametrize("brought", LABELS_AS)
def test_labels_of_any_type(door, brought):
    door(network(), labels=LABELS_AS[brought]())


def made_in_inference_mode():
    with torch.inference_mode():
        return IMAGES.clone()


IMAGES_AS = {
    "numpy": IMAGES.numpy,
    "numpy of float64": lambda: IMAGES.double().numpy(),
    "list": lambda: list(IMAGES),
    "list of arrays": lambda: [image.numpy() for image in IMAGES],
    "with a gradient": lambda: IMAGES.clone().requires_grad_(),
    "inference": made_in_inference_mode,
    "channels last": lambda: IMAGES.to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("brought", IMAGES_AS)
def test_images_of_any_container(door, brought):
    door(network(), images=IMAGES_AS[brought]())


DATA_AS = {
    "data set": lambda: TensorDataset(IMAGES, LABELS),
    "pairs": Pairs,
    "loader": lambda: DataLoader(TensorDataset(IMAGES, LABELS.int()), batch_size=4),
    "loader of pairs": lambda: DataLoader(Pairs(), batch_size=4),
    "mappings": lambda: [
        {"pixel_values": x, "labels": y} for x, y in zip(IMAGES, LABELS, strict=True)
    ],
    "list of pairs": lambda: list(zip(IMAGES, LABELS, strict=True)),
    "a generator": lambda: ((x, y) for x, y in zip(IMAGES, LABELS, strict=True)),
}


@pytest.mark.parametrize("brought", DATA_AS)
def test_a_data_set_in_place_of_images_and_labels(door, brought):
    door(network(), images=DATA_AS[brought](), labels=None)


@dataclass
class Output:
    logits: torch.Tensor
    hidden: torch.Tensor


class Returns(nn.Module):
    """A classifier whose logits come in some other form."""

    def __init__(self, form):
        super().__init__()
        self.net, self.form = network(), form

    def forward(self, x):
        return self.form(self.net(x), x)


FORMS = {
    "float16": lambda z, x: z.half(),
    "bfloat16": lambda z, x: z.bfloat16(),
    "float64": lambda z, x: z.double(),
    "object": lambda z, x: Output(logits=z, hidden=x),
    "mapping": lambda z, x: {"loss": None, "logits": z},
    "mapping by another name": lambda z, x: OrderedDict(out=z, aux=x),
    "tuple": lambda z, x: (z, x),
    "tuple with None": lambda z, x: (None, z),
    "list": lambda z, x: [z],
    "object within a tuple's logits": lambda z, x: {"logits": (z,)},
    "squeezed": lambda z, x: z.squeeze(0) if len(z) == 1 else z,
    "maps of one pixel": lambda z, x: z[:, :, None, None],
}
COARSE = {"float16", "bfloat16"}


@pytest.mark.parametrize("form", FORMS)
def test_logits_of_any_type_and_container(door, form):
    # What half precision rounds is the model's own answer; the reference gives it in float32.
    if form in COARSE:
        rounded = Returns(lambda z, x: FORMS[form](z, x).float())
        assert by_evaluate(Returns(FORMS[form]), IMAGES, LABELS).tolist() == (
            by_evaluate(rounded, IMAGES, LABELS).tolist()
        )
    else:
        door(Returns(FORMS[form]))


@pytest.mark.parametrize("form", FORMS)
def test_a_purified_classifier_takes_the_same(form):
    model = PurifiedClassifier(Returns(FORMS[form]), Jpeg(75))
    logits = model(IMAGES.numpy())
    assert logits.shape == (COUNT, CLASSES)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(
        logits, PurifiedClassifier(network(), Jpeg(75))(IMAGES), atol=1e-2, rtol=1e-2
    )


def asserted(x):
    assert x.shape[-1] == 32, "only 32 by 32 pixels"


UNREADABLE = {
    "two candidates": (Returns(lambda z, x: (z, z)), "2 entries may be the logits"),
    "none": (Returns(lambda z, x: {"loss": z.sum()}), "no entries may be the logits"),
    "one column": (Returns(lambda z, x: z[:, :1]), "two columns"),
    "no axis of classes": (Returns(lambda z, x: z[:, 0]), "for 1 images|two columns"),
    "text": (Returns(lambda z, x: "cat"), "returned str"),
    "complex": (Returns(lambda z, x: z + 1j), "complex"),
    "an assertion": (Returns(lambda z, x: asserted(x)), "only 32"),
    "fewer classes": (network(2), "labels go up to 2"),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("what", UNREADABLE)
def test_what_has_no_one_reading_is_refused_in_a_sentence(door, what):
    model, said = UNREADABLE[what]
    with pytest.raises(UsageError, match=said) as refused:
        DOORS[door](model, IMAGES, LABELS)
    assert "\n" not in str(refused.value)


WRONG = {
    "off the scale": (lambda: IMAGES * 255, LABELS, "divide 8-bit images by 255"),
    "bytes": ((IMAGES * 255).byte, LABELS, "divide 8-bit images by 255"),
    "no batch": (lambda: IMAGES[:, 0], LABELS, "axis of the batch or of the channel"),
    "probabilities": (lambda: IMAGES, torch.rand(COUNT), "not probabilities"),
    "several at once": (lambda: IMAGES, torch.ones((COUNT, 3)).long(), "labels must be"),
    "words": (lambda: IMAGES, ["cat"] * COUNT, "whole numbers"),
    "too few": (lambda: IMAGES, LABELS[:2], "labels must be|differ|shorter"),
}


@pytest.mark.parametrize("door", ["evaluate", "judge_images", "an attack"])
@pytest.mark.parametrize("what", WRONG)
def test_images_and_labels_that_do_not_fit_are_refused(door, what):
    images, labels, said = WRONG[what]
    with pytest.raises(UsageError, match=said) as refused:
        DOORS[door](network(), images(), labels)
    assert "\n" not in str(refused.value)


# Modes: of the caller, and of the modules.


def through_a_function(model):
    return lambda x: 1.0 * model(x)


def modes_of(model):
    return {name: module.training for name, module in model.named_modules()}


@pytest.mark.parametrize("reach", [lambda m: m, through_a_function, lambda m: m.forward])
def test_training_mode_is_neither_attacked_nor_changed(door, reach):
    model = network().train()
    model[1].eval()
    model[5].weight.requires_grad_(False)
    model[5].bias.grad = torch.ones_like(model[5].bias)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes, flags = modes_of(model), [p.requires_grad for p in model.parameters()]
    door(reach(model))
    assert modes_of(model) == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model[5].bias.grad, torch.ones_like(model[5].bias))
    assert model[0].weight.grad is None


def test_a_purified_classifier_runs_its_parts_in_evaluation_mode_unless_it_trains():
    model = network().train()
    defended = PurifiedClassifier(model, lambda x: x, 1)
    assert model.training
    torch.testing.assert_close(defended(IMAGES), network()(IMAGES))
    assert all(modes_of(model).values())
    assert not torch.equal(defended.train()(IMAGES), network()(IMAGES))


@pytest.mark.parametrize("layer", ["batch norm", "spectral norm"])
def test_an_energy_in_training_mode_purifies_as_in_evaluation_mode(layer):
    first = nn.Conv2d(1, 4, 3)
    if layer == "spectral norm":
        first = nn.utils.parametrizations.spectral_norm(first)
    net = nn.Sequential(first, nn.BatchNorm2d(4), nn.SiLU(), nn.Flatten(), nn.Linear(144, 1))
    purifier = LangevinPurifier(lambda x: net(x)[:, 0], 3, 0.06, 0.0036, "fp32")
    before = {name: value.clone() for name, value in net.state_dict().items()}
    found = [purifier(IMAGES, torch.Generator().manual_seed(0)) for _ in range(2)]
    assert torch.equal(*found)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    alone = purifier(IMAGES[:1], torch.Generator().manual_seed(0))
    assert alone.shape == (1, 1, 8, 8)
    assert net.training


@pytest.mark.parametrize(
    "around", [torch.no_grad, torch.inference_mode, partial(torch.autocast, "cpu", torch.float32)]
)
def test_the_caller_s_mode_changes_nothing(door, around):
    with around():
        door(network())


def test_autocast_of_the_caller_s_is_the_model_s_affair():
    with torch.autocast("cpu", torch.bfloat16):
        rounded = by_evaluate(network(), IMAGES, LABELS)
    assert rounded.shape == EXPECTED["evaluate"].shape


def test_weights_that_were_made_in_inference_mode_are_attacked_all_the_same(door):
    with torch.inference_mode():
        model = network()
    door(model)
    assert model[0].weight.is_inference()


class Inside(nn.Module):
    """A classifier that runs in a mode of its own, and so has no gradient."""

    def __init__(self, mode):
        super().__init__()
        self.net, self.mode = network(), mode

    def forward(self, x):
        with self.mode():
            return self.net(x)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_model_without_a_gradient_is_told_so_before_any_long_work(mode):
    model = Inside(mode)
    for attack in (ATTACK, Transfer(attack=ATTACK, source=model)):
        with pytest.raises(UsageError, match="no gradient to attack with"):
            evaluate(model, IMAGES, LABELS, attacks=[attack])
    square = Square(threat=THREAT, steps=2)
    report = evaluate(model, IMAGES, LABELS, attacks=[square], judge_replicates=2)
    assert int(report.records["clean"].sum()) == COUNT


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_foreign_purifier_may_run_in_a_mode_of_its_own(mode):
    model = PurifiedClassifier(network(), in_mode(mode), 2, seed=0)
    report = evaluate(model, IMAGES, LABELS, attacks=[ATTACK], judge_replicates=2)
    assert len(report.records) == COUNT


def in_mode(mode):
    def purify(x):
        with mode():
            return 0.5 + 0.9 * (x - 0.5)

    return purify


def quantised(model):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


@pytest.mark.filterwarnings("ignore")
def test_a_quantised_model_is_judged_and_kept_apart_from_another(tmp_path):
    square = Square(threat=THREAT, steps=2)
    run = partial(
        evaluate, images=IMAGES, labels=LABELS, attacks=[square], judge_replicates=2,
        out=tmp_path / "run",
    )  # fmt: skip
    first = run(quantised(network())).records
    assert run(quantised(network())).records.equals(first)
    other = network()
    nn.init.normal_(other[5].weight)
    with pytest.raises(UsageError, match="holds a run of"):
        run(quantised(other))


class InPlace(nn.Module):
    """A classifier that scales its input where it lies."""

    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, x):
        return self.net(x.sub_(0.5).add_(0.5).clone())


class Reusing(nn.Module):
    """A classifier that writes every answer over the last one, as captured graphs do."""

    def __init__(self, std=0.0):
        super().__init__()
        self.net, self.std, self.answers = network(), std, {}

    def forward(self, x):
        z = self.net(x + self.std * torch.randn_like(x))
        if z.requires_grad:
            return z
        return self.answers.setdefault(len(x), torch.empty_like(z)).copy_(z)


def test_answers_that_are_written_over_are_kept():
    defense = PurifiedClassifier(Reusing(), Jpeg(75), max_chains=2)
    expected = PurifiedClassifier(network(), Jpeg(75))
    with torch.no_grad():
        torch.testing.assert_close(defense(IMAGES), expected(IMAGES))
    assert not as_defense(Reusing(0.1)).check_deterministic(IMAGES)


def test_a_purifier_s_answers_that_are_written_over_are_kept():
    kept = torch.empty_like(IMAGES[:2])
    defense = PurifiedClassifier(network(), lambda x: kept[: len(x)].copy_(1 - x), 1, max_chains=2)
    torch.testing.assert_close(defense(IMAGES), network()(1 - IMAGES))


SAME = {
    "reusing its answers": Reusing,
    "parallel": lambda: nn.DataParallel(network()),
    "in place": InPlace,
    "scripted": lambda: torch.jit.script(network().train()),
    "frozen": lambda: torch.jit.freeze(torch.jit.script(network())),
    "a symbolic trace": lambda: torch.fx.symbolic_trace(network()),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model", SAME)
def test_what_computes_the_same_is_the_same(door, model):
    door(SAME[model]())


DTYPES = [torch.float16, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("door", ["evaluate", "judge_images", "an attack"])
@pytest.mark.parametrize("of_images", [torch.float32, *DTYPES])
@pytest.mark.parametrize("of_model", [torch.float32, *DTYPES])
def test_models_and_images_of_any_two_dtypes(door, of_model, of_images):
    images = IMAGES.to(of_images)
    found = np.asarray(DOORS[door](network().to(of_model), images, LABELS))
    if door == "an attack":
        within = 255 * (THREAT.eps + torch.finfo(of_images).eps)
        assert np.abs(found - 255 * images.double().numpy()).max() <= within + 0.5
    else:
        np.testing.assert_array_equal(found, EXPECTED[door])


def flat_energy():
    energy = nn.Sequential(nn.Conv2d(1, 4, 3), nn.SiLU(), nn.Flatten(), nn.Linear(144, 1))
    return energy.append(nn.Flatten(0))


def conv_energy(activation):
    shape = ConvEnergySettings(channels=1, image_size=8, width=2, activation=activation)
    return ConvEnergy(shape)


THROUGH = {
    "flat": (flat_energy, Full()),
    "silu": (partial(conv_energy, "silu"), Full(store="checkpoints")),
    "leaky_relu": (partial(conv_energy, "leaky_relu"), Smoothed(width=0.3)),
}


@pytest.mark.parametrize("energy", THROUGH)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_whole_defense_in_another_precision(dtype, energy):
    energy, gradient = THROUGH[energy]
    purifier = LangevinPurifier(energy(), 3, 0.01, 1e-5)
    defense = PurifiedClassifier(network(), purifier, 2, seed=0).to(dtype)
    images = IMAGES.to(dtype)
    assert defense(images).isfinite().all()
    assert defense.purifier(images).dtype == dtype
    for name in ("evaluate", "judge_images"):
        found = np.asarray(DOORS[name](defense, images, LABELS), dtype=float)
        assert np.isfinite(found).all()
    attack = PGD(threat=THREAT, steps=2, replicates=2, gradient=gradient)
    assert attack(defense, images, LABELS).dtype == dtype
    assert all(p.dtype == dtype for p in defense.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_the_caller_s_default_dtype_changes_nothing(door, dtype):
    model = network()
    torch.set_default_dtype(dtype)
    try:
        door(model)
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_caller_s_generator_is_not_touched(door):
    before = torch.get_rng_state()
    loader = DataLoader(TensorDataset(IMAGES, LABELS), batch_size=4)
    door(network(), loader, None)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_compiled_model_is_as_the_plain_one():
    model = torch.compile(network().train(), backend="eager")
    assert by_attack(model, IMAGES, LABELS).tolist() == EXPECTED["an attack"].tolist()
    assert model.training


# Randomness of a model's own.


class Noisy(nn.Module):
    """Adds noise from torch's own generator, and counts the images that it sees."""

    def __init__(self, std=0.1):
        super().__init__()
        self.net, self.std, self.seen = network(), std, 0

    def forward(self, x):
        self.seen += len(x)
        return self.net(x + self.std * torch.randn_like(x))


DRAWN = {
    "PGD": PGD(threat=THREAT, steps=4, replicates=15),
    "APGD": APGD(threat=THREAT, steps=4, replicates=15),
    "Square": Square(threat=THREAT, steps=4, replicates=15),
    "foolbox": FoolboxAttack(
        attack="LinfPGD", threat=THREAT, replicates=15, parameters="steps=4"
    ),
    "torchattacks": TorchattacksAttack(
        attack="PGD", threat=THREAT, replicates=15, parameters="steps=4"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DRAWN)
def test_replicates_are_drawn_of_a_model_with_randomness_of_its_own(name):
    model = Noisy()
    DRAWN[name](model, IMAGES, LABELS)
    assert model.seen >= COUNT * 5 * 15


@pytest.mark.parametrize("name", ["PGD", "foolbox"])
def test_they_are_drawn_of_a_transfer_s_source(name):
    source = Noisy()
    transfer = Transfer(attack=DRAWN[name], source=source)
    evaluate(network(), IMAGES, LABELS, attacks=[transfer], judge_replicates=2)
    assert source.seen >= COUNT * 5 * 15


@pytest.mark.parametrize("name", DRAWN)
def test_one_is_drawn_of_a_model_that_was_checked(name):
    model = Noisy(std=0.0)
    DRAWN[name](model, IMAGES, LABELS)
    assert model.seen <= COUNT * (8 + 8) + 10


def test_the_check_leaves_nothing_on_a_purifier():
    purifier = Jpeg(75)
    before = dict(vars(purifier))
    evaluate(PurifiedClassifier(Noisy(), purifier, 2), IMAGES, LABELS, attacks=[ATTACK],
             judge_replicates=2)  # fmt: skip
    assert dict(vars(purifier)) == before
    assert PurifiedClassifier(network(), purifier).check_deterministic(IMAGES)


def test_a_purifier_that_calls_itself_deterministic_and_uses_its_noise_is_found_out():
    class Liar(ForeignPurifier):
        stochastic = False

    defense = PurifiedClassifier(network(), Liar(lambda x: x + 0.1 * torch.randn_like(x)))
    assert not defense.check_deterministic(IMAGES)


def test_the_check_puts_torch_s_generator_back():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    as_defense(Noisy()).check_deterministic(IMAGES)
    assert torch.equal(torch.rand(1), expected)


# Few classes.


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_standard_keeps_what_a_model_of_few_classes_admits_and_says_so(classes, caplog):
    model = network(classes)
    labels = model(IMAGES).argmax(1)
    protocol = get_protocol("standard", eps=0.003, steps=1, replicates=1, judge_replicates=2)
    report = evaluate(model, IMAGES, labels, protocol)
    kept = {attack.name.split("-")[0] for attack in report.protocol.attacks}
    assert len(report.protocol.attacks) == {2: 5, 3: 6, 4: 7}[classes]
    assert {"PGD", "Square", "DiffHammer"} <= kept
    assert report.protocol.name == ("standard" if classes == 4 else "standard-partial")
    assert ("standard without" in caplog.text) == (classes < 4)


@pytest.mark.parametrize(
    "attack",
    [
        APGD(threat=THREAT, loss=DLR()),
        TargetedAPGD(threat=THREAT),
        PGD(threat=THREAT, loss=Towards(target=5)),
    ],
)
def test_a_loss_that_needs_more_classes_says_so_before_any_work(attack):
    model = Noisy(std=0.0)
    model.net = network(2)
    labels = model.net(IMAGES).argmax(1)
    for go in (attack, partial(evaluate, attacks=[attack])):
        model.seen = 0
        with pytest.raises(UsageError, match="classes or more"):
            go(model, IMAGES, labels)
        assert model.seen < 300


# A chosen class.


def test_an_attack_towards_a_class_reaches_it_and_the_records_say_so():
    wide = ThreatModel(eps=1.0)
    attack = PGD(threat=wide, steps=40, step_size=0.1, replicates=1, loss=Towards(target=2))
    report = evaluate(network(), IMAGES, LABELS, attacks=[attack], judge_replicates=2)
    assert attack.name == "PGD-CE to class 2-40"
    predicted = report.records[f"0 {attack.name}: predicted"]
    x = torch.as_tensor(report.adversarial[f"0 {attack.name}"])
    assert predicted.tolist() == network()(x).argmax(1).tolist()
    last = attack(network(), IMAGES, LABELS)
    assert int((network()(last).argmax(1) == 2).sum()) > int((LABELS == 2).sum())
    assert report.records["clean: predicted"].tolist() == LABELS.tolist()
