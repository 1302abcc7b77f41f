"""Published Matryoshka checkpoints, in miniature: their names, their answers, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import mmcompress
from mmcompress import InputError, SpecError, UnsupportedError
from mmcompress.integrations.hf.checkpoints import FORMATS
from mmcompress.projectors.m3 import M3
from mmcompress.projectors.mqt import MQT
from mmcompress.projectors.tokenflex import TokenFLEX
from mmcompress.projectors.tokenpacker import TokenPacker

MANIFESTS = Path(__file__).parents[1] / "golden" / "learned" / "manifests"
SIDE, PATCH, HIDDEN = 4, 14, 32
WORDS = ("<unk>", "<s>", "</s>", "USER:", "ASSISTANT:", "what", "is", "this", "?", *"abcdefgh")
QUESTION = "<s> USER: <image> what is this ? ASSISTANT:"
Weights = dict[str, Tensor]


def text_settings(kind: str, vocabulary: int = len(WORDS)) -> dict[str, Any]:
    return dict(
        model_type=kind,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=vocabulary,
        max_position_embeddings=512,
        rms_norm_eps=1e-6,
        rope_theta=5000.0,
        bos_token_id=1,
        eos_token_id=2,
    )


def tower(layers: int) -> transformers.CLIPVisionModel:
    return transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=layers,
            num_attention_heads=1,
            image_size=SIDE * PATCH,
            patch_size=PATCH,
        )
    )


def names(module: torch.nn.Module, prefix: str) -> Weights:
    return {prefix + name: value.detach().clone() for name, value in module.state_dict().items()}


def loud(module: torch.nn.Module) -> torch.nn.Module:
    """Weights large enough for an answer to depend on all of them."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1 and parameter.requires_grad:
                parameter.normal_(std=0.3)
    return module.eval()


def llm(kind: str = "llama", vocabulary: int = len(WORDS)) -> PreTrainedModel:
    settings = {key: value for key, value in text_settings(kind, vocabulary).items() if key != "model_type"}
    model = {"llama": transformers.LlamaForCausalLM, "qwen2": transformers.Qwen2ForCausalLM}[kind]
    config = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config}[kind]
    return loud(model(config(**settings)))  # type: ignore[return-value]


def published(folder: Path, weights: Weights, config: dict[str, Any], words: tuple[str, ...] = WORDS) -> Path:
    """A checkpoint folder as authors publish it."""
    folder.mkdir(exist_ok=True)
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(config))
    vocabulary = Tokenizer(WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    vocabulary.pre_tokenizer = WhitespaceSplit()
    special = dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary, **special)
    tokenizer.add_tokens([word for word in words if word.startswith("<")], special_tokens=True)
    tokenizer.save_pretrained(folder)
    return folder


