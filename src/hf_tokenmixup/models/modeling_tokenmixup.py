"""What every model family shares: the forward's state, the loss, loading, what is published.

A family adds :class:`~hf_tokenmixup.models.layers.TokenMixupLayerMixin` in front of its plain layer and
:class:`TokenMixupModelMixin` in front of its plain classifier, and says how a layer's attention is computed; nothing
else of TokenMixup is family matter.
"""

import logging
import os

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils import can_return_tuple
from transformers.utils import logging as transformers_logging

from ..configuration import TokenMixupConfigMixin
from ..functional import soft_cross_entropy
from ..saliency import eval_mode, gradient_saliency
from ..vertical import VerticalMemory
from .gradient_checkpointing import ActivationCheckpointing, rename_in_config
from .labels import to_soft_targets, validate_label_shape, validate_label_values
from .layers import TokenMixupLayerMixin, unshard
from .outputs import ManifoldMixupParams, TokenMixupContext, TokenMixupOutput
from .peft_utils import AdapterMethods, merge_adapters
from .positions import border_hint, config_to_load_with, resize_positions

logger = logging.getLogger(__name__)
once_logger = transformers_logging.get_logger(__name__)

_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "proxies")
# Attributes that change how many tokens an image has.
_GEOMETRY_ATTRIBUTES = frozenset(
    {"image_size", "patch_size", "tokenizer", "num_conv_layers", "conv_kernel_size", "conv_stride", "conv_padding"}
    | {"pooling_kernel_size", "pooling_stride", "pooling_padding"}
)


