"""A run folder read back, and its images judged again."""

from __future__ import annotations

import dataclasses
import shutil
import tomllib

import pandas as pd
import pytest
import torch

from ebm_defense import UsageError
from ebm_defense.attacks import PGD, AdvGAN, ThreatModel, Transfer
from ebm_defense.attacks.external.advgan import Generator, GeneratorSettings
from ebm_defense.attacks.external.foolbox_adapter import FoolboxAttack
from ebm_defense.eval import evaluate, load_protocol, load_run, reverify
from ebm_defense.eval.protocols.protocol import Protocol, restore_protocol
from ebm_defense.eval.storage.run_folder import read_records
from ebm_defense.storage.serialize import describe

ATTACK = PGD(threat=ThreatModel(norm="L2", eps=0.5), steps=2, step_size=0.2, replicates=2)
ATTACKS = (Transfer(attack=ATTACK, replicates=2), ATTACK)


@pytest.fixture(scope="module")
def kept(langevin_defense, tmp_path_factory):
    """A finished run and its report."""
    generator = torch.Generator().manual_seed(5)
    images = torch.rand((6, 1, 8, 8), generator=generator, dtype=torch.float64)
    defense = langevin_defense(steps=2, replicates=2)
    labels = langevin_defense(replicates=50)(images).argmax(1)
    labels[-1] = (labels[-1] + 1) % 3
    folder = tmp_path_factory.mktemp("kept") / "my run"
    report = evaluate(
        defense, images, labels, attacks=ATTACKS, judge_replicates=4, out=folder, seed=3
    )
    return folder, report, defense


@pytest.fixture
def copied(kept, tmp_path):
    """A copy of that run, to be damaged."""
    return shutil.copytree(kept[0], tmp_path / "run")


def test_a_run_read_back_is_the_run(kept):
    folder, report, _ = kept
    found = load_run(folder)
    assert found.protocol == report.protocol
    assert found.settings == report.settings
    pd.testing.assert_frame_equal(found.records, report.records, check_exact=True)
    assert torch.equal(found.originals, report.originals)
    assert all(torch.equal(found.adversarial[k], v) for k, v in report.adversarial.items())
    assert found.chain_steps == report.chain_steps
    assert found.to_markdown() == report.to_markdown()
    assert found.name == "my run"
    assert load_run(folder, name="mine").name == "mine"


