"""Log file of JSON lines, and training curves."""

import json
from pathlib import Path

from helpers.tiny_training import Images, plain_vit, tokenmixup_vit

from hf_tokenmixup.training import JsonlLoggerCallback, TokenMixupTrainer, TrainingCurvesCallback


def strict_lines(folder: str) -> list[dict]:
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    lines = (Path(folder) / "training_log.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def test_jsonl_logger_writes_one_line_per_record(arguments):
    args = arguments(max_steps=3, logging_steps=1)
    model = tokenmixup_vit()
    trainer = TokenMixupTrainer(model, args, train_dataset=Images(12), callbacks=[JsonlLoggerCallback()])
    trainer.train()
    assert strict_lines(args.output_dir) == json.loads(json.dumps(trainer.state.log_history))
    assert strict_lines(args.output_dir)[0]["mixed_samples"] == 4
    trainer.train()  # a new run truncates the file
    assert [line["step"] for line in strict_lines(args.output_dir)] == [1, 2, 3, 3]


def test_jsonl_logger_resumed_run_keeps_records_up_to_checkpoint(arguments):
    settings = {"max_steps": 5, "logging_steps": 1, "save_strategy": "steps", "save_steps": 2}
    args = arguments(**settings)
    TokenMixupTrainer(plain_vit(), args, train_dataset=Images(12), callbacks=[JsonlLoggerCallback()]).train()
    first = strict_lines(args.output_dir)
    path = Path(args.output_dir) / "training_log.jsonl"
    path.write_text(path.read_text() + '{"step": 5, "half a li')  # killed while writing
    resumed = TokenMixupTrainer(plain_vit(), args, train_dataset=Images(12), callbacks=[JsonlLoggerCallback()])
    resumed.train(resume_from_checkpoint=f"{args.output_dir}/checkpoint-2")
    lines = strict_lines(args.output_dir)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 5]
    assert [line.get("loss") for line in lines[:5]] == [line.get("loss") for line in first[:5]]


def test_jsonl_logger_nonfinite_number_becomes_null(arguments):
    args = arguments(logging_steps=1)
    trainer = TokenMixupTrainer(plain_vit(), args, train_dataset=Images(4), callbacks=[JsonlLoggerCallback()])
    trainer.train()
    trainer.log({"eval_loss": float("nan"), "norms": [1.0, float("inf")]})
    line = strict_lines(args.output_dir)[-1]
    assert line["eval_loss"] is None and line["norms"] == [1.0, None] and line["step"] == 1


def test_jsonl_logger_writes_in_first_process_only(arguments):
    args = arguments(logging_steps=1)
    callbacks = [JsonlLoggerCallback(), TrainingCurvesCallback()]
    trainer = TokenMixupTrainer(plain_vit(), args, train_dataset=Images(4), callbacks=callbacks)
    trainer.is_world_process_zero = lambda: False
    trainer.train()
    assert not list(Path(args.output_dir).glob("training_*.jsonl")) + list(Path(args.output_dir).glob("*.png"))


def test_training_curves_callback_plots_at_end_of_training(arguments):
    args = arguments(max_steps=2, logging_steps=1)
    TokenMixupTrainer(tokenmixup_vit(), args, train_dataset=Images(8), callbacks=[TrainingCurvesCallback()]).train()
    assert (Path(args.output_dir) / "training_curves.png").read_bytes().startswith(b"\x89PNG")
