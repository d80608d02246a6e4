from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model.builders import LEAST_BYTES, ModelConfig, ModelError, build
from model.tokens import ByteTokenizer, CheckpointTokenizer, tokenizer_for

ROOT = Path(__file__).parents[2]


def tiny(name: str, **fields: object) -> ModelConfig:
    return ModelConfig(
        **{"kind": "transformers", "name": name, "layers": 2, "width": 32, "heads": 2,
           "context": 32, **fields}  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.mark.parametrize("config", [ModelConfig(layers=1, width=32, heads=2), tiny("gpt2")])
def test_the_seed_decides_the_weights_and_nothing_else_does(config):
    torch.manual_seed(123)
    before = torch.get_rng_state()
    one = build(config, 7)
    assert torch.equal(torch.get_rng_state(), before), "the caller's generator was used up"
    torch.manual_seed(999)
    two, other = build(config, 7), build(config, 8)
    assert all(map(torch.equal, one.parameters(), two.parameters()))
    assert not all(map(torch.equal, one.parameters(), other.parameters()))


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt"])
def test_a_model_type_is_built_in_the_shape_asked_for(name):
    model = build(tiny(name), 0)
    assert model(torch.zeros(2, 5, dtype=torch.long)).shape == (2, 5, 256)
    assert model.vocabulary == 256
    assert sum(p.numel() for p in model.parameters()) < 60_000
    assert model.hidden_matrices()
    assert all(256 not in p.shape for p in model.hidden_matrices())


@pytest.mark.parametrize("config", [ModelConfig(layers=3, width=64, heads=2), tiny("llama")])
def test_a_model_that_memory_cannot_hold_is_refused_before_it_is_built(config, monkeypatch):
    numel = sum(p.numel() for p in build(config, 0).parameters())
    monkeypatch.setattr("model.builders.available_bytes", lambda: numel * LEAST_BYTES)
    build(config, 0)
    monkeypatch.setattr("model.builders.available_bytes", lambda: numel * LEAST_BYTES - 1)
    with pytest.raises(ModelError, match="make layers or width smaller") as caught:
        build(config, 0)
    assert "\n" not in str(caught.value)


def test_overrides_reach_the_configuration():
    assert build(tiny("llama", overrides={"num_key_value_heads": 1}), 0).inner.config.num_key_value_heads == 1  # noqa: E501  # fmt: skip


def test_a_checkpoint_folder_gives_its_weights_in_float32(tmp_path):
    saved = build(tiny("gpt2"), 3)
    saved.inner.to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = build(tiny(str(tmp_path), layers=9), 0)  # the checkpoint's shape wins
    assert all(p.dtype == torch.float32 for p in loaded.parameters())
    assert all(
        torch.equal(a.float(), b)
        for a, b in zip(saved.parameters(), loaded.parameters(), strict=True)
    )


def test_a_folder_with_only_a_configuration_starts_at_random(tmp_path):
    build(tiny("gpt2"), 3).inner.config.save_pretrained(tmp_path)
    one, two = build(tiny(str(tmp_path)), 1), build(tiny(str(tmp_path)), 2)
    assert not all(map(torch.equal, one.parameters(), two.parameters()))


def test_pickled_weights_are_not_read(tmp_path):
    build(tiny("gpt2"), 3).inner.config.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(ModelError, match="safetensors"):
        build(tiny(str(tmp_path)), 0)


def test_a_damaged_checkpoint_is_one_line(tmp_path):
    build(tiny("gpt2"), 3).inner.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{ not json")
    with pytest.raises(ModelError) as caught:
        build(tiny(str(tmp_path)), 0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["no-such-type", "no/such-model", "/no/such/folder", "bad name!"])
def test_an_unknown_name_is_one_line(name):
    with pytest.raises(ModelError) as caught:
        build(tiny(name), 0)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_context_beyond_the_checkpoint_is_refused(tmp_path):
    build(tiny("gpt2"), 0).inner.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="context = 64"):
        build(tiny(str(tmp_path), context=64), 0)


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "rnn"},
        {"layers": 0},
        {"width": 33},
        {"context": -1},
        {"name": "gpt2"},
        {"kind": "transformers"},
    ],
)
def test_a_wrong_field_is_named(fields):
    with pytest.raises(ModelError, match=next(iter(fields))):
        ModelConfig(**fields)


def test_a_checkpoint_brings_its_tokenizer(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"[UNK]": 0, "hello": 1, "world": 2, "<end>": 3}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="[UNK]", eos_token="<end>"
    ).save_pretrained(tmp_path)
    build(tiny("gpt2"), 0).inner.save_pretrained(tmp_path)
    tokenizer = tokenizer_for(tiny(str(tmp_path)))
    assert isinstance(tokenizer, CheckpointTokenizer)
    assert tokenizer.encode(b"hello world hello").tolist() == [1, 2, 1, 3]
    assert tokenizer.vocabulary == 4


def test_bytes_otherwise():
    tokenizer = tokenizer_for(tiny("gpt2"))
    assert isinstance(tokenizer, ByteTokenizer)
    ids = tokenizer.encode("né".encode())
    assert ids.tolist() == [110, 195, 169, 0]
    assert tokenizer.decode(ids[:-1].tolist()) == "né"


def test_the_default_model_needs_neither_transformers_nor_dynamo():
    code = (
        "import sys, torch, model.trainer as t\n"
        "from model.optimizers import InnerOptimizer, OptimizerConfig\n"
        "m = t.build(t.ModelConfig(layers=1, width=16, heads=2), 0)\n"
        "o = InnerOptimizer(m.parameters(), m.hidden_matrices(), OptimizerConfig())\n"
        "m(torch.zeros(1, 4, dtype=torch.long)).sum().backward(); o.clip(); o.step(0)\n"
        "assert not {'transformers', 'torch._dynamo'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