def test_records_are_read_to_the_last_digit(tmp_path):
    values = torch.rand(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    frame = pd.DataFrame({"x": values.numpy(), "tiny": (values * 1e-17).numpy()})
    frame.to_csv(tmp_path / "records.csv", index=False)
    pd.testing.assert_frame_equal(read_records(tmp_path / "records.csv"), frame, check_exact=True)


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(UsageError, match="holds no run"):
        load_run(tmp_path)


def test_an_unfinished_run_is_not_read(copied):
    (copied / "SHA256SUMS").unlink()
    with pytest.raises(UsageError, match="not finished"):
        load_run(copied)


@pytest.mark.parametrize(
    "name", ["records.csv", "settings.toml", "adversarial.safetensors", "data.safetensors"]
)
@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b + b"\n", None])
def test_a_damaged_file_is_named(copied, name, damage):
    file = copied / name
    file.unlink() if damage is None else file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UsageError, match=name.replace(".", r"\.")) as caught:
        load_run(copied)
    assert "\n" not in str(caught.value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnAttack(PGD):
    """An attack of somebody else's."""


def test_an_attack_of_ones_own_is_restored_where_it_is_named():
    protocol = Protocol(name="mine", attacks=(OwnAttack(steps=3),), judge_replicates=4)
    plain = describe(protocol)
    assert restore_protocol(plain, [OwnAttack]) == protocol
    with pytest.raises(UsageError, match="OwnAttack"):
        restore_protocol(plain)


def carrying_models(defense):
    """Attacks that carry a model, or parameters of a library's."""
    generator = Generator(GeneratorSettings(channels=1, width=4, blocks=0))
    return [
        Transfer(attack=ATTACK, source=defense, label="elsewhere"),
        AdvGAN(weights=generator),
        FoolboxAttack(attack="LinfPGD", parameters="steps=3"),
    ]


@pytest.mark.parametrize("number", range(3))
def test_an_attack_that_carries_a_model_is_restored_without_it(kept, number):
    attack = carrying_models(kept[2])[number]
    protocol = Protocol(name="mine", attacks=(attack, ATTACK), judge_replicates=4)
    found = restore_protocol(describe(protocol))
    assert describe(found) == describe(protocol)
    assert found.attacks[0].name == attack.name


def test_a_run_of_another_defenses_images_is_read_but_not_made_again(kept, tmp_path):
    _, report, defense = kept
    attack = Transfer(attack=ATTACK, replicates=2, source=defense, label="elsewhere")
    images, labels = report.originals[:2], torch.zeros(2, dtype=torch.int64)
    made = evaluate(
        defense, images, labels, attacks=[attack], judge_replicates=2, out=tmp_path / "run"
    )
    found = load_run(tmp_path / "run")
    assert found.to_markdown() == made.to_markdown()
    assert "from elsewhere" in found.to_markdown()
    with pytest.raises(UsageError, match="kept no PurifiedClassifier"):
        found.protocol.attacks[0](defense, images, labels)


def test_a_file_of_a_protocol_cannot_hold_a_model(kept, tmp_path):
    attack = carrying_models(kept[2])[0]
    protocol = Protocol(name="mine", attacks=(attack,), judge_replicates=4)
    with pytest.raises(
        UsageError, match=r"attacks\[0\]\.source: unknown kind 'PurifiedClassifier'"
    ):
        load_protocol(protocol.save(tmp_path / "protocol.toml"))


def test_a_protocol_of_another_version_is_refused():
    plain = describe(Protocol(name="mine", attacks=ATTACKS, judge_replicates=4))
    with pytest.raises(UsageError, match="another version"):
        restore_protocol(plain | {"looks": 3})
    with pytest.raises(UsageError, match="no protocol"):
        restore_protocol(describe(ATTACK))


# Judged again.


def test_fresh_draws_are_fresh_and_repeat(kept):
    _, report, defense = kept
    first, again, other = (reverify(report, defense, number=n) for n in (1, 1, 2))
    assert first.to_text() == again.to_text()
    assert first.settings["seed"] != other.settings["seed"] != report.settings["seed"]
    assert first.settings["judge"] == "the same weights"
    assert first.settings["replicates"] == 4


def test_many_draws_agree_with_the_mean_of_the_defense(kept, langevin_defense):
    _, report, defense = kept
    found = reverify(report, defense, replicates=400).records
    # The truth by other draws: what the defense says of the saved images in the long run.
    name = "1 PGD-2"
    labels = torch.tensor(report.records["label"])
    mean = langevin_defense(steps=2, replicates=400, seed=9)(report.adversarial[name])
    margin = mean.topk(2).values.diff().abs().flatten()
    sure = margin > 0.02
    right = mean.argmax(1) == labels
    assert sure.sum() >= 3
    assert ((torch.tensor(found[f"{name}: after"]) > 0.5) == right)[sure].all()
    assert found[f"{name}: before"].tolist() == report.records[f"{name}: stands"].tolist()


def test_changes_are_counted_both_ways(kept, langevin_defense):
    _, report, _ = kept

    def never(x):
        return torch.nn.functional.one_hot(torch.full((len(x),), 2), 3).to(x)

    found = reverify(report, never, replicates=1)
    row = found.table().set_index("attack").loc["clean"]
    labels = report.records["label"]
    clean = report.records["clean"].astype(bool)
    assert row["newly broken"] == (clean & (labels != 2)).sum()
    assert row["newly right"] == (~clean & (labels == 2)).sum()
    assert row["after"] == (labels == 2).mean()
    assert found.settings["judge"] == "another defense"


def test_a_verification_is_kept_beside_the_last_one(kept, copied):
    _, report, defense = kept
    found = reverify(report, defense)
    files = [found.save(copied) for _ in range(2)]
    assert [f.name for f in files] == ["verification-1.toml", "verification-2.toml"]
    kept_settings = tomllib.loads(files[0].read_text(encoding="utf-8"))
    assert kept_settings["seed"] == found.settings["seed"]
    table = pd.read_csv(copied / "verification-1.csv")
    assert table["newly broken"].tolist() == found.table()["newly broken"].tolist()
    assert len(pd.read_csv(copied / "verification-1-records.csv")) == len(report.records)
    load_run(copied)  # which the run's own files still satisfy


def test_no_draws_are_refused(kept):
    with pytest.raises(UsageError, match="at least 1"):
        reverify(kept[1], kept[2], replicates=0)
