"""Removal of secrets."""

import pytest

from hf_tokenmixup.hub.card_redaction import redact_text, redact_value
from hf_tokenmixup.utils.redaction import remove_secrets

HF_TOKEN = "hf_" + "aB3" * 11


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("WANDB_API_KEY=s3cr3t accelerate launch x.py", "accelerate launch x.py"),
        ("KEY=s3cr3t OMP_NUM_THREADS=4 python x.py", "OMP_NUM_THREADS=4 python x.py"),
        ("export HF_TOKEN='s3cr3t s3cr3t' && python x.py", "python x.py"),
        ("DB_URL=postgres://me:s3cr3t@host/db python x.py", "python x.py"),
        ("KEY=$(cat s3cr3t) python x.py", "python x.py"),
        ('$env:HF_TOKEN="s3cr3t"; python x.py', "python x.py"),
        ("docker run -e PASSWORD_OF_DB=s3cr3t image", "docker run -e PASSWORD_OF_DB=*** image"),
        ("x.py --dataset_name https://me:s3cr3t@host.org/d.zip", "x.py --dataset_name https://host.org/d.zip"),
        ("x.py https://me:s3cr3t@s3cr3t/s3cr3t@host.org/d", "x.py https://host.org/d"),
        ("x.py https://s3cr3t@github.com/a/b", "x.py https://github.com/a/b"),
        ("x.py s3://me:s3cr3t@bucket/d me:s3cr3t@host.org/d", "x.py s3://bucket/d host.org/d"),
        ("x.py 'https://host.org/d?token=s3cr3t&x=1'", "x.py 'https://host.org/d'"),
        ("x.py https://host.org/d?sv=1&sig=s3cr3t", "x.py https://host.org/d"),
        ("x.py https://host.org/d?X-Amz-Credential=s3cr3t", "x.py https://host.org/d"),
        ("x.py https://host.org/d#access_token=s3cr3t", "x.py https://host.org/d"),
        ("x.py --token s3cr3t --hub-token=s3cr3t --seed 3", "x.py --seed 3"),
        ("x.py --password 's3cr3t s3cr3t' --api_key s3cr3t --seed 3", "x.py --seed 3"),
        ("curl -H 'Authorization: Bearer s3cr3t'", "curl -H 'Authorization: ***'"),
        ("curl -H 'X-Api-Key: s3cr3t' -H 'Cookie: id=s3cr3t'", "curl -H 'X-Api-Key: ***' -H 'Cookie: ***'"),
        ("--optim_args momentum=0.9,api_key=s3cr3t", "--optim_args momentum=0.9,api_key=***"),
        ("""--x '{"apiKey": "s3cr3t", "mask_token": true}'""", """--x '{"apiKey": "***", "mask_token": true}'"""),
        (f"x.py --model_revision {HF_TOKEN}", "x.py --model_revision "),
    ],
)  # fmt: skip
def test_remove_secrets_removes_secrets(text, public):
    assert remove_secrets(text) == public and "s3cr3t" not in redact_text(text)


@pytest.mark.parametrize(
    "text",
    [
        "accelerate launch scripts/finetune.py --token_selection random --image_mean 0.5 0.5 0.5 --do_eval",
        "CUDA_VISIBLE_DEVICES=0,1 TOKENIZERS_PARALLELISM=false ACCELERATE_MIXED_PRECISION=bf16 python x.py",
        "x.py --optim_args momentum=0.9,nesterov=true --auto_augment rand-m9-mstd0.5-inc1 --num_tokens 3",
        "x.py --dataset_name https://host.org:8080/d.zip?download=true --model git@github.com:a/b",
        """x.py --config_overrides '{"hidden_size": 96, "use_mask_token": true, "pad_token": 3}'""",
        "x.py --label_names cat:dog --run_name a=b --learning_rate=1e-3 --eval_split test",
    ],
)
def test_remove_secrets_keeps_other_options(text):
    assert remove_secrets(text) == text and redact_text(text) == text


@pytest.mark.parametrize(
    ("value", "public"),
    [
        ("src:/home/me/x", "src:x"),
        ("file:///home/me/x", "x"),
        ("'/home/my name/a b' /home/my\\ name/c ../d/e", "'a b' c e"),
        ([r"C:\Users\me\x", r"\\server\me\y"], '["x", "y"]'),
        ({"token": "s3cr3t", "min_lr": 1e-5}, '{"token": "***", "min_lr": 1e-05}'),
    ],
)
def test_redact_value_has_no_folder_and_no_secret(value, public):
    assert redact_value(value) == public
