"""Released weight files: every format gives the same weights and logits, and invalid files leave no output."""

import argparse
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.golden_cases import FOLDER, build_cct, load_case
from helpers.state_dicts import assert_same
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hf_tokenmixup.cli import convert
from hf_tokenmixup.conversion.convert import convert_weights
from hf_tokenmixup.conversion.released_weights import detect_format, load_released_weights
from hf_tokenmixup.models import (
    CctForImageClassification,
    TokenMixupCctForImageClassification,
    TokenMixupViTForImageClassification,
)
from hf_tokenmixup.models.cct.modeling_cct import build_sincos_position_embedding

SCRIPT = Path(__file__).parents[2] / "scripts" / "convert_weights.py"
LOGITS = {"atol": 1e-5, "rtol": 1e-5}
# Names in transformers to names of the authors (jeonsworld), independent of the table of the converter.
AUTHORS = [
    (r"^vit\.layers\.", "transformer.encoder.layer."),
    (r"\.q_proj\.", ".query."),
    (r"\.k_proj\.", ".key."),
    (r"\.v_proj\.", ".value."),
    (r"\.o_proj\.", ".out."),
    (r"\.layernorm_before\.", ".attention_norm."),
    (r"\.layernorm_after\.", ".ffn_norm."),
    (r"\.mlp\.", ".ffn."),
    (r"^vit\.layernorm\.", "transformer.encoder.encoder_norm."),
    (r"^vit\.embeddings\.", "transformer.embeddings."),
    (r"\.projection\.", "."),
    (r"^classifier\.", "head."),
]


def released_cct(structure: str = "base") -> dict[str, torch.Tensor]:
    return load_file(FOLDER / f"cct_weights_{structure}.safetensors")


def vit_weights() -> dict[str, torch.Tensor]:
    weights = load_file(FOLDER / "vit_weights.safetensors")
    return {name: tensor for name, tensor in weights.items() if not name.startswith("scorenet.")}


def authors_vit(scorenet_layer: int | None = None) -> dict[str, torch.Tensor]:
    result = {}
    for name, tensor in vit_weights().items():
        for pattern, replacement in AUTHORS:
            name = re.sub(pattern, replacement, name)
        result[name] = tensor
    if scorenet_layer is not None:
        scorenet = load_file(FOLDER / "vit_weights.safetensors")
        for part in ("weight", "bias"):
            result[f"transformer.encoder.layer.{scorenet_layer}.small_h_fc.{part}"] = scorenet[f"scorenet.{part}"]
    return result


def jax_vit(heads: int = 4) -> dict[str, np.ndarray]:
    result = {}
    for name, tensor in vit_weights().items():
        array = tensor.numpy()
        block = re.sub(r"^vit\.layers\.(\d+)\..*", r"Transformer/encoderblock_\1", name)
        leaf, part = name.split(".")[-2:]
        kernel = "kernel" if part == "weight" else "bias"
        if leaf in ("q_proj", "k_proj", "v_proj", "o_proj"):
            what = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "out"}[leaf]
            key = f"{block}/MultiHeadDotProductAttention_1/{what}/{kernel}"
            width = len(array) // heads
            if part == "weight":
                array = array.T.reshape(*((heads, width, -1) if what == "out" else (-1, heads, width)))
            elif what != "out":
                array = array.reshape(heads, width)
        elif leaf.startswith("layernorm"):
            where = {"layernorm_before": f"{block}/LayerNorm_0", "layernorm_after": f"{block}/LayerNorm_2"}
            key = where.get(leaf, "Transformer/encoder_norm") + ("/scale" if part == "weight" else "/bias")
        elif leaf in ("fc1", "fc2"):
            key, array = f"{block}/MlpBlock_3/Dense_{int(leaf[-1]) - 1}/{kernel}", array.T
        elif leaf == "projection":
            key, array = f"embedding/{kernel}", array.transpose(2, 3, 1, 0) if part == "weight" else array
        elif leaf == "classifier":
            key, array = f"head/{kernel}", array.T
        else:
            key = {"cls_token": "cls", "position_embeddings": "Transformer/posembed_input/pos_embedding"}[part]
        result[key] = array
    return result


def write(path: Path, content) -> Path:
    if path.suffix == ".npz":
        np.savez(path, **content)
    elif path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path)
    return path


def assert_conversion_fails(file: Path, match: str, **kwargs) -> str:
    """Check that the conversion fails without output, and return the error message."""
    folder = file.parent / "made" / "out"
    with pytest.raises(ValueError, match=match) as raised:
        convert_weights(file, folder, **kwargs)
    assert not folder.parent.exists()
    return str(raised.value)


