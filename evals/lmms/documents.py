"""Documents of an lmms-eval task as questions, worded as the task words them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lmms_eval.protocol import ChatMessages
from PIL import Image

from mmcompress.errors import InputError, UnsupportedError
from mmcompress.evals.lmms.asking import Messages
from mmcompress.evals.lmms.asking import encode as encode_chats
from mmcompress.evals.suites.base import Picture, Problem, Question


@dataclass(frozen=True)
class DocumentPicture(Picture):
    """A picture that its task reads again when it is needed; the name is that of its pixels."""

    task: Any = field(kw_only=True, repr=False, compare=False)
    document: int = field(kw_only=True, compare=False)
    place: int = field(kw_only=True, compare=False)

    def open(self) -> Image.Image:
        """The picture as RGB."""
        return pictures(_chat(self.task, self.document))[self.place]


@dataclass(frozen=True)
class Document(Question):
    """A question with the chat that asks it, in which images have their places but are left out."""

    number: int = field(kw_only=True)
    chat: Messages = field(kw_only=True, repr=False, compare=False)


def read(name: str, task: Any) -> tuple[list[Question], list[Problem]]:
    """All documents of a loaded task, and those that cannot be asked.

    Raises:
        UnsupportedError: they have videos or sound.
        InputError: not one can be asked.
    """
    questions: list[Question] = []
    problems: list[Problem] = []
    for number in range(len(task.eval_docs)):
        try:
            questions.append(document(name, task, number))
        except InputError as error:
            problems.append(Problem(f"document {number}", str(error)))
    if not questions:
        raise InputError(f"task {name}: no document can be asked; the first problem: {problems[0].reason}")
    return questions, problems


def document(name: str, task: Any, number: int) -> Document:
    """A document as a question.

    Raises:
        UnsupportedError: it has videos or sound.
        InputError: it has no images, or images that are not at hand.
    """
    chat = _chat(task, number)
    _, videos, sounds = chat.extract_media()
    if videos or sounds:
        raise UnsupportedError(f"task {name} has {'videos' if videos else 'sound'}; mmcompress asks about images.")
    shown = [
        DocumentPicture(_pixels(picture), task=task, document=number, place=place)
        for place, picture in enumerate(pictures(chat))
    ]
    if not shown:
        raise InputError("it has no image.")
    turns = [
        {"role": turn["role"], "content": [_without_picture(part) for part in turn["content"]]}
        for turn in chat.to_hf_messages()
    ]
    said = [part["text"] for turn in turns for part in turn["content"] if part["type"] == "text"]
    return Document(
        id=str(number),
        images=tuple(shown),
        prompt="\n".join(said),
        answers=targets(task, number),
        number=number,
        chat=turns,
    )


def targets(task: Any, number: int) -> tuple[str, ...]:
    """The right answers of a document."""
    target = task.doc_to_target(task.eval_docs_no_media[number])
    return tuple(str(one) for one in (target if isinstance(target, list) else [target]))


def encode(model: Any, processor: Any, batch: Sequence[Document], opened: Mapping[Picture, Image.Image]) -> Any:
    """The model's inputs for a batch.

    Raises:
        InputError: the processor refuses a question or a picture, or a question contains what stands for a picture.
    """
    mark = getattr(processor, "image_token", None)
    if mark and any(mark in asked.prompt for asked in batch):
        raise InputError(f"the question contains {mark}, which stands for a picture.")
    images = [[opened[picture] for picture in asked.images] for asked in batch]
    try:
        return encode_chats(model, processor, [asked.chat for asked in batch], images)
    except ValueError as error:
        raise InputError(f"the model's processor cannot encode it: {' '.join(str(error).split())}") from error


def pictures(chat: ChatMessages) -> list[Image.Image]:
    """The images of a chat as RGB.

    Raises:
        InputError: one is none that has been read.
    """
    images, _, _ = chat.extract_media()
    if not all(isinstance(image, Image.Image) for image in images):
        raise InputError("it has an image by its address, which mmcompress does not fetch.")
    return [image.convert("RGB") for image in images]


def _chat(task: Any, number: int) -> ChatMessages:
    return ChatMessages(messages=task.doc_to_messages(task.eval_docs[number]))


def _pixels(picture: Image.Image) -> str:
    """Equal for equal pictures."""
    return hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).hexdigest()[:16]


def _without_picture(part: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in part.items() if name != "image"}
