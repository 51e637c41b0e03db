"""A dataset of its own epoch. Spawned workers import it, which they cannot do with a class of a test module."""

from torch.utils.data import Dataset

from hf_tokenmixup.data.epochs import SharedEpoch


class EpochDataset(Dataset):
    """Each item is the epoch.

    Args:
        size: Number of items.
    """

    def __init__(self, size: int = 4) -> None:
        self.size = size
        self.shared = SharedEpoch()

    @property
    def epoch(self) -> int:
        return self.shared.get()

    def set_epoch(self, epoch: int) -> None:
        self.shared.set(epoch)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        return self.epoch
