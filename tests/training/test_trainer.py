"""The loss, its gradient, and what is logged."""

import copy

import pytest
import torch
from helpers.tiny_training import CLASSES, Images, plain_vit, resnet, tokenmixup_vit
from torch.nn import functional as F
from transformers import TrainerCallback

from hf_tokenmixup.training import TokenMixupTrainer, add_lora


class WatchSteps(TrainerCallback):
    """Records learning rate and momentum of each optimizer step."""

    def __init__(self):
        self.rates, self.momenta = [], []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.rates.append(optimizer.param_groups[0]["lr"])
        self.momenta.append(optimizer.param_groups[0].get("momentum"))


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def plain_step(
    model: torch.nn.Module, images: Images, rate: float = 0.1, smoothing: float = 0.0
) -> tuple[dict, float]:
    """The weights after one SGD step on all images at once, and the loss of that step."""
    model = copy.deepcopy(model).train()
    logits = model(pixel_values=images.pixels).logits
    loss = F.cross_entropy(logits, images.labels, label_smoothing=smoothing)
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= rate * parameter.grad
    return weights(model), loss.item()


@pytest.mark.parametrize("make_model", [plain_vit, lambda: tokenmixup_vit(horizontal_layers=[], vertical_layers=[])])
@pytest.mark.parametrize("average", [True, False])
def test_trainer_accumulation_matches_larger_batch(arguments, make_model, average):
    model, images = make_model(), Images(11)  # micro-batches of 4, 4 and 3
    expected, loss = plain_step(model, images)
    args = arguments(
        gradient_accumulation_steps=3,
        logging_steps=1,
        average_tokens_across_devices=average,
    )
    trainer = TokenMixupTrainer(model, args, train_dataset=images)
    trainer.train()
    for name, tensor in weights(model).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-5)


def test_trainer_accumulation_weighs_micro_batches_by_images(arguments):
    model, images = tokenmixup_vit(), Images(7)
    shares = []

    class Watching(TokenMixupTrainer):
        def compute_loss(self, model, inputs, *rest, **kwargs):
            twin = copy.deepcopy(model)  # same weights, so the same mixing
            mean = twin(**inputs).loss.item()
            loss = super().compute_loss(model, inputs, *rest, **kwargs)
            shares.append((loss.item(), mean * len(inputs["labels"]) / 7))
            return loss

    Watching(model, arguments(gradient_accumulation_steps=2), train_dataset=images).train()
    assert len(shares) == 2
    for got, expected in shares:
        assert got == pytest.approx(expected, rel=1e-5)


def test_trainer_label_smoothing_applies_in_training_only(arguments):
    model, images = plain_vit(), Images(6)
    expected, loss = plain_step(model, images, smoothing=0.3)
    args = arguments(label_smoothing_factor=0.3, logging_steps=1, per_device_train_batch_size=6)
    trainer = TokenMixupTrainer(model, args, train_dataset=images, eval_dataset=images)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-5)
    for name, tensor in weights(model).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("make_model", [plain_vit, tokenmixup_vit, resnet])
def test_trainer_evaluation_loss_is_cross_entropy_over_all_images(arguments, make_model):
    model, images = make_model(), Images(11)
    args = arguments(label_smoothing_factor=0.3, mixup_alpha=1.0, per_device_eval_batch_size=4)
    metrics = TokenMixupTrainer(model, args, eval_dataset=images).evaluate()
    with torch.no_grad():
        logits = model.eval()(pixel_values=images.pixels).logits
    assert metrics["eval_loss"] == pytest.approx(F.cross_entropy(logits, images.labels).item(), rel=1e-5)
    predictions = TokenMixupTrainer(model, args).predict(images).predictions
    torch.testing.assert_close(torch.tensor(predictions), logits)


