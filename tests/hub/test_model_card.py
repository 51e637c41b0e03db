"""Check the content of model cards and what they must not contain."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fake_hub.cards import read_card, validate_card
from helpers.card_cases import CARD_DATA, EVALUATION, MODEL_INDEX, evaluation_result, tokenmixup_config
from helpers.tiny_training import VIT, plain_vit, resnet, tokenmixup_vit
from huggingface_hub import ModelCard
from transformers import ResNetConfig, ViTConfig

from hf_tokenmixup.configuration import TokenMixupConfigMixin
from hf_tokenmixup.hub import TrainingCardData, build_eval_results, build_model_card
from hf_tokenmixup.models import CctConfig, TokenMixupCctConfig
from hf_tokenmixup.paper_results import find_paper_results


def test_card_metadata_round_trip_is_equal(tmp_path):
    build_model_card(tokenmixup_config(), "alice/vit", CARD_DATA, [EVALUATION]).save(tmp_path / "README.md")
    written = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert validate_card(written) == ([], [])
    assert read_card(written) == {
        "base_model": "google/vit-base-patch16-224",
        "datasets": ["uoft-cs/cifar10"],
        "library_name": "transformers",
        "metrics": ["accuracy"],
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "hf_tokenmixup", "tokenmixup", "vit"],
        "model-index": MODEL_INDEX,
    }
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.eval_results == build_eval_results(EVALUATION) and card.data.model_name == "vit"
    assert str(card) == written


def test_card_text_contains_every_fact():
    text = build_model_card(tokenmixup_config(), "alice/vit", CARD_DATA, [EVALUATION]).text
    row = "| `uoft-cs/cifar10` (plain_text) | test | 10,000 | 97.57 | 99.91 | 0.1235 |"
    assert row in text and f"```bash\n{EVALUATION.command}\n```" in text
    assert "| multiply-accumulate operations per image | 16.90 G |" in text
    setup = "2 x NVIDIA H100 80GB HBM3, bf16, batches of 64 in each of 2 processes. torch 2.6.0, timm 1.0.20."
    assert all(part in text for part in (setup, "`0a1b2c`", "`3d4e5f`", "`6a7b8c`"))
    assert f"```bash\n{CARD_DATA.command}\n```" in text and "![Training curves](training_curves.png)" in text
    assert "| duration | 2 h 3 min |" in text and "| epochs | 29.5 |" in text
    assert "| recipe | `my-recipe` |" in text and "| split | train |" in text
    hyperparameters = [
        "| `learning_rate` | 5e-05 |",
        "| `optim_args` | momentum=0.9 |",
        '| `lr_scheduler_kwargs` | {"min_lr": 1e-05} |',
    ]
    assert "\n".join(hyperparameters) in text
    assert (
        "classifies images into 4 classes." in text
        and "for images of 8x8 pixels" in text
        and "Before layer 1," in text
        and "In layer 2," in text
    )
    assert "No weights yet" not in text and "Results in the paper" not in text
    resumed = build_model_card(
        tokenmixup_config(), "alice/vit", dataclasses.replace(CARD_DATA, resumed=True, seconds=59.6)
    ).text
    assert "| duration | 1 min 0 s since the run was resumed |" in resumed


def test_card_has_results_first_and_details_last():
    text = build_model_card(tokenmixup_config(), "alice/vit", CARD_DATA, [EVALUATION], license="mit").text
    headings = ["Results", "How to use", "Limitations", "Training", "Details", "Citation", "License"]
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == headings
    details = text.partition("## Details")[2]
    assert "| hidden size |" in details and "### Hyperparameters" in details and "### TokenMixup" in details


def test_card_of_few_classes_has_no_top5_and_small_costs_have_megas():
    few = dataclasses.replace(EVALUATION, top5=None, macs=1_234_567)
    card = build_model_card(tokenmixup_config(), "alice/vit", CARD_DATA, [few])
    assert "top-5" not in card.text and "| test | 10,000 | 97.57 | 0.1235 |  |" in card.text
    assert "| multiply-accumulate operations per image | 1.23 M |" in card.text
    assert "top_5_accuracy" not in str(card) and "top-5" not in few.table() and "top-5" in EVALUATION.table()
    both = build_model_card(tokenmixup_config(), "alice/vit", CARD_DATA, [few, EVALUATION]).text
    assert "| 97.57 |  | 0.1235 |" in both and "| 97.57 | 99.91 | 0.1235 |" in both


def test_card_unknown_facts_are_omitted():
    card = build_model_card(tokenmixup_config(), "alice/vit", TrainingCardData())
    assert validate_card(str(card)) == ([], [])
    assert {"base_model", "datasets", "metrics", "model-index"}.isdisjoint(read_card(str(card)))
    for absent in (
        "None",
        "none |",
        "duration",
        "| recipe",
        "Trained on",
        "![",
        "## Results",
        "\n\n\n",
        "accuracy of",
    ):
        assert absent not in card.text
    assert "Not evaluated here" in card.text


def test_card_without_training_facts_has_no_training_or_license():
    card = build_model_card(CctConfig(num_labels=10), "alice/cct", None, [EVALUATION])
    assert validate_card(str(card)) == ([], []) and "license" not in read_card(str(card))
    assert "The training of these weights is not recorded here." in card.text
    assert "## License" not in card.text and "TokenMixup is" not in card.text
    assert read_card(str(card))["tags"] == ["image-classification", "hf_tokenmixup", "cct"]


@pytest.mark.parametrize("make", [plain_vit, tokenmixup_vit, resnet])
def test_card_parameters_equal_exported_model_parameters(make):
    model = make()
    exported = model.to_plain_model() if hasattr(model, "to_plain_model") else model
    count = sum(parameter.numel() for parameter in exported.parameters())
    text = build_model_card(model.config, "a/b").text
    assert f"| parameters | {count:,} |" in text
    # The plain and the TokenMixup configuration give the same card.
    assert build_model_card(exported.config, "a/b").text == text


def test_card_model_and_class_names_match_config():
    named = [
        (CctConfig.cct_2_3x2(), "CCT-2/3x2"),
        (CctConfig.cvt_6_4(), "CVT-6/4"),
        (CctConfig.vit_lite_7_4(), "ViT-Lite-7/4"),
        (CctConfig(tokenizer="convolution", pooling="cls"), "Compact Transformer (CCT)"),
        (ViTConfig(), "ViT-B/16"),
        (ViTConfig(hidden_size=384, num_attention_heads=6, patch_size=32), "ViT-S/32"),
        (ViTConfig(**VIT), "ViT"),
        (ResNetConfig(), "`resnet`"),
    ]
    for config, name in named:
        assert f" classes. It is a {name} with " in build_model_card(config, "a/b").text
    names = {0: "cat|dog", 1: "a\nb"}
    text = build_model_card(ViTConfig(**VIT | {"num_labels": 2}, id2label=names), "a/b").text
    assert "\n\nThis model classifies images into 2 classes: cat\\|dog and a b. It is a ViT with " in text
    assert " into 4 classes. It is a " in build_model_card(ViTConfig(**VIT), "a/b").text


def test_card_settings_table_lists_only_active_settings():
    def build(**settings):
        card = build_model_card(tokenmixup_config(**settings), "a/b", CARD_DATA)
        table = card.text.partition("### TokenMixup")[2].partition("##")[0]
        tagged = "tokenmixup" in read_card(str(card))["tags"]
        assert tagged == bool(table)
        return set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)), card.text

    everything = {item.name for item in dataclasses.fields(TokenMixupConfigMixin)}
    everything -= {"horizontal_tau_relative", "horizontal_rho"}  # the forms of the thresholds that are not set
    more = {"assignment_group_size": 8, "manifold_mixup_layers": [1]}
    names, text = build(horizontal_tau=2.5, **more)
    assert names == everything and "Before layer 1, one of them per batch, [manifold mixup]" in text
    everything -= {"assignment_group_size", "manifold_mixup_layers", "manifold_mixup_alpha"}
    names, text = build(horizontal_tau=2.5)
    assert names == everything and "| `horizontal_tau` | 2.5 |" in text
    names, text = build(vertical_layers=[], horizontal_layers=[0, 1, 2], horizontal_tau=None)
    assert names == {name for name in everything if not name.startswith("vertical_")}
    assert "| `horizontal_tau` | none |" in text and "Before layers 0, 1 and 2," in text and "(VTM)" not in text
    assert "ScoreNet, which" in text
    names, text = build(horizontal_layers=[])
    vertical = {"vertical_layers", "vertical_kappa", "vertical_detach"}
    assert names == vertical | {"saliency_detector", "saliency_query", "saliency_route"}
    assert "(HTM)" not in text and "ScoreNet" not in text
    names, text = build(saliency_detector="random", horizontal_tau=2.5)
    assert names == everything - {"saliency_query", "saliency_route", "rollout_steps"}
    names, text = build(horizontal_layers=[], vertical_layers=[])
    assert not names and ", without TokenMixup." in text


def test_card_says_what_htm_did_or_that_nothing_was_mixed():
    def text(**facts):
        return build_model_card(tokenmixup_config(), "a/b", dataclasses.replace(CARD_DATA, **facts)).text

    assert "(HTM) mixes tokens between the images of a batch." in text()
    mixed = text(mixing="12.5% of the images were mixed")
    assert "(HTM) mixes tokens between the images of a batch: 12.5% of the images were mixed." in mixed
    nothing = text(mixing="nothing was mixed, because no image was easy", nothing_mixed=True)
    assert "(HTM) was enabled before layer 1, but nothing was mixed, because no image was easy." in nothing
    assert "mixes tokens between" not in nothing and "In layer 2, vertical" in nothing


def test_card_snippets_use_trust_remote_code_only_for_cct():
    for config, requires_remote_code in (
        (TokenMixupCctConfig(), True),
        (tokenmixup_config(), False),
        (ResNetConfig(), False),
    ):
        text = build_model_card(config, "alice/model", CARD_DATA).text
        assert ('model="alice/model", trust_remote_code=True)' in text) == requires_remote_code
        assert ('model="alice/model")' in text) == (not requires_remote_code)
        assert 'load_classifier("alice/model")' in text


def test_card_paper_results_are_shown_only_for_paper_recipes():
    facts = dataclasses.replace(CARD_DATA, recipe="scripts/recipes/cct-7-3x1-cifar100-htm-300.yaml")
    card = build_model_card(TokenMixupCctConfig(), "a/b", facts)
    assert "| HTM | 3.81 M | 0.95 G | 83.56 |\n" in card.text and "Not measured here." in card.text
    assert "model-index" not in read_card(str(card)) and find_paper_results("cct-2-3x2-cifar10-cpu") is None
    explicit = build_model_card(
        tokenmixup_config(), "a/b", CARD_DATA, paper=find_paper_results("vit-b16-imagenet1k-htm")
    )
    assert "| HTM | 87.3 M | 16.9 G | 82.37 | 96.29 |\n" in explicit.text


def test_card_contains_no_local_path_and_no_token(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "vit").mkdir(parents=True)
    token = "hf_" + "aB3" * 11
    facts = dataclasses.replace(
        CARD_DATA,
        base_model=str(tmp_path / "secret" / "vit"),
        dataset=str(tmp_path / "secret" / "flowers"),
        recipe=str(tmp_path / "secret" / "mine.yaml"),
        command=f"HF_TOKEN={token} accelerate launch scripts/finetune.py --token {token} --hub_token=hf_short "
        f"--train_dir {tmp_path}/secret/train --token_selection random --output_dir='{tmp_path}/secret/out'",
        hyperparameters={"cache": f"{tmp_path}/secret/cache", "others": [f"{tmp_path}/secret/x", token]},
        curves=str(tmp_path / "secret" / "curves.png"),
    )
    evaluation = evaluation_result(
        model=str(tmp_path / "secret" / "vit"),
        dataset="C:\\secret\\images",
        command=f"python scripts/evaluate.py ../secret/vit --validation_dir {tmp_path}/secret/val --token {token}",
    )
    card = build_model_card(tokenmixup_config(), str(tmp_path / "secret" / "vit"), facts, [evaluation])
    for private in (str(tmp_path), "secret", token, "hf_short", "TOKEN"):
        assert private not in str(card)
    assert validate_card(str(card)) == ([], []) and "base_model" not in read_card(str(card))
    assert "datasets" not in read_card(str(card)) and "Trained on `flowers` (local folder)" in card.text
    command = "accelerate launch scripts/finetune.py --train_dir train --token_selection random --output_dir='out'"
    assert f"```bash\n{command}\n```" in card.text and "| recipe | `mine` |" in card.text
    assert "python scripts/evaluate.py vit --validation_dir val\n" in card.text
    assert "(curves.png)" in card.text and '| `others` | ["x", ""] |' in card.text
    # An existing folder is not a model on the Hub, even if its name is valid there.
    folder = build_model_card(
        tokenmixup_config(), "outputs/vit", dataclasses.replace(CARD_DATA, base_model="outputs/vit")
    )
    assert "base_model" not in read_card(str(folder)) and 'load_classifier("outputs/vit")' in folder.text


@pytest.mark.parametrize("dataset", ["digits", "flowers", "images/train/x", "a b/c"])
def test_card_datasets_metadata_contains_only_hub_names(dataset):
    card = build_model_card(
        tokenmixup_config(),
        "a/b",
        dataclasses.replace(CARD_DATA, dataset=dataset),
        [evaluation_result(dataset=dataset)],
    )
    assert validate_card(str(card)) == ([], []) and "datasets" not in read_card(str(card))
    assert read_card(str(card))["model-index"][0]["results"][0]["dataset"]["type"] == dataset


def test_card_license_is_shown_only_if_set():
    for training in (CARD_DATA, None):
        for license in (None, "mit"):
            card = build_model_card(tokenmixup_config(), "a/b", training, license=license)
            assert read_card(str(card)).get("license") == license
            assert ("\n## License\n\n`mit`" in card.text) == (license is not None)
    facts = dataclasses.replace(CARD_DATA, license="cc-by-4.0")
    assert read_card(str(build_model_card(tokenmixup_config(), "a/b", facts)))["license"] == "cc-by-4.0"


@pytest.mark.parametrize("folder", ["photos/train", "photos/val/", "photos"])
def test_card_for_local_folder_has_no_hub_dataset(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / folder).mkdir(parents=True)
    for name in (folder, str(tmp_path / folder)):
        facts = dataclasses.replace(CARD_DATA, dataset=name, dataset_config=None)
        card = build_model_card(
            tokenmixup_config(), "a/b", facts, [evaluation_result(dataset=name, dataset_config=None)]
        )
        assert validate_card(str(card)) == ([], []) and "datasets" not in read_card(str(card))
        assert (
            "Trained on `photos` (local folder)" in card.text and "| dataset | `photos` (local folder) |" in card.text
        )
        dataset = read_card(str(card))["model-index"][0]["results"][0]["dataset"]
        assert (dataset["type"], dataset["name"]) == ("imagefolder", "photos (local folder)")


def test_card_omits_secret_hyperparameters():
    facts = dataclasses.replace(CARD_DATA, hyperparameters={"hub_token": "s3cr3t", "proxy": "http://me:s3cr3t@host"})
    text = build_model_card(tokenmixup_config(), "a/b", facts).text
    assert "s3cr3t" not in text and "hub_token" not in text and "| `proxy` | http://host |" in text


def test_card_for_working_directory_has_directory_name_as_title(tmp_path, monkeypatch):
    (tmp_path / "digits").mkdir()
    monkeypatch.chdir(tmp_path / "digits")
    assert "\n# digits\n" in str(build_model_card(tokenmixup_config(), "."))


def test_build_eval_results_omits_nonfinite_loss():
    assert [result.metric_type for result in build_eval_results(evaluation_result(loss=float("nan")))] == [
        "accuracy",
        "top_5_accuracy",
    ]


def test_built_package_contains_card_template(tmp_path):
    pytest.importorskip("setuptools")
    root = Path(__file__).parents[2]
    command = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(command, cwd=root, check=True, capture_output=True)
    built = tmp_path / "hf_tokenmixup" / "hub" / "templates" / "model_card.md"
    assert built.read_bytes() == (root / "src" / built.relative_to(tmp_path)).read_bytes()
