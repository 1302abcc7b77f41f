"""Reports as files: a page, Markdown or CSV about results of `mmcompress eval` and `mmcompress bench`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmcompress.errors import InputError, SpecError
from mmcompress.evals import record, report, report_bench, report_html, result_file
from mmcompress.evals.answers import write_whole
from mmcompress.evals.bench import latency


def write(runs: Sequence[Path], out: Path) -> None:
    """Write the report that the ending of `out` names about all of `runs`, folders or result files.

    Raises:
        InputError: a result is missing, damaged or none.
        SpecError: it has another version of its format, or no report ends so.
        OSError: `out` cannot be written.
    """
    made = {".html": page, ".md": _markdown, ".csv": _csv}
    if out.suffix not in made:
        raise SpecError(f"--out {out}: a report ends in {', '.join(made)}.")
    if not out.parent.is_dir():
        raise SpecError(f"--out {out}: the folder {out.parent} does not exist.")
    if out.is_dir():
        raise SpecError(f"--out {out}: {out.name} is a folder; give the name of a file.")
    write_whole(out, made[out.suffix](runs))


def page(runs: Sequence[Path]) -> str:
    """One page about all of `runs`; see `write` for what it raises."""
    return report_html.page([_section(path, _load(path)) for path in runs])


def _markdown(runs: Sequence[Path]) -> str:
    loaded = [_load(path) for path in runs]
    texts = [report_bench.markdown(one) if _is_bench(one) else report.markdown(one) for one in loaded]
    return "\n".join(f"# {one['model']}\n\n{text}" for one, text in zip(loaded, texts, strict=True))


def _csv(runs: Sequence[Path]) -> str:
    loaded = [_load(path) for path in runs]
    return report.as_csv(
        [line for one in loaded for line in (report_bench.lines(one) if _is_bench(one) else report.lines(one))]
    )


def _section(path: Path, result: dict[str, Any]) -> str:
    if _is_bench(result):
        return report_bench.html(result)
    return report_html.evaluation(path if path.is_dir() else path.parent, result)


def _load(path: Path) -> dict[str, Any]:
    result = result_file.read(path, {record.FORMAT: record.VERSION, latency.FORMAT: latency.VERSION})
    if not _is_bench(result):
        return record.checked(result, path)
    lacking = [part for part in ("model", "environment", "left_out", "rows") if part not in result]
    if lacking:
        raise InputError(f"{path} is damaged: it lacks {', '.join(lacking)}.")
    return result


def _is_bench(result: dict[str, Any]) -> bool:
    return bool(result["format"] == latency.FORMAT)
