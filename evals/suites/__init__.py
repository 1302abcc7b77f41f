"""Benchmarks as files on disk: what each needs, how its questions are put, and how answers are scored."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmcompress.errors import SpecError, unknown_name
from mmcompress.evals.micro import MICROVQA_PATH
from mmcompress.evals.suites.base import Suite
from mmcompress.evals.suites.documents import ChartQA, DocVQA, InfoVQA, OCRBench
from mmcompress.evals.suites.microvqa import MicroVQA
from mmcompress.evals.suites.own import Jsonl
from mmcompress.evals.suites.science import ScienceQA
from mmcompress.evals.suites.tables import AI2D, MMMU, SEED, MMBench
from mmcompress.evals.suites.vqa import GQA, TextVQA, VizWiz, VQAv2
from mmcompress.evals.suites.yesno import MME, POPE
from mmcompress.spec import Spec

SUITES: Mapping[str, type[Suite]] = {
    suite.name: suite
    for suite in (
        MicroVQA, VQAv2, TextVQA, VizWiz, GQA, POPE, MME, ScienceQA, MMBench, SEED, MMMU, AI2D, DocVQA, InfoVQA,
        ChartQA, OCRBench, Jsonl,
    )
}  # fmt: skip


def configure(text: str, data: Path, **extra: Any) -> Suite:
    """The suite that `text` names, as in "pope" or "textvqa(prompt=qwen, folder=/data/textvqa)".

    Args:
        text: a name with options: `prompt`, and `folder` instead of the one of that name in `data`.
        data: the folder of all suites.
        extra: further fields, for suites that have them.

    Raises:
        SpecError: there is no such suite or option.
    """
    spec = Spec.parse(text)
    if spec.name not in SUITES:
        raise unknown_name("suite", spec.name, SUITES)
    options = dict(spec.options)
    unknown = sorted(set(options) - {"prompt", "folder"})
    if unknown or spec.keep is not None:
        raise SpecError(f"suite {spec.name} has the options prompt and folder, not {', '.join(unknown) or 'keep'}.")
    suite = SUITES[spec.name]
    default = MICROVQA_PATH if suite is MicroVQA else data / spec.name
    fields = {name: value for name, value in extra.items() if name in suite.__dataclass_fields__}
    return suite(Path(str(options.get("folder", default))), str(options.get("prompt", "default")), **fields)
