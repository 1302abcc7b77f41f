"""What the operator wrote under `mmcompress` in vLLM's additional config, and what requests may change of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mmcompress
from mmcompress.budget import Budget
from mmcompress.errors import InputError, SpecError
from mmcompress.spec import CompressionConfig, Spec

KEEP = "mmcompress_keep"
"""The entry of a request's `mm_processor_kwargs` that changes its budget."""


@dataclass(frozen=True)
class Settings:
    """The config of `wrap`, with one entry more.

    Args:
        config: one method that acts before the LLM, with its budget.
        keep_range: the least and the largest budget a request may ask for; None if it may not.
    """

    config: CompressionConfig
    keep_range: tuple[Budget, Budget] | None = None

    @classmethod
    def parse(cls, data: Any) -> Settings:
        """Read `{"method": "hired", "keep": 0.2}`, with `"keep_range": [0.1, 0.5]` if requests have a say.

        Raises:
            SpecError: an entry is unknown, malformed or contradicts another.
        """
        if not isinstance(data, Mapping):
            raise SpecError(f'give {{"method": "hired", "keep": 0.2}}, not {data!r}.')
        entries = dict(data)
        bounds = entries.pop("keep_range", None)
        settings = cls(CompressionConfig.from_dict(entries), None if bounds is None else _range(bounds))
        if settings.keep_range is not None and settings.config.methods:
            settings.require_in_range(settings.keep, "keep")
        return settings

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON-ready data that `parse` reads back."""
        bounds = {} if self.keep_range is None else {"keep_range": [bound.keep for bound in self.keep_range]}
        return {**self.config.to_dict(), **bounds}

    @property
    def spec(self) -> Spec:
        """The method."""
        return self.config.methods[0]

    @property
    def keep(self) -> Budget:
        """The budget of a request that asks for no other."""
        return self.spec.keep or Budget(1.0)

    @property
    def fingerprint(self) -> str:
        """What tells tokens apart that were kept by other settings or another release."""
        return json.dumps([mmcompress.__version__, self.config.to_dict()], sort_keys=True)

    def requested(self, options: Mapping[str, Any]) -> Budget:
        """The budget of a request with these `mm_processor_kwargs`.

        Raises:
            InputError: it asks for one that is malformed or not allowed.
        """
        if KEEP not in options:
            return self.keep
        try:
            budget = Budget(options[KEEP])
            self.require_in_range(budget, KEEP)
        except SpecError as error:
            raise InputError(f"{KEEP}={options[KEEP]!r}: {error}") from error
        return budget

    def require_in_range(self, budget: Budget, name: str) -> None:
        """Refuse a budget outside of what is allowed, or of another kind."""
        if self.keep_range is None:
            raise SpecError('this server lets no request change its budget; "keep_range": [0.1, 0.5] would.')
        least, most = self.keep_range
        if type(budget.keep) is not type(least.keep) or not least.keep <= budget.keep <= most.keep:
            kind = "count" if isinstance(least.keep, int) else "fraction"
            raise SpecError(f"{name} must be a {kind} from {least} to {most}, not {budget}.")


def _range(bounds: Any) -> tuple[Budget, Budget]:
    if not isinstance(bounds, (list, tuple)) or len(bounds) != 2:
        raise SpecError(f"keep_range={bounds!r} must be the least and the largest keep, as in [0.1, 0.5].")
    least, most = Budget(bounds[0]), Budget(bounds[1])
    if type(least.keep) is not type(most.keep) or least.keep > most.keep:
        raise SpecError(f"keep_range={bounds!r} must ascend and be two fractions or two counts.")
    return least, most