@pytest.mark.parametrize("make_model", [plain_vit, resnet])
def test_trainer_plain_model_with_mixed_inputs_stays_single_label(arguments, make_model):
    model = make_model()
    seen = []

    def watch(module, args, kwargs):
        seen.append((kwargs["pixel_values"].clone(), "labels" in kwargs))

    model.register_forward_pre_hook(watch, with_kwargs=True)
    before, images = weights(model), Images(5)
    args = arguments(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing_factor=0.1, per_device_train_batch_size=5)
    trainer = TokenMixupTrainer(model, args, train_dataset=images, eval_dataset=images)
    trainer.train()
    trainer.evaluate()
    assert model.config.problem_type == "single_label_classification"
    assert any(not torch.equal(tensor, before[name]) for name, tensor in weights(model).items())
    assert not any(labels for _, labels in seen)
    originals = {tuple(image.flatten().tolist()) for image in images.pixels}
    assert any(tuple(image.flatten().tolist()) not in originals for image in seen[0][0])  # mixed in training
    assert all(tuple(image.flatten().tolist()) in originals for image in seen[-1][0])  # not in evaluation


def test_trainer_labels_are_distributions_with_input_mixup_only(arguments):
    for settings, shape in (({}, (4,)), ({"mixup_alpha": 0.8}, (4, CLASSES))):
        model = tokenmixup_vit()
        seen = []
        model.register_forward_pre_hook(
            lambda m, a, kwargs, seen=seen: seen.append(kwargs.get("labels")), with_kwargs=True
        )
        TokenMixupTrainer(model, arguments(**settings), train_dataset=Images(4)).train()
        assert seen[0].shape == shape
        torch.testing.assert_close(seen[0].float().sum(-1), torch.ones(4) if len(shape) > 1 else seen[0].sum().float())


def test_trainer_logged_metrics_are_means_over_steps(arguments):
    model = tokenmixup_vit(horizontal_tau=1.4)
    seen = []

    class Watching(TokenMixupTrainer):
        def compute_loss(self, model, inputs, *rest, **kwargs):
            if model.training:
                counts = copy.deepcopy(model)(**inputs).mixing_metrics
                seen.append({k: v.item() for k, v in counts.items()} | {"images": len(inputs["labels"])})
            return super().compute_loss(model, inputs, *rest, **kwargs)

    # Three forwards, of 4, 4 and 2 images, between the first lines; two, of 4 and 4, until the run ends.
    args = arguments(max_steps=5, logging_steps=2, gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=1)
    trainer = Watching(model, args, train_dataset=Images(10), eval_dataset=Images(4))
    for _ in range(2):
        seen.clear()
        trainer.train()
        lines = [line for line in trainer.state.log_history if "loss" in line]
        others = [line for line in trainer.state.log_history if "loss" not in line]
        assert [line["step"] for line in lines] == [2, 4, 5]
        assert not any("mixed_samples" in line for line in others)
        for line, forwards, steps in zip(lines, (seen[:3], seen[3:6], seen[6:]), (2, 2, 1), strict=True):
            images = sum(forward["images"] for forward in forwards)
            for name in ("easy_samples", "mixed_samples", "replaced_tokens", "vertical_tokens"):
                assert line[name] == pytest.approx(sum(f[name] for f in forwards) / steps, rel=1e-4), name
            for name in ("scorenet_loss", "difficulty"):
                expected = sum(f[name] * f["images"] for f in forwards) / images
                assert line[name] == pytest.approx(expected, rel=1e-4), name


def test_trainer_does_not_synchronize_between_log_lines(arguments, monkeypatch):
    args = arguments(max_steps=4, logging_steps=4)
    assert args.logging_nan_inf_filter is False
    trainer = TokenMixupTrainer(plain_vit(), args, train_dataset=Images(16))
    monkeypatch.setattr(trainer, "log", lambda *a, **k: None)
    reads = []
    compute_loss = trainer.compute_loss

    def counted(*args, **kwargs):
        with monkeypatch.context() as patch:
            for name in ("item", "tolist", "__bool__", "__float__", "cpu", "numpy"):
                original = getattr(torch.Tensor, name)
                patch.setattr(torch.Tensor, name, lambda *a, n=name, o=original, **k: (reads.append(n), o(*a, **k))[1])
            return compute_loss(*args, **kwargs)

    monkeypatch.setattr(trainer, "compute_loss", counted)
    trainer.train()
    assert reads == []


