from __future__ import annotations

import json
import os
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
    model = build(config, 0)
    needed = LEAST_BYTES * sum(p.numel() for p in model.parameters())
    tables = sum(b.numel() * b.element_size() for b in model.buffers())
    needed += tables if config.kind == "transformers" else tables * 3 // 2  # and the angles
    monkeypatch.setattr("model.builders.available_bytes", lambda: needed)
    build(config, 0)
    monkeypatch.setattr("model.builders.available_bytes", lambda: needed - 1)
    with pytest.raises(ModelError, match="make layers, width or context smaller") as caught:
        build(config, 0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(layers=1, width=1024, heads=1, context=2**24),
        tiny("gpt2", context=2**24, width=1024),
    ],
)
def test_a_long_context_counts_as_memory(config, monkeypatch):
    monkeypatch.setattr("model.builders.available_bytes", lambda: 30 * 2**30)
    with pytest.raises(ModelError, match="context smaller"):
        build(config, 0)


def test_a_checkpoint_that_memory_cannot_hold_is_refused_before_it_is_read(tmp_path, monkeypatch):
    build(tiny("gpt2"), 0).inner.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not read")
    monkeypatch.setattr("model.builders.available_bytes", lambda: 1000)
    with pytest.raises(ModelError, match="GB are free here"):
        build(tiny(str(tmp_path)), 0)


@pytest.mark.parametrize("name", ["n_layer", "num_hidden_layers"])
def test_overrides_reach_the_configuration(name, tmp_path):
    assert len(build(tiny("gpt2", overrides={name: 3}), 0).inner.transformer.h) == 3
    build(tiny("gpt2"), 0).inner.config.save_pretrained(tmp_path)
    assert len(build(tiny(str(tmp_path), overrides={name: 3}), 0).inner.transformer.h) == 3


HOSTILE = [
    {"attn_implementation": "evil/repo@main", "allow_all_kernels": True},
    {"attn_implementation": "kernels-community/x"},
    {"allow_all_kernels": True},
    {"experts_implementation": "deepgemm"},
    {"_attn_implementation": "evil/repo"},
    {"_name_or_path": "evil/repo"},
    {"id2label": {"attn_implementation": "evil/repo"}},
    {"auto_map": {"AutoModelForCausalLM": "evil/repo--code.Model"}},
    {"trust_remote_code": True},
    {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
    {"cache_dir": "/somewhere"},
    {"config": "/somewhere"},
    {"device_map": "meta"},
    {"dtype": "float16"},
    {"torch_dtype": "float16"},
    {"local_files_only": False},
    {"output_loading_info": True},
    {"weights_only": False},
    {"save_pretrained": 1},
    {"model_type": "llama"},
    {"no_such_field": 1},
    {"return_dict": False},
    {"n_layer": 10**7},
    {"num_hidden_layers": 10**7},
    {"n" * 10_000: 1},
]


@pytest.fixture
def fetched(monkeypatch):
    """What is fetched from the hub as code: nothing, or the test fails."""
    import transformers.integrations.hub_kernels as hub_kernels
    import transformers.modeling_utils as modeling_utils

    def refuse(*arguments, **settings):
        calls.append(arguments)
        raise ValueError("no such kernel")

    calls = []
    monkeypatch.setattr(hub_kernels, "is_kernels_available", lambda *_: True)
    monkeypatch.setattr(modeling_utils, "is_kernels_available", lambda *_: True)
    monkeypatch.setattr(hub_kernels, "get_kernel", refuse)
    return calls


@pytest.mark.parametrize("overrides", HOSTILE, ids=lambda overrides: next(iter(overrides))[:30])
@pytest.mark.parametrize("kind", ["type", "configuration", "weights"])
def test_overrides_reach_nothing_but_the_configuration(kind, overrides, tmp_path, fetched):
    name = "gpt2"
    if kind != "type":
        name, inner = str(tmp_path), build(tiny("gpt2"), 0).inner
        (inner if kind == "weights" else inner.config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="overrides") as caught:
        build(tiny(name, overrides=overrides), 0)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert not fetched


@pytest.mark.parametrize(
    "overrides",
    [
        {"n_layer": "x"},
        {"n_layer": 1.5},
        {"resid_pdrop": 2.0},
        {"activation_function": "nonsense"},
        {"n_head": 0},
        {"vocab_size": -1},
        {"vocab_size": 10**30},
        {"layer_norm_epsilon": [1]},
    ],
    ids=str,
)
@pytest.mark.parametrize("folder", [False, True])
def test_an_override_that_the_library_refuses_is_one_line(overrides, folder, tmp_path):
    name = "gpt2"
    if folder:
        build(tiny("gpt2"), 0).inner.config.save_pretrained(tmp_path)
        name = str(tmp_path)
    with pytest.raises(ModelError) as caught:
        build(tiny(name, overrides=overrides), 0)
    assert "\n" not in str(caught.value)


def test_what_can_be_built_but_not_computed_is_one_line():
    with pytest.raises(ModelError, match="cannot be built") as caught:
        build(tiny("mixtral", overrides={"num_local_experts": 2, "num_experts_per_tok": 3}), 0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("field", ["attn_implementation", "_attn_implementation"])
def test_a_checkpoint_cannot_name_a_kernel(field, weights, tmp_path, fetched):
    inner = build(tiny("llama"), 0).inner
    (inner if weights else inner.config).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: "evil/repo@main"}))
    loaded = build(tiny(str(tmp_path)), 0)
    assert not fetched
    assert loaded.inner.config._attn_implementation == "sdpa"


def test_code_that_comes_with_a_checkpoint_is_not_run(tmp_path):
    build(tiny("gpt2"), 0).inner.config.save_pretrained(tmp_path)
    path, run = tmp_path / "config.json", tmp_path / "run"
    code = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": code}))
    (tmp_path / "code.py").write_text(f"open({str(run)!r}, 'w')")
    build(tiny(str(tmp_path)), 0)
    assert not run.exists()


def test_quantised_weights_are_not_trained(tmp_path):
    build(tiny("gpt2"), 0).inner.config.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    how = {"quant_method": "fp8"}
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": how}))
    with pytest.raises(ModelError, match="quantised"):
        build(tiny(str(tmp_path)), 0)


@pytest.mark.slow
def test_models_do_not_bring_kernels_of_their_own():
    code = (
        "import model.builders\n"
        "from transformers.integrations import hub_kernels\n"
        "assert not hub_kernels._kernels_enabled\n"
    )
    clean = {name: value for name, value in os.environ.items() if name != "USE_HUB_KERNELS"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=clean, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


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
        {"layers": 1001},
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
