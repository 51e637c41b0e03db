"""Safe loading of released weight files, and conversion of their state dicts: CCT, the authors' ViT, the JAX ViT."""

import argparse
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from ..utils.text import format_list

logger = logging.getLogger(__name__)

TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".tar")
STATE_DICT_KEYS = ("state_dict_ema", "state_dict", "model")
PREFIXES = ("module.",)
FORMATS = {
    "cct": "Compact Transformer of the authors or of the Compact-Transformers project",
    "vit": "ViT of the authors",
    "vit-jax": "original ViT in JAX",
}


def load_released_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """Load the tensors of a weight file. No code in the file is executed.

    Args:
        path: `.npz`, `.safetensors`, or a file of torch: `.pth`, `.pth.tar`, `.pt`, `.bin`. From a training checkpoint
            only the weights are loaded, those of the moving average (`state_dict_ema`) if present.

    Returns:
        Tensors on the CPU by their names in the file. A prefix `module.` of all names is removed.

    Raises:
        ValueError: The file does not exist, has an unsupported suffix, is corrupted, contains other objects than
            tensors, or requires unpickling of arbitrary objects.
    """
    path = Path(path)
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist"
        raise ValueError(f"{path} {found}. Use the path of a downloaded weight file.")
    suffix = path.suffix.lower()
    if suffix not in (".npz", ".safetensors", *TORCH_SUFFIXES):
        raise ValueError(
            f"{path.name} must end in .npz, .safetensors, .pth, .pth.tar, .pt or .bin, got "
            f"{suffix or 'no suffix'!r}. Rename the file to match its format."
        )
    read = {".npz": _read_npz, ".safetensors": load_file}.get(suffix, _read_torch)
    try:
        content = read(path)
    except Exception as error:  # readers raise many types of errors for a corrupted file
        raise ValueError(_format_read_error(path, error)) from error
    return _extract_state_dict(path, content)


def detect_format(weights: Mapping[str, torch.Tensor]) -> str:
    """Detect the released format from the tensor names.

    Returns:
        `"cct"`, `"vit"` or `"vit-jax"`, the keys of `FORMATS`.

    Raises:
        ValueError: The format is unknown.
    """
    prefixes_by_format = {
        "cct": ("tokenizer.conv_layers.", "classifier.blocks."),
        "vit": ("transformer.encoder.", "transformer.embeddings."),
        "vit-jax": ("Transformer/", "embedding/"),
    }
    for name, prefixes in prefixes_by_format.items():
        if any(key.startswith(prefixes) for key in weights):
            return name
    is_converted = any(key.startswith(("vit.", "cct.")) for key in weights)
    hint = " These are names of transformers, so no conversion is needed: use from_pretrained." if is_converted else ""
    raise ValueError(
        f"The format of these weights is unknown. Supported: {'; '.join(FORMATS.values())}. Tensors in the file: "
        f"{format_list(sorted(weights), formatter=str)}.{hint}"
    )