def test_trainer_sets_epoch_of_dataset(arguments):
    images = Images(8)
    args = arguments(num_train_epochs=3, max_steps=-1)
    TokenMixupTrainer(plain_vit(), args, train_dataset=images).train()
    assert images.seen == [0] * 8 + [1] * 8 + [2] * 8


def test_trainer_momentum_and_schedule_are_in_force(arguments):
    watch = WatchSteps()
    args = arguments(
        max_steps=10,
        optim_args="momentum=0.9",
        learning_rate=0.5,
        lr_scheduler_type="cosine_warmup_with_min_lr",
        lr_scheduler_kwargs={"min_lr": 0.05, "warmup_lr_rate": 0.1},
        warmup_steps=4,
    )
    TokenMixupTrainer(plain_vit(), args, train_dataset=Images(40), callbacks=[watch]).train()
    assert watch.momenta == [0.9] * 10
    assert watch.rates[0] == pytest.approx(0.05)
    assert max(watch.rates) == pytest.approx(0.5) and watch.rates.index(max(watch.rates)) == 3
    assert min(watch.rates) >= 0.05 and watch.rates[-1] < 0.12
    assert watch.rates[3:] == sorted(watch.rates[3:], reverse=True)


def test_trainer_cosine_min_lr_is_in_force(arguments):
    watch = WatchSteps()
    args = arguments(max_steps=8, lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr": 0.04})
    trainer = TokenMixupTrainer(plain_vit(), args, train_dataset=Images(32), callbacks=[watch])
    trainer.train()
    assert watch.rates[0] == pytest.approx(0.1)
    assert trainer.lr_scheduler.get_last_lr()[0] == pytest.approx(0.04)


# Under torch 2.6, dynamo stumbles over a decorator of transformers: its own ViT does not compile there.
OLD_TORCH = pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="plain ViT does not compile either")


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=OLD_TORCH)])
def test_trainer_with_autocast_and_compile_trains(arguments, compiled):
    model = plain_vit() if compiled else tokenmixup_vit()
    before = weights(model)
    args = arguments(
        bf16=True, mixup_alpha=0.8, logging_steps=1, **({"torch_compile_backend": "eager"} if compiled else {})
    )
    trainer = TokenMixupTrainer(model, args, train_dataset=Images(4))
    trainer.train()
    line = trainer.state.log_history[0]
    assert line["loss"] > 0 and line.get("mixed_samples") == (None if compiled else 4)
    assert not torch.equal(model.classifier.weight, before["classifier.weight"])
    trainer.save_model()
    exported, report = type(plain_vit()).from_pretrained(args.output_dir, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.equal(exported.classifier.weight, model.classifier.weight)


def test_trainer_ddp_finds_no_unused_parameters_of_tokenmixup_model(arguments):
    assert TokenMixupTrainer(tokenmixup_vit(), arguments()).accelerator.ddp_handler.find_unused_parameters is False
    chosen = arguments(ddp_find_unused_parameters=True)
    assert TokenMixupTrainer(tokenmixup_vit(), chosen).accelerator.ddp_handler.find_unused_parameters is True


@pytest.mark.parametrize("is_trained", [True, False])
def test_trainer_ddp_finds_unused_parameters_that_are_trained(arguments, monkeypatch, is_trained):
    model = tokenmixup_vit()
    monkeypatch.setattr(type(model), "unused_parameters", (".position_embeddings",))
    model.vit.embeddings.position_embeddings.requires_grad_(is_trained)
    trainer = TokenMixupTrainer(model, arguments())
    assert trainer.accelerator.ddp_handler.find_unused_parameters is is_trained


def test_trainer_user_errors_name_what_to_do(arguments):
    with pytest.raises(ValueError, match="TokenMixupTrainingArguments, got NoneType"):
        TokenMixupTrainer(plain_vit())
    with pytest.raises(ValueError, match="compute_loss_func"):
        TokenMixupTrainer(plain_vit(), arguments(), compute_loss_func=lambda *a: 0)
    trainer = TokenMixupTrainer(plain_vit(), arguments())
    pixels = torch.zeros(2, 3, 8, 8)
    with pytest.raises(ValueError, match="must hold `labels`, got pixel_values"):
        trainer.compute_loss(trainer.model, {"pixel_values": pixels})
    with pytest.raises(ValueError, match=r"class indices of shape \(B,\), got torch.float32 of shape \(2, 4\)"):
        trainer.compute_loss(trainer.model, {"pixel_values": pixels, "labels": torch.zeros(2, 4)})


def tokenmixup_vit_with_lora(**settings):
    return add_lora(tokenmixup_vit(**settings))


@pytest.mark.parametrize("problem_type", ["multi_label_classification", "regression"])
@pytest.mark.parametrize(
    "make_model", [plain_vit, tokenmixup_vit, lambda **kwargs: add_lora(tokenmixup_vit(**kwargs))]
)
def test_trainer_other_problem_type_trains_on_single_labels(arguments, caplog, make_model, problem_type):
    model, reference, images = make_model(problem_type=problem_type), make_model(), Images(8)
    trainers = [
        TokenMixupTrainer(each, arguments(logging_steps=1), train_dataset=images) for each in (model, reference)
    ]
    for trainer in trainers:
        trainer.train()
    first, expected = (trainer.state.log_history[0] for trainer in trainers)
    assert first["loss"] == expected["loss"]
    assert first.get("mixed_samples") == expected.get("mixed_samples")
    assert make_model is plain_vit or first["mixed_samples"] > 0
    assert trainers[0].plain_model().config.problem_type == "single_label_classification"
    assert f"problem_type of the base model is '{problem_type}'" in caplog.text


def test_trainer_with_return_dict_false_trains(arguments):
    model = plain_vit()
    model.config.return_dict = False
    trainer = TokenMixupTrainer(model, arguments(), train_dataset=Images(4))
    trainer.train()
    assert trainer.state.global_step == 1


def test_trainer_half_precision_weights_warn(arguments, caplog):
    TokenMixupTrainer(plain_vit().bfloat16(), arguments(), train_dataset=Images(4)).train()
    assert "The weights are in bfloat16 and are trained in it" in caplog.text
    caplog.clear()
    TokenMixupTrainer(plain_vit(), arguments(), train_dataset=Images(4)).train()
    assert not caplog.text


def test_trainer_model_of_one_class_raises(arguments):
    with pytest.raises(ValueError, match="num_labels is 1, but classification needs at least 2 classes"):
        TokenMixupTrainer(plain_vit(num_labels=1), arguments(), train_dataset=Images(4))


@pytest.mark.parametrize("strategy", ["steps", "no"])
def test_trainer_results_have_fractions_of_the_complete_run(arguments, strategy):
    """Also of steps that no log line has."""
    model, forwards = tokenmixup_vit(horizontal_tau=1.4), []
    model.register_forward_hook(
        lambda module, inputs, output: forwards.append(output.horizontal[0]) if module.training else None
    )
    args = arguments(max_steps=5, logging_steps=2, logging_strategy=strategy)
    metrics = TokenMixupTrainer(model, args, train_dataset=Images(10)).train().metrics
    mixed = sum(record.replaced.any(dim=1).sum().item() for record in forwards)
    images = sum(len(record.easy) for record in forwards)
    replaced = sum(record.replaced.sum().item() for record in forwards)
    weight = sum(record.statistics.partner_weight.sum().item() for record in forwards)
    assert 0 < mixed < images == 18
    assert metrics["train_mixed_fraction"] == pytest.approx(mixed / images)
    assert metrics["train_replaced_fraction"] == pytest.approx(replaced / (mixed * forwards[0].replaced.shape[1]))
    assert metrics["train_label_mass_moved"] == pytest.approx(weight / mixed)
    assert metrics["train_easy_fraction"] == sum(record.easy.sum().item() for record in forwards) / images


def test_trainer_warns_if_nothing_can_be_mixed(arguments, caplog):
    args = arguments(max_steps=12, logging_steps=3)
    TokenMixupTrainer(tokenmixup_vit(horizontal_rho=0.9), args, train_dataset=Images(8)).train()
    found = [record.getMessage() for record in caplog.records if "Nothing was mixed" in record.getMessage()]
    assert len(found) == 1 and "`horizontal_rho=0.9`" in found[0]
