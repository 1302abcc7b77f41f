"""The CLIP text tower beside a wrapped model: what it reads, what it says, and whom it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hf.families import FAMILIES
from tiny_models import SIDE, save_tiny_model
from tokenizers.processors import TemplateProcessing
from torch.nn.functional import normalize
from transformers import AutoModelForImageTextToText, AutoTokenizer, CLIPConfig, CLIPModel

import mmcompress
from mmcompress.budget import Budget
from mmcompress.errors import SpecError, UnsupportedError
from mmcompress.evals.micro import saving
from mmcompress.evals.micro.vocabulary import SPECIAL_TOKENS, TOKENS
from mmcompress.integrations.hf.text_tower import TextTower, _load
from mmcompress.methods.cdpruner import CDPruner
from mmcompress.types import Selection, VisualItem

WIDTH, IMAGE_TOKENS, LENGTH = 64, 16, 12
SHORT, LONG = "what color is the star ?", "is there a red circle left of the blue square above the green moon ?"


def save_tower(folder: Path, width: int = WIDTH) -> str:
    """A random CLIP whose text side has the models' words under other ids, and room for few of them."""
    words = (*SPECIAL_TOKENS, *reversed(TOKENS[len(SPECIAL_TOKENS) : -1]), "<|endoftext|>")
    begin, end = words.index("<s>"), len(words) - 1
    text = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, initializer_range=0.5)
    special = dict(bos_token_id=begin, eos_token_id=end, pad_token_id=words.index("<pad>"))
    vision = dict(hidden_size=width, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    config = CLIPConfig(
        text_config=dict(vocab_size=len(words), max_position_embeddings=LENGTH, projection_dim=8, **text, **special),
        vision_config=dict(image_size=SIDE, patch_size=14, projection_dim=8, **vision),
        projection_dim=8,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        CLIPModel(config).save_pretrained(folder)
    tokenizer = saving.build_tokenizer(words)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A <|endoftext|>", special_tokens=[("<s>", begin), ("<|endoftext|>", end)]
    )
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("llava")
    save_tiny_model("llava", folder)
    return AutoModelForImageTextToText.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tower(tmp_path_factory.mktemp("tower"))


def prompt_ids(model: Any, question: str) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    return tokenizer(f"<s> USER: {'<image> ' * IMAGE_TOKENS}{question} ASSISTANT:").input_ids


def prompts(model: Any, *questions: str) -> dict[str, torch.Tensor]:
    """Left-padded prompts, each with a picture of its own."""
    rows = [prompt_ids(model, question) for question in questions]
    longest = max(map(len, rows))
    padding = [[TOKENS.index("<pad>")] * (longest - len(row)) for row in rows]
    mask = [[0] * len(pad) + [1] * len(row) for pad, row in zip(padding, rows, strict=True)]
    pixels = torch.randn(len(rows), 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    return {
        "input_ids": torch.tensor([pad + row for pad, row in zip(padding, rows, strict=True)]),
        "attention_mask": torch.tensor(mask),
        "pixel_values": pixels,
    }


@torch.no_grad()
def cosines(folder: str, model: Any, pixels: torch.Tensor, question: str) -> torch.Tensor:
    """`[chunks, patches]` with the whole CLIP, the question in pieces by hand."""
    clip = CLIPModel.from_pretrained(folder).eval()
    hidden = model.model.vision_tower(pixels[None], output_hidden_states=True).hidden_states[-2][0, 1:]
    seen = clip.visual_projection(clip.vision_model.post_layernorm(hidden))
    begin, *words, end = AutoTokenizer.from_pretrained(folder)(question).input_ids
    pieces = [words[at : at + LENGTH - 2] for at in range(0, len(words), LENGTH - 2)]
    texts = [clip.text_model(input_ids=torch.tensor([[begin, *piece, end]])).pooler_output for piece in pieces]
    return normalize(clip.text_projection(torch.cat(texts)), dim=-1) @ normalize(seen, dim=-1).T


def test_items_tell_how_relevant_each_token_is(llava: Any, tower: str, monkeypatch: pytest.MonkeyPatch) -> None:
    items: list[VisualItem] = []
    compress = CDPruner.compress

    def spy(self: CDPruner, given: Sequence[VisualItem], *args: Any) -> list[Selection]:
        items.extend(given)
        return compress(self, given, *args)

    monkeypatch.setattr(CDPruner, "compress", spy)
    inputs = prompts(llava, SHORT, LONG)
    with mmcompress.wrap(llava, "cdpruner", text_tower=tower, keep=5) as handle:
        llava.generate(**inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False)
        selections = [trace.selection for trace in handle.trace]
    expected = [
        cosines(tower, llava, pixels, question)
        for pixels, question in zip(inputs["pixel_values"], (SHORT, LONG), strict=True)
    ]
    assert [len(chunks) for chunks in expected] == [1, 2]
    for item, wanted, selection in zip(items, expected, selections, strict=True):
        assert item.relevance is not None
        torch.testing.assert_close(item.relevance, wanted, rtol=1e-5, atol=1e-6)
        assert wanted.std() > 0.01, "a tower that says the same of all tokens shows nothing"
        method = CDPruner(text_tower=tower)
        alone = compress(method, [item], Budget(5), method.needs(handle.encoder))[0]
        assert selection.anchor.tolist() == alone.anchor.tolist()


def test_the_question_decides_what_stays(llava: Any, tower: str) -> None:
    kept = set()
    for question in (SHORT, LONG, "how many red shapes are there ?"):
        with mmcompress.wrap(llava, "cdpruner", text_tower=tower, keep=3) as handle, torch.no_grad():
            llava(**prompts(llava, question))
            kept.add(tuple(handle.trace[0].selection.anchor.tolist()))
    assert len(kept) > 1


def test_nothing_but_the_question_is_read(llava: Any, tower: str) -> None:
    with mmcompress.wrap(llava, "cdpruner", text_tower=tower, keep=3) as handle:
        reader = handle._door.remover._text_tower  # type: ignore[union-attr]
    assert isinstance(reader, TextTower)
    image = TOKENS.index("<image>")

    def ids(text: str) -> torch.Tensor:
        return torch.tensor([token for token in prompt_ids(llava, text) if token != image])

    assert reader.question(ids(SHORT)) == SHORT
    assert reader.question(ids("")) == ""
    assert reader.question(ids("ASSISTANT: what ? USER:")) == "ASSISTANT: what ? USER:"
    plain = AutoTokenizer.from_pretrained(llava.name_or_path)(SHORT, return_tensors="pt").input_ids[0]
    assert reader.question(plain) == SHORT
    reader._before = reader._after = []
    assert reader.question(ids(SHORT)) == f"USER: {SHORT} ASSISTANT:"


def test_embeddings_alone_cannot_be_read(llava: Any, tower: str) -> None:
    inputs = prompts(llava, SHORT)
    embeds = llava.get_input_embeddings()(inputs.pop("input_ids"))
    with (
        mmcompress.wrap(llava, "cdpruner", text_tower=tower, keep=3),
        pytest.raises(UnsupportedError, match="token ids; pass input_ids, not inputs_embeds"),
        torch.no_grad(),
    ):
        llava(inputs_embeds=embeds, **inputs)


def test_towers_that_do_not_fit_are_refused(llava: Any, tower: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    wide = save_tower(tmp_path / "wide", 96)
    for folder, problem in (
        (str(tmp_path / "nowhere"), "there is no such folder"),
        (llava.name_or_path, "holds a model of type 'llava'; a 'clip' is needed"),
        (str(broken), "cannot be loaded"),
        (wide, "reads features of width 96, but the vision encoder's are 64 wide"),
    ):
        with pytest.raises(SpecError, match=problem):
            mmcompress.wrap(llava, "cdpruner", text_tower=folder, keep=3)
    mmcompress.wrap(llava, "cdpruner", text_tower=tower, keep=3).unwrap()  # a refusal leaves nothing behind


def test_a_tower_without_all_its_weights_is_refused(tower: str, tmp_path: Path) -> None:
    clip = CLIPModel.from_pretrained(tower)
    weights = {name: value for name, value in clip.state_dict().items() if name != "visual_projection.weight"}
    clip.save_pretrained(tmp_path, state_dict=weights)
    AutoTokenizer.from_pretrained(tower).save_pretrained(tmp_path)
    with pytest.raises(SpecError, match=r"lacks weights: visual_projection.weight"):
        _load(str(tmp_path))


def test_models_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    for family, problem in (
        ("qwen2_5_vl", "sees through 'qwen2_5_vl[a-z_]*', and only the features of a CLIP"),
        ("llava", "decoded by the model's own tokenizer, which cannot be loaded from ''"),
    ):
        model = FAMILIES[family].build("sdpa")
        tower = save_tower(tmp_path, model.config.vision_config.hidden_size)
        with pytest.raises(UnsupportedError, match=problem):
            mmcompress.wrap(model, "cdpruner", text_tower=tower, keep=3)
