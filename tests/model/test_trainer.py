from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from model.builders import ModelConfig, ModelError
from model.data import DataConfig, DataError, TokenData
from model.optimizers import OptimizerConfig
from model.trainer import Trainer, TrainerConfig, TrainingDiverged


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_it_learns(trainer, kind):
    one = trainer(optimizer=OptimizerConfig(kind=kind))
    before = one.evaluate()
    assert before == pytest.approx(math.log(256), abs=1e-4)
    losses = [one.step().loss for _ in range(60)]
    assert losses[-1] < losses[0] - 1.0
    assert one.evaluate() < before - 1.0


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_transformers_model_learns(trainer, name):
    model = ModelConfig(
        kind="transformers", name=name, layers=1, width=32, heads=2, context=32, vocabulary=256
    )
    one = trainer(model=model)
    before = one.evaluate()
    for _ in range(15):
        report = one.step()
    assert (report.samples, report.tokens) == (4, 128)
    assert one.evaluate() < before - 0.5


def test_averaging_four_shards_beats_the_start(trainer):
    peers = [trainer() for _ in range(4)]
    theta = peers[0].read()
    before = peers[0].evaluate()
    for round in range(2):
        for seat, peer in enumerate(peers):
            peer.write(theta)
            peer.begin_round(round, seat, 4)
            peer.set_progress(15 * round)
            for _ in range(15):
                peer.step()
        theta = torch.stack([peer.read() for peer in peers]).mean(0)
    for peer in peers:
        peer.write(theta)
    assert len({peer.evaluate() for peer in peers}) == 1
    assert peers[0].evaluate() < before - 1.0


def test_two_runs_from_one_seed_are_equal_and_evaluation_leaves_no_trace(trainer):
    one, two = trainer(), trainer()
    for _ in range(3):
        one.step()
        two.evaluate()
        two.step()
    assert torch.equal(one.read(), two.read())


def test_micro_batches_give_the_same_step(trainer):
    whole, parts = trainer(), trainer(micro_batch=3)  # 4 = 3 + 1: uneven on purpose
    for _ in range(3):
        assert whole.step().loss == pytest.approx(parts.step().loss, rel=1e-5)
    torch.testing.assert_close(whole.read(), parts.read(), rtol=1e-3, atol=1e-4)
    assert whole.evaluate() == pytest.approx(parts.evaluate(), rel=1e-4)


def test_peers_train_on_different_blocks_which_come_around_again(tiny, monkeypatch):
    tokens = torch.zeros(50 * 32 + 1, dtype=torch.uint8)
    data = TokenData(train=tokens, validation=tokens, vocabulary=256, digest="")
    seen: dict[int, list[int]] = {}
    for seat in range(3):
        one = Trainer(tiny, data)
        one.begin_round(5, seat, 3)
        blocks: list[int] = []
        loss = one._loss

        def record(tokens, rows, blocks=blocks, loss=loss):
            blocks.extend(rows)
            return loss(tokens, rows)

        monkeypatch.setattr(one, "_loss", record)
        share = -(-one.n_blocks // 3)
        for _ in range(share // 4 + 2):
            one.step()
        seen[seat] = blocks
    assert set(seen[0]) | set(seen[1]) | set(seen[2]) == set(range(one.n_blocks))
    assert not set(seen[0]) & set(seen[1])
    assert not set(seen[1]) & set(seen[2])
    assert len(seen[0]) > len(set(seen[0]))


def test_the_schedule_follows_the_runs_progress(trainer):
    config = OptimizerConfig(kind="adamw", warmup_steps=100, weight_decay=0.0)
    early, late = trainer(optimizer=config), trainer(optimizer=config)
    late.set_progress(99)
    start = early.read()
    early.step()
    late.step()
    # Adam's first step is the learning rate, whatever the gradient: a hundredth of it, and all.
    ratio = (late.read() - start).abs().max() / (early.read() - start).abs().max()
    assert ratio.item() == pytest.approx(100, rel=0.01)


def test_writing_keeps_the_momentum(trainer):
    one, fresh = trainer(), trainer()
    for _ in range(3):
        one.step()
    theta = one.read()
    fresh.write(theta)
    fresh.set_progress(3)
    for peer in (one, fresh):
        peer.write(theta)
        peer.begin_round(1, 0, 1)
        peer.step()
    assert not torch.equal(one.read(), fresh.read())


def test_divergence_is_an_error_and_changes_nothing(trainer):
    one = trainer()
    theta = one.read()
    theta[-1] = math.inf  # in the head, which every batch reaches
    one.write(theta)
    with pytest.raises(TrainingDiverged) as caught:
        one.step()
    assert caught.value.step == 0
    assert torch.equal(one.read(), theta)
    # Given a sound model again, it goes on: no moment was poisoned.
    sound = trainer()
    one.write(sound.read())
    assert one.step().loss == sound.step().loss
    assert torch.equal(one.read(), sound.read())


def test_equal_configurations_have_equal_layouts(trainer):
    other = trainer(model=ModelConfig(layers=1, width=32, heads=2, context=32))
    assert trainer().layout == trainer().layout != other.layout


def test_describe_is_one_line(trainer):
    text = trainer().describe()
    assert "\n" not in text
    assert "M parameters on cpu" in text


def test_a_vocabulary_too_small_for_the_data_is_refused(tiny):
    with pytest.raises(ModelError, match="vocabulary = 100"):
        Trainer(replace(tiny, model=replace(tiny.model, vocabulary=100)))


def test_too_little_text_is_refused(tiny, tmp_path):
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(DataError, match="needs 33"):
        Trainer(replace(tiny, data=DataConfig(path=str(tmp_path / "short.txt"))))


def test_a_peer_without_a_block_is_told(tiny):
    tokens = torch.zeros(70, dtype=torch.uint8)
    data = TokenData(train=tokens, validation=tokens, vocabulary=256, digest="")
    one = Trainer(tiny, data)
    assert one.n_blocks == 2
    one.begin_round(0, 1, 2)
    one.step()
    with pytest.raises(DataError, match="too few for 3 peers"):
        one.begin_round(0, 2, 3)


@pytest.mark.parametrize("device", ["abacus", "cuda:99"])
def test_a_wrong_device_is_one_line(tiny, device):
    with pytest.raises(ValueError, match=device) as caught:
        Trainer(replace(tiny, device=device))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fields", [{"batch_size": 0}, {"eval_blocks": 0}, {"micro_batch": -1}])
def test_a_wrong_field_is_named(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        TrainerConfig(**fields)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_it_learns_on_cuda_in_bf16(trainer, kind):
    one = trainer(device="cuda", optimizer=OptimizerConfig(kind=kind))
    before = one.evaluate()
    for _ in range(60):
        one.step()
    assert one.evaluate() < before - 1.0
    theta = one.read()
    assert theta.device.type == "cpu"
    one.write(theta)
    assert torch.equal(one.read(), theta)