def llava(folder: Path, projector: Weights, *, layers: int = 3, own_tower: bool = True, **config: Any) -> Path:
    """A checkpoint of the LLaVA code base."""
    torch.manual_seed(0)
    vision = loud(tower(layers))
    language = llm()
    weights = {**names(language.model, "model."), "lm_head.weight": language.lm_head.weight.detach().clone()}  # type: ignore[union-attr]
    weights |= projector
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    if own_tower:
        weights |= names(vision, "model.vision_tower.vision_tower.vision_model.")
        weights["model.vision_tower.vision_tower.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    else:
        vision.save_pretrained(folder / "tower")
    settings = {**text_settings("llava_llama"), "architectures": ["LlavaLlamaForCausalLM"], **config}
    return published(folder, weights, {"image_aspect_ratio": "pad", "mm_vision_tower": "none/such", **settings})


def mqt(folder: Path, **config: Any) -> Path:
    torch.manual_seed(1)
    weights = names(loud(MQT(2, HIDDEN, 1, 64)), "model.query_abstractor.")
    weights["model.query_abstractor.pos_embed"] = weights["model.query_abstractor.pos_embed"].half()
    return llava(folder, weights, num_visual_tokens="second_stage", **config)


def tokenpacker(folder: Path, **config: Any) -> Path:
    torch.manual_seed(1)
    packer = names(loud(TokenPacker(2, SIDE, 64, HIDDEN, 1)), "model.mm_projector.")
    folder.mkdir(exist_ok=True)
    return llava(folder, packer, **{"layers": 24, "own_tower": False, "scale_factor": 2, **config})


def m3(folder: Path, **config: Any) -> Path:
    torch.manual_seed(1)
    mlp = loud(torch.nn.Sequential(torch.nn.Linear(64, HIDDEN), torch.nn.GELU(), torch.nn.Linear(HIDDEN, HIDDEN)))
    return llava(folder, names(mlp, "model.mm_projector."), **config)


def m3_next(folder: Path) -> Path:
    pinpoints = [[56, 112], [112, 56], [112, 112]]
    path = m3(folder, image_grid_pinpoints=pinpoints, image_aspect_ratio="anyres")
    weights = torch.load(path / "pytorch_model.bin", weights_only=True)
    torch.save({**weights, "model.image_newline": torch.randn(HIDDEN)}, path / "pytorch_model.bin")
    return path


def tokenflex(folder: Path, **config: Any) -> Path:
    torch.manual_seed(2)
    words = (*WORDS, "<img>", "</img>", "<IMG_CONTEXT>")
    settings = dict(hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    settings |= dict(image_size=SIDE * PATCH, patch_size=PATCH)
    vision = loud(transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**settings)))
    language = llm("qwen2", len(words))
    weights = names(language.model, "language_model.model.")  # type: ignore[arg-type]
    weights["language_model.lm_head.weight"] = language.lm_head.weight.detach().clone()  # type: ignore[union-attr]
    weights |= names(vision, "vision_model.vision_model.")
    weights |= names(loud(TokenFLEX(SIDE, 48, HIDDEN)), "projector.")
    llm_config = {**text_settings("qwen2", len(words)), "architectures": ["Qwen2ForCausalLM"]}
    tiles = dict(dynamic_image_size=True, min_dynamic_patch=1, max_dynamic_patch=4, force_image_size=SIDE * PATCH)
    return published(
        folder,
        weights,
        {
            "model_type": "ristretto",
            "architectures": ["RistrettoModel"],
            "llm_config": llm_config,
            "vision_config": {"model_type": "siglip_vision_model", **settings},
            "select_layer": -1,
            **tiles,
            **config,
        },
        words,
    )


BUILDERS: dict[str, Callable[[Path], Path]] = {"mqt": mqt, "tokenpacker": tokenpacker, "tokenflex": tokenflex}


def load(path: Path, **options: Any) -> Any:
    if (path / "tower").is_dir():
        options.setdefault("vision_tower", path / "tower")
    return mmcompress.load(path, **options)


def ask(loaded: Any, width: int = 120, height: int = 50) -> Any:
    noise = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    question = QUESTION.replace("<image>", f" {loaded.processor.image_token} ")
    picture = Image.fromarray(noise.numpy())
    return loaded.processor(images=[picture], text=[question], return_tensors="pt")


def by_hand(path: Path, loaded: Any, inputs: Any, project: Callable[[Any, Tensor], Tensor]) -> Tensor:
    """Logits of the published parts, put together one after the other."""
    tokens = project(loaded.model.model.vision_tower, inputs["pixel_values"]).flatten(0, 1)
    ids = inputs["input_ids"][0]
    embeds = loaded.model.get_input_embeddings()(ids).clone()
    embeds[ids == loaded.processor.image_token_id] = tokens
    hidden = loaded.model.model.language_model(inputs_embeds=embeds[None]).last_hidden_state
    return loaded.model.lm_head(hidden)


def stored(path: Path, module: torch.nn.Module, prefix: str) -> torch.nn.Module:
    weights = torch.load(path / "pytorch_model.bin", weights_only=True)
    own = {name.removeprefix(prefix): value.float() for name, value in weights.items() if name.startswith(prefix)}
    module.load_state_dict(own)
    return module.eval()