CONTAINERS = {
    "flat.pth": lambda weights: weights,
    "timm.pth.tar": lambda weights: {
        "epoch": 3,
        "arch": "cct",
        "state_dict": {f"module.{name}": tensor for name, tensor in weights.items()},
        "optimizer": {"state": {0: {"step": 5}}, "param_groups": [{"lr": 0.1}]},
        "args": argparse.Namespace(lr=0.1, model="cct"),
        "metric": 80.1,
    },
    "ema.pt": lambda weights: {
        "state_dict": {name: tensor + 1 for name, tensor in weights.items()},
        "state_dict_ema": weights,
    },
    "model.bin": lambda weights: {"model": weights},
    "flat.safetensors": lambda weights: weights,
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_cct_in_each_container_matches_reference(tmp_path, name):
    case, tensors = load_case("cct_eval")
    file = write(tmp_path / name, CONTAINERS[name](released_cct()))
    folder = convert_weights(file, tmp_path / "out", num_attention_heads=2)
    assert_same(load_file(folder / "model.safetensors"), build_cct(case).to_plain_model().state_dict())
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    assert type(model) is CctForImageClassification
    torch.testing.assert_close(model(tensors["in.pixel_values"]).logits, tensors["eval.logits"], **LOGITS)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    "name", ["cct_eval_sine", "cct_cls_eval", "cct_htm", "cct_vtm", "cct_htm_then_vtm", "cct_cls_htm", "cct_cls_vtm"]
)
def test_every_cct_structure_matches_reference(tmp_path, name):
    case, tensors = load_case(name)
    folder = convert_weights(FOLDER / case["weights_file"], tmp_path / "out", num_attention_heads=2)
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    assert model.config.image_size == case["config"]["img_size"]
    expected = tensors.get("eval.logits")
    if expected is None:
        expected = build_cct(case).eval()(tensors["in.pixel_values"]).logits
    torch.testing.assert_close(model(tensors["in.pixel_values"]).logits, expected, **LOGITS)


def test_sinusoidal_positions_are_detected_and_dropped(tmp_path):
    weights = released_cct() | {
        "classifier.positional_emb": build_sincos_position_embedding(256, 32, torch.device("cpu"))
    }
    folder = convert_weights(write(tmp_path / "w.pth", weights), tmp_path / "out", num_attention_heads=2)
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert model.config.position_embedding == "sinusoidal"
    assert model.cct.embeddings.position_embeddings is None


def test_cct_structures_give_equal_weights_and_fused_qkv(tmp_path):
    converted = {}
    for structure in ("base", "htm1", "vtm2", "htm1_vtm3"):
        file = FOLDER / f"cct_weights_{structure}.safetensors"
        folder = convert_weights(file, tmp_path / structure, num_attention_heads=2)
        converted[structure] = load_file(folder / "model.safetensors")
        assert_same(converted[structure], converted["base"])
    separate = released_cct("vtm2")
    parts = [separate[f"classifier.blocks.2.self_attn.{part}.weight"] for part in ("query", "key", "value")]
    assert torch.equal(converted["vtm2"]["cct.layers.2.attention.qkv.weight"], torch.cat(parts))


def test_settings_give_the_tokenmixup_model_with_scorenet(tmp_path):
    case, _ = load_case("cct_htm_then_vtm")
    settings = {"horizontal_tau": 3.0, "horizontal_rho": 0.02, "vertical_kappa": 5}
    folder = convert_weights(FOLDER / case["weights_file"], tmp_path / "out", settings=settings, num_attention_heads=2)
    model = TokenMixupCctForImageClassification.from_pretrained(folder)
    assert model.config.horizontal_layers == [1] and model.config.vertical_layers == [3]
    assert (model.config.horizontal_tau, model.config.horizontal_rho, model.config.vertical_kappa) == (3.0, 0.02, 5)
    assert_same(model.state_dict(), build_cct(case).state_dict())


def test_unused_pooling_of_cls_scorenet_is_dropped(tmp_path, caplog):
    file = FOLDER / "cct_weights_cls_htm1.safetensors"
    folder = convert_weights(file, tmp_path / "out", horizontal_layers=[1], num_attention_heads=2)
    model = TokenMixupCctForImageClassification.from_pretrained(folder)
    assert model.config.effective_scorenet_pooling == model.config.effective_saliency_query == "cls"
    assert "small_h_attention_pool" in caplog.text


