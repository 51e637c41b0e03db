"""Train the rows of one of the paper's tables, of a small study or of a sweep, and
compare them with each other.

  # a table of the paper
  python scripts/study.py 4 --seeds 42 43 44
  # in periods of 25 minutes; the same command continues
  python scripts/study.py 1 --part cifar100 --max_time 25
  # with other options of finetune.py
  python scripts/study.py 5 --output_dir outputs/short -- --num_train_epochs 310
  # a sweep, and one of another recipe
  python scripts/study.py rho --values 0.001 0.005 0.01
  python scripts/study.py kappa --recipe vit-b16-imagenet1k-vtm --values 3 10
  # on a CPU
  python scripts/study.py small --seeds 42 43 44
  python scripts/study.py transfer --seeds 42 43 44
  # several processes for each run
  python scripts/study.py 3 --launcher "accelerate launch --num_processes 4"
  # also evaluated on corrupted images, as small and transfer always are
  python scripts/study.py 3 --corruptions
  # the results so far, compared with another row
  python scripts/study.py 4 --report_only
  python scripts/study.py 5 --report_only --compare_to "input mixup & CutMix"

Tables 1 (plain, HTM, VTM, both; --part names the dataset), 3 (saliency
detectors), 4 (ablation of HTM) and 5 (combinations with other mixups). Studies
for a CPU: small (a small CCT on CIFAR-10) and transfer (a small ViT, pretrained
on 50 classes of CIFAR-100 and fine-tuned on the others). Sweeps: rho, tau and
kappa. With several seeds, differences are paired and have an interval.

Options of finetune.py after -- apply to every run. Each row and seed is a run
in a process of its own. A finished run is not repeated, and an interrupted one
resumes from its last checkpoint. --max_time ends the study during a run, and
the same command continues it. Two of these commands with the same output folder
share the runs of a study, on a GPU each.
"""

import dataclasses
import math
import shlex
import shutil
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import torch

from ..models import load_classifier
from ..studies.definitions import (
    CORRUPTION_METRIC,
    STUDIES,
    SWEEPS,
    TABLE_1_PARTS,
    Study,
    StudyRow,
    sweep_study,
)
from ..studies.results import format_table, save_results, summarize
from ..studies.runner import (
    LOG_FILE,
    RunSpec,
    collect_metrics,
    collect_mixing,
    collect_top1,
    find_last_checkpoint,
    find_seeds,
    load_run_spec,
    load_top1,
    parse_option_words,
    run_dir,
    validate_run_spec,
)
from ..training.checkpointing.disk_space import check_writable
from .arguments import ParsedArguments, build_parser, parse_options
from .parser import CliParser
from .program import program_name, run_command
from .recipes import expand_recipe, get_option_name, split_lists
from .study_runs import RunStarter

DEFAULT_SEED = 42
TABLE_1 = "1"
STUDY_NAMES = (TABLE_1, *STUDIES, *SWEEPS)
OptionWords = dict[str, list[str]]
# Options of finetune.py that cannot be passed after `--`, and what to do instead.
RESERVED_OPTIONS = {
    "recipe": "For a sweep, pass --recipe before `--`.",
    "seed": "Pass --seeds before `--`.",
    "output_dir": "Pass --output_dir before `--`.",
    "dry_run": "Run scripts/finetune.py with it.",
    "max_time": "Pass --max_time before `--`.",
    "compare_to": "Pass --compare_to before `--`.",
    "resume_from_checkpoint": "A run with a checkpoint resumes by itself.",
    "push_to_hub": "Run scripts/publish.py afterwards.",
    "hub_model_id": "Run scripts/publish.py afterwards.",
}