class TokenMixupModelMixin(ActivationCheckpointing, AdapterMethods):
    """Training forward, loss, loading and publishing of a TokenMixup classifier. Comes before the plain classifier.

    The family gives ``config_class``, ``base_model_class``, ``layer_class`` and ``lora_target_modules``; its base
    model holds ``layers``.

    Args:
        config: the family's configuration with the settings of TokenMixup.

    Raises:
        ValueError: for a configuration without these settings, or with invalid ones.
    """

    base_model_class: type[PreTrainedModel]
    layer_class: type[TokenMixupLayerMixin]
    # What LoRA adapts unless it is told otherwise: attention's projections to queries and values.
    lora_target_modules: tuple[str, ...]
    # ScoreNet is training state: a published checkpoint holds none, and a model with HTM off has no use for one.
    _keys_to_ignore_on_load_missing = [r"\.scorenet\."]
    _keys_to_ignore_on_load_unexpected = [r"\.scorenet\."]

    def __init__(self, config: TokenMixupConfigMixin):
        if not isinstance(config, self.config_class):
            ours = self.config_class.__name__
            raise ValueError(
                f"{type(self).__name__} needs a {ours}, got {type(config).__name__}: build it with "
                f"{ours}.from_dict(config.to_dict(), horizontal_layers=[...])."
            )
        config.validate_tokenmixup_config()
        if hint := border_hint(config):
            once_logger.warning_once(hint)
        rename_in_config(config)
        super().__init__(config)
        self._replace_layers()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args,
        config: PreTrainedConfig | str | os.PathLike | None = None,
        **kwargs,
    ):
        """As in transformers, with two differences.

        Weights are loaded in float32 unless `dtype` says otherwise: they are trained in the dtype that they have. For
        another `image_size` than the checkpoint's, learned positions are interpolated.

        Args:
            pretrained_model_name_or_path: a folder or a name on the Hub.
            config: instead of the checkpoint's own.
            kwargs: as in transformers, attributes of the configuration among them.
        """
        name = pretrained_model_name_or_path
        dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", None))
        kwargs["dtype"] = torch.float32 if dtype is None else dtype
        wanted, loaded = None, None
        if name is not None and (config is not None or not _GEOMETRY_ATTRIBUTES.isdisjoint(kwargs)):
            hub = {key: kwargs[key] for key in _HUB_OPTIONS if key in kwargs}
            attributes = {key: value for key, value in kwargs.items() if key not in (*_HUB_OPTIONS, "dtype")}
            wanted, rest = config, attributes
            if not isinstance(config, PreTrainedConfig):
                wanted, rest = cls.config_class.from_pretrained(
                    config or name, return_unused_kwargs=True, **hub, **attributes
                )
            loaded = config_to_load_with(cls, wanted, _stored_config(cls.config_class, name, wanted, hub))
        if loaded is None:
            return super().from_pretrained(name, *model_args, config=config, **kwargs)
        kwargs = rest | hub | {"dtype": kwargs["dtype"]}
        opened = super().from_pretrained(name, *model_args, config=loaded, **kwargs)
        resize_positions(opened[0] if isinstance(opened, tuple) else opened, wanted, str(name))
        return opened

    def get_transformer_layers(self) -> nn.ModuleList:
        """The network's layers in order."""
        return self.base_model.layers

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patch tokens of an image of this size."""
        return self.config.token_grid(height, width)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        **kwargs,
    ) -> ImageClassifierOutput | TokenMixupOutput:
        """Classify images; in training mode and with labels, mix tokens.

        Args:
            pixel_values: (B, 3, height, width).
            labels: class indices (B,) or distributions over the classes (B, C), as mixup, CutMix and label smoothing
                make them.
            interpolate_pos_encoding: fit the learned positions to images of another size.
            kwargs: as the plain model takes them. ``num_items_in_batch``, if given, divides the summed loss in place
                of B.

        Returns:
            A :class:`TokenMixupOutput` where tokens are mixed. Else what the plain model returns; so too, with one
            warning, for other problem types than single-label classification.

        Raises:
            ValueError: for a batch without images; for labels of a wrong shape or dtype, out of range, or rows that
                do not sum to one (values on an accelerator are read at the first forward only); for an
                ``attention_mask`` while tokens are mixed.
        """
        if pixel_values is not None and pixel_values.shape[0] == 0:
            raise ValueError(
                f"pixel_values must have at least one image, got shape {tuple(pixel_values.shape)}. Skip batches "
                "without images."
            )
        kwargs["interpolate_pos_encoding"] = interpolate_pos_encoding
        single_label = self.config.problem_type in (None, "single_label_classification") and self.config.num_labels > 1
        mixing = self.training and self.config.tokenmixup_enabled and single_label and labels is not None
        if self.training and self.config.tokenmixup_enabled and not mixing:
            once_logger.warning_once(
                "No tokens are mixed in a training forward without labels, with fewer than two classes, or with a "
                "problem_type other than 'single_label_classification'."
            )
        # The host would take distributions for multi-label targets, and change the problem type for good.
        if not mixing and not (single_label and labels is not None and labels.is_floating_point()):
            return super().forward(pixel_values, labels=labels, **kwargs)

        validate_label_shape(labels, len(pixel_values), self.config.num_labels)
        self._validate_labels_once(labels)
        targets = to_soft_targets(labels, self.config.num_labels)
        num_items = kwargs.pop("num_items_in_batch", None)
        state = self._create_mixing_context(pixel_values, targets, kwargs) if mixing else None
        outputs = super().forward(pixel_values, return_dict=True, tokenmixup=state, **kwargs)
        if state is None:
            outputs.loss = _reduce_loss(soft_cross_entropy(outputs.logits, targets), num_items)
            return outputs
        return self._build_training_output(outputs, state, num_items)

    def published(self) -> PreTrainedModel:
        """The plain model with these weights (shared, not copied) and without ScoreNet, which is training state.

        This is what goes into an output folder and to the Hub: plain transformers opens it without this package.
        The settings stay in its configuration as a record, and for training on with our class. Adapters of peft are
        merged into copies of the weights that they adapt.
        """
        config = self.base_model_class.config_class.from_dict(self.config.to_dict())
        config._attn_implementation = self.config._attn_implementation
        state = merge_adapters(self).state_dict(keep_vars=True)
        weights = {name: tensor for name, tensor in state.items() if ".scorenet." not in name}
        with torch.device("meta"):
            model = self.base_model_class(config)
        model.load_state_dict(weights, assign=True)
        return model.train(self.training)

    def push_to_hub(self, *args, **kwargs) -> str:
        """Upload the :meth:`published` model; arguments as in ``PreTrainedModel.push_to_hub``."""
        return self.published().push_to_hub(*args, **kwargs)

    def _replace_layers(self) -> None:
        # The layers keep their parameters, initialised as the plain model's under the same seed; building ours on the
        # meta device draws no random numbers. ScoreNet alone is new.
        layers = self.get_transformer_layers()
        for index, plain in enumerate(layers):
            weights = plain.state_dict(keep_vars=True)
            with torch.device("meta"):
                layer = self.layer_class(self.config, index)
            layer.load_state_dict(weights, assign=True, strict=False)
            if layer.is_horizontal:
                layer.scorenet.to_empty(device=next(iter(weights.values())).device)
                for module in layer.scorenet.modules():
                    self._init_weights(module)
            if plain.gradient_checkpointing:
                layer.gradient_checkpointing = True
                layer._gradient_checkpointing_func = plain._gradient_checkpointing_func
            layers[index] = layer
            # Sharding goes by these names, and refuses one that no module bears.
            self._no_split_modules = {*self._no_split_modules, type(layer).__name__} - {type(plain).__name__}

    def _adjust_missing_and_unexpected_keys(self, loading_info) -> None:
        fresh = sorted({key.rsplit(".", 2)[0] for key in loading_info.missing_keys if ".scorenet." in key})
        super()._adjust_missing_and_unexpected_keys(loading_info)
        if fresh:
            logger.warning("%s: the checkpoint holds no ScoreNet, so it starts untrained.", ", ".join(fresh))

    def _validate_labels_once(self, labels: torch.Tensor) -> None:
        # Reading values waits for an accelerator, so there only the first labels are read. On the CPU, where it is
        # free, ``to_soft_targets`` reads them all.
        if torch.compiler.is_compiling() or labels.device.type == "cpu" or getattr(self, "_labels_read", False):
            return
        validate_label_values(labels, self.config.num_labels)
        self._labels_read = True

    def _create_mixing_context(
        self, pixel_values: torch.Tensor, targets: torch.Tensor, kwargs: dict
    ) -> TokenMixupContext:
        if kwargs.get("attention_mask") is not None:
            raise ValueError(
                "attention_mask cannot be used while tokens are mixed: tokens would move to places that are masked. "
                "Leave it out, or turn TokenMixup off (horizontal_layers=[], vertical_layers=[])."
            )
        config, layers = self.config, self.get_transformer_layers()
        for name, is_one in (("horizontal_layers", "is_horizontal"), ("vertical_layers", "is_vertical")):
            built = [index for index, layer in enumerate(layers) if getattr(layer, is_one)]
            if sorted(getattr(config, name)) != built:
                raise ValueError(
                    f"{name} was {built} when the model was built and cannot change afterwards, got "
                    f"{getattr(config, name)}: open the model anew with it."
                )
        memory = VerticalMemory(config.vertical_kappa, config.vertical_detach, config.num_prefix_tokens)
        state = TokenMixupContext(layers=layers, memory=memory, targets=targets)
        if config.saliency_detector == "gradient" and (config.horizontal_layers or config.vertical_layers):
            state.saliency = self._gradient_saliency(pixel_values, targets, kwargs)
        if config.manifold_mixup_layers:
            num_layers, alpha = len(config.manifold_mixup_layers), config.manifold_mixup_alpha
            state.manifold = ManifoldMixupParams.of(num_layers, alpha, len(targets), targets.device)
        return state

    # A gradient within a forward, and modules that change their mode, are not for a compiler: a break in its graph.
    @torch.compiler.disable
    def _gradient_saliency(self, pixel_values: torch.Tensor, targets: torch.Tensor, kwargs: dict) -> torch.Tensor:
        classify = super().forward
        with eval_mode(self):
            saliency = gradient_saliency(
                lambda pixels: classify(pixels, return_dict=True, **kwargs).logits,
                pixel_values,
                targets,
                self.config.token_grid(*pixel_values.shape[2:]),
            )
        unshard(self)
        return saliency

    def _build_training_output(
        self, outputs: ImageClassifierOutput, state: TokenMixupContext, num_items: torch.Tensor | int | None
    ) -> TokenMixupOutput:
        loss = _reduce_loss(soft_cross_entropy(outputs.logits, state.targets), num_items)
        scorenet_loss = None
        counts = state.counts()
        if state.steps:
            scorenet_loss = _reduce_loss(torch.stack(state.scorenet_losses).sum(dim=0), num_items)
            loss = loss + self.config.scorenet_loss_weight * scorenet_loss
        return TokenMixupOutput(
            loss=loss,
            logits=outputs.logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            targets=state.targets,
            scorenet_loss=scorenet_loss,
            scorenet_logits=tuple(step.scorenet_logits for step in state.steps) or None,
            horizontal=tuple(state.steps) or None,
            counts=counts,
        )


def _reduce_loss(losses: torch.Tensor, num_items: torch.Tensor | int | None) -> torch.Tensor:
    if num_items is None:
        return losses.mean()
    if torch.is_tensor(num_items):
        num_items = num_items.to(losses.device).flatten()[0]
    return losses.sum() / num_items


def _stored_config(
    config_class: type[PreTrainedConfig], name: str | os.PathLike, wanted: PreTrainedConfig, hub: dict
) -> PreTrainedConfig:
    """The configuration of a checkpoint; `wanted` where it has none, as a folder of weights alone."""
    try:
        return config_class.from_pretrained(name, **hub)
    except OSError:
        return wanted