def test_horizontal_layers_without_scorenet_weights_raise(tmp_path):
    file = write(tmp_path / "w.pth", released_cct("htm1"))
    assert "[1]" in assert_conversion_fails(
        file, "has ScoreNet weights for the layers", horizontal_layers=[2], num_attention_heads=2
    )
    file = write(tmp_path / "w.pth", released_cct())
    assert_conversion_fails(file, "has ScoreNet weights for the layers", horizontal_layers=[2], num_attention_heads=2)
    folder = convert_weights(file, tmp_path / "out", vertical_layers=[2], num_attention_heads=2)
    assert TokenMixupCctForImageClassification.from_pretrained(folder).config.vertical_layers == [2]


@pytest.mark.parametrize("name", ["authors.bin", "authors.pth.tar", "original.npz"])
def test_vit_formats_match_reference(tmp_path, name):
    _, tensors = load_case("vit_eval")
    if name.endswith(".npz"):
        file, heads = write(tmp_path / name, jax_vit()), None
    else:
        content = authors_vit(scorenet_layer=2)
        file, heads = write(tmp_path / name, content if name.endswith("bin") else {"state_dict": content}), 4
    folder = convert_weights(file, tmp_path / "out", num_attention_heads=heads)
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    assert_same(model.state_dict(), vit_weights())  # the file has the older names of transformers
    assert (model.config.layer_norm_eps, model.config.num_attention_heads) == (1e-6, 4)
    torch.testing.assert_close(model(tensors["in.pixel_values"]).logits, tensors["eval.logits"], **LOGITS)


def test_nested_scorenet_of_the_authors_vit_is_found(tmp_path):
    weights = authors_vit(scorenet_layer=2)
    weights = {name.replace(".small_h_fc", ".mixup.small_h_fc"): tensor for name, tensor in weights.items()}
    file = write(tmp_path / "w.bin", weights)
    folder = convert_weights(file, tmp_path / "out", horizontal_layers=[2], num_attention_heads=4)
    model = TokenMixupViTForImageClassification.from_pretrained(folder)
    expected = load_file(FOLDER / "vit_weights.safetensors")["scorenet.weight"]
    assert torch.equal(model.state_dict()["vit.layers.2.scorenet.classifier.weight"], expected)


def test_npz_with_bfloat16_arrays(tmp_path):
    tensor = torch.tensor([1.5, -2.0]).bfloat16()
    file = write(tmp_path / "w.npz", {"cls": tensor.view(torch.int16).numpy().view("V2")})
    assert torch.equal(load_released_weights(file)["cls"], tensor)


def test_image_processor_and_label_names_are_saved(tmp_path):
    folder = convert_weights(
        write(tmp_path / "w.npz", jax_vit()),
        tmp_path / "out",
        label_names=list("abcdefg"),
        image_mean=[0.1, 0.2, 0.3],
        image_std=[0.4, 0.5, 0.6],
    )
    processor = AutoImageProcessor.from_pretrained(folder)
    assert (processor.size["height"], processor.size["width"]) == (32, 32)
    assert (list(processor.image_mean), list(processor.image_std)) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    config = AutoModelForImageClassification.from_pretrained(folder).config
    assert config.id2label[6] == "g" and config.label2id["a"] == 0


