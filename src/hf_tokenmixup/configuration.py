"""Settings of TokenMixup, shared by all model families (paper: section 3, Table 4)."""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeGuard

from .functional import ASSIGNMENTS, RELABELS, SALIENCY_QUERIES, TOKEN_SELECTIONS, validate_choice
from .horizontal import SCORENET_POOLINGS
from .network import Network
from .saliency import SALIENCY_DETECTORS

SALIENCY_ROUTES = ("auto", "output_attentions")
AUTO = "auto"
# The absolute and the relative form of each threshold. A configuration has one of the two.
RELATIVE_THRESHOLDS = {"horizontal_tau": "horizontal_tau_relative", "horizontal_rho": "horizontal_rho_relative"}
OTHER_THRESHOLD_FORM = RELATIVE_THRESHOLDS | {relative: name for name, relative in RELATIVE_THRESHOLDS.items()}
_DEFAULT_KAPPA = 3
# Poolings of a classifier that reads the CLS token, alone or with the patch tokens.
_CLS_POOLINGS = ("cls", "cls_mean")


def _config_field(default: Any, help: str, choices: Sequence[str] | None = None) -> Any:
    metadata = {"help": help} | ({"choices": list(choices)} if choices else {})
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def _replace_default_thresholds(config_class: type) -> type:
    """Wrap `__init__` of a class so that an absolute threshold, None included, replaces the relative default."""
    init = config_class.__init__  # type: ignore[misc]

    @functools.wraps(init)
    def wrapped(self, *args, **kwargs):
        _validate_exclusive(kwargs)
        for absolute, relative in RELATIVE_THRESHOLDS.items():
            if absolute in kwargs and _is_value(absolute, kwargs[absolute]):
                kwargs.setdefault(relative, None)
        init(self, *args, **kwargs)

    config_class.__init__ = wrapped  # type: ignore[misc]
    return config_class


def _is_value(threshold: str, value: float | None) -> bool:
    """Whether `value` sets a threshold. None is a value of `horizontal_tau` only: all images are easy."""
    return value is not None or threshold == "horizontal_tau"


def _validate_exclusive(given: Mapping[str, Any]) -> None:
    for absolute, relative in RELATIVE_THRESHOLDS.items():
        if given.get(absolute) is not None and given.get(relative) is not None:
            raise ValueError(
                f"`{absolute}={given[absolute]}` and `{relative}={given[relative]}` are two forms of one threshold. "
                "Remove one of them."
            )


