"""Mixin for TokenMixup classifiers, shared by all model families: forward pass, loss, loading and export.

The layers of a family inherit from `hf_tokenmixup.models.layers.TokenMixupLayerMixin` and from the base layer, its
classifier from `TokenMixupModelMixin` and from the base classifier. A family defines only how its attention is
computed; everything else is shared.
"""

import os

import torch
import transformers
from packaging import version
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils import can_return_tuple, logging

from ..configuration import TokenMixupConfigMixin
from ..functional import soft_cross_entropy
from ..saliency import eval_mode, gradient_saliency
from ..vertical import VerticalMemory
from .gradient_checkpointing import ActivationCheckpointing, rename_in_config
from .labels import to_soft_targets, validate_label_shape, validate_label_values
from .layers import TokenMixupLayerMixin, unshard
from .loss import reduce_loss
from .outputs import ManifoldMixupParams, TokenMixupContext, TokenMixupOutput
from .peft_utils import AdapterMethods, merge_adapters
from .positions import border_hint, config_to_load_with, resize_positions

logger = logging.get_logger(__name__)

_HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "proxies")
# Attributes of a configuration that determine the number of tokens per image.
_GEOMETRY_ATTRIBUTES = frozenset(
    {"image_size", "patch_size", "tokenizer", "num_conv_layers", "conv_kernel_size", "conv_stride", "conv_padding"}
    | {"pooling_kernel_size", "pooling_stride", "pooling_padding", "vision_config", "model_args"}
)