def assert_answers(path: Path, loaded: Any, budgets: dict[int, int], project: Any) -> None:
    for budget, count in budgets.items():
        with loaded.set(keep=budget), torch.no_grad():
            inputs = ask(loaded)
            assert int((inputs["input_ids"] == loaded.processor.image_token_id).sum()) == count
            expected = by_hand(path, loaded, inputs, partial(project, budget=budget))
            torch.testing.assert_close(loaded.model(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
            answer = loaded.model.generate(**inputs, max_new_tokens=3, do_sample=False)
            assert not (answer[:, inputs["input_ids"].shape[1] :] == loaded.processor.image_token_id).any()


def test_mqt(tmp_path: Path) -> None:
    path = mqt(tmp_path / "mqt")
    module = stored(path, MQT(2, HIDDEN, 1, 64), "model.query_abstractor.")

    def project(vision: Any, pixels: Tensor, budget: int) -> Tensor:
        states = vision(pixels, output_hidden_states=True).hidden_states
        return module(states[-2][:, 1:], budget)

    loaded = load(path)
    assert loaded.keep == 4 and loaded.budgets() == range(1, 5)
    assert loaded.tokens_for((40, 60), 3) == 3
    assert_answers(path, loaded, {1: 1, 3: 3, 4: 4}, project)


def test_the_llm_is_the_published_one(tmp_path: Path) -> None:
    path = m3(tmp_path / "m3")
    loaded = load(path)
    settings = {key: value for key, value in text_settings("llama").items() if key != "model_type"}
    original = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    weights = torch.load(path / "pytorch_model.bin", weights_only=True)
    original.load_state_dict({name: weights[name] for name in original.state_dict()})
    ids = torch.tensor([[1, 5, 9, 12, 3, 7]])
    with torch.no_grad():
        logits = loaded.model(input_ids=ids).logits
        torch.testing.assert_close(logits[..., : len(WORDS)], original(input_ids=ids).logits)
    assert not logits[..., len(WORDS) :].any()


def test_tokenpacker(tmp_path: Path) -> None:
    path = tokenpacker(tmp_path / "tokenpacker")
    module: Any = stored(path, TokenPacker(2, SIDE, 64, HIDDEN, 1), "model.mm_projector.")

    def project(vision: Any, pixels: Tensor, budget: int) -> Tensor:
        states = [state[:, 1:] for state in vision(pixels, output_hidden_states=True).hidden_states]
        return module.pack(states[-2], torch.cat([states[layer] for layer in (12, 16, 22, 23)], dim=-1))

    loaded = load(path)
    assert loaded.budgets() == (4,)
    assert_answers(path, loaded, {4: 4}, project)
    with pytest.raises(SpecError, match="TokenPacker has no budget 2: its 4 tokens are fixed"):
        loaded.set(keep=2)


@pytest.mark.parametrize(("width", "height"), [(50, 50), (170, 100), (50, 200)])
def test_tokenpacker_hd(tmp_path: Path, width: int, height: int) -> None:
    words = (*WORDS, ",")  # there is no newline, as in Llama's vocabulary
    path = tokenpacker(tmp_path / "tokenpacker", vocab_size=len(words))
    published(path, extended(path), json.loads((path / "config.json").read_text()), words)
    loaded = load(path, tiles=9)
    inputs = ask(loaded, width, height)
    rows, columns = loaded.dial.grid((height, width))
    tiles = rows * columns + (rows * columns > 1)
    assert inputs["pixel_values"].shape == (tiles, 3, 56, 56)
    ids = inputs["input_ids"][0]
    image, comma = loaded.processor.image_token_id, len(WORDS)
    first, last = (ids == image).nonzero()[[0, -1], 0].tolist()
    sequence = ids[first : last + 2].tolist()
    assert len(sequence) == loaded.tokens_for((height, width), 4)
    row = [*([*[image] * 4, comma] * columns)[:-1], 0]
    assert sequence == row * rows + ([*[image] * 4, 0] if rows * columns > 1 else [])
    assert int(ids.max()) <= image
    module: Any = stored(path, TokenPacker(2, SIDE, 64, HIDDEN, 1), "model.mm_projector.")

    def project(vision: Any, pixels: Tensor) -> Tensor:
        states = [state[:, 1:] for state in vision(pixels, output_hidden_states=True).hidden_states]
        return module.pack(states[-2], torch.cat([states[layer] for layer in (12, 16, 22, 23)], dim=-1))

    with torch.no_grad():
        expected = by_hand(path, loaded, inputs, project)
        torch.testing.assert_close(loaded.model(**inputs).logits, expected, rtol=1e-4, atol=1e-5)


def extended(path: Path) -> Weights:
    """Weights with one more row for a word."""
    weights = torch.load(path / "pytorch_model.bin", weights_only=True)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = torch.cat([weights[name], weights[name][:1]])
    return weights


def test_tiles_are_of_tokenpacker_alone(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="tiles= is for TokenPacker-HD"):
        load(mqt(tmp_path / "mqt"), tiles=9)
    with pytest.raises(SpecError, match="tiles=10 must be one of 9, 16, 25"):
        load(tokenpacker(tmp_path / "tokenpacker"), tiles=10)


def test_tokenflex(tmp_path: Path) -> None:
    path = tokenflex(tmp_path / "tokenflex")
    module = stored(path, TokenFLEX(SIDE, 48, HIDDEN), "projector.")
    tower = transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(**json.loads((path / "config.json").read_text())["vision_config"])
    )
    tower = stored(path, tower, "vision_model.vision_model.")  # type: ignore[assignment]

    def project(vision: Any, pixels: Tensor, budget: int) -> Tensor:
        return module(tower(pixels).last_hidden_state, budget)

    loaded = load(path)
    assert loaded.budgets() == (1, 4, 9, 16)
    tiles = len(ask(loaded)["pixel_values"])
    assert tiles > 1
    assert [loaded.tokens_for((50, 120), budget) for budget in (1, 16)] == [tiles, tiles * 16]
    with pytest.raises(SpecError, match="TokenFLEX has no budget 5"):
        loaded.tokens_for((50, 120), 5)
    assert load(tokenflex(tmp_path / "whole", dynamic_image_size=False)).tokens_for((50, 120), 9) == 9
    with pytest.raises(UnsupportedError, match="use_thumbnail=false"):
        load(tokenflex(tmp_path / "bare", use_thumbnail=False))
    assert_answers(path, loaded, {budget: tiles * budget for budget in (1, 4, 9, 16)}, project)


def test_m3_is_a_plain_model_whose_dial_is_a_method(tmp_path: Path) -> None:
    loaded = load(m3(tmp_path / "m3"))
    assert type(loaded.model) is transformers.LlavaForConditionalGeneration
    assert loaded.budgets() == (1, 4, 16) and loaded.tokens_for((40, 60), 4) == 4
    weights = torch.load(tmp_path / "m3" / "pytorch_model.bin", weights_only=True)
    own = loaded.model.state_dict()
    torch.testing.assert_close(
        own["model.multi_modal_projector.linear_2.weight"], weights["model.mm_projector.2.weight"]
    )
    assert len(loaded.model.get_input_embeddings().weight) == len(WORDS) + 1
    inputs = ask(loaded)
    with mmcompress.wrap(loaded.model, "m3", keep=4) as handle, torch.no_grad():
        loaded.model.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert handle.stats is not None and handle.stats.kept == 4
    with pytest.raises(UnsupportedError, match="the dial of this model is a method"):
        loaded.set(keep=4)
    with pytest.raises(SpecError, match="the dial of this model is a method"):
        load(tmp_path / "m3", keep=4)


def test_m3_next_counts_before_the_forward_pass(tmp_path: Path) -> None:
    loaded = load(m3_next(tmp_path / "m3"))
    assert type(loaded.model) is transformers.LlavaNextForConditionalGeneration
    inputs = ask(loaded, 100, 50)
    full = int((inputs["input_ids"] == loaded.processor.image_token_id).sum())
    assert full == loaded.tokens_for((50, 100), 16)
    for keep in (1, 4):
        with mmcompress.wrap(loaded.model, "m3", keep=keep) as handle, torch.no_grad():
            loaded.model.generate(**inputs, max_new_tokens=2, do_sample=False)
            assert handle.stats is not None and handle.stats.kept == loaded.tokens_for((50, 100), keep)


def test_a_batch_of_several_images_and_none(tmp_path: Path) -> None:
    loaded = load(mqt(tmp_path / "mqt"), keep=2)
    picture = Image.new("RGB", (30, 70), "red")
    texts = [QUESTION, QUESTION.replace("<image>", "<image> a <image>"), QUESTION.replace("<image>", "b")]
    inputs = loaded.processor(images=[picture] * 3, text=texts, padding=True, return_tensors="pt")
    together = loaded.model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    for row, text in enumerate(texts):
        images = [picture] * text.count("<image>") or None
        alone = loaded.processor(images=images, text=[text], return_tensors="pt")
        answer = loaded.model.generate(**alone, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        assert together[row, -4:].tolist() == answer[0, -4:].tolist()


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_other_stages_go_on_where_the_dial_ends(tmp_path: Path, build: Any) -> None:
    loaded = load(build(tmp_path / "model"))
    inputs = ask(loaded)
    options: Any = dict(max_new_tokens=3, min_new_tokens=3, do_sample=False)
    images = len(inputs["pixel_values"])
    plain = loaded.model.generate(**inputs, **options)
    with mmcompress.wrap(loaded.model, "divprune", keep=1.0):
        assert torch.equal(loaded.model.generate(**inputs, **options), plain)
    with mmcompress.wrap(loaded.model, "divprune", keep=2, kv="streamingllm(keep=8, sinks=2)") as handle:
        loaded.model.generate(**inputs, **options)
        assert handle.stats is not None and [item.kept for item in handle.stats.items] == [2] * images
    for method in ("vtc-cls", "m3", "tome", "visionzip"):
        with pytest.raises(UnsupportedError, match=r"tokens than there are patches|the whole grid of patches"):
            mmcompress.wrap(loaded.model, method, keep=2)


def test_safetensors_come_first_and_dtypes_are_kept(tmp_path: Path) -> None:
    path = mqt(tmp_path / "mqt", torch_dtype="bfloat16")
    weights = torch.load(path / "pytorch_model.bin", weights_only=True)
    (path / "pytorch_model.bin").write_bytes(b"not read")
    half = len(weights) // 2
    for number, part in enumerate((list(weights)[:half], list(weights)[half:])):
        save_file({name: weights[name].contiguous() for name in part}, path / f"model-{number}.safetensors")
    loaded = load(path)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}
    assert load(path, dtype=torch.float32).model.dtype == torch.float32
    assert load_file(path / "model-0.safetensors")


def edited(path: Path, change: Callable[[Weights], Any]) -> Path:
    weights = torch.load(path / "pytorch_model.bin", weights_only=True)
    change(weights)
    torch.save(weights, path / "pytorch_model.bin")
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("model.query_abstractor.ln_v.bias"), r"missing .*projector\.ln_v\.bias"),
        (lambda w: w.pop("model.layers.1.mlp.up_proj.weight"), r"missing .*layers\.1\.mlp\.up_proj\.weight"),
        (lambda w: w.update({"model.mystery": torch.zeros(1)}), r"unknown model\.mystery"),
        (
            lambda w: w.update({"model.query_abstractor.proj": torch.zeros(64, 5)}),
            r"misshapen model\.query_abstractor\.proj is \[64, 5\] instead of \[64, 32\]",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path: Path, change: Any, message: str) -> None:
    path = edited(mqt(tmp_path / "mqt"), change)
    with pytest.raises(InputError, match=message):
        load(path)


