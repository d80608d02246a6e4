"""From a line in the run file to a model: our own GPT, or any causal LM of `transformers`.

Guaranteed: on one machine and one set of library versions, equal configuration and seed give equal
parameters, bit for bit; all parameters are float32 on the CPU; nothing is fetched from the network
unless `allow_download` says so; no code that comes with a checkpoint is run, no kernel that it or
`overrides` name is fetched, and only safetensors weights are read, never pickles; what is larger
than this machine's memory is refused before it is built. Not guaranteed: equality across machines
or versions; the swarm compares digests and hands its state over instead.

`overrides` come from a stranger as a rule, with the run file. So they reach the fields of the
model's configuration alone, never an argument of the library: `from_pretrained` takes dozens, with
which it reads other files, fetches kernels, which are code, or returns something else.

`transformers` takes seconds to import and most runs do without it, hence the imports in functions.
"""

from __future__ import annotations

import difflib
import os
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


# Some model types ("mamba", for one) have `transformers` fetch kernels and run them where the
# package `kernels` is there. Whoever wants that sets it to YES; a run file of a stranger cannot. It
# is read when `transformers` is imported, which is later, in functions.
os.environ.setdefault("USE_HUB_KERNELS", "NO")

LEAST_BYTES: Final = 20
"""A peer's memory for each parameter: it and its gradient, the state's two vectors, and what is
handed in, in float32. The inner optimizer's moments come on top."""

MOST_LAYERS: Final = 1000
"""Layers are objects of Python as well, which no count of parameters shows."""

_TABLE_COPIES: Final = 3
"""Rotary tables while they are made: the angles, their cosines and their sines."""

