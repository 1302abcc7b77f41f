"""What a suite is: files on disk, read row by row into questions, and a scorer for the answers."""

from __future__ import annotations

import hashlib
import io
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image, ImageOps

from mmcompress.errors import InputError, SpecError, unknown_name
from mmcompress.evals.suites.files import Row

MAX_PIXELS = 100_000_000
MAX_BYTES = 100 * 2**20
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""Of pictures; Pillow would hand others to programs outside."""

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


def content_hash(source: bytes | Path) -> str:
    """Equal for equal bytes, at hand or in a file.

    Raises:
        OSError: the file cannot be read.
    """
    with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


@dataclass(frozen=True)
class Picture:
    """A picture that is read when it is needed: `data` holds the encoded file, or `path` says where it is."""

    name: str
    path: Path | None = None
    data: bytes | None = field(default=None, repr=False, compare=False)

    @classmethod
    def held(cls, data: bytes) -> Picture:
        """A picture of no name of its own: it is named by its content, so that equal ones are one."""
        return cls(content_hash(data), data=data)

    @property
    def content(self) -> str | None:
        """The hash of its encoded file; None where there is none to read."""
        if self.data is not None:
            return content_hash(self.data)
        try:
            return content_hash(self.path) if self.path is not None and self.path.is_file() else None
        except OSError:
            return None

    def open(self) -> Image.Image:
        """Read it as RGB, turned upright.

        Raises:
            InputError: it is missing, no readable picture, or larger than `MAX_BYTES` or `MAX_PIXELS`.
        """
        if self.path is not None and not self.path.is_file():
            problem = "cannot be read: it is no file" if self.path.exists() else "does not exist"
            raise InputError(f"image {self.name} {problem}.")
        try:
            size = len(self.data) if self.data is not None else self._file.stat().st_size
            if size > MAX_BYTES:
                raise InputError(f"image {self.name} has {size} bytes; the most is {MAX_BYTES}.")
            file = io.BytesIO(self.data) if self.data is not None else self._file
            with Image.open(file, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise InputError(f"image {self.name} is {image.width}x{image.height}; the most is {MAX_PIXELS} px.")
                upright = ImageOps.exif_transpose(image)
                if upright.mode.startswith("I"):  # 16 bits per pixel, which convert() would clip to white
                    upright = upright.point(lambda value: value / 257).convert("L")
                return upright.convert("RGB")
        except InputError:
            raise
        except _UNREADABLE as error:
            raise InputError(f"image {self.name} cannot be read: {error}") from error

    @property
    def _file(self) -> Path:
        assert self.path is not None
        return self.path


def picture_in(folder: Path, name: str) -> Picture:
    """The picture `name` of `folder`, which it must not lead out of; `folder` itself may be a link.

    Raises:
        InputError: it does.
    """
    path = folder / name
    if "\0" in name or Path(name).is_absolute() or not path.resolve().is_relative_to(folder.resolve()):
        raise InputError(f"image {name!r} leads out of {folder}.")
    return Picture(name, path)


@dataclass(frozen=True)
class Question:
    """What is asked, and what a scorer needs to judge the answer.

    Args:
        id: unique in its suite.
        images: in the order they are shown.
        prompt: all that is said beside the images, without the model's chat format.
        answers: right ones; several annotators' for VQA accuracy.
        choices: what the letters A, B, ... stand for, in multiple choice.
        category: what results are broken down by.
    """

    id: str
    images: tuple[Picture, ...]
    prompt: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()
    category: str = ""

    @property
    def cluster(self) -> str:
        """Questions that stand or fall together: those about one image."""
        return self.images[0].name if self.images else self.id


@dataclass(frozen=True)
class Problem:
    """A row that cannot be asked: where it is and why."""

    where: str
    reason: str


@dataclass(frozen=True)
class Grade:
    """What an answer is worth, between 0 and 1; whether it could be read; and as what it was read."""

    score: float
    valid: bool
    read: str = ""


Array = np.ndarray[Any, Any]
Metrics = Callable[[Sequence[Question], Sequence[Grade], Array], dict[str, Array]]


@dataclass(frozen=True)
class Scorer:
    """How answers are judged.

    Args:
        metric: the name of the number that stands for the suite.
        grade: one answer.
        metrics: of all answers, from weights per question `[samples, questions]` to values `[samples]` by name; the
            weights are what the bootstrap resamples.
        unit: what the values are multiplied by for people.
        invalid: in words, which answers count as invalid.
        require: raises UnsupportedError where grading lacks a package; it comes last, behind costly answers.
    """

    metric: str
    grade: Callable[[str, Question], Grade]
    metrics: Metrics
    unit: float = 100.0
    invalid: str = "empty"
    require: Callable[[], object] | None = None


@dataclass(frozen=True)
class Suite:
    """A benchmark: subclasses say which files there are and what their rows mean.

    Args:
        folder: where its files are.
        prompt: which of `prompts` to ask with.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    files: ClassVar[tuple[str, ...]]
    scorer: ClassVar[Scorer]
    prompts: ClassVar[Mapping[str, str]]
    max_new_tokens: ClassVar[int] = 16

    folder: Path
    prompt: str = "default"

    def __post_init__(self) -> None:
        if self.prompt not in self.prompts:
            raise unknown_name(f"prompt of {self.name}", self.prompt, self.prompts)

    def rows(self) -> Iterable[Row]:
        """The rows of its files, with where they stand.

        Raises:
            InputError: a file cannot be parsed at all.
        """
        raise NotImplementedError

    def question(self, row: Row) -> Question | None:
        """What a row asks; None if the benchmark leaves it out.

        Raises:
            InputError: the row is malformed.
        """
        raise NotImplementedError

    def word(self, question: str, **parts: str) -> str:
        """`question` in the chosen prompt."""
        return self.prompts[self.prompt].format(question=question, **parts)

    def found(self, names: str) -> list[Path]:
        """The files that the first of `names` to be there stands for; they are separated by bars, with wildcards."""
        every = (sorted(self.folder.glob(name.strip())) for name in names.split("|"))
        return next((paths for paths in every if paths), [])

    def read(self) -> tuple[list[Question], list[Problem]]:
        """All questions, and the rows that are none.

        Raises:
            SpecError: files are absent.
            InputError: a file cannot be parsed at all.
        """
        absent = [names for names in self.files if not self.found(names)]
        if absent:
            raise SpecError(
                f"{self.name} needs {' and '.join(absent)} in {self.folder}, where it is not: {self.summary}. "
                "mmcompress suites lists what goes where; nothing is downloaded."
            )
        questions: list[Question] = []
        problems: list[Problem] = []
        seen: set[str] = set()
        for row in self.rows():
            try:
                asked = self.question(row)
                if asked is not None:
                    if asked.id in seen:
                        raise InputError(f"id {asked.id} is used twice.")
                    seen.add(asked.id)
                    questions.append(asked)
            except InputError as error:
                problems.append(Problem(row.where, str(error)))
        if not questions:
            raise InputError(f"{self.name}: no question can be read in {self.folder}; {_most_common(problems)}")
        return questions, problems