@pytest.mark.parametrize("build", [mqt, m3])
def test_no_other_tower_takes_the_place_of_a_trained_one(tmp_path: Path, build: Any) -> None:
    path = edited(
        build(tmp_path / "model"),
        lambda weights: [weights.pop(name) for name in list(weights) if "vision_tower" in name],
    )
    with pytest.raises(UnsupportedError, match="holds no vision tower, and"):
        load(path, vision_tower="openai/clip-vit-large-patch14-336")


@pytest.mark.parametrize("build", [mqt, m3])
def test_a_tower_that_nobody_needs_is_refused(tmp_path: Path, build: Any) -> None:
    with pytest.raises(SpecError, match="holds the vision tower it was trained with; leave out vision_tower="):
        load(build(tmp_path / "model"), vision_tower="openai/clip-vit-large-patch14-336")


def test_tokenpacker_reads_layers_of_a_deep_tower(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="reads layers 12, 16, 22, 23 of the vision tower, which has 5"):
        load(tokenpacker(tmp_path / "shallow", layers=5))
    with pytest.raises(UnsupportedError, match="scale_factor=3 does not divide a side of 4 patches"):
        load(tokenpacker(tmp_path / "odd", scale_factor=3))
    with pytest.raises(InputError, match=r"the vision tower .*nowhere cannot be loaded"):
        load(tokenpacker(tmp_path / "none"), vision_tower=tmp_path / "nowhere")


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"MptForCausalLM\): of checkpoints of mqt, those with a Llama"):
        load(mqt(tmp_path / "mpt", architectures=["MptForCausalLM"]))
    other = published(tmp_path / "other", {"model.x": torch.zeros(1)}, {"architectures": ["GPT2LMHeadModel"]})
    with pytest.raises(UnsupportedError, match=r"GPT2LMHeadModel\) has none of the weights .*query_abstractor"):
        load(other)
    with pytest.raises(InputError, match="holds no weights"):
        (other / "pytorch_model.bin").unlink()
        load(other)
    with pytest.raises(InputError, match=r"cannot read .*config\.json"):
        load(tmp_path)