def parse_arguments(arguments: Sequence[str]) -> tuple[Namespace, list[str]]:
    """The study's own arguments, and those of finetune.py.

    Raises:
        ValueError: An argument does not exist, has a wrong value, or cannot be used with another one.
    """
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parser = CliParser(usage="%(prog)s STUDY [options] [-- options of finetune.py]", description=__doc__)
    parser.add_argument("study", metavar="STUDY", help=f"{', '.join(STUDY_NAMES)}.")
    parser.add_argument("--part", help=f"Part of Table 1: {', '.join(TABLE_1_PARTS)}.")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help=f"Seeds to train with ({DEFAULT_SEED}).")
    parser.add_argument("--values", nargs="+", metavar="VALUE", help="Values of a sweep.")
    parser.add_argument("--recipe", help="Recipe of a sweep (HTM or VTM of CCT-7/3x1 on CIFAR-100).")
    parser.add_argument(
        "--output_dir", type=Path, default=Path("outputs/studies"), help="One folder for all studies (%(default)s)."
    )
    parser.add_argument("--launcher", default="accelerate launch", help="Command that starts a run (%(default)s).")
    parser.add_argument(
        "--max_time",
        type=float,
        metavar="MINUTES",
        help="Stop a run after this time, and start no other one. Loading and the last checkpoint take longer.",
    )
    parser.add_argument(
        "--corruptions",
        action="store_true",
        help="Also evaluate the rows on corrupted images; always for small and transfer.",
    )
    parser.add_argument("--compare_to", metavar="ROW", help="Row that the others are compared with, by its name.")
    parser.add_argument("--report_only", action="store_true", help="Run no training; show the results of all seeds.")
    args, unknown = parser.parse_known_args(split_lists(arguments[:split], parser))
    overrides = list(arguments[split + 1 :])
    for name in sorted(RESERVED_OPTIONS.keys() & option_names_in(unknown)):
        raise ValueError(f"There is no option --{name}. {RESERVED_OPTIONS[name]}")
    if unknown:
        raise ValueError(f"Unknown arguments: {' '.join(unknown)}. Pass options of finetune.py after `--`.")
    if args.study not in STUDY_NAMES:
        raise ValueError(f"There is no study {args.study!r}. Studies: {', '.join(STUDY_NAMES)}.")
    if args.study == TABLE_1 and args.part not in TABLE_1_PARTS:
        raise ValueError(f"--part must be one of {', '.join(TABLE_1_PARTS)} for Table 1, got {args.part!r}.")
    if args.study != TABLE_1 and args.part is not None:
        raise ValueError(f"--part is for Table 1, and {args.study} has no parts. Remove it.")
    if args.max_time is not None and not 0 < args.max_time < math.inf:
        raise ValueError(f"--max_time must be a finite number of minutes above 0, got {args.max_time}.")
    if args.study not in SWEEPS and (args.values or args.recipe):
        raise ValueError(
            f"--values and --recipe are for {', '.join(SWEEPS)}; the rows of the other studies are fixed."
        )
    for value in args.values or []:
        validate_sweep_value(args.study, value)
    if args.seeds and (min(args.seeds) < 0 or len(set(args.seeds)) < len(args.seeds)):
        raise ValueError(f"--seeds must be different numbers of at least 0, got {' '.join(map(str, args.seeds))}.")
    if args.report_only and overrides:
        raise ValueError("--report_only runs no training. Remove the options after `--`.")
    for name in sorted(RESERVED_OPTIONS.keys() & option_names_in(overrides)):
        raise ValueError(f"--{name} cannot be passed after `--`. {RESERVED_OPTIONS[name]}")
    return args, overrides


def validate_sweep_value(study: str, value: str) -> None:
    """Check a value of a sweep.

    Raises:
        ValueError: It is not a number, or for tau not `none`.
    """
    if value.lower() == "none" and study == "tau":
        return
    try:
        float(value)
    except ValueError as error:
        raise ValueError(f"--values of a sweep over {study} must be numbers, got {value!r}.") from error


def option_names_in(arguments: Sequence[str]) -> set[str]:
    return {get_option_name(word) for word in arguments if word.startswith("--")}


