"""From a line in the run file to a model: our own GPT, or any causal LM of `transformers`.

Guaranteed: on one machine and one set of library versions, equal configuration and seed give equal
parameters, bit for bit; all parameters are float32 on the CPU; nothing is fetched from the network
unless `allow_download` says so; no code that comes with a checkpoint is run, and only safetensors
weights are read, never pickles. Not guaranteed: equality across machines or versions; the swarm
compares digests and hands its state over instead.

`transformers` takes seconds to import and most runs do without it, hence the imports in functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import torch
from torch import Tensor, nn

from model.gpt import GPT
from model.headroom import available_bytes

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


LEAST_BYTES: Final = 20
"""A peer's memory for each parameter: it and its gradient, the state's two vectors, and what is
handed in, in float32. The inner optimizer's moments come on top."""


class ModelError(ValueError):
    """The model cannot be built as asked: one line, what is wrong and how to mend it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Which model a run trains.

    Args:
        kind: "gpt" (ours) or "transformers".
        layers: blocks; ignored where a checkpoint brings its own shape, as are width, heads and
            vocabulary.
        width: of the residual stream, a multiple of `2 * heads`.
        heads: of attention.
        context: tokens in a training sequence.
        vocabulary: number of different tokens; 256 for bytes.
        name: with "transformers", in this order: a folder with a `config.json` (and weights as
            safetensors, or none to start at random), a model type such as "gpt2" or "llama"
            (started at random in the shape given here), or a hub name such as "org/model".
        overrides: further fields of the `transformers` configuration.
        allow_download: may a hub name be fetched; otherwise only the local cache is looked at.

    Raises:
        ModelError: a value out of range.
    """

    kind: Literal["gpt", "transformers"] = "gpt"
    layers: int = 4
    width: int = 96
    heads: int = 3
    context: int = 128
    vocabulary: int = 256
    name: str = ""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    allow_download: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ("gpt", "transformers"):
            raise ModelError(f"model kind {self.kind!r} is unknown: use 'gpt' or 'transformers'")
        for name in ("layers", "width", "heads", "context", "vocabulary"):
            if (value := getattr(self, name)) < 1:
                raise ModelError(f"model {name} = {value} must be at least 1")
        if self.width % (2 * self.heads):
            raise ModelError(
                f"model width = {self.width} must be a multiple of 2 * heads = {2 * self.heads}"
            )
        if self.kind == "gpt" and (self.name or self.overrides):
            raise ModelError("model name and overrides need kind = 'transformers'")
        if self.kind == "transformers" and not self.name:
            raise ModelError("model kind 'transformers' needs a name: a model type or a folder")