def test_transformers_own_format_is_pointed_to_wrap(tmp_path: Path) -> None:
    loaded = load(m3(tmp_path / "m3"))
    loaded.model.save_pretrained(tmp_path / "saved")
    with pytest.raises(UnsupportedError, match=r"load it with from_pretrained.*mmcompress\.wrap"):
        load(tmp_path / "saved")


def test_what_a_model_looks_like_must_be_told(tmp_path: Path) -> None:
    patches = "model.vision_tower.vision_tower.vision_model.embeddings.patch_embedding.weight"
    with pytest.raises(InputError, match=r"lacks embeddings\.patch_embedding\.weight"):
        load(edited(m3(tmp_path / "m3"), lambda weights: weights.pop(patches)))
    path = tokenflex(tmp_path / "tokenflex")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key != "llm_config"}))
    with pytest.raises(InputError, match="lacks llm_config"):
        load(path)


@pytest.mark.parametrize(("manifest", "module"), [("mqt_llava_7b", MQT), ("tokenpacker_7b", TokenPacker)])
def test_modules_have_the_weights_of_the_published_checkpoints(manifest: str, module: Any) -> None:
    stated = json.loads((MANIFESTS / f"{manifest}.json").read_text())
    with torch.device("meta"):
        own = module().state_dict()
    assert {name: list(value.shape) for name, value in own.items()} == {
        name: shape for name, (shape, _) in stated["module_keys"].items()
    }
    in_checkpoints = {stated["prefix_in_checkpoint"] + name for name in stated["module_keys"]}
    assert in_checkpoints & {kind.key for kind in FORMATS}


class Unsafe:
    def __reduce__(self) -> Any:
        return (print, ("run",))


def test_pickles_are_never_run(tmp_path: Path) -> None:
    path = mqt(tmp_path / "mqt")
    torch.save({"model.query_abstractor.query": Unsafe()}, path / "pytorch_model.bin")
    with pytest.raises(InputError, match="cannot read"):
        load(path)


def test_a_wrong_budget_is_refused_before_loading(tmp_path: Path) -> None:
    path = mqt(tmp_path / "mqt")
    with pytest.raises(SpecError, match="MQT has no budget 5: it takes 1 to 4"):
        load(path, keep=5)
    with pytest.raises(SpecError, match="MQT has no budget 0"):
        load(path, keep=0)
    assert M3(24).budgets() == (1, 9, 36, 144, 576)
