"""User errors of settings, on the command line and in recipes."""

from transformers import TrainingArguments
from user_errors.harness import DIGITS, ErrorCase, Harness

from hf_tokenmixup.training import training_args


def flags(name: str, text: str, *fragments: str, exception: type[BaseException] = ValueError) -> ErrorCase:
    """Train a ViT on the digits with these flags."""
    return ErrorCase(name, lambda harness: harness.prepare_digits(*text.split()), exception, fragments)


def removed_flag(name: str, text: str, *fragments: str) -> list[ErrorCase]:
    """Pass a flag that newer versions of transformers have removed. No case if the installed version has it."""
    field = text.split()[0].removeprefix("--")
    return [] if hasattr(TrainingArguments, field) else [flags(name, text, *fragments)]


def recipe(name: str, content: str | bytes, *fragments: str) -> ErrorCase:
    """Parse a recipe with this content."""
    return ErrorCase(f"recipe: {name}", lambda harness: harness.parse_recipe(content), ValueError, fragments)


def recipe_path(name: str, path: str, *fragments: str) -> ErrorCase:
    """Train with the recipe of this name or path. {folder} is a folder that contains an empty subfolder."""

    def trigger(harness: Harness):
        (harness.folder / "folder").mkdir()
        return harness.prepare("--recipe", path.format(folder=harness.folder))

    return ErrorCase(f"recipe: {name}", trigger, ValueError, fragments)


def train_with_zero_stage_3(harness: Harness):
    """Train as if DeepSpeed were configured with ZeRO stage 3. DeepSpeed need not be installed."""
    harness.monkeypatch.setattr(training_args, "is_deepspeed_zero3_enabled", lambda: True)
    return harness.prepare_digits()


