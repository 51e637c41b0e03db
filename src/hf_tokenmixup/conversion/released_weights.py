"""Opens released weight files safely and gives their tensors our names: CCT, the authors' ViT, the JAX ViT."""

import argparse
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

logger = logging.getLogger(__name__)

TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".tar")
WRAPPERS = ("state_dict_ema", "state_dict", "model")
PREFIXES = ("module.",)
FORMATS = {
    "cct": "Compact Transformer of the authors or of the Compact-Transformers project",
    "vit": "ViT of the authors",
    "vit-jax": "original ViT in JAX",
}
MOST_SHOWN = 40


def load_released_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a weight file, without running anything that the file asks for.

    Args:
        path: ``.npz``, ``.safetensors``, or one of torch's ``.pth``, ``.pth.tar``, ``.pt``, ``.bin``. Of a training
            checkpoint the weights alone are taken, the moving average (``state_dict_ema``) before the others.

    Returns:
        Tensors on the CPU by the file's names, without a prefix ``module.`` that all of them have.

    Raises:
        ValueError: for a file that is not there, of another kind, damaged, that holds anything but plain tensors, or
            that only full unpickling, which can run any code, would open.
    """
    path = Path(path)
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist"
        raise ValueError(f"There is no file {path}, it {found}: give the path of a downloaded weight file.")
    suffix = path.suffix.lower()
    if suffix not in (".npz", ".safetensors", *TORCH_SUFFIXES):
        raise ValueError(
            f"{path.name} must end in .npz, .safetensors, .pth, .pth.tar, .pt or .bin, which tells how to read it, "
            f"got {suffix or 'no ending'!r}: rename it."
        )
    read = {".npz": _read_npz, ".safetensors": load_file}.get(suffix, _read_torch)
    try:
        content = read(path)
    except Exception as error:  # a damaged file makes the readers raise nearly anything
        raise ValueError(_format_read_error(path, error)) from error
    return _extract_state_dict(path, content)


def detect_format(weights: Mapping[str, torch.Tensor]) -> str:
    """Which of the released formats the names belong to.

    Returns:
        ``"cct"``, ``"vit"`` or ``"vit-jax"``, keys of :data:`FORMATS`.

    Raises:
        ValueError: if they belong to none.
    """
    starts = {
        "cct": ("tokenizer.conv_layers.", "classifier.blocks."),
        "vit": ("transformer.encoder.", "transformer.embeddings."),
        "vit-jax": ("Transformer/", "embedding/"),
    }
    for name, start in starts.items():
        if any(key.startswith(start) for key in weights):
            return name
    own = any(key.startswith(("vit.", "cct.")) for key in weights)
    raise ValueError(
        f"These weights are of no format known here ({'; '.join(FORMATS.values())}): their names are "
        f"{_some(sorted(weights), 5)}."
        + (" These are transformers' own names: nothing is to be converted, use from_pretrained." if own else "")
    )


@dataclass
class ConvertedStateDict:
    """Tensors under our names, what each was called in the file, and what stands against using them."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def rename(kind: str, weights: Mapping[str, torch.Tensor]) -> ConvertedStateDict:
    """Give the tensors of a format our names, shapes and float32.

    Args:
        kind: the format, as :func:`detect_format` tells.
        weights: as :func:`load_released_weights` gives them.

    Returns:
        With one line in ``problems`` for each name that maps nowhere or tensor that cannot be brought into shape.
    """
    result = ConvertedStateDict()
    for source, tensor in weights.items():
        # Where in its layer the authors' ViT keeps ScoreNet is not known: the linear layer's name tells.
        known_as = _NESTED_SCORENET.sub(r"\1\2", source)
        target = _translate(known_as, TABLES[kind])
        if target is None:
            result.problems.append(f"{source}: maps nowhere{_hint(source)}")
        elif target in result.tensors:
            result.problems.append(f"{source}: the same as {result.sources[target]}")
        elif not tensor.is_floating_point():
            result.problems.append(f"{source}: floating-point numbers expected, got {tensor.dtype}")
        else:
            result.sources[target] = source
            tensor = tensor.float()
            result.tensors[target] = (_from_jax(source, tensor) if kind == "vit-jax" else tensor).contiguous()
    if kind == "cct":
        _fuse_qkv(result)
    return result


def source_name(kind: str, target: str) -> str:
    """What the format calls our ``target``; the name itself where the format has no such tensor."""
    return _translate(target, {own: released for released, own in TABLES[kind].items()}) or target


def _read_torch(path: Path) -> object:
    # timm's checkpoints carry the command line's Namespace, which can do nothing but hold attributes.
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _read_npz(path: Path) -> dict[str, torch.Tensor]:
    with np.load(path, allow_pickle=False) as archive:
        return {name: _tensor(archive[name]) for name in archive.files}