def build_study(args: Namespace) -> Study:
    """The study that the arguments name, with the metric and the reference row that they ask for.

    Raises:
        ValueError: No row has this name.
    """
    study = find_study(args)
    names = [row.name for row in study.rows]
    if args.compare_to is not None:
        if args.compare_to not in names:
            rows = ", ".join(f'"{name}"' for name in names)
            raise ValueError(f"--compare_to must name a row of the study, got {args.compare_to!r}. Rows: {rows}.")
        study = dataclasses.replace(study, reference=names.index(args.compare_to))
    if args.corruptions and CORRUPTION_METRIC not in study.metrics:
        return dataclasses.replace(study, metrics=(*study.metrics, CORRUPTION_METRIC))
    return study


def find_study(args: Namespace) -> Study:
    """The study that the arguments name."""
    if args.study == TABLE_1:
        return TABLE_1_PARTS[args.part]
    if args.study in STUDIES:
        return STUDIES[args.study]
    sweep = SWEEPS[args.study]
    recipe = args.recipe or sweep.recipe
    own = row_options(StudyRow("", recipe), {}).get(sweep.setting)
    return sweep_study(args.study, recipe, args.values or sweep.values, " ".join(own) if own else None)


def row_options(row: StudyRow, overrides: OptionWords) -> OptionWords:
    """All options that a row is trained with, by name."""
    words = expand_recipe(["--recipe", row.recipe, *row.options], build_parser())
    return parse_option_words(words) | overrides


def validate_row(row: StudyRow, overrides: Sequence[str]) -> ParsedArguments:
    """Check that finetune.py accepts the options of a row and can build its model.

    Raises:
        ValueError: It does not. The message has the row's name and that of finetune.py.
    """
    # This process must not initialize the accelerator, which the runs use.
    device = ["--use_cpu"] if torch.accelerator.is_available() else []
    try:
        options = parse_options(["--recipe", row.recipe, *row.options, *overrides, *device])
        if options.model.from_scratch and options.model.model_name_or_path is None:
            with torch.device("meta"):
                load_classifier(
                    model_type=options.model.model_type,
                    from_scratch=True,
                    tokenmixup=options.tokenmixup,
                    config_overrides=options.model.parse_config_overrides(),
                )
    except ValueError as error:
        hint = " Pass options of finetune.py after `--`." if "--" in str(error) else ""
        raise ValueError(f"Row {row.name!r}: {error}{hint}") from error
    if not (options.training.do_train and options.training.do_eval):
        raise ValueError(f"Row {row.name!r}: a study needs both --do_train and --do_eval.")
    return options


def check_rows(study: Study, args: Namespace, overrides: Sequence[str]) -> dict[StudyRow, str]:
    """Check every row, and that no two rows are the same run.

    Returns:
        The rows that cannot be trained, with the reason.

    Raises:
        ValueError: No row can be trained (with the reason of the first), two rows are the same run, or a sweep has no
            effect.
    """
    if study.base is not None:
        validate_row(study.base, overrides)
    names: dict[str, str] = {}
    errors: dict[StudyRow, ValueError] = {}
    for row in study.rows:
        try:
            options = validate_row(row, overrides)
        except ValueError as error:
            errors[row] = error
            continue
        if args.study in SWEEPS and not options.tokenmixup.get(SWEEPS[args.study].layers):
            layers = SWEEPS[args.study].layers
            raise ValueError(f"{args.study} has no effect in {row.recipe}, which has no {layers}.")
        content = str(sorted(row_options(row, parse_option_words(overrides)).items()))
        if content in names:
            raise ValueError(
                f"The rows {names[content]!r} and {row.name!r} are identical with these options. Remove the "
                "option that sets what the rows vary."
            )
        names[content] = row.name
    if len(errors) == len(study.rows):
        raise errors[study.rows[0]]
    return {row: str(error) for row, error in errors.items()}