@dataclass
class ConvertedStateDict:
    """Result of `convert_state_dict`.

    Attributes:
        tensors: Tensors by their names in the model.
        original_names: Names in the file by names in the model.
        problems: One line for each tensor that cannot be converted.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    original_names: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def convert_state_dict(weight_format: str, weights: Mapping[str, torch.Tensor]) -> ConvertedStateDict:
    """Convert the tensors of a released format to the names and shapes of the models, in float32.

    Args:
        weight_format: Result of `detect_format`.
        weights: Result of `load_released_weights`.

    Returns:
        The converted tensors. `problems` has one line for each tensor without a matching parameter or with a wrong
        dtype or rank.
    """
    result = ConvertedStateDict()
    for original_name, tensor in weights.items():
        # The module that contains ScoreNet in the authors' ViT is unknown, so nested names are accepted.
        flat_name = _NESTED_SCORENET.sub(r"\1\2", original_name)
        name = _translate(flat_name, NAME_MAPS[weight_format])
        if name is None:
            result.problems.append(f"{original_name}: no matching parameter{_format_hint(original_name)}")
        elif name in result.tensors:
            result.problems.append(f"{original_name}: the same parameter as {result.original_names[name]}")
        elif not tensor.is_floating_point():
            result.problems.append(f"{original_name}: floating-point numbers expected, got {tensor.dtype}")
        else:
            result.original_names[name] = original_name
            tensor = tensor.float()
            if weight_format == "vit-jax":
                tensor = _convert_jax_tensor(original_name, tensor)
            result.tensors[name] = tensor.contiguous()
    if weight_format == "cct":
        _fuse_qkv(result)
    return result


def get_original_name(weight_format: str, name: str) -> str:
    """Return the name of a parameter in a released format, or the name itself if the format has no such tensor."""
    return _translate(name, {new: original for original, new in NAME_MAPS[weight_format].items()}) or name


def _read_torch(path: Path) -> object:
    # Checkpoints of timm contain the parsed arguments. A Namespace only stores attributes, so it is safe.
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _read_npz(path: Path) -> dict[str, torch.Tensor]:
    with np.load(path, allow_pickle=False) as archive:
        return {name: _to_tensor(archive[name]) for name in archive.files}


def _to_tensor(array: np.ndarray) -> torch.Tensor:
    if array.dtype.kind == "V" and array.dtype.itemsize == 2:  # numpy stores bfloat16 as two raw bytes
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _format_read_error(path: Path, error: Exception) -> str:
    text = str(error)
    unsafe_global = re.search(r"GLOBAL (\S+)", text)
    if unsafe_global or "allow_pickle" in text:
        content = f"the Python object {unsafe_global[1]}" if unsafe_global else "pickled Python objects"
        return (
            f"{path.name} was not loaded: it contains {content}, and unpickling could execute code from the file. If "
            "you trust its source, load it in an isolated environment and save only the tensors as .safetensors."
        )
    reason = next(iter(text.splitlines()), "") or type(error).__name__
    return (
        f"{path.name} cannot be read as {path.suffix}: {reason} The file may be corrupted, truncated or of another "
        "format."
    )


def _extract_state_dict(path: Path, content: object) -> dict[str, torch.Tensor]:
    while isinstance(content, Mapping):
        found = [name for name in STATE_DICT_KEYS if isinstance(content.get(name), Mapping)]
        if not found:
            break
        if len(found) > 1:
            logger.warning("%s contains %s: using %s.", path.name, " and ".join(found), found[0])
        content = content[found[0]]
    if not isinstance(content, Mapping) or not content:
        content_type = "an empty one" if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(f"{path.name} must contain a state dict of named tensors, got {content_type}.")
    other = [name for name, value in content.items() if not (isinstance(name, str) and torch.is_tensor(value))]
    if other:
        raise ValueError(
            f"{path.name} must contain only tensors, at the top level or under {', '.join(STATE_DICT_KEYS)}; found "
            f"other objects: {format_list(other, 10, str)}."
        )
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in content):
            content = {name.removeprefix(prefix): tensor for name, tensor in content.items()}
    return dict(content)


def _weight_and_bias(*modules: tuple[str, str], leaves: tuple[str, str] = (".weight", ".bias")) -> dict[str, str]:
    """Map weight and bias of modules. `leaves` are the format's names of weight and bias."""
    return {
        original + leaf: new + name
        for original, new in modules
        for leaf, name in zip(leaves, (".weight", ".bias"), strict=True)
    }


# Names in the file to names in the model. {n} is an index.
_block, _layer = "classifier.blocks.{n}", "cct.layers.{n}"
_CCT = {
    **_weight_and_bias(("tokenizer.conv_layers.{n}.0", "cct.embeddings.tokenizer.layers.{n}")),
    "classifier.positional_emb": "cct.embeddings.position_embeddings",
    "classifier.class_emb": "cct.embeddings.cls_token",
    **_weight_and_bias(
        (f"{_block}.pre_norm", f"{_layer}.pre_norm"),
        (f"{_block}.self_attn.proj", f"{_layer}.attention.proj"),
        (f"{_block}.norm1", f"{_layer}.norm1"),
        (f"{_block}.linear1", f"{_layer}.linear1"),
        (f"{_block}.linear2", f"{_layer}.linear2"),
        (f"{_block}.small_h_fc", f"{_layer}.scorenet.classifier"),
        (f"{_block}.small_h_attention_pool", f"{_layer}.scorenet.attention"),
        ("classifier.norm", "cct.norm"),
        ("classifier.attention_pool", "cct.attention_pool"),
        ("classifier.fc", "classifier"),
    ),
    **{
        f"{_block}.self_attn.{part}.weight": f"{_layer}.attention.{part}.weight"
        for part in ("qkv", "query", "key", "value")
    },
}
_block, _layer = "transformer.encoder.layer.{n}", "vit.layers.{n}"
_VIT = {
    "transformer.embeddings.cls_token": "vit.embeddings.cls_token",
    "transformer.embeddings.position_embeddings": "vit.embeddings.position_embeddings",
    **_weight_and_bias(
        ("transformer.embeddings.patch_embeddings", "vit.embeddings.patch_embeddings.projection"),
        (f"{_block}.attention.query", f"{_layer}.attention.q_proj"),
        (f"{_block}.attention.key", f"{_layer}.attention.k_proj"),
        (f"{_block}.attention.value", f"{_layer}.attention.v_proj"),
        (f"{_block}.attention.out", f"{_layer}.attention.o_proj"),
        (f"{_block}.attention_norm", f"{_layer}.layernorm_before"),
        (f"{_block}.ffn_norm", f"{_layer}.layernorm_after"),
        (f"{_block}.ffn.fc1", f"{_layer}.mlp.fc1"),
        (f"{_block}.ffn.fc2", f"{_layer}.mlp.fc2"),
        (f"{_block}.small_h_fc", f"{_layer}.scorenet.classifier"),
        (f"{_block}.small_h_attention_pool", f"{_layer}.scorenet.attention"),
        ("transformer.encoder.encoder_norm", "vit.layernorm"),
        ("head", "classifier"),
    ),
}
_block = "Transformer/encoderblock_{n}"
_attention = f"{_block}/MultiHeadDotProductAttention_1"
_VIT_JAX = {
    "cls": "vit.embeddings.cls_token",
    "Transformer/posembed_input/pos_embedding": "vit.embeddings.position_embeddings",
    **_weight_and_bias(
        ("embedding", "vit.embeddings.patch_embeddings.projection"),
        (f"{_attention}/query", f"{_layer}.attention.q_proj"),
        (f"{_attention}/key", f"{_layer}.attention.k_proj"),
        (f"{_attention}/value", f"{_layer}.attention.v_proj"),
        (f"{_attention}/out", f"{_layer}.attention.o_proj"),
        (f"{_block}/MlpBlock_3/Dense_0", f"{_layer}.mlp.fc1"),
        (f"{_block}/MlpBlock_3/Dense_1", f"{_layer}.mlp.fc2"),
        ("head", "classifier"),
        leaves=("/kernel", "/bias"),
    ),
    **_weight_and_bias(
        (f"{_block}/LayerNorm_0", f"{_layer}.layernorm_before"),
        (f"{_block}/LayerNorm_2", f"{_layer}.layernorm_after"),
        ("Transformer/encoder_norm", "vit.layernorm"),
        leaves=("/scale", "/bias"),
    ),
}
NAME_MAPS = {"cct": _CCT, "vit": _VIT, "vit-jax": _VIT_JAX}


