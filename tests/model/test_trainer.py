from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from model.builders import ModelConfig, ModelError
from model.data import DataConfig, DataError, TokenData
from model.headroom import held_bytes
from model.optimizers import OptimizerConfig
from model.shards import blocks_of
from model.trainer import Trainer, TrainerConfig, TrainingDiverged


@pytest.mark.parametrize("kind", ["muon", "adamw", "sgd", "schedulefree"])
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
    one = trainer(model=model, optimizer=OptimizerConfig(warmup_samples=40))
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
            peer.set_progress(15 * round * 16, 4)
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
    config = OptimizerConfig(
        kind="adamw", warmup_samples=400, joiner_warmup_steps=0, weight_decay=0.0
    )
    early, late = trainer(optimizer=config), trainer(optimizer=config)
    late.set_progress(396)
    start = early.read()
    early.step()
    late.step()
    # Adam's first step is the learning rate, whatever the gradient: a hundredth of it, and all.
    ratio = (late.read() - start).abs().max() / (early.read() - start).abs().max()
    assert ratio.item() == pytest.approx(100, rel=0.01)


def test_each_step_moves_the_position_by_a_step_of_every_peer(trainer):
    config = OptimizerConfig(
        kind="adamw", warmup_samples=10_000, weight_decay=0.0, joiner_warmup_steps=0
    )
    one = trainer(optimizer=config)
    one.set_progress(1000, peers=3)
    for place in (1012, 1024):
        before = one.read()
        one.step()
        moved = (one.read() - before).abs().max().item()
        # Adam's step is at most the rate, and about it while the gradients agree.
        assert moved == pytest.approx(config.peak_lr * place / 10_000, rel=0.05)


def test_writing_keeps_the_momentum(trainer):
    one, fresh = trainer(), trainer()
    for _ in range(3):
        one.step()
    theta = one.read()
    fresh.write(theta)
    fresh.set_progress(12)
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
    assert caught.value.samples == 0
    assert torch.equal(one.read(), theta)
    # Given a sound model again, it goes on: no moment was poisoned.
    sound = trainer()
    one.write(sound.read())
    assert one.step().loss == sound.step().loss
    assert torch.equal(one.read(), sound.read())


@pytest.mark.parametrize("kind", ["muon", "adamw", "sgd", "schedulefree"])
def test_divergence_leaves_every_bit(trainer, kind):
    one = trainer(optimizer=OptimizerConfig(kind=kind))
    for _ in range(3):
        one.step()
    bad = one.read()
    bad[-1] = math.inf
    one.write(bad)
    with pytest.raises(TrainingDiverged):
        one.step()
    assert torch.equal(one.read(), bad)


def test_reading_and_writing_a_span(trainer):
    one = trainer()
    theta = one.read()
    assert torch.equal(one.read(start=100, stop=5000), theta[100:5000])
    one.write(torch.ones(4900), start=100, stop=5000)
    theta[100:5000] = 1.0
    assert torch.equal(one.read(), theta)


@pytest.fixture
def untrained_head(trainer):
    """A trainer whose parameters are all in use: a head of zeros lets no gradient through."""

    def make(**changes):
        one = trainer(**changes)
        theta = one.read()
        generator = torch.Generator().manual_seed(3)
        one.write(theta + 0.05 * torch.randn(theta.shape, generator=generator))
        return one

    return make


def reference_gradient(one: Trainer, blocks: list[int]) -> torch.Tensor:
    """By plain torch, the whole batch at once."""
    rows = torch.stack([one.data.train[32 * b : 32 * b + 33].long() for b in blocks])
    logits = one.model(rows[:, :-1])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    gradients = torch.autograd.grad(loss, list(one.model.parameters()))
    return torch.cat([gradient.flatten() for gradient in gradients])


