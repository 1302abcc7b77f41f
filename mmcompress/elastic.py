"""What has a dial for its token count: the budgets it takes, and what each comes to before any forward pass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from mmcompress.errors import SpecError

ImageSize = tuple[int, int]
"""`(height, width)` in pixels."""


class Elastic(ABC):
    """A model's dial: one number per request decides how many tokens an image becomes."""

    @abstractmethod
    def budgets(self) -> Sequence[int]:
        """What the dial can be set to, ascending: a `range`, or else a tuple, of one number where it is fixed."""

    @abstractmethod
    def tokens_for(self, image_size: ImageSize, budget: int) -> int:
        """How many tokens the LLM sees of an image of `image_size`, separators included.

        Raises:
            SpecError: `budget` is none of `budgets()`.
        """

    def require(self, budget: int) -> None:
        """Refuse a `budget` the dial does not have; it is never replaced by one nearby.

        Raises:
            SpecError: it is none of `budgets()`.
        """
        known = self.budgets()
        if isinstance(budget, int) and not isinstance(budget, bool) and budget in known:
            return
        if len(known) == 1:
            allowed = f"its {known[0]} tokens are fixed"
        elif isinstance(known, range):
            allowed = f"it takes {known[0]} to {known[-1]}"
        else:
            allowed = f"it takes {', '.join(map(str, known))}"
        raise SpecError(f"{type(self).__name__} has no budget {budget!r}: {allowed}.")


class ElasticProjector(nn.Module, Elastic):
    """A projector with a dial."""

    @abstractmethod
    def forward(self, features: Tensor, budget: int) -> Tensor:
        """Make `budget` tokens of each image or tile: `[images, patches, width]` -> `[images, budget, hidden]`.

        Raises:
            SpecError: `budget` is none of `budgets()`.
        """
