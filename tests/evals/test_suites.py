"""Readers of official files: what is asked, what is right, and what happens to rows that are broken."""

from __future__ import annotations

import base64
import io
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from mmcompress.errors import InputError, SpecError, UnsupportedError
from mmcompress.evals.suites import SUITES, base, configure
from mmcompress.evals.suites.base import Picture, Question, draw, fingerprint, picture_contents, picture_in

DATA = Path(__file__).parent / "suites"
ANSWER = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


def read(text: str, data: Path = DATA) -> list[Question]:
    questions, problems = configure(text, data).read()
    assert not problems
    return questions


def png(colour: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(file, "PNG")
    return file.getvalue()


def broken(suite: str, tmp_path: Path, file: str, text: str) -> list[tuple[str, str]]:
    """The problems of a suite whose `file` holds `text`."""
    folder = tmp_path / suite
    shutil.copytree(DATA / suite, folder)
    (folder / file).write_text(text)
    return [(problem.where, problem.reason) for problem in configure(suite, tmp_path).read()[1]]


@pytest.mark.parametrize("name", SUITES)
def test_every_suite_reads_its_files_and_opens_its_pictures(name: str) -> None:
    questions = read(name)
    assert len({asked.id for asked in questions}) == len(questions)
    for asked in questions[:5]:
        assert asked.images and asked.answers and asked.prompt
        assert all(picture.open().mode == "RGB" for picture in asked.images)
        assert SUITES[name].scorer.grade(asked.answers[0], asked).valid


@pytest.mark.parametrize("name", SUITES)
def test_the_right_answer_scores(name: str) -> None:
    suite = SUITES[name]
    assert max(suite.scorer.grade(answer, asked).score for asked in read(name) for answer in asked.answers) == 1


def test_vqav2_joins_questions_and_annotations() -> None:
    red, rain, dogs = read("vqav2")
    assert (red.id, red.prompt, red.category) == ("42000", "What color is the square?" + ANSWER, "other")
    assert red.images[0].name == "COCO_val2014_000000000042.jpg" and rain.cluster == red.cluster != dogs.cluster
    assert dogs.answers.count("2") == 7 and dogs.answers.count("two") == 2


def test_prompts_are_chosen_by_name() -> None:
    assert read("gqa")[0].prompt == "Is it overcast?" + ANSWER
    assert read("gqa(prompt=qwen)")[0].prompt == "Is it overcast? Answer:"
    assert read("gqa(prompt=plain)")[0].prompt == "Is it overcast?"
    assert "Unanswerable" in read("vizwiz")[0].prompt
    assert read("mme")[0].prompt == "Is there a red square?" + ANSWER
    assert read("mme(prompt=official)")[0].prompt == "Is there a red square? Please answer yes or no."
    with pytest.raises(SpecError, match="Did you mean 'plain'"):
        configure("gqa(prompt=plan)", DATA)


def test_pope_keeps_its_splits_apart() -> None:
    questions = read("pope")
    assert [asked.category for asked in questions] == [s for s in ("random", "popular", "adversarial") for _ in "12"]
    assert {asked.answers for asked in questions} == {("yes",), ("no",)}
    assert len({asked.cluster for asked in questions}) == 1


def test_scienceqa_asks_test_questions_with_a_picture() -> None:
    (asked,) = read("scienceqa")
    assert asked.prompt == (
        "Context: Figure: bear.\nWhich animal's skin is adapted for survival in cold places?\n"
        "A. polar bear\nB. fantastic leaf-tailed gecko" + LETTER
    )
    assert asked.answers == ("B",) and asked.category == "natural science"


def test_tables_share_pictures_and_leave_out_shifted_rows() -> None:
    first, second = read("mmbench")
    assert (first.id, second.id) == ("241", "252") and first.cluster == second.cluster
    assert first.prompt.startswith("The passage\nhas two lines.\nIdentify") and first.choices == (
        "Does it bend?",
        "Does it burn?",
    )
    assert second.images[0].open().size == (8, 6)
    twice = read("mme")
    assert [asked.cluster for asked in twice] == ["color/1.png"] * 2 + ["numerical_calculation/2.png"] * 2


def test_mmmu_has_several_pictures_and_open_questions() -> None:
    differ, area = read("mmmu")
    assert len(differ.images) == 2 and differ.images[0].name != differ.images[1].name
    assert area.choices == () and area.prompt.endswith(ANSWER) and area.answers == ("12.5",)


@pytest.mark.parametrize("name", ["docvqa", "infovqa", "chartqa", "ocrbench"])
def test_parquet_and_json_ask_alike(name: str) -> None:
    listed = {asked.prompt: asked.answers for asked in read(name)}
    for asked in read(name, DATA / "parquet"):
        assert set(asked.answers) <= set(listed[asked.prompt])
        assert asked.images[0].open().size == (8, 6)


def test_parquet_pictures_are_known_by_their_content(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    colours = ("red", "blue", "red")
    rows = [{"question": "What?", "answer": of, "image": {"bytes": png(of), "path": "image.png"}} for of in colours]
    (tmp_path / "chartqa").mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "chartqa" / "test.parquet")
    questions = read("chartqa", tmp_path)
    opened = {picture: picture.open() for asked in questions for picture in asked.images}
    assert [opened[asked.images[0]].getpixel((0, 0)) for asked in questions] == [(255, 0, 0), (0, 0, 255), (255, 0, 0)]
    assert questions[0].cluster == questions[2].cluster != questions[1].cluster


def test_parquet_without_pyarrow_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UnsupportedError, match=r"mmcompress\[evals\]"):
        read("docvqa", DATA / "parquet")