class TokenMixupModelMixin(ActivationCheckpointing, AdapterMethods):
    """Mixin that adds TokenMixup to an image classifier. Precedes the base classifier among the base classes.

    A model family defines `config_class`, `base_model_class`, `layer_class` and `lora_target_modules`. If the layers
    are not `base_model.layers`, it also defines `get_transformer_layers`.

    Args:
        config: configuration of the family with the settings of TokenMixup.

    Raises:
        ValueError: if the configuration has no settings of TokenMixup, or invalid ones.
    """

    base_model_class: type[PreTrainedModel]
    layer_class: type[TokenMixupLayerMixin]
    # Default target modules of LoRA: the query and value projections of attention.
    lora_target_modules: tuple[str, ...]
    # Ends of the names of the modules that are trained for a task in full if the other weights have adapters.
    head_names: tuple[str, ...] = ("classifier",)
    # Parts of the names of parameters that no forward pass with labels uses.
    unused_parameters: tuple[str, ...] = ()
    # Whether the base model has the argument `interpolate_pos_encoding`.
    takes_interpolate_pos_encoding = True
    # The first version of transformers in which the layers of the base model can be converted.
    min_transformers_version: str | None = None
    # Exported models have no ScoreNet, and a model without HTM does not use the ScoreNet of a checkpoint.
    _keys_to_ignore_on_load_missing = [r"\.scorenet\."]
    _keys_to_ignore_on_load_unexpected = [r"\.scorenet\."]

    def __init__(self, config: TokenMixupConfigMixin):
        if not isinstance(config, self.config_class):
            expected = self.config_class.__name__
            raise ValueError(
                f"{type(self).__name__} needs a {expected}, got a {type(config).__name__}. Create it with "
                f"{expected}.from_dict(config.to_dict(), horizontal_layers=[...])."
            )
        self._validate_transformers_version()
        config.validate_tokenmixup_config()
        if hint := border_hint(config):
            logger.warning_once(hint)
        rename_in_config(config)
        super().__init__(config)
        self._convert_layers()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args,
        config: PreTrainedConfig | str | os.PathLike | None = None,
        **kwargs,
    ):
        """Load a model, as in `PreTrainedModel.from_pretrained` with two differences.

        The default dtype is float32, since weights are trained in the dtype in which they are loaded. If `image_size`
        differs from the checkpoint's, learned position embeddings are interpolated.

        Args:
            pretrained_model_name_or_path: a folder or the name of a model on the Hub.
            model_args: as in `PreTrainedModel.from_pretrained`.
            config: configuration to use instead of the checkpoint's.
            kwargs: as in `PreTrainedModel.from_pretrained`, including attributes of the configuration.
        """
        name = pretrained_model_name_or_path
        dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", None))
        kwargs["dtype"] = torch.float32 if dtype is None else dtype
        wanted, loaded = None, None
        if name is not None and (config is not None or not _GEOMETRY_ATTRIBUTES.isdisjoint(kwargs)):
            hub = {key: kwargs[key] for key in _HUB_KWARGS if key in kwargs}
            attributes = {key: value for key, value in kwargs.items() if key not in (*_HUB_KWARGS, "dtype")}
            wanted, rest = config, attributes
            if not isinstance(config, PreTrainedConfig):
                wanted, rest = cls.config_class.from_pretrained(
                    config or name, return_unused_kwargs=True, **hub, **attributes
                )
            loaded = config_to_load_with(cls, wanted, _load_stored_config(cls.config_class, name, wanted, hub))
        if loaded is None:
            return super().from_pretrained(name, *model_args, config=config, **kwargs)
        kwargs = rest | hub | {"dtype": kwargs["dtype"]}
        result = super().from_pretrained(name, *model_args, config=loaded, **kwargs)
        resize_positions(result[0] if isinstance(result, tuple) else result, wanted, str(name))
        return result

    def get_transformer_layers(self) -> nn.ModuleList:
        """Return the transformer layers."""
        return self.base_model.layers

    def get_lora_target_modules(self) -> tuple[str, ...]:
        """Return the default target modules of LoRA."""
        return self.lora_target_modules

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns of patch tokens for an image size in pixels."""
        return self.config.token_grid(height, width)

    @classmethod
    def is_custom_code(cls) -> bool:
        """Whether transformers initializes weights as for code outside of transformers: as for the base model.

        For such code, it does not initialize modules without weights of their own.
        """
        return cls.base_model_class.is_custom_code()

    @property
    def has_unused_parameters(self) -> bool:
        """Whether a trained parameter has no gradient after a backward pass."""
        return any(
            parameter.requires_grad and self.is_unused_parameter(name) for name, parameter in self.named_parameters()
        )

    @classmethod
    def is_unused_parameter(cls, name: str) -> bool:
        """Whether no forward pass with labels uses the parameter of this name."""
        return any(part in name for part in cls.unused_parameters)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        **kwargs,
    ) -> ImageClassifierOutput | TokenMixupOutput:
        """Classify images. Tokens are mixed in training mode if labels are passed.

        Args:
            pixel_values: (B, 3, height, width) images.
            labels: class indices (B,), or class distributions (B, C) from mixup, CutMix or label smoothing.
            interpolate_pos_encoding: interpolate the learned position embeddings to the size of the images.
            kwargs: keyword arguments of the base model. `num_items_in_batch` divides the summed loss instead of B.

        Returns:
            A `TokenMixupOutput` if tokens are mixed, otherwise the output of the base model. Problem types other than
            single-label classification are not mixed and log one warning.

        Raises:
            ValueError: if the batch is empty, the labels have an invalid shape, dtype or value, or an
                `attention_mask` is passed while tokens are mixed. On an accelerator, label values are validated in the
                first forward pass only.
        """
        if pixel_values is not None and pixel_values.shape[0] == 0:
            raise ValueError(
                f"pixel_values must have at least one image, got shape {tuple(pixel_values.shape)}. Skip batches "
                "without images."
            )
        if self.takes_interpolate_pos_encoding:
            kwargs["interpolate_pos_encoding"] = interpolate_pos_encoding
        single_label = self.config.problem_type in (None, "single_label_classification") and self.config.num_labels > 1
        mixing = self.training and self.config.tokenmixup_enabled and single_label and labels is not None
        if self.training and self.config.tokenmixup_enabled and not mixing:
            logger.warning_once(
                "No tokens are mixed in training forward passes without labels, with fewer than two classes, or with "
                "a problem_type other than 'single_label_classification'."
            )
        # The base model would treat class distributions as multi-label targets and set its problem type to that.
        if not mixing and not (single_label and labels is not None and labels.is_floating_point()):
            return super().forward(pixel_values, labels=labels, **kwargs)

        validate_label_shape(labels, len(pixel_values), self.config.num_labels)
        self._validate_labels_once(labels)
        targets = to_soft_targets(labels, self.config.num_labels)
        num_items = kwargs.pop("num_items_in_batch", None)
        context = self._create_mixing_context(pixel_values, targets, kwargs) if mixing else None
        if context is not None and not labels.is_floating_point():
            context.labels = labels.long()
        outputs = super().forward(pixel_values, return_dict=True, tokenmixup=context, **kwargs)
        if context is None:
            outputs.loss = reduce_loss(soft_cross_entropy(outputs.logits, targets), num_items)
            return outputs
        return self._build_training_output(outputs, context, num_items)

    def to_plain_model(self) -> PreTrainedModel:
        """Export the base model, which transformers loads without this package.

        Use this after a run with another trainer or training loop. `TokenMixupTrainer.save_model` does it itself.

        The base model shares the weights of this model and has no ScoreNet. Adapters of peft are merged into copies of
        the adapted weights. The settings of TokenMixup remain in the configuration, so training can continue.

        Returns:
            The base model, for example a `ViTForImageClassification`, in the same mode (training or evaluation).

        Example:
            >>> from tempfile import TemporaryDirectory
            >>> from transformers import AutoModelForImageClassification
            >>> from hf_tokenmixup import TokenMixupViTConfig, TokenMixupViTForImageClassification
            >>> model = TokenMixupViTForImageClassification(
            ...     TokenMixupViTConfig(hidden_size=24, num_hidden_layers=2, horizontal_layers=[1])
            ... )
            >>> with TemporaryDirectory() as folder:
            ...     model.to_plain_model().save_pretrained(folder)
            ...     type(AutoModelForImageClassification.from_pretrained(folder)).__name__
            'ViTForImageClassification'
        """
        config = self.base_model_class.config_class.from_dict(self.config.to_dict())
        config._attn_implementation = self.config._attn_implementation
        merged = merge_adapters(self)
        state_dict = merged.state_dict(keep_vars=True)
        weights = {name: tensor for name, tensor in state_dict.items() if ".scorenet." not in name}
        with torch.device("meta"):
            model = self.base_model_class(config)
        model.load_state_dict(weights, assign=True)
        for name, buffer in merged.named_non_persistent_buffers():
            module_name, _, buffer_name = name.rpartition(".")
            setattr(model.get_submodule(module_name), buffer_name, buffer)
        return model.train(self.training)

    def push_to_hub(self, *args, **kwargs) -> str:
        """Upload the base model of `to_plain_model`. Arguments are those of `PreTrainedModel.push_to_hub`."""
        return self.to_plain_model().push_to_hub(*args, **kwargs)

    @classmethod
    def _validate_transformers_version(cls) -> None:
        required = cls.min_transformers_version
        if required is not None and version.parse(transformers.__version__) < version.parse(required):
            raise ValueError(
                f"{cls.__name__} needs transformers {required} or newer, found {transformers.__version__}. Run "
                f"`pip install 'transformers>={required}'`."
            )

    def _convert_layers(self) -> None:
        self._plain_no_split_modules = self._no_split_modules
        for index, layer in enumerate(self.get_transformer_layers()):
            layer = self.layer_class.from_layer(layer, self.config, index)
            if layer.is_horizontal:
                layer.scorenet.apply(self._init_weights)
        # FSDP wraps modules with these class names, and fails for a class without modules.
        names = {type(module).__name__ for module in self.modules()}
        layer_names = {type(layer).__name__ for layer in self.get_transformer_layers()}
        self._no_split_modules = {*self._no_split_modules, *layer_names} & names

    def _restore_layers(self) -> None:
        """Undo `_convert_layers`, which may have been interrupted by an error."""
        for layer in self.get_transformer_layers():
            if isinstance(layer, TokenMixupLayerMixin):
                layer.to_plain_layer()
        self._no_split_modules = vars(self).pop("_plain_no_split_modules", self._no_split_modules)

    def _adjust_missing_and_unexpected_keys(self, loading_info) -> None:
        newly_initialized = sorted({key.rsplit(".", 2)[0] for key in loading_info.missing_keys if ".scorenet." in key})
        super()._adjust_missing_and_unexpected_keys(loading_info)
        if newly_initialized:
            logger.warning(
                "ScoreNet is newly initialized, as for every model that is not a training checkpoint: there is no %s.",
                ", ".join(newly_initialized),
            )

    def _validate_labels_once(self, labels: torch.Tensor) -> None:
        # Reading values synchronizes an accelerator, so only the labels of the first batch are validated there. On the
        # CPU, `to_soft_targets` validates all labels.
        if torch.compiler.is_compiling() or labels.device.type == "cpu" or getattr(self, "_labels_validated", False):
            return
        validate_label_values(labels, self.config.num_labels)
        self._labels_validated = True

    def _create_mixing_context(
        self, pixel_values: torch.Tensor, targets: torch.Tensor, kwargs: dict
    ) -> TokenMixupContext:
        if kwargs.get("attention_mask") is not None:
            raise ValueError(
                "attention_mask is not supported while tokens are mixed, since tokens would be copied to masked "
                "positions. Remove it, or turn TokenMixup off (horizontal_layers=[], vertical_layers=[])."
            )
        config, layers = self.config, self.get_transformer_layers()
        for name, attribute in (("horizontal_layers", "is_horizontal"), ("vertical_layers", "is_vertical")):
            built = [index for index, layer in enumerate(layers) if getattr(layer, attribute)]
            if sorted(getattr(config, name)) != built:
                raise ValueError(
                    f"{name} cannot change after the model is created: it was {built} then and is "
                    f"{getattr(config, name)} now. Load the model again with the new value."
                )
        memory = VerticalMemory(config.vertical_kappa, config.vertical_detach, config.num_prefix_tokens)
        context = TokenMixupContext(layers=layers, memory=memory, targets=targets)
        if config.needs_gradient_saliency:
            context.saliency = self.compute_gradient_saliency(pixel_values, targets, **kwargs)
        if config.manifold_mixup_layers:
            num_layers, alpha = len(config.manifold_mixup_layers), config.manifold_mixup_alpha
            context.manifold = ManifoldMixupParams.sample(num_layers, alpha, len(targets), targets.device)
        return context

    # A compiler cannot trace the nested gradient and the switch to evaluation mode, so this is a graph break.
    @torch.compiler.disable
    def compute_gradient_saliency(self, pixel_values: torch.Tensor, targets: torch.Tensor, **kwargs) -> torch.Tensor:
        """Compute the saliency of the gradient detector in evaluation mode.

        Args:
            pixel_values: (B, 3, height, width) images.
            targets: (B, C) class distributions.
            kwargs: keyword arguments of the base model.

        Returns:
            (B, T) saliency, see `hf_tokenmixup.saliency.gradient_saliency`.
        """
        base_forward = super().forward
        with eval_mode(self):
            saliency = gradient_saliency(
                lambda pixels: base_forward(pixels, return_dict=True, **kwargs).logits,
                pixel_values,
                targets,
                self.token_grid(*pixel_values.shape[2:]),
            )
        unshard(self)
        return saliency

    def _build_training_output(
        self, outputs: ImageClassifierOutput, context: TokenMixupContext, num_items: torch.Tensor | int | None
    ) -> TokenMixupOutput:
        losses = soft_cross_entropy(outputs.logits, context.targets if context.labels is None else context.labels)
        loss, scorenet_loss = reduce_loss(losses, num_items), None
        if context.scorenet_losses:
            first, *others = context.scorenet_losses
            scorenet_loss = reduce_loss(sum(others, first), num_items)
            loss = torch.add(loss, scorenet_loss, alpha=self.config.scorenet_loss_weight)
        return TokenMixupOutput(
            loss=loss,
            logits=outputs.logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            targets=context.targets,
            scorenet_loss=scorenet_loss,
            scorenet_logits=tuple(record.scorenet_logits for record in context.horizontal_records) or None,
            horizontal=tuple(context.horizontal_records) or None,
            mixing_metrics=context.compute_mixing_metrics(losses),
        )


def _load_stored_config(
    config_class: type[PreTrainedConfig], name: str | os.PathLike, default: PreTrainedConfig, hub_kwargs: dict
) -> PreTrainedConfig:
    """Load the configuration of a checkpoint; return `default` for a folder without config.json."""
    try:
        return config_class.from_pretrained(name, **hub_kwargs)
    except OSError:
        return default
