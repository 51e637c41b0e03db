"""The settings of TokenMixup, shared by every model family and validated once (paper: section 3, Table 4)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeGuard

from .functional import ASSIGNMENTS, RELABELS, SALIENCY_QUERIES, TOKEN_SELECTIONS, check_choice
from .horizontal import SCORENET_POOLINGS
from .saliency import SALIENCY_DETECTORS

SALIENCY_ROUTES = ("auto", "output_attentions")
_DEFAULT_KAPPA = 3


def _config_field(default: Any, help: str, choices: Sequence[str] | None = None) -> Any:
    metadata = {"help": help} | ({"choices": list(choices)} if choices else {})
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(kw_only=True)
class TokenMixupConfigMixin:
    """Settings of TokenMixup as flat attributes of a model configuration; with both lists empty all of it is off.

    A family's configuration inherits from this and from its plain configuration, calls
    :meth:`validate_tokenmixup_config` once its attributes stand, and tells ``num_prefix_tokens`` and
    ``num_patch_tokens``. Layer numbers count from 0 and name the layer whose input is mixed.
    """

    horizontal_layers: list[int] = _config_field([], "Layers whose input is mixed between images (HTM); none: off.")
    horizontal_tau: float | None = _config_field(
        1.0, "Images with a ScoreNet loss below it, in nats, are easy and get mixed; none: all of them."
    )
    horizontal_rho: float = _config_field(
        0.01, "Replace a token where the partner's saliency is higher by more than this."
    )
    scorenet_pooling: str = _config_field("cls", "What ScoreNet looks at.", SCORENET_POOLINGS)
    scorenet_loss_weight: float = _config_field(1.0, "Lambda, the weight of ScoreNet's loss in the training loss.")
    scorenet_detach: bool = _config_field(True, "Train ScoreNet alone by its loss, not the layers before it.")
    vertical_layers: list[int] = _config_field(
        [], "Layers that also attend to salient tokens of all earlier layers (VTM); none: off."
    )
    vertical_kappa: int = _config_field(_DEFAULT_KAPPA, "How many tokens each earlier layer contributes.")
    vertical_detach: bool = _config_field(False, "Keep the gradient of vertical layers from those tokens.")
    saliency_detector: str = _config_field(
        "attention",
        "What tells salient tokens: the attention they get, the loss's gradient, or chance.",
        SALIENCY_DETECTORS,
    )
    saliency_query: str = _config_field(
        "cls", "Whose attention is saliency: the CLS token's, or the mean of all tokens.", SALIENCY_QUERIES
    )
    rollout_steps: int = _config_field(
        0, "How many further layers a horizontal layer's attention rollout goes through."
    )
    saliency_route: str = _config_field(
        "auto", "Compute the attention rows that are needed, or whole maps; the values are the same.", SALIENCY_ROUTES
    )
    assignment: str = _config_field("optimal", "Partners by optimal matching or at random.", ASSIGNMENTS)
    assignment_group_size: int | None = _config_field(
        None, "Match within groups of at most so many images, for large batches; none: the whole batch."
    )
    token_selection: str = _config_field(
        "saliency", "Replace tokens by saliency, or as many at random.", TOKEN_SELECTIONS
    )
    relabel: str = _config_field("saliency", "New labels by saliency or by the number of tokens.", RELABELS)
    manifold_mixup_layers: list[int] = _config_field(
        [], "Manifold mixup, for comparison: mix the input of one of these layers, drawn for each batch; none: off."
    )
    manifold_mixup_alpha: float = _config_field(
        2.0, "Beta(alpha, alpha) gives the share of an image in manifold mixup."
    )

    # Fields of a training output that the Trainer must not take for predictions.
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "targets",
        "scorenet_loss",
        "scorenet_logits",
        "horizontal",
        "counts",
    ]

    if TYPE_CHECKING:
        # A family's configuration sets these.
        num_hidden_layers: int
        num_prefix_tokens: int
        num_patch_tokens: int

    @property
    def tokenmixup_enabled(self) -> bool:
        """Whether anything is mixed in training."""
        return bool(self.horizontal_layers or self.vertical_layers or self.manifold_mixup_layers)

    @property
    def num_collected_layers(self) -> int:
        """Layers before this one are collected from; 0 where there is no vertical layer."""
        return max(self.vertical_layers, default=0)

    def validate_tokenmixup_config(self) -> None:
        """Check every setting against its range and against the network.

        Raises:
            ValueError: names the setting, its value, and what is allowed.
        """
        check_choice("scorenet_pooling", self.scorenet_pooling, SCORENET_POOLINGS)
        check_choice("saliency_detector", self.saliency_detector, SALIENCY_DETECTORS)
        check_choice("saliency_query", self.saliency_query, SALIENCY_QUERIES)
        check_choice("saliency_route", self.saliency_route, SALIENCY_ROUTES)
        check_choice("assignment", self.assignment, ASSIGNMENTS)
        check_choice("token_selection", self.token_selection, TOKEN_SELECTIONS)
        check_choice("relabel", self.relabel, RELABELS)
        for name in ("scorenet_detach", "vertical_detach"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}.")

        if self.num_hidden_layers < 1:
            raise ValueError(f"num_hidden_layers must be at least 1, got {self.num_hidden_layers}.")
        self._check_layers("horizontal_layers", first=0)
        self._check_layers("vertical_layers", first=1)
        self._check_layers("manifold_mixup_layers", first=0)
        self._validate_non_negative("manifold_mixup_alpha", self.manifold_mixup_alpha)
        if self.manifold_mixup_alpha == 0:
            raise ValueError("manifold_mixup_alpha must be above 0; manifold_mixup_layers=[] turns it off.")
        group = self.assignment_group_size
        if group is not None and not (_is_integer(group) and group >= 2):
            raise ValueError(f"assignment_group_size must be an integer of at least 2, or None; got {group!r}.")
        if group is not None and self.assignment == "random":
            raise ValueError("assignment_group_size is for assignment='optimal', got assignment='random' beside it.")
        self._validate_non_negative("horizontal_rho", self.horizontal_rho)
        self._validate_non_negative("scorenet_loss_weight", self.scorenet_loss_weight)
        if self.horizontal_tau is not None:
            self._validate_non_negative("horizontal_tau", self.horizontal_tau, "; None makes every image easy")
        # A network of fewer patch tokens than the default kappa is no mistake where nothing is collected.
        most = self.num_patch_tokens if self.vertical_layers else max(self.num_patch_tokens, _DEFAULT_KAPPA)
        self._validate_integer_range("vertical_kappa", self.vertical_kappa, most, "the number of patch tokens")
        last = self.num_hidden_layers - 1 - max(self.horizontal_layers, default=0)
        self._validate_integer_range(
            "rollout_steps", self.rollout_steps, last, "the layers behind the last horizontal one"
        )

        if self.rollout_steps and self.saliency_detector != "attention":
            raise ValueError(
                f"rollout_steps belong to saliency_detector='attention'; got {self.rollout_steps} of them and "
                f"{self.saliency_detector!r}."
            )
        if self.num_prefix_tokens == 0:
            for name, instead in (("scorenet_pooling", "'attention' or 'mean'"), ("saliency_query", "'mean'")):
                if getattr(self, name) == "cls":
                    raise ValueError(f"{name}='cls' needs a CLS token, and this model has none: use {instead}.")

    def _check_layers(self, name: str, first: int) -> None:
        layers, last = getattr(self, name), self.num_hidden_layers - 1
        if not isinstance(layers, list | tuple) or not all(_is_integer(layer) for layer in layers):
            raise ValueError(f"{name} must be a list of layer numbers, got {layers!r}.")
        if layers and first > last:
            raise ValueError(f"{name} must be empty in a model of {last + 1} layer, got {layers!r}.")
        outside = [layer for layer in layers if not first <= layer <= last]
        if outside:
            reason = ", as nothing lies before layer 0" if first == 1 and 0 in outside else ""
            raise ValueError(f"{name} must lie between {first} and {last}{reason}, got {layers!r}.")
        if len(set(layers)) != len(layers):
            raise ValueError(f"{name} must name each layer once, got {layers!r}.")

    @staticmethod
    def _validate_non_negative(name: str, value: object, otherwise: str = "") -> None:
        number = value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
        if not (math.isfinite(number) and number >= 0):
            raise ValueError(f"{name} must be a finite number of at least 0{otherwise}; got {value!r}.")

    @staticmethod
    def _validate_integer_range(name: str, value: object, most: int, meaning: str) -> None:
        if not (_is_integer(value) and 0 <= value <= most):
            raise ValueError(f"{name} must be an integer between 0 and {most} ({meaning}), got {value!r}.")


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
