"""Train the rows of one of the paper's tables, or of a sweep, and compare them with each other and with the paper.

  python scripts/study.py 4 --seeds 42 43 44
  python scripts/study.py 5 --seeds 42 --output_dir outputs/short -- --num_train_epochs 310
  python scripts/study.py rho --values 0.001 0.005 0.01
  python scripts/study.py 4 --report_only

Tables 3 (saliency detectors), 4 (ablation of HTM) and 5 (combinations with other mixups); sweeps rho, tau and kappa.
What stands behind -- are options of finetune.py for every row. Each row and seed is trained by a process of its own;
one that is finished is not run again, and one that was cut off goes on from its last checkpoint. Two of these commands
share the work of one study, on a GPU each, if they have the same output folder.
"""

import argparse
import io
import shlex
import shutil
import signal
import sys
from argparse import Namespace
from collections.abc import Sequence
from contextlib import redirect_stderr
from pathlib import Path

import torch

from ..models import load_classifier
from ..studies.definitions import SWEEPS, TABLES, Row, Study, sweep_study
from ..studies.results import format_table, save_results, summarize
from ..studies.runner import (
    LOG_FILE,
    Request,
    check_run_spec,
    collect_top1,
    find_seeds,
    load_run_spec,
    load_top1,
    parse_option_words,
    run_dir,
    train,
)
from ..training.checkpointing.disk_space import check_writable
from .arguments import Options, build_parser, parse_options
from .program import program_name, run_command
from .recipes import RECIPES, expand_recipe, split_lists

FINETUNE = ("-m", "hf_tokenmixup.cli.finetune")
DEFAULT_SEED = 42
OptionWords = dict[str, list[str]]
# Options that are not for behind the --, and what says the same here.
OWN_OPTIONS = {"recipe": "--recipe, for sweeps", "seed": "--seeds", "output_dir": "--output_dir"}
OWN_OPTIONS |= {"resume_from_checkpoint": "nothing: it is done where there is a checkpoint"}
OWN_OPTIONS |= {"push_to_hub": "scripts/publish.py, afterwards", "hub_model_id": "scripts/publish.py, afterwards"}


class Parser(argparse.ArgumentParser):
    """Raises its errors, so that they are told like all others."""

    def error(self, message: str) -> None:
        raise ValueError(message)