def _most_common(problems: Sequence[Problem]) -> str:
    if not problems:
        return "its files have no rows."
    ((reason, count),) = Counter(problem.reason for problem in problems).most_common(1)
    return f"{len(problems)} rows are malformed, {count} of them: {reason}"


def draw(questions: Sequence[Question], limit: int | None, seed: int) -> list[Question]:
    """At least `limit` questions, all about the images that `seed` draws, in their order.

    Raises:
        SpecError: `limit` is not positive.
    """
    if limit is None:
        return list(questions)
    if limit < 1:
        raise SpecError(f"limit must be at least 1, got {limit}.")
    sizes = Counter(asked.cluster for asked in questions)
    order = list(sizes)
    random.Random(seed).shuffle(order)
    drawn: set[str] = set()
    count = 0
    for cluster in order:
        if count >= limit:
            break
        drawn.add(cluster)
        count += sizes[cluster]
    return [asked for asked in questions if asked.cluster in drawn]


def fingerprint(questions: Sequence[Question]) -> str:
    """Equal for equal questions in the same order."""
    digest = hashlib.sha256()
    for asked in questions:
        parts = (asked.id, *(picture.name for picture in asked.images), asked.prompt, *asked.answers, *asked.choices)
        digest.update("\0".join(parts).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]


def picture_contents(questions: Iterable[Question]) -> dict[str, str]:
    """The hash of every picture by its name, but of those that are missing or named by their content.

    Bytes are hashed, not sizes and times, for copies of a folder have other times. It costs little: whatever is asked
    about is read anyway.
    """
    pictures = dict.fromkeys(picture for asked in questions for picture in asked.images)
    found = ((picture.name, picture.content) for picture in pictures)
    return {name: content for name, content in found if content is not None and content != name}