def test_own_questions() -> None:
    one, two = read("jsonl")
    assert (one.id, one.answers, one.category) == ("0", ("red", "crimson"), "")
    assert (two.id, two.answers, two.category) == ("two", ("second",), "pairs")
    assert [picture.name for picture in two.images] == ["pictures/a.png", "pictures/b.png"]
    assert read(f"jsonl(folder={DATA}/jsonl)", Path("elsewhere")) == [one, two]


# --- what is wrong


def test_unknown_suites_and_options() -> None:
    with pytest.raises(SpecError, match="Did you mean 'textvqa'"):
        configure("textvq", DATA)
    with pytest.raises(SpecError, match="prompt and folder, not split"):
        configure("pope(split=random)", DATA)


def test_absent_files_say_what_goes_where(tmp_path: Path) -> None:
    with pytest.raises(
        SpecError, match=r"testdev_balanced_questions\.json and images in .*gqa, .*nothing is downloaded"
    ):
        configure("gqa", tmp_path).read()


def test_malformed_lines_are_reported_with_file_and_line(tmp_path: Path) -> None:
    good = '{"image": "pictures/a.png", "question": "What?", "answers": "red", "id": "x"}'
    lines = [
        good,
        "{nonsense",
        '{"image": "pictures/a.png", "answers": "red"}',
        "[1]",
        good,
        good.replace('"x"', "true"),
    ]
    assert broken("jsonl", tmp_path, "questions.jsonl", "\n".join(lines)) == [
        ("questions.jsonl, line 2", "the line is no JSON object."),
        ("questions.jsonl, line 3", "'question' is missing."),
        ("questions.jsonl, line 4", "the line is no JSON object."),
        ("questions.jsonl, line 5", "id x is used twice."),
        ("questions.jsonl, line 6", "'id' is true or false, not a text."),
    ]


def test_malformed_entries_of_json_too(tmp_path: Path) -> None:
    rows = [
        {"question": "What?", "image_id": "003a8ae2ef43b901", "question_id": 1, "answers": ["red"]},
        {"question": "What?", "image_id": "003a8ae2ef43b901", "question_id": 2, "answers": [1.5]},
        7,
        {"question": ["What?"], "image_id": "003a8ae2ef43b901", "question_id": 3, "answers": ["red"]},
        {"question": "What?", "image_id": "../../secret", "question_id": 4, "answers": ["red"]},
    ]
    found = broken("textvqa", tmp_path, "TextVQA_0.5.1_val.json", json.dumps({"version": 1, "data": rows}, indent=0))
    assert [where.split(", ")[2] for where, _ in found] == ["entry 1", "entry 2", "entry 3", "entry 4"]
    lines = json.dumps({"version": 1, "data": rows}, indent=0).splitlines()
    assert found[1][0] == f"TextVQA_0.5.1_val.json, line {lines.index('7,') + 1}, entry 2"
    reasons = [reason for _, reason in found]
    assert "not a list of texts" in reasons[0] and "no object" in reasons[1] and "not a text" in reasons[2]
    assert "leads out of" in reasons[3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"data": [1, 2', r"TextVQA_0\.5\.1_val\.json, line 1: no valid JSON"),
        ('{"data":\n [1,\n 2 3]}', r"line 3: no valid JSON"),
        ('{"rows": []}', "there is no 'data' in it"),
        ("7", "a list or an object was expected"),
        ("", "a list or an object was expected"),
        ('{"data": []}', "no question can be read in .*its files have no rows"),
        ('{"data": [1, 2, {}]}', "3 rows are malformed"),
    ],
)
def test_files_that_are_none(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        broken("textvqa", tmp_path, "TextVQA_0.5.1_val.json", text)


def test_tables_report_rows(tmp_path: Path) -> None:
    image = base64.b64encode(b"x" * 90).decode()
    rows = [
        "index\timage\tquestion\tA\tB\tC\tD\tanswer\tcategory",
        f"0\t{image}\tWhat?\tx\ty\t\t\tA\tc",
        f"1\t{image}\tWhat?\tx\ty\t\t\tC\tc",
        f"2\t{image[:-1]}!\tWhat?\tx\ty\t\t\tA\tc",
        "3\t77\tWhat?\tx\ty\t\t\tA\tc",
        "4\ttoo few cells",
        f'5\t{image}\t"What\nnow?"\tx\ty\t\t\tA\tc',
        f"6\t{image}\tWhat?\tx\ty\t\t\t\tc",
    ]
    found = broken("seed", tmp_path, "SEEDBench_IMG.tsv", "\n".join(rows))
    assert [where.split(", ")[1].split()[1] for where, _ in found] == ["3", "4", "5", "6", "9"]
    reasons = [reason for _, reason in found]
    assert "not the letter of one of 2 choices" in reasons[0] and "no base64" in reasons[1]
    assert "'image' is missing" in reasons[2] and "'answer' is missing" in reasons[4]
    assert reasons[3] == "it has not one cell for each column."


def test_a_table_without_a_column_is_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"SEEDBench_IMG\.tsv has no column 'answer', 'image'"):
        broken("seed", tmp_path, "SEEDBench_IMG.tsv", "index\tquestion\tA\tB\n0\tWhat?\tx\ty\n")


