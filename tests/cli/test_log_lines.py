"""Log of a run in the terminal."""

import json

import pytest
from transformers import PrinterCallback, ProgressCallback

from hf_tokenmixup.cli.finetune import build_trainer
from hf_tokenmixup.cli.log_lines import LinePrinterCallback, LineProgressCallback, format_log

DIGITS = (
    "--dataset_name digits --eval_split test --from_scratch --model_type vit --max_train_samples 32 --use_cpu".split()
)
DIGITS += "--max_eval_samples 16 --do_train --do_eval --max_steps 2 --logging_steps 1 --report_to none".split()
DIGITS += "--horizontal_layers 1 --save_strategy no --eval_strategy epoch --per_device_train_batch_size 16".split()
DIGITS += ["--config_overrides", '{"image_size": 32, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 2,']
DIGITS[-1] += ' "num_attention_heads": 2, "intermediate_size": 16}'


@pytest.mark.parametrize(
    ("logs", "line"),
    [
        (
            {"loss": 4.06213, "classification_loss": 1.8174, "scorenet_loss": 2.2447, "learning_rate": 0.00099127}
            | {"grad_norm": 6.955, "easy_fraction": 0.5, "mixed_fraction": 0.333, "replaced_fraction": 0.128}
            | {"vertical_attention": 1.306, "epoch": 5.0},
            "epoch 5     loss 4.062  classification 1.817  ScoreNet 2.245  learning rate 0.000991  easy 50.0%  "
            "mixed 33.3%  replaced 12.8%  attention to collected tokens 1.31 x uniform",
        ),
        ({"loss": 2.0, "learning_rate": 0.1, "epoch": 0.25}, "epoch 0.25  loss 2  learning rate 0.1"),
        (
            {
                "eval_loss": 1.5531,
                "eval_top1": 0.46666,
                "eval_top5": 0.9528,
                "eval_calibration_error": 0.1992,
                "epoch": 5,
            },
            "epoch 5     evaluation: top-1 46.67%  top-5 95.28%  loss 1.553  calibration error 0.1992",
        ),
        ({"eval_loss": 1.0, "eval_top1": 0.5, "eval_top5": None}, "evaluation: top-1 50.00%  loss 1"),
        (
            {"train_runtime": 76.2, "train_samples_per_second": 1930.4, "train_loss": 2.0, "epoch": 50.0},
            "epoch 50    trained in 1 min 16 s, 1,930 images per second",
        ),
        ({"other": 0.123456, "name": "x"}, "{'other': '0.1235', 'name': 'x'}"),
    ],
)
def test_format_log_shows_the_values_of_a_record(logs, line):
    assert format_log(logs) == line


@pytest.mark.parametrize("with_bars", [True, False])
def test_run_prints_the_records_of_its_log_as_lines(tmp_path, capsys, with_bars):
    trainer = build_trainer([*DIGITS, "--disable_tqdm", str(not with_bars), "--output_dir", str(tmp_path / "out")])
    callbacks = [callback for callback in trainer.callback_handler.callbacks if hasattr(callback, "max_str_len")]
    printers = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, PrinterCallback)]
    assert [type(callback) for callback in callbacks] == [LineProgressCallback] * with_bars
    assert [type(callback) for callback in printers] == [LinePrinterCallback] * (not with_bars)
    assert issubclass(LineProgressCallback, ProgressCallback)
    trainer.train()
    printed = capsys.readouterr().out
    records = [json.loads(line) for line in (tmp_path / "out" / "training_log.jsonl").read_text().splitlines()]
    assert len(records) == 4
    assert [line for line in printed.splitlines() if line.strip()] == [format_log(record) for record in records]