PARSER_CASES = [
    flags("learning_rate that is not a number", "--learning_rate x", "--learning_rate", "float", "'x'"),
    flags(
        "layer index that is not a number", "--horizontal_layers one",
        "--horizontal_layers", "int", "'one'",
    ),
    flags(
        "layer index that is not a number in a list", "--horizontal_layers 1,x",
        "--horizontal_layers", "int", "'x'",
    ),
    flags(
        "horizontal_tau that is not a number", "--horizontal_tau x",
        "--horizontal_tau", "expected a number or none", "'x'",
    ),
    flags(
        "assignment_group_size that is not a number", "--assignment_group_size x",
        "--assignment_group_size", "expected an integer or none", "'x'",
    ),
    flags(
        "vertical_kappa that is not an integer", "--vertical_kappa 2.5",
        "--vertical_kappa", "int", "'2.5'",
    ),
    flags(
        "scorenet_detach that is not a bool", "--scorenet_detach yes",
        "--scorenet_detach", "expected true or false", "'yes'",
    ),
    flags(
        "unknown scorenet_pooling", "--scorenet_pooling max",
        "--scorenet_pooling", "'max'", "'cls', 'mean', 'attention'",
    ),
    flags(
        "unknown saliency_detector", "--saliency_detector grad",
        "--saliency_detector", "'grad'", "'gradient'",
    ),
    flags("unknown assignment", "--assignment best", "--assignment", "'best'", "'optimal', 'random'"),
    flags(
        "unknown label_mapping", "--label_mapping names",
        "--label_mapping", "'names'", "'strict', 'name', 'number'",
    ),
    flags("misspelled optim", "--optim adma", "--optim", "'adma'", "adamw_torch"),
    flags("bf16 that is not a bool", "--bf16 maybe", "--bf16", "maybe", "true/false"),
    flags("seed that is not a number", "--seed x", "--seed", "int", "'x'"),
    flags("image_mean that is not a number", "--image_mean a b c", "--image_mean", "float", "'a'"),
    flags("recipe without a value", "--recipe", "--recipe", "expected one argument"),
]  # fmt: skip
SETTINGS_CASES = [
    flags("fp16 on a CPU", "--fp16", "fp16", "no effect on a CPU", "`bf16=True`"),
    recipe("fp16", "fp16: true", "fp16", "mine.yaml sets `fp16: true`", "`--fp16 false`"),
    ErrorCase("ZeRO stage 3", train_with_zero_stage_3, ValueError, ("ZeRO stage 3", "stage 1 or 2", "`fsdp`")),
    flags(
        "misspelled flag", "--horizontal_layer 1",
        "no option --horizontal_layer", "did you mean --horizontal_layers?",
    ),
    flags("values without a flag", "1 2", "Unknown arguments", "1 2"),
    flags(
        "horizontal layer above the last one", "--horizontal_layers 99",
        "horizontal_layers", "between 0 and 2", "[99]",
    ),
    flags("negative horizontal layer", "--horizontal_layers -1", "horizontal_layers", "between 0 and 2", "[-1]"),
    flags("duplicate horizontal layer", "--horizontal_layers 1 1", "horizontal_layers", "each layer once", "[1, 1]"),
    flags(
        "vertical layer 0", "--vertical_layers 0",
        "vertical_layers", "between 1 and 2", "no layer before layer 0", "[0]",
    ),
    flags(
        "manifold mixup layer above the last one", "--manifold_mixup_layers 3",
        "manifold_mixup_layers", "between 0 and 2", "[3]",
    ),
    flags(
        "horizontal_tau of nan", "--horizontal_tau nan",
        "horizontal_tau", "finite number of at least 0", "None makes", "nan",
    ),
    flags("negative horizontal_tau", "--horizontal_tau -1", "horizontal_tau", "finite number of at least 0", "-1.0"),
    flags("horizontal_rho of nan", "--horizontal_rho nan", "horizontal_rho", "finite number of at least 0", "nan"),
    flags(
        "scorenet_loss_weight of inf", "--scorenet_loss_weight inf",
        "scorenet_loss_weight", "finite number of at least 0", "inf",
    ),
    flags(
        "vertical_kappa above the number of tokens", "--vertical_layers 2 --vertical_kappa 17",
        "vertical_kappa", "between 0 and 16", "17",
    ),
    flags(
        "rollout_steps above the number of layers", "--horizontal_layers 1 --rollout_steps 9",
        "rollout_steps", "between 0 and 1", "9",
    ),
    flags(
        "rollout_steps with random saliency", "--rollout_steps 1 --saliency_detector random",
        "rollout_steps", "'attention'", "'random'",
    ),
    flags(
        "assignment_group_size of 1", "--assignment_group_size 1",
        "assignment_group_size", "at least 2, or None", "1",
    ),
    flags(
        "assignment_group_size with random assignment", "--assignment_group_size 4 --assignment random",
        "assignment_group_size", "'optimal'", "'random'",
    ),
    flags(
        "manifold_mixup_alpha of 0", "--manifold_mixup_alpha 0",
        "manifold_mixup_alpha", "above 0", "manifold_mixup_layers=[] turns it off",
    ),
    flags("learning_rate of nan", "--learning_rate nan", "`learning_rate`", "finite number of at least 0", "nan"),
    flags("negative learning_rate", "--learning_rate -1", "`learning_rate`", "finite number of at least 0", "-1.0"),
    flags("weight_decay of nan", "--weight_decay nan", "`weight_decay`", "finite number of at least 0", "nan"),
    flags("layer_decay of 0", "--layer_decay 0", "`layer_decay`", "above 0 and at most 1", "got 0.0"),
    flags("max_grad_norm of nan", "--max_grad_norm nan", "`max_grad_norm`", "finite number of at least 0", "nan"),
    flags(
        "per_device_train_batch_size of 0", "--per_device_train_batch_size 0",
        "`per_device_train_batch_size`", "at least 1", "got 0",
    ),
    flags(
        "negative per_device_eval_batch_size", "--per_device_eval_batch_size -4",
        "`per_device_eval_batch_size`", "at least 1", "got -4",
    ),
    flags(
        "gradient_accumulation_steps of 0", "--gradient_accumulation_steps 0",
        "`gradient_accumulation_steps`", "at least 1", "got 0",
    ),
    flags("num_train_epochs of nan", "--num_train_epochs nan", "`num_train_epochs`", "finite number above 0", "nan"),
    flags("num_train_epochs of 0", "--num_train_epochs 0", "`num_train_epochs`", "finite number above 0", "0.0"),
    flags("max_steps of 0", "--max_steps 0", "`max_steps`", "at least 1, or -1", "got 0"),
    flags(
        "negative dataloader_num_workers", "--dataloader_num_workers -1",
        "`dataloader_num_workers`", "at least 0", "-1",
    ),
    flags("negative seed", "--seed -1", "`seed`", "between 0 and 4294967295", "-1"),
    flags(
        "negative logging_steps", "--logging_steps -1",
        "`logging_steps`", "above 0", "`logging_strategy=no` turns it off", "-1",
    ),
    flags("save_steps of 0", "--save_steps 0", "`save_steps`", "above 0", "`save_strategy=no` turns it off", "0.0"),
    flags("negative skip_nonfinite_steps", "--skip_nonfinite_steps -1", "`skip_nonfinite_steps`", "at least 0", "-1"),
    flags(
        "mixup_alpha of nan", "--mixup_alpha nan",
        "`mixup_alpha`", "finite number of at least 0", "0 turns it off", "nan",
    ),
    flags("mixup_prob above 1", "--mixup_prob 2", "`mixup_prob`", "between 0 and 1", "2.0"),
    flags(
        "label_smoothing_factor of 1", "--label_smoothing_factor 1",
        "`label_smoothing_factor`", "less than 1", "1.0",
    ),
    flags(
        "lr_scheduler_kwargs of invalid JSON", "--lr_scheduler_kwargs {",
        "`lr_scheduler_kwargs`", "JSON object", "'{'",
    ),
    flags(
        "lr_scheduler_kwargs that is a string", "--lr_scheduler_kwargs foo",
        "`lr_scheduler_kwargs`", "JSON object", "'foo'",
    ),
    flags(
        "lr_scheduler_kwargs of another scheduler", '--lr_scheduler_kwargs {"min_lr":1}',
        "--lr_scheduler_kwargs", "'min_lr'", "linear does not take",
    ),
    flags(
        "scheduler without its required argument", "--lr_scheduler_type cosine_with_min_lr",
        "--lr_scheduler_type cosine_with_min_lr", "min_lr",
    ),
    flags(
        "optim_args without a value", "--optim sgd --optim_args momentum",
        "--optim_args", "'momentum=0.9,nesterov=true'", "'momentum'",
    ),
    flags(
        "misspelled name in optim_args", "--optim sgd --optim_args momentun=0.9",
        "'momentun'", "sgd does not take", "It takes dampening",
    ),
    flags(
        "string instead of a number in optim_args", "--optim sgd --optim_args momentum=much",
        "--optim sgd", "momentum=much",
    ),
    flags("adam_beta1 above 1", "--adam_beta1 2", "--optim adamw", "beta", "2.0"),
    flags(
        "unknown metric_for_best_model", "--metric_for_best_model top2",
        "--metric_for_best_model", "top1, top5, loss", "'top2'",
    ),
    flags(
        "load_best_model_at_end without evaluation", "--load_best_model_at_end",
        "--load_best_model_at_end", "save and eval strategy to match",
    ),
    flags("bf16 together with fp16", "--bf16 --fp16", "fp16 and bf16", "not both"),
    flags("hflip above 1", "--hflip 2", "hflip", "between 0 and 1", "2.0"),
    flags("crop_scale of one number", "--crop_scale 1", "crop_scale", "two numbers a <= b", "(1.0,)"),
    flags("crop_scale in descending order", "--crop_scale 1 0.5", "crop_scale", "two numbers a <= b", "(1.0, 0.5)"),
    flags("unknown auto_augment policy", "--auto_augment foo", "auto_augment", "'rand-m9-mstd0.5-inc1'", "'foo'"),
    flags("random_erasing above 1", "--random_erasing 7", "random_erasing", "between 0 and 1", "7.0"),
    flags("unknown erasing_mode", "--erasing_mode x", "erasing_mode", "'pixel', 'rand' or 'const'", "'x'"),
    flags("color_jitter of nan", "--color_jitter nan", "color_jitter", "at least 0", "nan"),
    flags("image_size of 0", "--image_size 0", "--image_size", "at least 1", "got 0"),
    flags(
        "image_size that differs from config_overrides", "--image_size 17",
        "image_size is 17, but config_overrides has image_size 16", "Remove one",
    ),
    flags(
        "image_size of three numbers", "--image_size 16,16,16",
        "--image_size must be a side, or height and width", "got 16 16 16",
    ),
    *removed_flag(
        "removed flag warmup_ratio", "--warmup_ratio 0.1",
        "--warmup_ratio was removed", "as in --warmup_steps 0.1",
    ),
    flags(
        "removed flag evaluation_strategy", "--evaluation-strategy epoch",
        "--evaluation_strategy was removed", "pass --eval_strategy",
    ),
    flags(
        "overwrite_output_dir", "--overwrite_output_dir",
        "name another --output_dir", "--resume_from_checkpoint auto",
    ),
    *removed_flag("removed flag logging_dir", "--logging_dir x", "TENSORBOARD_LOGGING_DIR"),
    flags("removed flag save_safetensors", "--save_safetensors true", "always saved as safetensors"),
    flags(
        "removed flag per_gpu_train_batch_size", "--per_gpu_train_batch_size 8",
        "pass --per_device_train_batch_size",
    ),
    flags("trust_remote_code", "--trust_remote_code", "--trust_remote_code is not supported"),
    flags(
        "image_mean of two numbers", "--image_mean 1 2",
        "--image_mean", "three finite numbers, or one", "[1.0, 2.0]",
    ),
    flags("image_std of 0", "--image_std 0 0 0", "--image_std", "three numbers above 0, or one", "[0.0, 0.0, 0.0]"),
    flags("image_cache_gib of nan", "--image_cache_gib nan", "image_cache_gib", "at least 0", "nan"),
    flags("unknown integration in report_to", "--report_to nobody", "nobody is not supported", "tensorboard"),
    flags("unknown attn_implementation", "--attn_implementation foo", "attn_implementation", "foo", "sdpa"),
    flags(
        "eval_steps of 0", "--eval_strategy steps --eval_steps 0",
        "`eval_steps`", "above 0", "`eval_strategy=no`", "got 0",
    ),
    flags("eval_steps of nan", "--eval_strategy steps --eval_steps nan", "`eval_steps`", "above 0", "nan"),
    flags("negative eval_steps", "--eval_strategy steps --eval_steps -1", "`eval_steps`", "above 0", "-1"),
    flags(
        "eval_delay of nan", "--eval_strategy epoch --eval_delay nan",
        "`eval_delay`", "finite number of at least 0", "nan",
    ),
    flags(
        "eval_accumulation_steps of 0", "--eval_accumulation_steps 0",
        "`eval_accumulation_steps`", "at least 1", "got 0",
    ),
    flags(
        "save_total_limit of 0", "--save_total_limit 0",
        "`save_total_limit`", "at least 1", "got 0", "Omit it to keep all",
    ),
    flags(
        "dataloader_prefetch_factor of 0", "--dataloader_num_workers 1 --dataloader_prefetch_factor 0",
        "`dataloader_prefetch_factor`", "at least 1",
    ),
    flags("ddp_timeout of 0", "--ddp_timeout 0", "`ddp_timeout`", "at least 1", "got 0"),
    flags(
        "data_seed above the maximum", "--data_seed 18446744073709551616",
        "`data_seed`", "between 0 and 4294967295", "18446744073709551616",
    ),
    flags(
        "warmup_steps of nan", "--warmup_steps nan",
        "`warmup_steps`", "integer number of steps, or a fraction", "nan",
    ),
    flags(
        "warmup_steps of 1.5", "--warmup_steps 1.5",
        "`warmup_steps`", "integer number of steps, or a fraction", "1.5",
    ),
    flags(
        "neftune_noise_alpha of nan", "--neftune_noise_alpha nan",
        "`neftune_noise_alpha`", "finite number of at least 0", "nan",
    ),
    flags("use_liger_kernel", "--use_liger_kernel", "`use_liger_kernel` has no effect", "language models", "Omit it"),
    flags("unknown torch_compile_mode", "--torch_compile_mode fast", "`torch_compile_mode` 'fast'", "max-autotune"),
    flags(
        "unknown torch_compile_backend", "--torch_compile_backend llvm",
        "`torch_compile_backend` must be one of", "inductor", "'llvm'",
    ),
    flags(
        "accelerator_config of invalid JSON", "--accelerator_config {",
        "`accelerator_config` must be a JSON object or a JSON file", "'{'", "line 1",
    ),
    flags(
        "accelerator_config file that does not exist", "--accelerator_config no.json",
        "`accelerator_config` must be a JSON", "'no.json'", "No such file",
    ),
    flags(
        "misspelled key in accelerator_config", '--accelerator_config {"split_batch":true}',
        "`accelerator_config` has no 'split_batch'", "split_batches",
    ),
    flags(
        "fsdp_config that is a list", "--fsdp_config [1]",
        "`fsdp_config` must be a JSON object or a JSON file", "'[1]'",
    ),
    flags(
        "deepspeed file that does not exist", "--deepspeed no.json",
        "`deepspeed` must be a JSON object or a JSON file", "'no.json'", "No such file",
    ),
    flags(
        "misspelled key in activation_checkpointing_kwargs", '--activation_checkpointing_kwargs {"reentrant":true}',
        "_kwargs` has no 'reentrant'", "use_reentrant",
    ),
    flags("removed optimizer adamw_hf", "--optim adamw_hf", "--optim adamw_hf was removed", "pass adamw_torch"),
    flags(
        "removed optimizer adamw_apex_fused", "--optim=adamw_apex_fused",
        "--optim adamw_apex_fused was removed", "pass adamw_torch_fused",
    ),
    flags("do_predict", "--do_predict", "--do_predict has no effect", "--do_eval", "pipeline"),
    flags("label_names", "--label_names labels other", "--label_names must be labels", "got labels other"),
    flags("empty output_dir", "--output_dir=", "`output_dir` must name a folder, got ''"),
    flags(
        "negative power of a polynomial scheduler",
        '--lr_scheduler_type polynomial --lr_scheduler_kwargs {"power":-1}',
        "{'power': -1}", "negative power",
    ),
    flags(
        "greater_is_better that contradicts the metric", "--metric_for_best_model top1 --greater_is_better false",
        "--greater_is_better is False", "worst", "Omit it",
    ),
    flags("infinite crop_ratio", "--crop_ratio inf inf", "crop_ratio", "two numbers a <= b", "finite", "(inf, inf)"),
    flags(
        "invalid part of an auto_augment policy", "--auto_augment rand-mfoo",
        "auto_augment", "'rand-mfoo'", "'mfoo' must be a name and a number",
    ),
    ErrorCase(
        "do_eval with random weights",
        lambda harness: harness.prepare(*DIGITS, "--do_eval", *harness.vit_flags()),
        ValueError,
        ("--from_scratch gives random ones", "add --do_train"),
    ),
    ErrorCase(
        "no do_train and no do_eval",
        lambda harness: harness.prepare(*DIGITS),
        ValueError,
        ("Nothing to do", "--do_train"),
    ),
]  # fmt: skip
RECIPE_CASES = [
    recipe("empty file", "", "mine.yaml", "mapping of options to values", "got nothing"),
    recipe("list instead of a mapping", "- a\n", "mine.yaml", "mapping of options to values", "got list"),
    recipe("string instead of a mapping", "hello", "mine.yaml", "mapping of options to values", "got str"),
    recipe("invalid YAML", "a: [1\n", "mine.yaml", "not valid YAML", "line 2"),
    recipe("binary file", b"\xff\xfe\x00", "mine.yaml", "text file in UTF-8", "0xff"),
    recipe("duplicate key", "seed: 1\nseed: 2\n", "mine.yaml", "duplicate key 'seed'", "line 2"),
    recipe("misspelled key", "learning_rat: 1\n", "'learning_rat'", "did you mean learning_rate?"),
    recipe("key of transformers 4", "no_cuda: true\n", "'no_cuda', which was removed", "pass use_cpu"),
    recipe("value of transformers 4", "optim: adamw_hf\n", "has optim: adamw_hf, which was removed", "adamw_torch"),
    recipe("key with a dash", "learning-rate: 1\n", "'learning-rate'", "did you mean learning_rate?"),
    recipe("key that is a number", "1: 2\n", "the key 1, which is not an option"),
    recipe("list instead of a number", "learning_rate: [1, 2]\n", "learning_rate must be a number", "[1, 2]"),
    recipe("empty list instead of a bool", "do_train: []\n", "do_train must be true or false", "[]"),
    recipe("mapping instead of a number", "learning_rate: {a: 1}\n", "learning_rate must be a number", "{'a': 1}"),
    recipe("string instead of a number", "learning_rate: fast\n", "learning_rate must be a number", "'fast'"),
    recipe("float instead of an integer", "max_steps: 2.5\n", "max_steps must be an integer", "2.5"),
    recipe("bool instead of layer indices", "horizontal_layers: true\n", "a list, each item an integer", "True"),
    recipe("nested list of layer indices", "horizontal_layers: [[1]]\n", "a list, each item an integer", "[[1]]"),
    recipe("null in a list of layer indices", "horizontal_layers: [null]\n", "a list, each item an integer", "[None]"),
    recipe("unknown choice", "save_strategy: no\n", "save_strategy must be one of no, steps, epoch, best", "False"),
    recipe("number instead of a choice", "assignment: 1\n", "assignment must be one of optimal, random", "1"),
    recipe_path("misspelled name", "digits-quikstart", "no recipe 'digits-quikstart'", "did you mean digits-quick"),
    recipe_path("file that does not exist", "{folder}/no.yaml", "no recipe", "no.yaml", "Recipes: cct"),
    recipe_path("folder instead of a file", "{folder}/folder", "must name a YAML file", "is a folder", "Recipes: cct"),
]
