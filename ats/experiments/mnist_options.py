"""What experiments on handwritten digits share: which digits, and where they are."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from ats.datasets.megapixel_mnist import N_CLASSES
from ats.datasets.mnist import Digits, fetch_mnist, load_digits
from ats.experiments.config import DataConfig
from ats.paths import user_path

Options = TypeVar("Options", bound="MNISTConfig")


@dataclass(frozen=True)
class MNISTConfig(DataConfig):
    """Images made of MNIST's digits."""

    digits: Literal["bundled", "full"] = "full"
    """The 6,000 digits that ship with the package, or all of MNIST."""
    folder: Path | None = None
    """Folder with MNIST's IDX files, for digits=full. Default: $ATS_DATA/mnist, else a cache; downloaded if missing."""

    @property
    def channels(self) -> int:
        return 1

    @property
    def n_classes(self) -> int:
        """The digits."""
        return N_CLASSES

    @classmethod
    def subfolder(cls) -> str:
        """MNIST's: that is what is on disk."""
        return "mnist"

    def find_folder(self) -> Path:
        """Where MNIST is, or is to be put."""
        if self.folder is not None:
            return self.folder
        if "ATS_DATA" in os.environ:
            return user_path(os.environ["ATS_DATA"]) / self.subfolder()
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return user_path(cache) / "torch-ats" / self.subfolder()

    def fetch(self) -> None:
        """Download MNIST where it is needed and missing."""
        if self.digits == "full":
            fetch_mnist(self.find_folder())

    def load(self, split: str) -> Digits:
        """The digits of a split."""
        return load_digits(split, self.find_folder() if self.digits == "full" else None)

    def called(self, name: str) -> str:
        """What images made of these digits are called, for reports."""
        return name if self.digits == "full" else f"{name} of the bundled digits"

    def with_test_images(self: Options, count: int) -> Options:
        """The same with `count` images to test on: there are as many as anyone wants."""
        values: dict[str, Any] = {"test_images": count}
        return dataclasses.replace(self, **values)