@pytest.mark.parametrize("micro", [1, 2, 3, 12])
def test_the_accumulated_gradient_is_that_of_the_whole(untrained_head, micro):
    one = untrained_head(batch_size=12, micro_batch=micro)
    one.begin_round(2, 0, 1)
    reports = [one.accumulate() for _ in range(12 // micro)]
    assert [report.samples for report in reports] == [micro] * (12 // micro)
    blocks = list(blocks_of(0, 2, 0, 1, one.n_blocks))[:12]
    wanted = reference_gradient(one, blocks)
    out = torch.empty(one.numel)
    assert one.gradient(out) is out
    assert (out - wanted).norm() < 1e-6 * wanted.norm()
    assert torch.equal(one.gradient(), out), "asking changes nothing"
    one.accumulate()
    assert not torch.equal(one.gradient(), out)


def test_gradients_of_peers_weighted_by_samples_are_that_of_the_union(untrained_head):
    peers = [untrained_head(micro_batch=size) for size in (1, 3)]
    blocks, total = [], torch.zeros(peers[0].numel)
    for seat, peer in enumerate(peers):
        peer.begin_round(0, seat, 2)
        samples = peer.accumulate().samples + peer.accumulate().samples
        total += peer.gradient() * samples
        blocks += list(blocks_of(0, 0, seat, 2, peer.n_blocks))[:samples]
    wanted = reference_gradient(peers[0], blocks)
    assert (total / 8 - wanted).norm() < 1e-6 * wanted.norm()


def test_a_new_round_forgets_what_was_accumulated_and_a_step_does_not_meet_it(untrained_head):
    one, other = untrained_head(), untrained_head()
    one.begin_round(3, 0, 1)
    one.accumulate()
    for peer in (one, other):
        peer.begin_round(4, 0, 1)
        peer.accumulate()
    assert torch.equal(one.gradient(), other.gradient())
    other.begin_round(5, 0, 1)
    one.begin_round(5, 0, 1)
    one.accumulate()
    one._next_block = 0
    for peer in (one, other):
        peer.set_progress(0)
        peer.step()
    assert one.read().equal(other.read())
    one.accumulate()
    other.accumulate()
    assert one.gradient().equal(other.gradient())


def test_accumulating_takes_no_step_and_frozen_parameters_have_no_gradient(untrained_head):
    one = untrained_head()
    theta = one.read()
    one.model.embedding.weight.requires_grad_(False)
    one._trained = [p for p in one.model.parameters() if p.requires_grad]
    one.accumulate()
    gradient = one.gradient()
    head, *rest = one.tensors()
    assert (head.name, head.start, head.shape) == ("embedding.weight", 0, (256, 32))
    assert (head.matrix, head.decay) == (False, False)
    assert not gradient[: 256 * 32].any()
    assert all(gradient[t.start : t.start + math.prod(t.shape)].any() for t in rest)
    assert torch.equal(one.read(), theta)


def test_tensors_are_the_layout_of_the_vector(trainer):
    one = trainer()
    theta = one.read()
    for info, (name, p) in zip(one.tensors(), one.model.named_parameters(), strict=True):
        assert info.name == name
        stop = info.start + math.prod(info.shape)
        assert torch.equal(theta[info.start : stop].view(info.shape), p)
        assert info.matrix == name.startswith("blocks.")
        assert info.decay
    assert stop == one.numel


def test_a_gradient_that_is_not_finite_is_an_error(trainer):
    one = trainer()
    theta = one.read()
    bad = theta.clone()
    bad[-1] = math.inf
    one.write(bad)
    with pytest.raises(TrainingDiverged):
        one.accumulate()
    one.write(theta)
    one.accumulate()
    one.model.head.weight.grad[0, 0] = math.nan
    with pytest.raises(TrainingDiverged):
        one.gradient()
    one.accumulate()
    assert one.gradient().isfinite().all()


@pytest.mark.parametrize("kind", ["gpt", "gpt2"])
def test_checkpointing_gives_the_same_gradients(untrained_head, tiny, kind):
    model = tiny.model
    if kind != "gpt":
        model = replace(
            tiny.model,
            kind="transformers",
            name=kind,
            overrides={"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
        )
    kept, again = (untrained_head(gradient_checkpointing=on, model=model) for on in (False, True))
    for peer in (kept, again):
        peer.accumulate()
    assert torch.equal(kept.gradient(), again.gradient())


def test_checkpointing_holds_less_for_the_backward_pass(tiny):
    kept, again = (Trainer(replace(tiny, gradient_checkpointing=on)) for on in (False, True))
    held = [
        held_bytes(lambda one=one: one._loss(one.data.train, [0]), one.model.parameters())
        for one in (kept, again)
    ]
    assert held[1] < 0.6 * held[0]


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_a_batch_too_large_for_the_gpu_is_cut_down_in_the_middle_of_a_step(
    untrained_head, monkeypatch, when
):
    """The device is said to hold two sequences; nothing is drawn or trained on twice."""
    model = ModelConfig(  # has dropout, so that the generator counts
        kind="transformers", name="gpt2", layers=1, width=32, heads=2, context=32
    )
    roomy = untrained_head(batch_size=8, micro_batch=2, model=model)
    tight = untrained_head(batch_size=8, model=model)
    loss = tight._loss

    class Burst(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, _):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    def full(tokens, rows):
        result = loss(tokens, rows)
        if len(rows) <= 2:
            return result
        if when == "forward":
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return Burst.apply(result)

    monkeypatch.setattr(tight, "_loss", full)
    for take in ("step", "accumulate", "step"):
        for peer in (roomy, tight):
            torch.manual_seed(1)
            report = getattr(peer, take)()
        assert report.samples == (2 if take == "accumulate" else 8)
    assert torch.equal(roomy.read(), tight.read())
    assert tight.chosen["micro_batch"] == "2: 4 did not fit in the memory of cpu"
    assert "2 of 8 sequences at once" in tight.describe()


def test_a_device_too_small_for_one_sequence_is_one_line(trainer, monkeypatch):
    one = trainer()

    def full(tokens, rows):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(one, "_loss", full)
    with pytest.raises(ModelError, match="too small for one sequence of 32"):
        one.step()
    fixed = trainer(micro_batch=3)
    monkeypatch.setattr(fixed, "_loss", full)
    with pytest.raises(ModelError, match="micro_batch = 3: use 0"):
        fixed.step()


def test_a_small_machine_trains_in_small_pieces(tiny, monkeypatch):
    monkeypatch.setattr("model.trainer.available_bytes", lambda: 10_000_000)
    one = Trainer(replace(tiny, batch_size=100))
    micro, why = one.chosen["micro_batch"].split(": ")
    assert int(micro) in (2, 4, 7, 13)
    assert "0.0 GB are free" in why
    monkeypatch.setattr("model.trainer.available_bytes", lambda: None)
    assert Trainer(tiny).chosen["micro_batch"].startswith("4: the whole batch")


def test_choosing_leaves_the_generator_alone(tiny):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    Trainer(tiny)
    assert torch.equal(torch.get_rng_state(), before)


def test_bf16_is_near_fp32_and_learns(trainer):
    exact, rough = trainer(), trainer(precision="bf16")
    assert exact.chosen["precision"].startswith("fp32")
    assert rough.chosen["precision"] == "bf16: as configured"
    assert "in bf16" in rough.describe()
    for _ in range(30):
        a, b = exact.step().loss, rough.step().loss
    assert a != b
    assert b == pytest.approx(a, rel=0.05)
    assert rough.read().dtype == torch.float32


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


@pytest.mark.parametrize("device", ["abacus", "cuda:99", "mps", "meta"])
def test_a_wrong_device_is_one_line(tiny, device):
    with pytest.raises(ValueError, match=device) as caught:
        Trainer(replace(tiny, device=device))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"batch_size": 0},
        {"eval_blocks": 0},
        {"micro_batch": -1},
        {"micro_batch": 9, "batch_size": 8},
        {"precision": "fp8"},
    ],
)
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
