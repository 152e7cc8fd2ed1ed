"""Reading a sentence encoder of the BERT family (config.json, safetensors, and sentence-transformers' modules).

Nothing is written. Whatever does not fit ends in one sentence that names the file or the field and the remedy.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge.configuration import read_config, read_json
from forge.tensors import Tensors
from wire.errors import ConfigError
from wire.manifest import Pooling

SUPPORTED = {
    "BertModel": "bert", "BertForMaskedLM": "bert", "RobertaModel": "roberta", "RobertaForMaskedLM": "roberta",
    "XLMRobertaModel": "roberta", "XLMRobertaForMaskedLM": "roberta",
}  # fmt: skip
"""Architectures, and the prefix that tensors have in a checkpoint with a head."""

ACTIVATIONS = {"gelu": "BiasGelu", "gelu_new": "FastGelu", "gelu_pytorch_tanh": "FastGelu"}
"""`hidden_act`, and the operation that computes it: by the error function, or by its approximation with tanh."""

POOLINGS = {"pooling_mode_mean_tokens": Pooling.MEAN, "pooling_mode_cls_token": Pooling.CLS}
"""The modes of sentence-transformers' Pooling that are read; exactly one must be on."""

MODULES = ("Transformer", "Pooling", "Normalize")


@dataclass(frozen=True, slots=True)
class EncoderArchitecture:
    """The numbers of an encoder; see the Hugging Face `BertConfig` for the source of the names."""

    hidden_size: int
    layers: int
    heads: int
    mlp_size: int
    vocab_size: int
    types: int
    """Rows of the table of token types; every token is of the first."""
    positions: int
    first_position: int
    """Row of the table of positions that the first token has: RoBERTa leaves the rows up to the padding's free."""
    norm_epsilon: float
    activation: str
    max_tokens: int
    pooling: Pooling
    normalised: bool
    prefix: str


class EncoderCheckpoint(Tensors):
    """An open checkpoint of an encoder."""

    def __init__(self, directory: Path) -> None:
        """Raises ConfigError when `directory` is no checkpoint that this version can import."""
        self.architecture = read_encoder(directory)
        super().__init__(directory)


def is_encoder(directory: Path) -> bool:
    """Whether config.json names an encoder; what it names otherwise is not judged."""
    return bool(_known(read_config(directory / "config.json")))


def read_encoder(directory: Path) -> EncoderArchitecture:
    """Parse the JSON files beside the weights. Raises ConfigError naming the field."""
    path = directory / "config.json"
    config = read_config(path)
    kind = config.get("position_embedding_type") or "absolute"
    if kind != "absolute" or config.get("is_decoder"):
        raise ConfigError(f"{path} asks for {kind} positions or a decoder; use an encoder with absolute positions")
    activation = config.get("hidden_act", "gelu")
    if activation not in ACTIVATIONS:
        raise ConfigError(f"activation {activation!r} is not supported; use one of {sorted(ACTIVATIONS)}")
    pooling, normalised, longest = read_modules(directory)
    try:
        return _architecture(config, pooling, normalised=normalised, longest=longest)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{path}: field {error} is missing or wrong; take config.json from the same export"
        ) from error


def read_modules(directory: Path) -> tuple[Pooling, bool, int | None]:
    """Pooling, whether embeddings are normalised, and the longest text, as sentence-transformers keeps them.

    A checkpoint without modules.json gets what sentence-transformers would give it: the mean, not normalised.
    """
    if not (directory / "modules.json").is_file():
        return Pooling.MEAN, False, None
    kinds: dict[str, str] = {}
    for module in _modules(directory / "modules.json"):
        name = str(module.get("type", "")).rsplit(".", 1)[-1]
        if name not in MODULES or name in kinds:
            raise ConfigError(f"module {name or 'without a type'!r} is not supported; use a model of {MODULES}")
        kinds[name] = Path(str(module.get("path", ""))).name
    pooling = _pooling(directory / kinds["Pooling"] / "config.json") if "Pooling" in kinds else Pooling.MEAN
    sentences = directory / "sentence_bert_config.json"
    longest = read_config(sentences).get("max_seq_length") if sentences.is_file() else None
    return pooling, "Normalize" in kinds, longest if isinstance(longest, int) else None


def _known(config: dict[str, Any]) -> list[str]:
    names = config.get("architectures") or []
    return [name for name in names if name in SUPPORTED] if isinstance(names, list) else []


def _modules(path: Path) -> list[dict[str, Any]]:
    listed = read_json(path)
    if not isinstance(listed, list) or not all(isinstance(module, dict) for module in listed):
        raise ConfigError(f"{path} is no list of modules; take it from the same export")
    return listed


def _pooling(path: Path) -> Pooling:
    config = read_config(path)
    modes = [name for name, on in config.items() if name.startswith("pooling_mode_") and on is True]
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise ConfigError(f"{path} pools by {modes or 'nothing'}; supported is one of {sorted(POOLINGS)}")
    return POOLINGS[modes[0]]


def _architecture(
    config: dict[str, Any], pooling: Pooling, *, normalised: bool, longest: int | None
) -> EncoderArchitecture:
    family = SUPPORTED[_known(config)[0]]
    positions = int(config["max_position_embeddings"])
    first = int(config.get("pad_token_id", 1)) + 1 if family == "roberta" else 0
    if not 0 <= first < positions or int(config["hidden_size"]) % int(config["num_attention_heads"]):
        raise ValueError("max_position_embeddings, pad_token_id or num_attention_heads")
    return EncoderArchitecture(
        hidden_size=int(config["hidden_size"]),
        layers=int(config["num_hidden_layers"]),
        heads=int(config["num_attention_heads"]),
        mlp_size=int(config["intermediate_size"]),
        vocab_size=int(config["vocab_size"]),
        types=int(config["type_vocab_size"]),
        positions=positions,
        first_position=first,
        norm_epsilon=float(config["layer_norm_eps"]),
        activation=ACTIVATIONS[config.get("hidden_act", "gelu")],
        max_tokens=min(longest or positions, positions - first),
        pooling=pooling,
        normalised=normalised,
        prefix=family,
    )
