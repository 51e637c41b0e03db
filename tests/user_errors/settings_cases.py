"""Mistakes on the command line and in recipes."""

from transformers import TrainingArguments
from user_errors.harness import DIGITS, Bench, Mistake

from hf_tokenmixup.training import training_args as arguments


def flags(words: str, *told: str) -> Mistake:
    return Mistake(words, lambda bench: bench.digits(*words.split()), ValueError, told)


def removed(words: str, *told: str) -> list[Mistake]:
    """An option that newer versions of transformers have removed; none where this version still has it."""
    return [] if hasattr(TrainingArguments, words.split()[0].removeprefix("--")) else [flags(words, *told)]


def recipe(name: str, text: str | bytes, *told: str) -> Mistake:
    return Mistake(name, lambda bench: bench.parse(text), ValueError, told)


def recipe_named(name: str, path: str, *told: str) -> Mistake:
    def provoke(bench: Bench):
        (bench.folder / "folder").mkdir()
        return bench.prepare("--recipe", path.format(folder=bench.folder))

    return Mistake(name, provoke, ValueError, told)


def zero_stage_3(bench: Bench):
    """As if DeepSpeed, which need not be installed, were configured so."""
    bench.monkeypatch.setattr(arguments, "is_deepspeed_zero3_enabled", lambda: True)
    return bench.digits()