class TransformersModel(nn.Module):
    """A causal LM of `transformers` behind the same face as our GPT.

    Args:
        inner: the model.
        context: the longest sequence it will be given.
    """

    def __init__(self, inner: PreTrainedModel, context: int) -> None:
        super().__init__()
        self.inner = inner
        self.context = context
        embedding = inner.get_input_embeddings().weight
        assert isinstance(embedding, Tensor)
        self.vocabulary = embedding.shape[0]

    def hidden_matrices(self) -> list[nn.Parameter]:
        """All 2-D parameters that are neither an embedding nor the head."""
        outer = {id(m.weight) for m in self.inner.modules() if isinstance(m, nn.Embedding)}
        head: nn.Module | None = self.inner.get_output_embeddings()  # type: ignore[no-untyped-call]
        outer |= {id(p) for p in head.parameters()} if head is not None else set()
        return [p for p in self.inner.parameters() if p.ndim == 2 and id(p) not in outer]

    def checkpoint_activations(self) -> None:
        """Keep only what goes into each layer while training, and compute the rest again.

        Raises:
            ModelError: this kind of model cannot.
        """
        # The second name is that of older versions; newer ones warn of it.
        enable = getattr(
            self.inner, "activation_checkpointing_enable", self.inner.gradient_checkpointing_enable
        )
        try:
            enable({"use_reentrant": False})
        except ValueError as error:
            kind = type(self.inner).__name__
            raise ModelError(f"{kind} has no gradient checkpointing: switch it off") from error

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Predict the next token at every position.

        Args:
            tokens_BT: int64 in [0, V).

        Returns:
            (B, T, V) logits.
        """
        return self.inner(input_ids=tokens_BT, use_cache=False).logits  # type: ignore[no-any-return]


LanguageModel: TypeAlias = GPT | TransformersModel


def build(config: ModelConfig, seed: int) -> LanguageModel:
    """Make the model.

    Args:
        config: what to build.
        seed: of the initial weights, where they are not loaded.

    Returns:
        A module on the CPU, float32, in training mode; `forward(tokens_BT)` gives logits_BTV.

    Raises:
        ModelError: unknown name, unreadable checkpoint, a shape the library refuses, or one that
            this machine has no memory for.
    """
    # Constructors of torch and `transformers` draw from the global generator: borrow it and give it
    # back as it was. Only the CPU's: nothing is built on a GPU.
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        return _gpt(config) if config.kind == "gpt" else _transformers(config)
    finally:
        torch.set_rng_state(before)


def _gpt(config: ModelConfig) -> GPT:
    # Not counted on torch's meta device: that imports torch._dynamo, 2.6 s of every peer's start.
    matrices = 12 * config.layers * config.width**2
    _check_memory(matrices + 2 * config.vocabulary * config.width)
    return GPT(
        layers=config.layers,
        width=config.width,
        heads=config.heads,
        context=config.context,
        vocabulary=config.vocabulary,
    )


def _check_memory(numel: int) -> None:
    """Refuse what would get this process killed, before any memory is taken for it."""
    free = available_bytes()
    if free is not None and numel * LEAST_BYTES > free:
        raise ModelError(
            f"a model of {numel / 1e6:,.0f} M parameters needs {numel * LEAST_BYTES / 1e9:,.1f} GB"
            f" of memory at least, and {free / 1e9:,.1f} GB are free here: make layers or width"
            " smaller"
        )


def _transformers(config: ModelConfig) -> TransformersModel:
    inner = _load_transformers(config)
    limit = getattr(inner.config, "max_position_embeddings", None)
    if limit is not None and config.context > limit:
        raise ModelError(
            f"model context = {config.context} is more than the {limit} positions of {config.name}"
        )
    inner.to(dtype=torch.float32)  # type: ignore[call-arg]  # a checkpoint in bf16 would round each outer update away
    return TransformersModel(inner.train(), config.context)


def local_checkpoint(config: ModelConfig) -> Path | None:
    """The folder that `config.name` means, if it is one."""
    folder = Path(config.name).expanduser()
    return folder if config.kind == "transformers" and (folder / "config.json").is_file() else None


def _load_transformers(config: ModelConfig) -> PreTrainedModel:
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise ModelError(f"model {config.name!r} needs transformers: {error}") from error

    folder = local_checkpoint(config)
    source = str(folder or config.name)
    # What the library raises for a name, a file or a field it does not like. Its messages run over
    # many lines, the first of which says it.
    try:
        if folder is None and _is_model_type(config.name):
            shape = _shape(config)
            return _from_config(shape)
        if folder is not None and not any(folder.glob("*.safetensors")):
            if any(folder.glob("*.bin")):
                raise ModelError(f"{folder} holds pickled weights: convert them to safetensors")
            shape = AutoConfig.from_pretrained(source, local_files_only=True, **config.overrides)
            return _from_config(shape)
        return AutoModelForCausalLM.from_pretrained(
            source,
            local_files_only=not config.allow_download,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,
            **config.overrides,
        )
    except ModelError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise ModelError(_explain(config, error)) from error


def _from_config(shape: PretrainedConfig) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    def make() -> PreTrainedModel:
        return AutoModelForCausalLM.from_config(shape)  # type: ignore[no-untyped-call, no-any-return]

    with torch.device("meta"):
        numel = sum(p.numel() for p in make().parameters())
    _check_memory(numel)
    return make()


def _explain(config: ModelConfig, error: Exception) -> str:
    if isinstance(error, OSError) and local_checkpoint(config) is None:
        hint = "" if config.allow_download else " (allow_download is off, so only the cache counts)"
        return f"model {config.name!r} is no folder, model type or reachable hub name{hint}"
    reason = next(iter(str(error).splitlines()), "") or type(error).__name__
    return f"model {config.name!r} cannot be built: {reason}"


def _is_model_type(name: str) -> bool:
    from transformers import CONFIG_MAPPING

    return name in CONFIG_MAPPING


def _shape(config: ModelConfig) -> PretrainedConfig:
    """The configuration of a model type in the size that the run file asks for.

    Model types spell the same thing differently; `attribute_map` translates the common names, and
    a field that the type does not have is left out.
    """
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[config.name]
    default = kind()
    wanted: dict[str, Any] = {
        "num_hidden_layers": config.layers,
        "hidden_size": config.width,
        "intermediate_size": 4 * config.width,
        "ffn_dim": 4 * config.width,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.heads,
        "head_dim": config.width // config.heads,
        "vocab_size": config.vocabulary,
        "max_position_embeddings": config.context,
        # The default ids belong to the type's own tokenizer and may lie outside our vocabulary.
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    known = {name: value for name, value in wanted.items() if hasattr(default, name)}
    return kind(**{**known, **config.overrides})