def _tensor(array: np.ndarray) -> torch.Tensor:
    if array.dtype.kind == "V" and array.dtype.itemsize == 2:  # numpy knows no bfloat16 and stores two raw bytes
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _format_read_error(path: Path, error: Exception) -> str:
    text = str(error)
    asked = re.search(r"GLOBAL (\S+)", text)
    if asked or "allow_pickle" in text:
        what = f"{asked[1]}, a Python object" if asked else "pickled Python objects"
        return (
            f"{path.name} is refused: it holds {what}, and opening that could run code from the file. If you trust "
            "where it comes from, open it in an environment of its own and save the tensors alone as .safetensors."
        )
    reason = next(iter(text.splitlines()), "") or type(error).__name__
    return f"{path.name} cannot be read as {path.suffix}: damaged, incomplete or of another kind? Reason: {reason}"


def _extract_state_dict(path: Path, content: object) -> dict[str, torch.Tensor]:
    while isinstance(content, Mapping):
        found = [name for name in WRAPPERS if isinstance(content.get(name), Mapping)]
        if not found:
            break
        if len(found) > 1:
            logger.warning("%s holds %s: %s is taken.", path.name, " and ".join(found), found[0])
        content = content[found[0]]
    if not isinstance(content, Mapping) or not content:
        what = "nothing" if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(f"{path.name} must hold named tensors (a state dict), got {what}.")
    other = [name for name, value in content.items() if not (isinstance(name, str) and torch.is_tensor(value))]
    if other:
        raise ValueError(
            f"{path.name} must hold named tensors alone, or below one of {', '.join(WRAPPERS)}; no tensors are "
            f"{_some([str(name) for name in other], 10)}."
        )
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in content):
            content = {name.removeprefix(prefix): tensor for name, tensor in content.items()}
    return dict(content)


def _some(names: list[str], most: int = MOST_SHOWN) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _weight_and_bias(*modules: tuple[str, str], leaves: tuple[str, str] = (".weight", ".bias")) -> dict[str, str]:
    """Both tensors of modules, ``leaves`` being what the format calls weight and bias."""
    return {
        released + leaf: own + name
        for released, own in modules
        for leaf, name in zip(leaves, (".weight", ".bias"), strict=True)
    }


# Names in the file to ours; {n} stands for a number.
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
TABLES = {"cct": _CCT, "vit": _VIT, "vit-jax": _VIT_JAX}


def _translate(name: str, table: Mapping[str, str]) -> str | None:
    if name in table and "{n}" not in name:
        return table[name]
    # Leading zeros would make two names one.
    if number := re.search(r"(?<=[._])(0|[1-9]\d{0,3})(?=[./])", name):
        target = table.get(f"{name[: number.start()]}{{n}}{name[number.end() :]}")
        return target and target.replace("{n}", number[0])
    return None


def _hint(source: str) -> str:
    if source.startswith("pre_logits/"):
        return " (a layer in front of the head, as weights for ImageNet-21k have it; transformers' ViT has none)"
    return ""


def _from_jax(source: str, tensor: torch.Tensor) -> torch.Tensor:
    """(in, out) to (out, in), heads flattened, and convolutions from HWIO to OIHW; other ranks stay to be refused."""
    if "MultiHeadDotProductAttention_1/" in source:
        if source.endswith("/out/kernel"):
            return tensor.flatten(0, 1).T if tensor.ndim == 3 else tensor  # (H, d, D)
        if source.endswith("/kernel"):
            return tensor.flatten(1).T if tensor.ndim == 3 else tensor  # (D, H, d)
        return tensor.flatten()
    if source.endswith("/kernel"):
        return tensor.permute(3, 2, 0, 1) if tensor.ndim == 4 else tensor.T if tensor.ndim == 2 else tensor
    return tensor


def _fuse_qkv(result: ConvertedStateDict) -> None:
    """Queries, keys and values that vertical layers store apart, each (D, D), into one (3D, D)."""
    for prefix in sorted(
        {name[: match.start()] for name in result.tensors if (match := _SPLIT_QKV_PATTERN.search(name))}
    ):
        fused = f"{prefix}.qkv.weight"
        names = [f"{prefix}.{part}.weight" for part in ("query", "key", "value")]
        parts = {name: result.tensors.pop(name) for name in names if name in result.tensors}
        present = [result.sources[name] for name in parts]
        if fused in result.tensors:
            result.problems.append(f"{', '.join(present)}: stored beside {result.sources[fused]}")
            continue
        result.sources[fused] = " + ".join(present)
        # A wrong one of the three is told by name, as the fused shape would not tell which.
        hidden = next(iter(parts.values())).shape[-1:]
        for name in names:
            released = source_name("cct", name)
            if name not in parts:
                result.problems.append(f"{released}: missing")
            elif parts[name].shape != (*hidden, *hidden):
                result.problems.append(
                    f"{released}: shape {(*hidden, *hidden)} expected, got {tuple(parts[name].shape)}"
                )
        whole = len(parts) == 3 and all(part.shape == (*hidden, *hidden) for part in parts.values())
        # What is said above need not be said again, so something stands in for the fused tensor.
        result.tensors[fused] = torch.cat(list(parts.values())) if whole else torch.empty(0)


_NESTED_SCORENET = re.compile(r"^(transformer\.encoder\.layer\.\d+\.)(?:\w+\.)+(small_h_(?:fc|attention_pool)\.\w+)$")
_SPLIT_QKV_PATTERN = re.compile(r"\.(query|key|value)\.weight$")