NOT_PARSED = [
    flags("--learning_rate x", "--learning_rate", "float", "'x'"),
    flags("--horizontal_layers one", "--horizontal_layers", "int", "'one'"),
    flags("--horizontal_layers 1,x", "--horizontal_layers", "int", "'x'"),
    flags("--horizontal_tau x", "--horizontal_tau", "expected a number or none", "'x'"),
    flags("--assignment_group_size x", "--assignment_group_size", "expected a whole number or none", "'x'"),
    flags("--vertical_kappa 2.5", "--vertical_kappa", "int", "'2.5'"),
    flags("--scorenet_detach yes", "--scorenet_detach", "expected true or false", "'yes'"),
    flags("--scorenet_pooling max", "--scorenet_pooling", "'max'", "'cls', 'mean', 'attention'"),
    flags("--saliency_detector grad", "--saliency_detector", "'grad'", "'gradient'"),
    flags("--assignment best", "--assignment", "'best'", "'optimal', 'random'"),
    flags("--label_mapping names", "--label_mapping", "'names'", "'strict', 'name', 'number'"),
    flags("--optim adma", "--optim", "'adma'", "adamw_torch"),
    flags("--bf16 maybe", "--bf16", "maybe", "true/false"),
    flags("--seed x", "--seed", "int", "'x'"),
    flags("--image_mean a b c", "--image_mean", "float", "'a'"),
    flags("--recipe", "--recipe", "expected one argument"),
]
SETTINGS = [
    flags("--fp16", "fp16", "no effect on a CPU", "`bf16=True`"),
    recipe("an option that a recipe sets", "fp16: true", "fp16", "mine.yaml sets `fp16: true`", "`--fp16 false`"),
    Mistake("ZeRO stage 3", zero_stage_3, ValueError, ("ZeRO stage 3", "stage 1 or 2", "--fsdp")),
    flags("--horizontal_layer 1", "no option --horizontal_layer", "did you mean --horizontal_layers?"),
    flags("1 2", "Unknown arguments", "1 2"),
    flags("--horizontal_layers 99", "horizontal_layers", "between 0 and 2", "[99]"),
    flags("--horizontal_layers -1", "horizontal_layers", "between 0 and 2", "[-1]"),
    flags("--horizontal_layers 1 1", "horizontal_layers", "each layer once", "[1, 1]"),
    flags("--vertical_layers 0", "vertical_layers", "between 1 and 2", "nothing lies before layer 0", "[0]"),
    flags("--manifold_mixup_layers 3", "manifold_mixup_layers", "between 0 and 2", "[3]"),
    flags("--horizontal_tau nan", "horizontal_tau", "finite number of at least 0", "None makes", "nan"),
    flags("--horizontal_tau -1", "horizontal_tau", "finite number of at least 0", "-1.0"),
    flags("--horizontal_rho nan", "horizontal_rho", "finite number of at least 0", "nan"),
    flags("--scorenet_loss_weight inf", "scorenet_loss_weight", "finite number of at least 0", "inf"),
    flags("--vertical_layers 2 --vertical_kappa 17", "vertical_kappa", "between 0 and 16", "17"),
    flags("--horizontal_layers 1 --rollout_steps 9", "rollout_steps", "between 0 and 1", "9"),
    flags("--rollout_steps 1 --saliency_detector random", "rollout_steps", "'attention'", "'random'"),
    flags("--assignment_group_size 1", "assignment_group_size", "at least 2, or None", "1"),
    flags("--assignment_group_size 4 --assignment random", "assignment_group_size", "'optimal'", "'random'"),
    flags("--manifold_mixup_alpha 0", "manifold_mixup_alpha", "above 0", "manifold_mixup_layers=[] turns it off"),
    flags("--learning_rate nan", "`learning_rate`", "finite number of at least 0", "nan"),
    flags("--learning_rate -1", "`learning_rate`", "finite number of at least 0", "-1.0"),
    flags("--weight_decay nan", "`weight_decay`", "finite number of at least 0", "nan"),
    flags("--max_grad_norm nan", "`max_grad_norm`", "finite number of at least 0", "nan"),
    flags("--per_device_train_batch_size 0", "`per_device_train_batch_size`", "at least 1", "got 0"),
    flags("--per_device_eval_batch_size -4", "`per_device_eval_batch_size`", "at least 1", "got -4"),
    flags("--gradient_accumulation_steps 0", "`gradient_accumulation_steps`", "at least 1", "got 0"),
    flags("--num_train_epochs nan", "`num_train_epochs`", "finite number above 0", "nan"),
    flags("--num_train_epochs 0", "`num_train_epochs`", "finite number above 0", "0.0"),
    flags("--max_steps 0", "`max_steps`", "at least 1, or -1", "got 0"),
    flags("--dataloader_num_workers -1", "`dataloader_num_workers`", "at least 0", "-1"),
    flags("--seed -1", "`seed`", "between 0 and 4294967295", "-1"),
    flags("--logging_steps -1", "`logging_steps`", "above 0", "`logging_strategy=no` turns it off", "-1"),
    flags("--save_steps 0", "`save_steps`", "above 0", "`save_strategy=no` turns it off", "0.0"),
    flags("--eval_strategy steps --eval_steps 0", "`eval_steps`", "above 0", "`eval_strategy=no`", "got 0"),
    flags("--eval_strategy steps --eval_steps nan", "`eval_steps`", "above 0", "nan"),
    flags("--eval_strategy steps --eval_steps -1", "`eval_steps`", "above 0", "-1"),
    flags("--eval_strategy epoch --eval_delay nan", "`eval_delay`", "finite number of at least 0", "nan"),
    flags("--eval_accumulation_steps 0", "`eval_accumulation_steps`", "at least 1", "got 0"),
    flags("--save_total_limit 0", "`save_total_limit`", "at least 1", "got 0", "Omit it to keep all"),
    flags("--dataloader_num_workers 1 --dataloader_prefetch_factor 0", "`dataloader_prefetch_factor`", "at least 1"),
    flags("--ddp_timeout 0", "`ddp_timeout`", "at least 1", "got 0"),
    flags("--data_seed 18446744073709551616", "`data_seed`", "between 0 and 4294967295", "18446744073709551616"),
    flags("--warmup_steps nan", "`warmup_steps`", "whole number of steps, or a fraction", "nan"),
    flags("--warmup_steps 1.5", "`warmup_steps`", "whole number of steps, or a fraction", "1.5"),
    flags("--neftune_noise_alpha nan", "`neftune_noise_alpha`", "finite number of at least 0", "nan"),
    flags("--use_liger_kernel", "`use_liger_kernel` has no effect", "language models", "Omit it"),
    flags("--torch_compile_mode fast", "`torch_compile_mode` 'fast'", "max-autotune"),
    flags("--torch_compile_backend llvm", "`torch_compile_backend` must be one of", "inductor", "'llvm'"),
    flags("--accelerator_config {", "`accelerator_config` must be a JSON object or a JSON file", "'{'", "line 1"),
    flags("--accelerator_config no.json", "`accelerator_config` must be a JSON", "'no.json'", "No such file"),
    flags('--accelerator_config {"split_batch":true}', "`accelerator_config` has no 'split_batch'", "split_batches"),
    flags("--fsdp_config [1]", "`fsdp_config` must be a JSON object or a JSON file", "'[1]'"),
    flags("--deepspeed no.json", "`deepspeed` must be a JSON object or a JSON file", "'no.json'", "No such file"),
    flags('--activation_checkpointing_kwargs {"reentrant":true}', "_kwargs` has no 'reentrant'", "use_reentrant"),
    flags("--optim adamw_hf", "--optim adamw_hf was removed", "pass adamw_torch"),
    flags("--optim=adamw_apex_fused", "--optim adamw_apex_fused was removed", "pass adamw_torch_fused"),
    flags("--do_predict", "--do_predict has no effect", "--do_eval", "pipeline"),
    flags("--label_names labels other", "--label_names must be labels", "got labels other"),
    flags("--output_dir=", "output_dir must name a folder, got ''"),
    flags("--skip_nonfinite_steps -1", "`skip_nonfinite_steps`", "at least 0", "-1"),
    flags("--mixup_alpha nan", "`mixup_alpha`", "finite number of at least 0", "0 turns it off", "nan"),
    flags("--mixup_prob 2", "`mixup_prob`", "between 0 and 1", "2.0"),
    flags("--label_smoothing_factor 1", "`label_smoothing_factor`", "less than 1", "1.0"),
    flags("--lr_scheduler_kwargs {", "`lr_scheduler_kwargs`", "JSON object", "'{'"),
    flags("--lr_scheduler_kwargs foo", "`lr_scheduler_kwargs`", "JSON object", "'foo'"),
    flags('--lr_scheduler_kwargs {"min_lr":1}', "--lr_scheduler_kwargs", "'min_lr'", "linear does not take"),
    flags("--lr_scheduler_type cosine_with_min_lr", "--lr_scheduler_type cosine_with_min_lr", "min_lr"),
    flags('--lr_scheduler_type polynomial --lr_scheduler_kwargs {"power":-1}', "{'power': -1}", "negative power"),
    flags("--optim sgd --optim_args momentum", "--optim_args", "'momentum=0.9,nesterov=true'", "'momentum'"),
    flags("--optim sgd --optim_args momentun=0.9", "'momentun'", "sgd does not take", "It takes dampening"),
    flags("--optim sgd --optim_args momentum=much", "--optim sgd", "momentum=much"),
    flags("--adam_beta1 2", "--optim adamw", "beta", "2.0"),
    flags("--metric_for_best_model top2", "--metric_for_best_model", "top1, top5, loss", "'top2'"),
    flags(
        "--metric_for_best_model top1 --greater_is_better false", "--greater_is_better is False", "worst", "Omit it"
    ),
    flags("--load_best_model_at_end", "--load_best_model_at_end", "save and eval strategy to match"),
    flags("--bf16 --fp16", "fp16 and bf16", "not both"),
    flags("--hflip 2", "hflip", "between 0 and 1", "2.0"),
    flags("--crop_scale 1", "crop_scale", "two numbers a <= b", "(1.0,)"),
    flags("--crop_scale 1 0.5", "crop_scale", "two numbers a <= b", "(1.0, 0.5)"),
    flags("--crop_ratio inf inf", "crop_ratio", "two numbers a <= b", "finite", "(inf, inf)"),
    flags("--auto_augment rand-mfoo", "auto_augment", "'rand-mfoo'", "'mfoo' must be a name and a number"),
    flags("--auto_augment foo", "auto_augment", "'rand-m9-mstd0.5-inc1'", "'foo'"),
    flags("--random_erasing 7", "random_erasing", "between 0 and 1", "7.0"),
    flags("--erasing_mode x", "erasing_mode", "'pixel', 'rand' or 'const'", "'x'"),
    flags("--color_jitter nan", "color_jitter", "at least 0", "nan"),
    flags("--image_size 0", "--image_size", "at least 1", "got 0"),
    flags("--image_size 17", "image_size is 17, but config_overrides has image_size 16", "remove one"),
    flags("--image_size 16,16,16", "--image_size must be a side, or height and width", "got 16 16 16"),
    *removed("--warmup_ratio 0.1", "--warmup_ratio was removed", "as in --warmup_steps 0.1"),
    flags("--evaluation-strategy epoch", "--evaluation_strategy was removed", "pass --eval_strategy"),
    flags("--overwrite_output_dir", "name another --output_dir", "--resume_from_checkpoint auto"),
    *removed("--logging_dir x", "TENSORBOARD_LOGGING_DIR"),
    flags("--save_safetensors true", "always saved as safetensors"),
    flags("--per_gpu_train_batch_size 8", "pass --per_device_train_batch_size"),
    flags("--trust_remote_code", "--trust_remote_code is not supported"),
    flags("--image_mean 1 2", "--image_mean", "three finite numbers, or one", "[1.0, 2.0]"),
    flags("--image_std 0 0 0", "--image_std", "three numbers above 0, or one", "[0.0, 0.0, 0.0]"),
    flags("--image_cache_gib nan", "image_cache_gib", "at least 0", "nan"),
    flags("--report_to nobody", "nobody is not supported", "tensorboard"),
    flags("--attn_implementation foo", "attn_implementation", "foo", "sdpa"),
    Mistake(
        "random weights to evaluate",
        lambda bench: bench.prepare(*DIGITS, "--do_eval", *bench.network()),
        ValueError,
        ("--from_scratch gives random ones", "add --do_train"),
    ),
    Mistake("nothing to do", lambda bench: bench.prepare(*DIGITS), ValueError, ("Nothing to do", "--do_train")),
]
RECIPES = [
    recipe("an empty recipe", "", "mine.yaml", "mapping of options to values", "got nothing"),
    recipe("a recipe that is a list", "- a\n", "mine.yaml", "mapping of options to values", "got list"),
    recipe("a recipe that is a word", "hello", "mine.yaml", "mapping of options to values", "got str"),
    recipe("no YAML", "a: [1\n", "mine.yaml", "not valid YAML", "line 2"),
    recipe("no text", b"\xff\xfe\x00", "mine.yaml", "text file in UTF-8", "0xff"),
    recipe("a key twice", "seed: 1\nseed: 2\n", "mine.yaml", "duplicate key 'seed'", "line 2"),
    recipe("a misspelt key", "learning_rat: 1\n", "'learning_rat'", "did you mean learning_rate?"),
    recipe("a key of transformers 4", "no_cuda: true\n", "'no_cuda', which was removed", "pass use_cpu"),
    recipe("a value of transformers 4", "optim: adamw_hf\n", "has optim: adamw_hf, which was removed", "adamw_torch"),
    recipe("a key with a dash", "learning-rate: 1\n", "'learning-rate'", "did you mean learning_rate?"),
    recipe("a key that is a number", "1: 2\n", "the key 1, which is not an option"),
    recipe("a list for a number", "learning_rate: [1, 2]\n", "learning_rate must be a number", "[1, 2]"),
    recipe("an empty list for a switch", "do_train: []\n", "do_train must be true or false", "[]"),
    recipe("a mapping for a number", "learning_rate: {a: 1}\n", "learning_rate must be a number", "{'a': 1}"),
    recipe("a word for a number", "learning_rate: fast\n", "learning_rate must be a number", "'fast'"),
    recipe("a share for a count", "max_steps: 2.5\n", "max_steps must be a whole number", "2.5"),
    recipe("true for layers", "horizontal_layers: true\n", "a list, each item a whole number", "True"),
    recipe("a list of lists for layers", "horizontal_layers: [[1]]\n", "a list, each item a whole number", "[[1]]"),
    recipe("nothing in a list", "horizontal_layers: [null]\n", "a list, each item a whole number", "[None]"),
    recipe("no choice", "save_strategy: no\n", "save_strategy must be one of no, steps, epoch, best", "False"),
    recipe("a number for a choice", "assignment: 1\n", "assignment must be one of optimal, random", "1"),
    recipe_named("a misspelt recipe", "digits-quikstart", "no recipe 'digits-quikstart'", "did you mean digits-quick"),
    recipe_named("a recipe that is not there", "{folder}/no.yaml", "no recipe", "no.yaml", "Recipes: cct"),
    recipe_named("a folder for a recipe", "{folder}/folder", "must name a YAML file", "is a folder", "Recipes: cct"),
]