# Fields of a configuration that say not what the model is like, but what the library does with it.
_NOT_OURS: Final = frozenset(
    {
        "architectures",
        "auto_map",
        "dtype",
        "model_type",
        "name_or_path",
        "output_attentions",
        "output_hidden_states",
        "per_layer_config",
        "quantization_config",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "transformers_weights",
    }
)


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
        overrides: further fields of the `transformers` configuration, by the names that it has for
            them; `build` refuses others.
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
        if self.layers > MOST_LAYERS:
            raise ModelError(f"model layers = {self.layers} must be at most {MOST_LAYERS}")
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
    angles = config.context * (config.width // config.heads) // 2
    _check_memory(matrices + 2 * config.vocabulary * config.width, 4 * _TABLE_COPIES * angles)
    return GPT(
        layers=config.layers,
        width=config.width,
        heads=config.heads,
        context=config.context,
        vocabulary=config.vocabulary,
    )


def _check_memory(numel: int, tables_bytes: int) -> None:
    """Refuse what would get this process killed, before any memory is taken for it.

    Args:
        numel: parameters.
        tables_bytes: what the model holds besides.
    """
    free, needed = available_bytes(), numel * LEAST_BYTES + tables_bytes
    if free is not None and needed > free:
        tables = (
            f" and {tables_bytes / 1e9:,.1f} GB of tables" if tables_bytes > needed / 10 else ""
        )
        raise ModelError(
            f"a model of {numel / 1e6:,.0f} M parameters{tables} needs {needed / 1e9:,.1f} GB of"
            f" memory at least, and {free / 1e9:,.1f} GB are free here: make layers, width"
            " or context smaller"
        )


def _transformers(config: ModelConfig) -> TransformersModel:
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise ModelError(f"model {config.name!r} needs transformers: {error}") from error
    try:
        model = TransformersModel(_load_transformers(config).train(), config.context)
        with torch.no_grad():  # what can be built cannot always be computed
            model(torch.zeros(1, min(2, config.context), dtype=torch.long))
        return model
    except ModelError:
        raise
    # What the library raises for a name, a file or a field that it does not like is no closed set:
    # whatever torch, safetensors or a constructor says to a value of the wrong type or size.
    except Exception as error:
        raise ModelError(_explain(config, error)) from error


def local_checkpoint(config: ModelConfig) -> Path | None:
    """The folder that `config.name` means, if it is one."""
    folder = Path(config.name).expanduser()
    return folder if config.kind == "transformers" and (folder / "config.json").is_file() else None


def _load_transformers(config: ModelConfig) -> PreTrainedModel:
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = local_checkpoint(config)
    if folder is None and _is_model_type(config.name):
        return _from_config(_checked(config, _shape(config)))
    source, offline = str(folder or config.name), not config.allow_download or folder is not None
    at_random = folder is not None and not any(folder.glob("*.safetensors"))
    if folder is not None and at_random and any(folder.glob("*.bin")):
        raise ModelError(f"{folder} holds pickled weights: convert them to safetensors")
    shape = AutoConfig.from_pretrained(source, local_files_only=offline, trust_remote_code=False)
    _override(config, shape, config.overrides)
    shape = _checked(config, shape)
    if at_random:
        return _from_config(shape)
    inner = AutoModelForCausalLM.from_pretrained(
        source,
        config=shape,
        local_files_only=offline,
        trust_remote_code=False,
        use_safetensors=True,
        dtype=torch.float32,
    )
    return _as_float32(inner)


def _as_float32(inner: PreTrainedModel) -> PreTrainedModel:
    # A checkpoint in bf16 would round each outer update away.
    return inner.to(dtype=torch.float32)  # type: ignore[call-arg, no-any-return]


def _checked(config: ModelConfig, shape: PretrainedConfig) -> PretrainedConfig:
    """The configuration, if it can be trained here, and with nothing in it that names code.

    Raises:
        ModelError: it is quantised, its context is too short, or it is too large for this machine.
    """
    if getattr(shape, "quantization_config", None) is not None:
        raise ModelError(f"{config.name} is quantised, which cannot be trained: use the original")
    limit = getattr(shape, "max_position_embeddings", None)
    if isinstance(limit, int) and config.context > limit:
        raise ModelError(
            f"model context = {config.context} is more than the {limit} positions of {config.name}"
        )
    # A `config.json` may name an attention, which can be a kernel on the hub. With None the library
    # takes torch's own where the model has it ("sdpa"), else the model's own ("eager"). Both reach
    # the configurations inside this one, too.
    shape._attn_implementation = None
    shape._experts_implementation = None
    with torch.device("meta"):
        empty = _make(shape)
    _check_memory(
        sum(p.numel() for p in empty.parameters()),
        sum(b.numel() * b.element_size() for b in empty.buffers()),
    )
    return shape


def _from_config(shape: PretrainedConfig) -> PreTrainedModel:
    return _as_float32(_make(shape))


def _make(shape: PretrainedConfig) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(shape, trust_remote_code=False)  # type: ignore[no-untyped-call, no-any-return]


def _explain(config: ModelConfig, error: Exception) -> str:
    if isinstance(error, OSError) and local_checkpoint(config) is None:
        where = "reachable hub name" if config.allow_download else "hub name in the local cache"
        hint = "" if config.allow_download else "; --allow-download fetches one from the hub"
        return f"model {config.name!r} is no folder, model type or {where}{hint}"
    # Messages run over many lines, the first of which says it; but "for field x:" says too little.
    reason = " ".join(str(error).split("\n\n")[0].split()) or type(error).__name__
    reason = "".join(c if c.isprintable() else "?" for c in reason)  # may quote a stranger
    shown = reason if len(reason) <= 300 else f"{reason[:297]}..."
    return f"model {config.name!r} cannot be built: {shown}"


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
    for name in config.overrides:
        _check_field(config, default, name)
    _check_values(config.overrides)
    # Under the type's own names: of two for one field, the common one would win.
    own = default.attribute_map
    fields = {own.get(name, name): v for name, v in known.items()}
    fields |= {own.get(name, name): v for name, v in config.overrides.items()}
    return kind(**fields)  # all at once, as some fields follow from others


def _override(config: ModelConfig, shape: PretrainedConfig, values: Mapping[str, Any]) -> None:
    """Set fields of a configuration, and of those inside it.

    Raises:
        ModelError: it has no such field, or the field is not for a run file.
    """
    from transformers import PretrainedConfig

    for name, value in values.items():
        _check_field(config, shape, name)
        inside = getattr(shape, name)
        if isinstance(inside, PretrainedConfig) and isinstance(value, Mapping):
            _override(config, inside, value)
        else:
            _check_values({name: value})
            setattr(shape, name, value)


def _check_field(config: ModelConfig, shape: PretrainedConfig, name: str) -> None:
    _check_name(name)
    known = [*shape.to_dict(), *shape.attribute_map]
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f": did you mean {close[0]!r}?" if close else ""
        raise ModelError(f"model overrides: {config.name} has no field {_shown(name)}{hint}")


def _check_values(value: Any) -> None:
    """Look for names that are not for a run file inside a value, too, and for too many layers."""
    if isinstance(value, Mapping):
        for name, part in value.items():
            _check_name(name)
            if "layer" in name and isinstance(part, int) and part > MOST_LAYERS:
                raise ModelError(
                    f"model overrides: {_shown(name)} must be at most {MOST_LAYERS}: use fewer"
                )
            _check_values(part)
    elif isinstance(value, list | tuple):
        for part in value:
            _check_values(part)


def _check_name(name: str) -> None:
    if name in _NOT_OURS or name.startswith("_") or "kernel" in name or "implementation" in name:
        raise ModelError(
            f"model overrides: {_shown(name)} is not for a run file, which says what the model is"
            " like, not how it is loaded or computed: leave it out"
        )


def _shown(name: str) -> str:
    return repr(name if len(name) <= 60 else f"{name[:57]}...")