def find_launcher(text: str) -> list[str]:
    """The words of a launcher with the path of its program, which is searched next to this Python and on PATH.

    Raises:
        ValueError: There is no such program.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"--launcher must be a command line, got {text!r}: {error}.") from error
    program = words and (shutil.which(words[0], path=Path(sys.executable).parent) or shutil.which(words[0]))
    if not program:
        raise ValueError(f"--launcher must begin with a program that is installed, got {text!r}.")
    return [program, *words[1:]]


def build_run_specs(
    rows: Sequence[StudyRow], seeds: Sequence[int], launcher: list[str], overrides: OptionWords
) -> dict[tuple[StudyRow, int], RunSpec]:
    """The options of each run by row and seed, all rows of the first seed first, which completes a table early."""
    options = {row: row_options(row, overrides) for row in rows}
    return {
        (row, seed): RunSpec(launcher, options[row] | {"seed": [str(seed)]}, overrides)
        for seed in seeds
        for row in rows
    }


def save_report(study: Study, args: Namespace, seeds: Sequence[int], request: RunSpec) -> str:
    """Write the results of the finished runs, and return them as a table."""
    results = summarize(
        study,
        collect_top1(args.output_dir, study, seeds),
        collect_mixing(args.output_dir, study, seeds),
        collect_metrics(args.output_dir, study, seeds),
    )
    overrides = {name: " ".join(words) for name, words in request.overrides.items()}
    save_results(study, results, args.output_dir, overrides=overrides, launcher=shlex.join(request.launcher))
    files = ", ".join(str(args.output_dir / f"{study.name}.{ending}") for ending in ("json", "csv"))
    lines = ["", format_table(study, results), "", f"results  {files}"]
    if overrides:
        words = [word for name, values in request.overrides.items() for word in (f"--{name}", *values)]
        lines.append(f"options  {shlex.join(words)}")
    return "\n".join(lines)


def report_only(study: Study, args: Namespace) -> None:
    """Print and write the results of the finished runs.

    Raises:
        ValueError: No run is finished, or the runs have different options.
    """
    seeds = args.seeds or find_seeds(args.output_dir, study)
    folders = {(row, seed): run_dir(args.output_dir, row, seed) for row in study.rows for seed in seeds}
    finished = {run: folder for run, folder in folders.items() if load_top1(folder) is not None}
    first = next((request for folder in finished.values() if (request := load_run_spec(folder))), None)
    if first is None:
        started = sum(find_last_checkpoint(folder) is not None for folder in folders.values())
        raise ValueError(
            f"No run of this study is finished in {args.output_dir}, and {started} have a checkpoint. Start or "
            "continue them with the same command without --report_only."
        )
    expected = build_run_specs(study.rows, seeds, first.launcher, first.overrides)
    for run, folder in finished.items():
        validate_run_spec(folder, expected[run])
    print(save_report(study, args, seeds, first))


def run_study(study: Study, args: Namespace, overrides: Sequence[str]) -> None:
    """Train the runs that are not finished, then print and write the results.

    A row that cannot be trained with its settings does not stop the others. If no run has succeeded and the first two
    rows fail with the same error before a checkpoint, the study stops.

    Raises:
        ValueError: The options of every row are wrong; nothing was trained.
        SystemExit: Some runs are not finished.
    """
    rejected = check_rows(study, args, overrides)
    seeds, launcher = args.seeds or [DEFAULT_SEED], find_launcher(args.launcher)
    rows = [row for row in study.rows if row not in rejected]
    run_specs = build_run_specs(rows, seeds, shlex.split(args.launcher), parse_option_words(overrides))
    for (row, seed), run_spec in run_specs.items():
        validate_run_spec(run_dir(args.output_dir, row, seed), run_spec)
    check_writable(args.output_dir)
    for reason in rejected.values():
        print(f"not trained: {reason}", flush=True)
    deadline = None if args.max_time is None else time.monotonic() + 60 * args.max_time
    with_corruptions = CORRUPTION_METRIC in study.metrics
    starter = RunStarter(launcher, overrides, args.output_dir, deadline, with_corruptions)
    base = None
    if study.base is not None and "model_name_or_path" not in option_names_in(overrides):
        base = train_base(study.base, args, starter)
    failures: dict[Path, str] = {}
    first_with_error: dict[str | None, StudyRow] = {}
    timed_out, failed = False, False
    for number, ((row, seed), run_spec) in enumerate(run_specs.items(), start=1):
        folder = run_dir(args.output_dir, row, seed)
        timed_out = timed_out or starter.time_is_over
        if timed_out and not starter.is_finished(folder):
            reason = "not started" if load_top1(folder) is None else "not evaluated on corrupted images"
            failures[folder] = f"{row.name}, seed {seed}: {reason}"
            continue
        print(f"[{number}/{len(run_specs)}] {row.name}, seed {seed}", flush=True)
        unfinished = starter.start(row, seed, run_spec, base)
        if unfinished is None and with_corruptions:
            unfinished = starter.evaluate_corruptions(row, seed, run_spec)
        if unfinished:
            failures[folder] = f"{row.name}, seed {seed}: {unfinished.reason}"
            timed_out, failed = timed_out or unfinished.timed_out, failed or not unfinished.timed_out
            if unfinished.error and len(failures) == number:
                other = first_with_error.setdefault(unfinished.error, row)
                if other != row:
                    sys.exit(
                        f"{program_name()}: {other.name!r} and {row.name!r} fail for the same reason, so no other run "
                        f"is started. {unfinished.error} See {folder / LOG_FILE}."
                    )
        save_report(study, args, seeds, run_spec)
    print(save_report(study, args, seeds, run_spec))
    # Another process may have finished its runs by now.
    unfinished_runs = [reason for reason in rejected.values() for _ in seeds]
    unfinished_runs += [reason for folder, reason in failures.items() if not starter.is_finished(folder)]
    if not unfinished_runs:
        return
    count = f"{len(unfinished_runs)} of {len(study.rows) * len(seeds)} runs are not finished."
    report = "\n".join([count, *dict.fromkeys(unfinished_runs)])
    if failed or rejected or not timed_out:
        sys.exit(f"{program_name()}: {report}")
    print(f"\n{report}\n--max_time is over. Run the same command to continue.")


def train_base(base: StudyRow, args: Namespace, starter: RunStarter) -> Path:
    """Train the model that the rows of a study start from, unless it is trained. Returns its folder.

    Raises:
        ValueError: Its folder contains another run.
        SystemExit: It is not finished.
    """
    folder = run_dir(args.output_dir, base, DEFAULT_SEED)
    overrides = parse_option_words(starter.overrides)
    run_specs = build_run_specs([base], [DEFAULT_SEED], shlex.split(args.launcher), overrides)
    print(f"[{base.name}] seed {DEFAULT_SEED}", flush=True)
    unfinished = starter.start(base, DEFAULT_SEED, run_specs[base, DEFAULT_SEED])
    if unfinished is None:
        return folder
    if unfinished.timed_out:
        print(f"\n{base.name} is not finished. --max_time is over. Run the same command to continue.")
        sys.exit(0)
    sys.exit(f"{program_name()}: the model that the rows start from is not finished: {unfinished.reason}")


def main(arguments: Sequence[str]) -> None:
    args, overrides = parse_arguments(arguments)
    study = build_study(args)
    if args.report_only:
        return report_only(study, args)
    run_study(study, args, overrides)


def exit_on_signal(number: int, frame: object) -> None:
    sys.exit(128 + number)


def entry_point() -> None:
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, exit_on_signal)
    try:
        run_command(main, build_parser=build_parser)
    except KeyboardInterrupt:
        print(f"\n{program_name()}: interrupted; run the same command to resume.", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    entry_point()