def _translate(name: str, name_map: Mapping[str, str]) -> str | None:
    if name in name_map and "{n}" not in name:
        return name_map[name]
    # With leading zeros, two names would be translated to the same one.
    if number := re.search(r"(?<=[._])(0|[1-9]\d{0,3})(?=[./])", name):
        template = name_map.get(f"{name[: number.start()]}{{n}}{name[number.end() :]}")
        return template and template.replace("{n}", number[0])
    return None


def _format_hint(original_name: str) -> str:
    if original_name.startswith("pre_logits/"):
        return " (a layer before the head in weights for ImageNet-21k, which ViT in transformers does not have)"
    return ""


def _convert_jax_tensor(original_name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Convert (in, out) to (out, in) with flattened heads, and HWIO to OIHW. Tensors of other ranks do not change."""
    if "MultiHeadDotProductAttention_1/" in original_name:
        if original_name.endswith("/out/kernel"):
            return tensor.flatten(0, 1).T if tensor.ndim == 3 else tensor  # (H, d, D)
        if original_name.endswith("/kernel"):
            return tensor.flatten(1).T if tensor.ndim == 3 else tensor  # (D, H, d)
        return tensor.flatten()
    if original_name.endswith("/kernel") and tensor.ndim == 4:
        return tensor.permute(3, 2, 0, 1)
    if original_name.endswith("/kernel") and tensor.ndim == 2:
        return tensor.T
    return tensor


def _fuse_qkv(result: ConvertedStateDict) -> None:
    """Fuse the query, key and value weights of vertical layers, each (D, D), into one (3D, D)."""
    for prefix in sorted(
        {name[: match.start()] for name in result.tensors if (match := _SPLIT_QKV_PATTERN.search(name))}
    ):
        fused = f"{prefix}.qkv.weight"
        names = [f"{prefix}.{part}.weight" for part in ("query", "key", "value")]
        parts = {name: result.tensors.pop(name) for name in names if name in result.tensors}
        present = [result.original_names[name] for name in parts]
        if fused in result.tensors:
            result.problems.append(f"{', '.join(present)}: stored in addition to {result.original_names[fused]}")
            continue
        result.original_names[fused] = " + ".join(present)
        # Check each part, as the fused shape would not show which one is wrong.
        hidden_size = next(iter(parts.values())).shape[-1:]
        for name in names:
            original_name = get_original_name("cct", name)
            if name not in parts:
                result.problems.append(f"{original_name}: missing")
            elif parts[name].shape != (*hidden_size, *hidden_size):
                result.problems.append(
                    f"{original_name}: shape {(*hidden_size, *hidden_size)} expected, got {tuple(parts[name].shape)}"
                )
        is_complete = len(parts) == 3 and all(part.shape == (*hidden_size, *hidden_size) for part in parts.values())
        # An empty tensor, so that a problem listed above is not reported again as a missing tensor.
        result.tensors[fused] = torch.cat(list(parts.values())) if is_complete else torch.empty(0)


_NESTED_SCORENET = re.compile(r"^(transformer\.encoder\.layer\.\d+\.)(?:\w+\.)+(small_h_(?:fc|attention_pool)\.\w+)$")
_SPLIT_QKV_PATTERN = re.compile(r"\.(query|key|value)\.weight$")
