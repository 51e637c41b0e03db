"""How well a classifier does on a split, and what it costs."""

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One measurement, with all that repeats it.

    Shares (`top1`, `top5`) lie in [0, 1]; `loss` is the mean cross-entropy in nats; `macs` are multiply-accumulate
    operations of one image's forward pass; `images_per_second` counts loading and is that of all processes together.
    """

    model: str
    model_revision: str | None
    num_parameters: int
    macs: int | None
    dataset: str
    dataset_config: str | None
    dataset_revision: str | None
    dataset_fingerprint: str
    split: str
    num_images: int
    top1: float
    top5: float
    loss: float
    images_per_second: float
    batch_size: int
    num_processes: int
    hardware: str
    dtype: str
    command: str
    versions: dict[str, str] = field(default_factory=dict)