def test_a_file_of_another_encoding_is_named(tmp_path: Path) -> None:
    (folder := tmp_path / "jsonl").mkdir()
    (folder / "questions.jsonl").write_bytes('{"question": "Größe?"}'.encode("latin-1"))
    with pytest.raises(InputError, match="not UTF-8"):
        configure("jsonl", tmp_path).read()


# --- pictures


@pytest.mark.parametrize("name", ["../outside.png", "/etc/hostname", "link.png", "a/../../outside.png", "nul\0.png"])
def test_pictures_stay_in_their_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    (tmp_path / "outside.png").write_bytes(b"")
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    with pytest.raises(InputError, match="leads out of"):
        picture_in(folder, name)


def test_the_folder_of_pictures_may_be_a_link(tmp_path: Path) -> None:
    shutil.copytree(DATA / "gqa", tmp_path / "gqa")
    (tmp_path / "gqa" / "images").rename(tmp_path / "coco")
    (tmp_path / "gqa" / "images").symlink_to(tmp_path / "coco")
    assert read("gqa", tmp_path)[0].images[0].open().size == (8, 6)


def test_pictures_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    Image.new("RGB", (20, 20)).save(file, "PNG")
    monkeypatch.setattr(base, "MAX_PIXELS", 399)
    with pytest.raises(InputError, match="20x20; the most is 399 px"):
        Picture("big", data=file.getvalue()).open()
    monkeypatch.setattr(base, "MAX_PIXELS", 400)
    assert Picture("big", data=file.getvalue()).open().size == (20, 20)
    monkeypatch.setattr(base, "MAX_BYTES", 10)
    with pytest.raises(InputError, match="bytes; the most is 10"):
        Picture("big", data=file.getvalue()).open()


@pytest.mark.parametrize("data", [b"", b"no picture", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_broken_pictures_are_named(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="image torn cannot be read"):
        Picture("torn", data=data).open()
    with pytest.raises(InputError, match=r"image no\.png does not exist"):
        picture_in(tmp_path, "no.png").open()


# --- drawing questions


def test_limits_draw_whole_images_by_seed() -> None:
    questions = read("microvqa")
    drawn = draw(questions, 50, seed=1)
    assert 50 <= len(drawn) < 65 and drawn == draw(questions, 50, seed=1) != draw(questions, 50, seed=2)
    images = {asked.cluster for asked in drawn}
    assert drawn == [asked for asked in questions if asked.cluster in images]
    assert draw(questions, None, 0) == draw(questions, 10**6, 0) == questions
    with pytest.raises(SpecError, match="at least 1"):
        draw(questions, 0, 0)


def test_fingerprints_tell_questions_apart() -> None:
    questions = read("gqa")
    assert fingerprint(questions) == fingerprint(read("gqa"))
    assert len({fingerprint(read(text)) for text in ("gqa", "gqa(prompt=qwen)", "jsonl")}) == 3
    assert fingerprint(questions[:1]) != fingerprint(questions)


def test_pictures_are_told_apart_by_their_bytes(tmp_path: Path) -> None:
    for name, colour in (("a", "red"), ("b", "red"), ("c", "blue")):
        (tmp_path / name).write_bytes(png(colour))
    (tmp_path / "folder").mkdir()
    pictures = [picture_in(tmp_path, name) for name in ("a", "b", "c", "gone", "folder")]
    pictures += [Picture("held", data=png("blue")), Picture.held(png("red")), Picture("nothing")]
    found = picture_contents([Question("0", tuple(pictures), "?", ("yes",))])
    assert found.keys() == {"a", "b", "c", "held"}  # others have nothing to hash, or are named by it
    assert found["a"] == found["b"] == pictures[6].name != found["c"] == found["held"]