@_replace_default_thresholds
@dataclass(kw_only=True)
class TokenMixupConfigMixin:
    """Settings of TokenMixup as attributes of a model configuration.

    TokenMixup is off if all lists of layers are empty. Layer indices count from 0; mixing applies to the input of the
    layer.

    Two thresholds have an absolute and a relative form. The relative form is the same for models with another number
    of tokens, and for datasets with another number of classes. Setting one form removes the other.

    The configuration of a model family inherits from this class and from the configuration of the base model. It
    defines `network`, and calls `validate_tokenmixup_config` in `__post_init__`. If its tokens are no patches, it also
    defines `token_grid`.
    """

    horizontal_layers: list[int] = _config_field(
        [], "Layers before which tokens are mixed between images (HTM); empty: off."
    )
    horizontal_tau: float | None = _config_field(
        None,
        "Images with a ScoreNet loss below this value, in nats, are easy and are mixed; given as none: all images.",
    )
    horizontal_tau_relative: float | None = _config_field(
        0.43, "Replaces horizontal_tau: the value as a fraction of ln(number of classes), the loss of a guess."
    )
    horizontal_rho: float | None = _config_field(
        None, "Minimum difference in saliency of a replaced token, an attention probability."
    )
    horizontal_rho_relative: float | None = _config_field(
        1.3, "Replaces horizontal_rho: the value as a multiple of uniform attention, 1 / number of patch tokens."
    )
    scorenet_pooling: str = _config_field(
        AUTO,
        "Pooling of ScoreNet's input tokens; auto: cls if the model's classifier reads the CLS token, otherwise its "
        "pooling.",
        (AUTO, *SCORENET_POOLINGS),
    )
    scorenet_loss_weight: float = _config_field(1.0, "Weight of ScoreNet's loss in the training loss (lambda).")
    scorenet_detach: bool = _config_field(True, "Detach ScoreNet's input, so that its loss trains ScoreNet only.")
    vertical_layers: list[int] = _config_field(
        [], "Layers that also attend to salient tokens of all earlier layers (VTM); empty: off."
    )
    vertical_kappa: int = _config_field(_DEFAULT_KAPPA, "Number of salient tokens of each earlier layer.")
    vertical_detach: bool = _config_field(False, "Detach the salient tokens of earlier layers.")
    saliency_detector: str = _config_field(
        "attention", "Saliency of a token: attention, gradient of the loss, or random.", SALIENCY_DETECTORS
    )
    saliency_query: str = _config_field(
        AUTO,
        "Queries of the attention saliency: the CLS token, or the mean over all tokens; auto: cls if the model's "
        "classifier reads the CLS token, otherwise mean.",
        (AUTO, *SALIENCY_QUERIES),
    )
    rollout_steps: int = _config_field(0, "Number of additional layers in the attention rollout.")
    saliency_route: str = _config_field(
        "auto",
        "Compute only the attention rows that are needed (auto) or complete attention maps; same values.",
        SALIENCY_ROUTES,
    )
    assignment: str = _config_field("optimal", "Assign partners by optimal matching or at random.", ASSIGNMENTS)
    assignment_group_size: int | None = _config_field(
        None, "Match within groups of up to this many images, for large batches; none: the complete batch."
    )
    token_selection: str = _config_field(
        "saliency", "Replace tokens by saliency, or the same number of tokens at random.", TOKEN_SELECTIONS
    )
    relabel: str = _config_field("saliency", "Weight mixed labels by saliency or by the number of tokens.", RELABELS)
    manifold_mixup_layers: list[int] = _config_field(
        [], "Layers for manifold mixup, a baseline: each batch is mixed before one of them; empty: off."
    )
    manifold_mixup_alpha: float = _config_field(2.0, "Manifold mixup draws lambda from Beta(alpha, alpha).")

    # Name of the model family in `architecture_name`; empty: the model type.
    display_name: ClassVar[str] = ""

    # Trainer ignores these fields of a training output when it collects predictions.
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "targets",
        "scorenet_loss",
        "scorenet_logits",
        "horizontal",
        "mixing_metrics",
    ]

    if TYPE_CHECKING:
        # Defined by the configuration of the model family.
        model_type: str
        num_labels: int
        network: Network

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        # transformers has made the class a dataclass here. A generated `__init__` cannot tell None from no value.
        _replace_default_thresholds(cls)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        for absolute, relative in RELATIVE_THRESHOLDS.items():
            if name == absolute and _is_value(name, value):
                super().__setattr__(relative, None)
            elif name == relative and value is not None:
                super().__setattr__(absolute, None)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """Create a configuration, as in `PreTrainedConfig.from_dict`. A threshold among `kwargs` replaces both forms.

        Args:
            config_dict: attributes, such as those of a config.json.
            kwargs: as in `PreTrainedConfig.from_dict`, including attributes of the configuration.

        Raises:
            ValueError: if both forms of a threshold are given.
        """
        _validate_exclusive(kwargs)
        # transformers sets the attributes in this order, and the last form of a threshold that is set applies.
        kwargs = dict(sorted(kwargs.items(), key=lambda item: item[0] in RELATIVE_THRESHOLDS.values()))
        return super().from_dict(config_dict, **kwargs)  # type: ignore[misc]

    @classmethod
    def describe_unsupported(cls, attributes: Mapping[str, Any]) -> str | None:
        """Describe why a model with these attributes of a configuration does not support TokenMixup.

        Returns:
            A sentence for an error message, without the full stop; None if it does.
        """
        return None

    @property
    def num_prefix_tokens(self) -> int:
        """P, the number of leading tokens that are not patch tokens."""
        return self.network.num_prefix_tokens

    @property
    def num_patch_tokens(self) -> int:
        """T, the number of patch tokens at the configured image size."""
        rows, columns = self.token_grid(*self.network.image_size)
        return rows * columns

    @property
    def classifier_pooling(self) -> str:
        """Pooling of the classifier's input, see `hf_tokenmixup.network.Network`."""
        return self.network.classifier_pooling

    @property
    def architecture_name(self) -> str:
        """Name of the architecture for model cards, with its size if that has a usual name, such as `ViT-B/16`."""
        name = self.display_name or f"`{self.model_type}`"
        return f"{name}-{self.network.size_name}" if self.display_name and self.network.size_name else name

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns of patch tokens for an image size in pixels."""
        patch_height, patch_width = self.network.patch_size or (1, 1)
        return height // patch_height, width // patch_width

    @property
    def effective_tau(self) -> float | None:
        """Images with a ScoreNet loss below this value, in nats, are easy; None: all images."""
        if self.horizontal_tau_relative is None:
            return self.horizontal_tau
        return self.horizontal_tau_relative * math.log(self.num_labels)

    def effective_rho(self, num_patch_tokens: int) -> float:
        """Return the minimum difference in saliency of a replaced token.

        Args:
            num_patch_tokens: T, which depends on the image size.
        """
        if self.horizontal_rho is not None:
            return self.horizontal_rho
        return (self.horizontal_rho_relative or 0.0) / num_patch_tokens

    @property
    def effective_saliency_query(self) -> str:
        """`saliency_query`, with `"auto"` resolved for the classifier of the model."""
        if self.saliency_query != AUTO:
            return self.saliency_query
        return "cls" if self.classifier_pooling in _CLS_POOLINGS else "mean"

    @property
    def effective_scorenet_pooling(self) -> str:
        """`scorenet_pooling`, with `"auto"` resolved for the classifier of the model."""
        if self.scorenet_pooling != AUTO:
            return self.scorenet_pooling
        return "cls" if self.classifier_pooling in _CLS_POOLINGS else self.classifier_pooling

    @property
    def tokenmixup_enabled(self) -> bool:
        """Whether training forward passes mix tokens."""
        return bool(self.horizontal_layers or self.vertical_layers or self.manifold_mixup_layers)

    @property
    def num_collected_layers(self) -> int:
        """Number of layers that contribute tokens to vertical layers; 0 without vertical layers."""
        return max(self.vertical_layers, default=0)

    @property
    def needs_gradient_saliency(self) -> bool:
        """Whether a training forward pass computes the gradient of the loss before the first layer."""
        return self.saliency_detector == "gradient" and bool(self.horizontal_layers or self.vertical_layers)

    def validate_tokenmixup_config(self) -> None:
        """Validate all settings.

        Raises:
            ValueError: if a setting is out of range or does not fit the model.
        """
        validate_choice("scorenet_pooling", self.scorenet_pooling, (AUTO, *SCORENET_POOLINGS))
        validate_choice("saliency_detector", self.saliency_detector, SALIENCY_DETECTORS)
        validate_choice("saliency_query", self.saliency_query, (AUTO, *SALIENCY_QUERIES))
        validate_choice("saliency_route", self.saliency_route, SALIENCY_ROUTES)
        validate_choice("assignment", self.assignment, ASSIGNMENTS)
        validate_choice("token_selection", self.token_selection, TOKEN_SELECTIONS)
        validate_choice("relabel", self.relabel, RELABELS)
        for name in ("scorenet_detach", "vertical_detach"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}.")

        num_layers = self.network.num_layers
        if num_layers < 1:
            raise ValueError(f"num_hidden_layers must be at least 1, got {num_layers}.")
        self._validate_layer_indices("horizontal_layers", first=0)
        self._validate_layer_indices("vertical_layers", first=1)
        self._validate_layer_indices("manifold_mixup_layers", first=0)
        self._validate_non_negative("manifold_mixup_alpha", self.manifold_mixup_alpha)
        if self.manifold_mixup_alpha == 0:
            raise ValueError("manifold_mixup_alpha must be above 0 (manifold_mixup_layers=[] turns it off), got 0.")
        group = self.assignment_group_size
        if group is not None and not (_is_integer(group) and group >= 2):
            raise ValueError(f"assignment_group_size must be an integer of at least 2, or None, got {group!r}.")
        if group is not None and self.assignment == "random":
            raise ValueError(
                f"assignment_group_size={group} requires assignment='optimal', got assignment='random'. Set "
                "assignment_group_size=None."
            )
        self._validate_thresholds()
        self._validate_non_negative("scorenet_loss_weight", self.scorenet_loss_weight)
        # Without vertical layers, the default kappa is valid for a model with fewer patch tokens, too.
        max_kappa = self.num_patch_tokens if self.vertical_layers else max(self.num_patch_tokens, _DEFAULT_KAPPA)
        self._validate_integer_range("vertical_kappa", self.vertical_kappa, max_kappa, "the number of patch tokens")
        max_steps = num_layers - 1 - max(self.horizontal_layers, default=0)
        self._validate_integer_range(
            "rollout_steps", self.rollout_steps, max_steps, "the number of layers after the last horizontal layer"
        )

        if self.rollout_steps and self.saliency_detector != "attention":
            raise ValueError(
                f"rollout_steps={self.rollout_steps} requires saliency_detector='attention', got "
                f"{self.saliency_detector!r}. Set rollout_steps=0."
            )
        if self.num_prefix_tokens == 0:
            for name, alternatives in (("scorenet_pooling", "'attention' or 'mean'"), ("saliency_query", "'mean'")):
                if getattr(self, name) == "cls":
                    raise ValueError(f"{name}='cls' needs a CLS token, but this model has none. Use {alternatives}.")

    def _validate_thresholds(self) -> None:
        if self.horizontal_rho is None and self.horizontal_rho_relative is None:
            raise ValueError("horizontal_rho or horizontal_rho_relative must be a number, got None for both.")
        for pair in RELATIVE_THRESHOLDS.items():
            for name in pair:
                note = " (None makes all images easy)" if "tau" in name else ""
                if getattr(self, name) is not None:
                    self._validate_non_negative(name, getattr(self, name), note)
        if not self.horizontal_layers:
            return
        off = "Set horizontal_layers=[] to turn HTM off."
        for name in ("horizontal_tau", "horizontal_tau_relative"):
            if getattr(self, name) == 0:
                raise ValueError(f"{name} must be above 0, got 0: no image would be easy. None makes all easy. {off}")
        limits = {"horizontal_rho": 1, "horizontal_rho_relative": self.num_patch_tokens}
        for name, limit in limits.items():
            value = getattr(self, name)
            if value is not None and value >= limit:
                meaning = "" if limit == 1 else ", the number of patch tokens"
                raise ValueError(
                    f"{name} must be below {limit}{meaning}, got {value}: saliency is a probability, so no token "
                    f"would be replaced. {off}"
                )

    def _validate_layer_indices(self, name: str, first: int) -> None:
        layers, last = getattr(self, name), self.network.num_layers - 1
        if not isinstance(layers, list | tuple) or not all(_is_integer(layer) for layer in layers):
            raise ValueError(f"{name} must be a list of layer indices, got {layers!r}.")
        if layers and first > last:
            raise ValueError(f"{name} must be empty in a model of {last + 1} layer, got {layers!r}.")
        outside = [layer for layer in layers if not first <= layer <= last]
        if outside:
            reason = " (there is no layer before layer 0)" if first == 1 and 0 in outside else ""
            raise ValueError(f"{name} must be between {first} and {last}{reason}, got {layers!r}.")
        if len(set(layers)) != len(layers):
            raise ValueError(f"{name} must name each layer once, got {layers!r}.")

    @staticmethod
    def _validate_non_negative(name: str, value: object, note: str = "") -> None:
        number = value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
        if not (math.isfinite(number) and number >= 0):
            raise ValueError(f"{name} must be a finite number of at least 0{note}, got {value!r}.")

    @staticmethod
    def _validate_integer_range(name: str, value: object, maximum: int, meaning: str) -> None:
        if not (_is_integer(value) and 0 <= value <= maximum):
            raise ValueError(f"{name} must be an integer between 0 and {maximum} ({meaning}), got {value!r}.")


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
