"""Defaults and validation of the arguments, and their command-line form."""

import pytest
from transformers import HfArgumentParser

from hf_tokenmixup.training import TokenMixupTrainingArguments


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("mixup_alpha", -0.1),
        ("cutmix_alpha", float("inf")),
        ("mixup_prob", 1.5),
        ("mixup_switch_prob", -0.5),
        ("mixup_mode", "half"),
        ("label_smoothing_factor", 1.0),
    ],
)
def test_a_setting_outside_its_range_is_named(arguments, setting, value):
    with pytest.raises(ValueError, match=f"`{setting}` .*{value}"):
        arguments(**{setting: value})


def test_flags(tmp_path):
    parser = HfArgumentParser(TokenMixupTrainingArguments)
    flags = ["--output_dir", str(tmp_path), "--mixup_alpha", "0.8", "--mixup_mode", "pair", "--use_cpu"]
    (args,) = parser.parse_args_into_dataclasses([*flags, "--report_to", "none"])
    assert (args.mixup_alpha, args.cutmix_alpha, args.mixup_mode) == (0.8, 0.0, "pair")
    assert args.remove_unused_columns is False
    assert args.logging_nan_inf_filter is False
    assert "--mixup_switch_prob" in parser.format_help()


def test_processes_that_are_not_connected_are_refused(arguments, monkeypatch):
    args = arguments()
    # Set after the host has looked for other processes, which here would wait for them.
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were started .*--use_cpu"):
        args._refuse_unconnected_processes()
    monkeypatch.setenv("WORLD_SIZE", "1")
    args._refuse_unconnected_processes()