def parse_arguments(arguments: Sequence[str]) -> tuple[Namespace, list[str]]:
    """The study's own arguments, and those for finetune.py.

    Raises:
        ValueError: for arguments that do not exist, do not parse or do not go together.
    """
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parser = Parser(
        usage="%(prog)s STUDY [options] [-- options of finetune.py]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("study", metavar="STUDY", help=f"{', '.join([*TABLES, *SWEEPS])}.")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help=f"Seeds to train with ({DEFAULT_SEED}).")
    parser.add_argument("--values", nargs="+", metavar="VALUE", help="Values of a sweep.")
    parser.add_argument("--recipe", help="What a sweep starts from (HTM or VTM of CCT-7/3x1 on CIFAR-100).")
    parser.add_argument(
        "--output_dir", type=Path, default=Path("outputs/studies"), help="One folder for all studies (%(default)s)."
    )
    parser.add_argument("--launcher", default="accelerate launch", help="What starts a training (%(default)s).")
    parser.add_argument("--report_only", action="store_true", help="Train nothing; tell what is there, of all seeds.")
    args, unknown = parser.parse_known_args(split_lists(arguments[:split], parser))
    overrides = list(arguments[split + 1 :])
    for name in sorted(OWN_OPTIONS.keys() & options_in(unknown)):
        raise ValueError(f"There is no option --{name}: here it is {OWN_OPTIONS[name]}.")
    if unknown:
        raise ValueError(f"Not understood: {' '.join(unknown)}. Options of finetune.py stand behind a --.")
    if args.study not in TABLES | SWEEPS:
        raise ValueError(f"There is no study {args.study!r}. Studies: {', '.join([*TABLES, *SWEEPS])}.")
    if args.study in TABLES and (args.values or args.recipe):
        raise ValueError(f"--values and --recipe are for {', '.join(SWEEPS)}; the rows of a table are fixed.")
    if args.seeds and (min(args.seeds) < 0 or len(set(args.seeds)) < len(args.seeds)):
        raise ValueError(f"--seeds must be different numbers of at least 0, got {' '.join(map(str, args.seeds))}.")
    if args.report_only and overrides:
        raise ValueError("--report_only trains nothing: leave out what stands behind the --.")
    for name in sorted(OWN_OPTIONS.keys() & options_in(overrides)):
        raise ValueError(f"--{name} is not for behind the --: here it is {OWN_OPTIONS[name]}.")
    return args, overrides


def options_in(arguments: Sequence[str]) -> set[str]:
    return {word[2:].split("=")[0].replace("-", "_") for word in arguments if word.startswith("--")}


def build_study(args: Namespace) -> Study:
    """The rows that were asked for."""
    if args.study in TABLES:
        return TABLES[args.study]
    sweep = SWEEPS[args.study]
    recipe = args.recipe or sweep.recipe
    own = row_options(Row("", recipe), {}).get(sweep.setting)
    return sweep_study(args.study, recipe, args.values or sweep.values, " ".join(own) if own else None)


def row_options(row: Row, overrides: OptionWords) -> OptionWords:
    """All options that a row is trained with, by name."""
    words = expand_recipe(["--recipe", row.recipe, *row.options], build_parser(""), RECIPES)
    return parse_option_words(words) | overrides


def validate_row(row: Row, overrides: Sequence[str]) -> Options:
    """See to it that finetune.py will take the options of a row and build its model.

    Raises:
        ValueError: as finetune.py would tell, with the row's name.
    """
    # The accelerator is for the trainings.
    elsewhere = ["--use_cpu"] if torch.accelerator.is_available() else []
    told = io.StringIO()
    try:
        with redirect_stderr(told):
            options = parse_options(["--recipe", row.recipe, *row.options, *overrides, *elsewhere], RECIPES)
        if options.model.from_scratch and options.model.model_name_or_path is None:
            changes = options.model.parse_config_overrides()
            with torch.device("meta"):
                load_classifier(
                    model_type=options.model.model_type,
                    from_scratch=True,
                    tokenmixup=options.tokenmixup,
                    config_overrides=changes,
                )
    except (ValueError, SystemExit) as error:
        reason = told.getvalue().strip().rpartition("error: ")[2] if isinstance(error, SystemExit) else error
        raise ValueError(f"Row {row.name!r}: {reason}") from error
    if not (options.training.do_train and options.training.do_eval):
        raise ValueError(f"Row {row.name!r}: a study needs both --do_train and --do_eval.")
    return options


def check_rows(study: Study, args: Namespace, overrides: Sequence[str]) -> dict[Row, str]:
    """Check every row by itself, and that no two of them are the same training.

    Returns:
        The rows that cannot be trained, and why not.

    Raises:
        ValueError: no row can be trained, with the reason of the first; or the study makes no sense.
    """
    seen: dict[str, str] = {}
    refused: dict[Row, ValueError] = {}
    for row in study.rows:
        try:
            options = validate_row(row, overrides)
        except ValueError as error:
            refused[row] = error
            continue
        if args.study in SWEEPS and not options.tokenmixup.get(SWEEPS[args.study].layers):
            layers = SWEEPS[args.study].layers
            raise ValueError(f"{args.study} has no effect in {row.recipe}: there are no {layers}.")
        content = str(sorted(row_options(row, parse_option_words(overrides)).items()))
        if content in seen:
            raise ValueError(
                f"The rows {seen[content]!r} and {row.name!r} are one and the same training with these options: leave "
                "out what makes them so."
            )
        seen[content] = row.name
    if len(refused) == len(study.rows):
        raise refused[study.rows[0]]
    return {row: str(error) for row, error in refused.items()}


def find_launcher(text: str) -> list[str]:
    """The words of a launcher, its program by its path: that beside this Python, else as the shell finds it.

    Raises:
        ValueError: if there is no such program.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"--launcher must be a command line, got {text!r}: {error}.") from error
    program = words and (shutil.which(words[0], path=Path(sys.executable).parent) or shutil.which(words[0]))
    if not program:
        raise ValueError(f"--launcher must begin with a program that is installed, got {text!r}.")
    return [program, *words[1:]]


def requests(
    rows: Sequence[Row], seeds: Sequence[int], launcher: list[str], overrides: OptionWords
) -> dict[tuple[Row, int], Request]:
    """What each row is trained with, by row and seed; all rows with one seed first, which gives a table early."""
    options = {row: row_options(row, overrides) for row in rows}
    return {
        (row, seed): Request(launcher, options[row] | {"seed": [str(seed)]}, overrides)
        for seed in seeds
        for row in rows
    }


def report(study: Study, args: Namespace, seeds: Sequence[int], request: Request) -> str:
    """Write the results of what is finished, and return them as a table."""
    results = summarize(study, collect_top1(args.output_dir, study, seeds))
    overrides = {name: " ".join(words) for name, words in request.overrides.items()}
    save_results(study, results, args.output_dir, overrides=overrides, launcher=shlex.join(request.launcher))
    files = ", ".join(str(args.output_dir / f"{study.name}.{ending}") for ending in ("json", "csv"))
    lines = ["", format_table(study, results), "", f"results  {files}"]
    if overrides:
        words = [word for name, values in request.overrides.items() for word in (f"--{name}", *values)]
        lines.append(f"options  {shlex.join(words)}")
    return "\n".join(lines)


def report_only(study: Study, args: Namespace) -> None:
    """Print and write what is there, if it was all trained with the same options.

    Raises:
        ValueError: if there is nothing, or if it was not.
    """
    seeds = args.seeds or find_seeds(args.output_dir, study)
    folders = {(row, seed): run_dir(args.output_dir, row, seed) for row in study.rows for seed in seeds}
    finished = {training: folder for training, folder in folders.items() if load_top1(folder) is not None}
    first = next((request for folder in finished.values() if (request := load_run_spec(folder))), None)
    if first is None:
        raise ValueError(f"No training of this study is finished in {args.output_dir}.")
    expected = requests(study.rows, seeds, first.launcher, first.overrides)
    for training, folder in finished.items():
        check_run_spec(folder, expected[training])
    print(report(study, args, seeds, first))


def run_study(study: Study, args: Namespace, overrides: Sequence[str]) -> None:
    """Train what is not finished, then print and write the results.

    A row that cannot be trained with its settings does not stop the others. A failure that rows share does: the first
    two fail alike before their first checkpoint, and nothing has been trained.

    Raises:
        ValueError: for a mistake in the options of every row, before anything is trained.
    """
    refused = check_rows(study, args, overrides)
    seeds, launcher = args.seeds or [DEFAULT_SEED], find_launcher(args.launcher)
    rows = [row for row in study.rows if row not in refused]
    asked = requests(rows, seeds, shlex.split(args.launcher), parse_option_words(overrides))
    for (row, seed), request in asked.items():
        check_run_spec(run_dir(args.output_dir, row, seed), request)
    check_writable(args.output_dir)
    for reason in refused.values():
        print(f"not trained: {reason}", flush=True)
    reasons: dict[Path, str] = {}
    failed_at_start: dict[str | None, Row] = {}
    for number, ((row, seed), request) in enumerate(asked.items(), start=1):
        print(f"[{number}/{len(asked)}] {row.name}, seed {seed}", flush=True)
        folder = run_dir(args.output_dir, row, seed)
        command = [*launcher, *FINETUNE, "--recipe", row.recipe, *row.options, *overrides]
        command += ["--seed", str(seed), "--output_dir", str(folder)]
        if unfinished := train(folder, request, command, tell=lambda line: print(f"  {line}", flush=True)):
            reasons[folder] = f"{row.name}, seed {seed}: {unfinished.reason}"
            # Only while every training has failed.
            alike = failed_at_start.setdefault(unfinished.error, row) if len(reasons) == number else row
            if unfinished.error and alike != row:
                sys.exit(
                    f"{program_name()}: {alike.name!r} and {row.name!r} fail for the same reason, so nothing else is "
                    f"started. {unfinished.error} See {folder / LOG_FILE}."
                )
        report(study, args, seeds, request)
    print(report(study, args, seeds, request))
    # What another process trained may have come to its end by now.
    unfinished = [reason for folder, reason in reasons.items() if load_top1(folder) is None]
    unfinished = [*(reason for reason in refused.values() for _ in seeds), *unfinished]
    if unfinished:
        count = f"{len(unfinished)} of {len(study.rows) * len(seeds)} trainings are not finished."
        sys.exit("\n".join([f"{program_name()}: {count}", *dict.fromkeys(unfinished)]))


def main(arguments: list[str]) -> None:
    args, overrides = parse_arguments(arguments)
    study = build_study(args)
    if args.report_only:
        return report_only(study, args)
    run_study(study, args, overrides)


def end(number: int, frame: object) -> None:
    sys.exit(128 + number)


def entry_point() -> None:
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, end)
    try:
        run_command(main)
    except KeyboardInterrupt:
        print(f"\n{program_name()}: stopped; the same command continues from here.", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    entry_point()