@pytest.mark.parametrize("family", ["cct", "vit"])
def test_interpolated_positions_match_interpolate_pos_encoding(tmp_path, family):
    weights = released_cct() if family == "cct" else authors_vit()
    file, heads = write(tmp_path / "w.pth", weights), 4 if family == "vit" else 2
    original = convert_weights(file, tmp_path / "original", num_attention_heads=heads)
    changed = convert_weights(file, tmp_path / "changed", num_attention_heads=heads, image_size=[48, 64])
    images = torch.randn(2, 3, 48, 64)
    expected = AutoModelForImageClassification.from_pretrained(original).eval()
    model = AutoModelForImageClassification.from_pretrained(changed).eval()
    torch.testing.assert_close(
        model(images).logits, expected(images, interpolate_pos_encoding=True).logits, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("is_cct_7x2", [True, False])
def test_config_of_other_compact_transformers_is_inferred(tmp_path, is_cct_7x2):
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    if is_cct_7x2:
        structure = {
            "num_conv_layers": 2,
            "conv_kernel_size": 7,
            "conv_stride": 2,
            "conv_padding": 3,
            "image_size": 64,
        }
    else:
        structure = {"tokenizer": "patch", "patch_size": 4, "pooling": "cls", "image_size": 16}
    model = CctForImageClassification(
        CctForImageClassification.config_class(**sizes, **structure, num_labels=3)
    ).eval()
    names = [
        (r"^cct\.embeddings\.tokenizer\.layers\.(\d+)\.", r"tokenizer.conv_layers.\1.0."),
        (r"^classifier\.", "classifier.fc."),
        (r"^cct\.layers\.", "classifier.blocks."),
        (r"\.attention\.", ".self_attn."),
        (r"^cct\.embeddings\.position_embeddings", "classifier.positional_emb"),
        (r"^cct\.embeddings\.cls_token", "classifier.class_emb"),
        (r"^cct\.", "classifier."),
    ]
    weights = {}
    for name, tensor in model.state_dict().items():
        for pattern, replacement in names:
            name = re.sub(pattern, replacement, name)
        weights[name] = tensor
    folder = convert_weights(write(tmp_path / "w.pth", weights), tmp_path / "out")
    converted = AutoModelForImageClassification.from_pretrained(folder).eval()
    assert {name: getattr(converted.config, name) for name in {**sizes, **structure}} == {**sizes, **structure}
    images = torch.randn(2, 3, structure["image_size"], structure["image_size"])
    torch.testing.assert_close(converted(images).logits, model(images).logits)


def test_error_lists_every_problem(tmp_path):
    weights = released_cct("vtm2")
    del weights["classifier.blocks.1.norm1.bias"], weights["classifier.blocks.2.self_attn.key.weight"]
    weights["classifier.blocks.3.extra.weight"] = torch.zeros(2)
    weights["classifier.blocks.0.linear2.weight"] = torch.zeros(32, 63)
    weights["classifier.norm.weight"] = torch.zeros(32, dtype=torch.int64)
    message = assert_conversion_fails(
        write(tmp_path / "w.pth", weights), "could not be converted", num_attention_heads=2
    )
    for line in (
        "classifier.blocks.1.norm1.bias: missing",
        "classifier.blocks.2.self_attn.key.weight: missing",
        "classifier.blocks.3.extra.weight: no matching parameter",
        r"classifier.blocks.0.linear2.weight: shape (32, 64) expected, got (32, 63)",
        "classifier.norm.weight: floating-point numbers expected",
    ):
        assert line in message


@pytest.mark.parametrize("name", ["w.pth", "w.npz"])
def test_vit_with_missing_extra_and_misshaped_tensors_raises(tmp_path, name):
    if name == "w.npz":
        weights, block, heads = jax_vit(), "Transformer/encoderblock_1", None
        missing, wrong = f"{block}/MlpBlock_3/Dense_0/bias", f"{block}/MultiHeadDotProductAttention_1/key/kernel"
        weights |= {"pre_logits/kernel": np.zeros((48, 48), np.float32), wrong: np.zeros((48, 47), np.float32)}
        extra = "pre_logits/kernel: no matching parameter"
    else:
        weights, block, heads = authors_vit(), "transformer.encoder.layer.1", 4
        missing, wrong = f"{block}.ffn.fc1.bias", f"{block}.attention.key.weight"
        weights |= {"transformer.extra": torch.zeros(1), wrong: torch.zeros(48, 47)}
        extra = "transformer.extra: no matching parameter"
    del weights[missing]
    message = assert_conversion_fails(
        write(tmp_path / name, weights), "could not be converted", num_attention_heads=heads
    )
    assert f"{missing}: missing" in message and f"{wrong}: shape (48, 48)" in message and extra in message


@pytest.mark.parametrize(
    "missing", ["classifier.positional_emb", "tokenizer.conv_layers.0.0.weight", "classifier.fc.weight"]
)
def test_missing_tensor_needed_for_the_config_raises(tmp_path, missing):
    weights = released_cct()
    del weights[missing]
    assert_conversion_fails(
        write(tmp_path / "w.pth", weights), f"{re.escape(missing)}: missing", num_attention_heads=2
    )


def test_unknown_format_raises(tmp_path):
    weights = {"conv1.weight": torch.zeros(64, 3, 7, 7), "layer1.0.bn1.weight": torch.zeros(64)}
    assert_conversion_fails(write(tmp_path / "resnet.pth", weights), "format of these weights is unknown")
    assert_conversion_fails(write(tmp_path / "converted.safetensors", vit_weights()), "use from_pretrained")


class Payload:
    """Creates a file when unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_file_with_pickled_objects_raises_without_executing_code(tmp_path):
    trace = tmp_path / "trace"
    assert_conversion_fails(
        write(tmp_path / "w.pth.tar", {"state_dict": released_cct(), "x": Payload(trace)}), "could execute code"
    )
    objects = jax_vit() | {"x": np.array([Payload(trace)], dtype=object)}
    assert_conversion_fails(write(tmp_path / "w.npz", objects), "could execute code")
    assert not trace.exists()


@pytest.mark.parametrize("name", ["w.pth", "w.npz", "w.safetensors"])
@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.99])
def test_truncated_file_raises(tmp_path, name, fraction):
    file = write(tmp_path / name, jax_vit() if name == "w.npz" else released_cct())
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * fraction)])
    assert_conversion_fails(file, "cannot be read")


def test_file_without_state_dict_raises(tmp_path):
    assert_conversion_fails(write(tmp_path / "w.pth", [torch.zeros(1)]), "must contain a state dict")
    assert_conversion_fails(write(tmp_path / "w.pth", {"epoch": 1, "weights": torch.zeros(1)}), "other objects: epoch")
    assert_conversion_fails(tmp_path / "none.pth", "does not exist")
    assert_conversion_fails(write(tmp_path / "w.ckpt", released_cct()), "must end in")


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({}, "Set num_attention_heads"),
        ({"num_attention_heads": 5}, "must divide"),
        ({"num_attention_heads": 2, "label_names": ["a"]}, "10 different names"),
        ({"num_attention_heads": 2, "image_size": 0}, "image_size"),
        ({"num_attention_heads": 2, "image_mean": [0.5]}, "image_mean must have 3"),
        ({"num_attention_heads": 2, "image_std": [0.5, 0, 0.5]}, "image_std must be positive"),
        ({"num_attention_heads": 2, "settings": {"horizontal_ro": 1}}, ": did you mean 'horizontal_rho'?"),
        ({"num_attention_heads": 2, "vertical_layers": [9]}, "vertical_layers must be between"),
    ],
)
def test_invalid_arguments_raise(tmp_path, kwargs, match):
    assert_conversion_fails(write(tmp_path / "w.pth", released_cct()), match, **kwargs)


def test_output_dir_must_be_empty(tmp_path):
    file = FOLDER / "cct_weights_base.safetensors"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="new or empty"):
        convert_weights(file, tmp_path / "full", num_attention_heads=2)
    convert_weights(file, tmp_path / "empty", num_attention_heads=2)
    assert (tmp_path / "empty" / "config.json").exists()


def test_write_error_leaves_no_output(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("hf_tokenmixup.conversion.convert.ViTImageProcessor.save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        convert_weights(FOLDER / "cct_weights_base.safetensors", tmp_path / "out", num_attention_heads=2)
    assert not list(tmp_path.iterdir())


def test_detect_format():
    assert detect_format(released_cct()) == "cct"
    assert detect_format(authors_vit()) == "vit"
    assert detect_format({name: torch.from_numpy(array) for name, array in jax_vit().items()}) == "vit-jax"


def test_script_converts_tau_and_accepts_a_recipe(tmp_path, capsys):
    main = convert.main
    file, names = write(tmp_path / "w.bin", authors_vit(scorenet_layer=3)), tmp_path / "names.txt"
    names.write_text("\n".join("abcdefg") + "\n")
    words = f"{file} {tmp_path / 'out'} --num_attention_heads 4 --label_names {names} --authors_tau 0.2"
    main([*words.split(), "--recipe", "vit-b16-imagenet1k-htm-vtm", "--vertical_kappa", "2"])
    config = TokenMixupViTForImageClassification.from_pretrained(tmp_path / "out").config
    assert (config.horizontal_tau, config.horizontal_rho, config.vertical_kappa) == (2.0, 0.01, 2)
    assert (config.horizontal_layers, config.vertical_layers, config.id2label[0]) == ([3], [4], "a")
    assert AutoImageProcessor.from_pretrained(tmp_path / "out").image_mean[0] == 0.485
    main([*words.partition("--authors_tau")[0].replace("/out", "/all").split(), "--horizontal_tau", "none"])
    assert TokenMixupViTForImageClassification.from_pretrained(tmp_path / "all").config.horizontal_tau is None
    assert "ViT of the authors" in (printed := capsys.readouterr().out) and str(tmp_path / "out") in printed


def test_script_exits_with_one_line_on_error(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", [str(SCRIPT), str(tmp_path / "none.pth"), str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="convert_weights.py: .*none.pth does not exist"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
