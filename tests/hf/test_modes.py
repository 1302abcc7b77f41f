"""However a model is called, a compressed one answers as it does in its default mode, which other tests hold exact."""

from __future__ import annotations

import copy
import itertools
import typing
from collections.abc import Iterator
from contextlib import nullcontext
from functools import cache

import pytest
import torch
import transformers
from hf.fake_flash import fake_flash_attention
from hf.families import BOS, EOS, FAMILIES, IMAGE, PAD, VOCABULARY, Kind
from hf.test_exactness import TRANSFORMERS, _second_turn, generate
from hf.test_llm_stage import only_here
from packaging.version import Version
from torch import Tensor, nn
from torch._dynamo import register_backend
from transformers import CompileConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, StaticCache

import mmcompress
from mmcompress import UnsupportedError
from mmcompress.integrations.hf.cache import PrunedCache, PrunedStaticCache, adopt
from mmcompress.integrations.hf.generation import Generation
from mmcompress.llm_method import LLMMethod

__all__ = ["only_here"]  # registers `test-progressive`

TOLERANCE = 1e-5
# The first one reads the question, which is not to be taken for what is said after it.
SPECS: dict[str, str | list[str]] = {
    "before": "cdpruner(keep=0.4, relevance=text)",
    "inside": "fastv(keep=0.4)",
    "several": "test-progressive(keep=0.4, first=2, times=2, renumbers=true)",
    "stack": ["cdpruner(keep=8, relevance=text)", "fastv(keep=0.5)"],
}
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


@cache
def built(name: str, attention: str = "sdpa") -> PreTrainedModel:
    return FAMILIES[name].build(attention)


def text_config(model: PreTrainedModel) -> typing.Any:
    return model.base_model.get_decoder().config


def logits_of(output: typing.Any) -> Tensor:
    return torch.stack(output.logits, 1)


def assert_same(output: typing.Any, expected: typing.Any) -> None:
    steps = len(expected.logits)
    assert output.sequences[:, -steps:].tolist() == expected.sequences[:, -steps:].tolist()
    torch.testing.assert_close(logits_of(output), logits_of(expected), atol=TOLERANCE, rtol=0)


def assert_differs(output: typing.Any, model: PreTrainedModel, inputs: dict) -> None:
    whole = generate(model, inputs, steps=1)
    assert (whole.logits[0][0] - output.logits[0][0]).abs().max() > 1e-3, "or the test shows nothing"


# --- static caches and compiled models


@pytest.mark.parametrize(
    ("name", "attention", "kind"),
    [
        *itertools.product(["llava", "qwen2_5_vl"], ["sdpa", "eager", "flash"], ["mixed", "single"]),
        *itertools.product(["llava_onevision", "qwen3_vl"], ["sdpa", "flash"], ["mixed"]),
    ],
)
@every_spec
def test_static_cache(name: str, attention: str, kind: Kind, spec: typing.Any) -> None:
    model = built(name, "eager" if attention == "eager" else "sdpa")
    inputs = FAMILIES[name].inputs(model, kind)
    with fake_flash_attention(model) if attention == "flash" else nullcontext():
        with mmcompress.wrap(model, spec):
            expected = generate(model, inputs)
            output = generate(model, inputs, cache_implementation="static")
        assert_differs(output, model, inputs)
    assert_same(output, expected)
    static, dynamic = output.past_key_values, expected.past_key_values
    assert type(static) is PrunedStaticCache
    assert [static.stored(layer) for layer in range(4)] == [dynamic.stored(layer) for layer in range(4)]
    assert static.stored(3) < int(static.get_seq_length()) == dynamic.get_seq_length()


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@every_spec
def test_a_second_turn_in_a_static_cache(name: str, attention: str, spec: typing.Any) -> None:
    model = built(name, "eager" if attention == "eager" else "sdpa")
    inputs = FAMILIES[name].inputs(model, "mixed")
    # The later turn is ragged too, with padding between the turns.
    added = torch.tensor([[40, 41, 42], [PAD, 40, 41], [40, 41, 42]])
    outputs = []
    with fake_flash_attention(model) if attention == "flash" else nullcontext(), mmcompress.wrap(model, spec):
        for past in (DynamicCache(config=text_config(model)), StaticCache(config=text_config(model), max_cache_len=99)):
            first = generate(model, inputs, past_key_values=past)
            later = _second_turn(first, inputs, added)
            later["attention_mask"][1, -3] = 0
            outputs.append(generate(model, later, steps=3))
    assert_same(outputs[1], outputs[0])


@pytest.mark.parametrize("opening", ["text", "image"])
@every_spec
def test_a_new_image_in_a_static_cache(opening: str, spec: typing.Any) -> None:
    model = built("llava")
    one = FAMILIES["llava"].inputs(model, "single")
    ids = torch.tensor([[BOS, 50, 51, 52, 53]])
    begin = one if opening == "image" else {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    outputs = []
    with mmcompress.wrap(model, spec):
        for past in (DynamicCache(config=text_config(model)), StaticCache(config=text_config(model), max_cache_len=99)):
            first = generate(model, begin, steps=3, past_key_values=past)
            later = _second_turn(first, begin, one["input_ids"][:, 1:])
            outputs.append(generate(model, later | {"pixel_values": one["pixel_values"]}, steps=3))
    assert_same(outputs[1], outputs[0])


@every_spec
def test_beams_in_a_static_cache(spec: typing.Any) -> None:
    model = built("qwen2_5_vl")
    inputs = FAMILIES["qwen2_5_vl"].inputs(model, "images")
    beams = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True}
    with mmcompress.wrap(model, spec):
        expected = generate(model, inputs, **beams)
        output = generate(model, inputs, cache_implementation="static", **beams)
    assert torch.equal(output.sequences, expected.sequences)
    torch.testing.assert_close(output.sequences_scores, expected.sequences_scores, atol=TOLERANCE, rtol=0)


@pytest.fixture
def graphs() -> Iterator[list[torch.fx.GraphModule]]:
    """What the backend "counting" was given to compile, and runs as it is."""
    compiled: list[torch.fx.GraphModule] = []

    def counting(graph: torch.fx.GraphModule, example: typing.Any) -> typing.Any:
        compiled.append(graph)
        return graph.forward

    register_backend(counting)
    torch.compiler.reset()
    yield compiled
    torch.compiler.reset()
    torch._dynamo.backends.registry._COMPILER_FNS.pop("counting")


@pytest.mark.parametrize(
    ("name", "kind", "spec"),
    [
        ("llava", "mixed", SPECS["several"]),
        ("llava", "single", SPECS["inside"]),
        ("qwen2_5_vl", "mixed", SPECS["stack"]),
    ],
)
def test_decoding_compiled(name: str, kind: Kind, spec: typing.Any, graphs: list) -> None:
    """As `generate` compiles it with a static cache on a GPU: one graph holds all layers, and each step runs it."""
    model = FAMILIES[name].build("sdpa")
    inputs = FAMILIES[name].inputs(model, kind)
    compile_config = CompileConfig(fullgraph=False, backend="counting", mode=None)
    compile_config._compile_all_devices = True
    with mmcompress.wrap(model, spec):
        expected = generate(model, inputs)
        output = generate(model, inputs, cache_implementation="static", compile_config=compile_config)
    assert_same(output, expected)
    attentions = [sum("scaled_dot_product" in str(node.target) for node in graph.graph.nodes) for graph in graphs]
    assert sum(attentions) == max(attentions) == 4, "compiled once, and whole"


def test_a_compiled_model(graphs: list) -> None:
    """Prefill and decoding of a compiled model in a hand-written loop, with the cache that it makes itself."""
    model = FAMILIES["llava"].build("sdpa")
    inputs = FAMILIES["llava"].inputs(model, "single")
    del inputs["attention_mask"]
    with mmcompress.wrap(model, SPECS["stack"]), torch.no_grad():
        expected = generate(model, inputs, steps=2)
        compiled = torch.compile(model, backend="counting")
        output = compiled(**inputs, use_cache=True)
        torch.testing.assert_close(output.logits[:, -1], expected.logits[0], atol=TOLERANCE, rtol=0)
        token = expected.sequences[:, -2:-1]
        output = compiled(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        torch.testing.assert_close(output.logits[:, -1], expected.logits[1], atol=TOLERANCE, rtol=0)
    assert graphs


def test_whole_graphs_are_refused_with_the_reason() -> None:
    model = FAMILIES["llava"].build("sdpa")
    inputs = FAMILIES["llava"].inputs(model, "single")
    torch.compiler.reset()
    with (
        mmcompress.wrap(model, "fastv(keep=0.4)"),
        torch.no_grad(),
        pytest.raises(torch._dynamo.exc.Unsupported, match="leave out fullgraph=True"),
    ):
        torch.compile(model, backend="eager", fullgraph=True)(**inputs)


def test_a_static_cache_too_small_for_the_prompt_is_refused() -> None:
    model = built("llava")
    inputs = FAMILIES["llava"].inputs(model, "single")
    past = StaticCache(config=text_config(model), max_cache_len=20)
    with mmcompress.wrap(model, "uniform(keep=4)"), pytest.raises(UnsupportedError, match="max_cache_len=20"):
        model(**inputs, past_key_values=past)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_mask_of_ones_own_in_a_static_cache_is_refused(attention: str) -> None:
    model = built("llava", attention)
    inputs = FAMILIES["llava"].inputs(model, "single")
    length = inputs["input_ids"].shape[1]
    causal = torch.ones(length, 99, dtype=torch.bool).tril()[None, None]
    packed = causal & (torch.arange(99) >= 3 * (torch.arange(length)[:, None] > 9))
    with mmcompress.wrap(model, "uniform(keep=4)"), torch.no_grad():
        logits = []
        for mask in (causal, packed):
            inputs["attention_mask"] = (
                mask
                if attention == "sdpa"
                else torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
            )
            past = StaticCache(config=text_config(model), max_cache_len=99)
            with pytest.raises(UnsupportedError, match="custom 4-D") if mask is packed else nullcontext():
                logits.append(model(**inputs, past_key_values=past).logits)
        del inputs["attention_mask"]
        torch.testing.assert_close(logits[0], model(**inputs).logits, atol=TOLERANCE, rtol=0)


def test_caches_with_sliding_windows_are_refused() -> None:
    settings = text_config(built("llava_onevision")).to_dict()
    settings |= {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "layer_types": None}
    config = transformers.Qwen2Config(**settings)
    for past in (DynamicCache(config=config), StaticCache(config=config, max_cache_len=9)):
        with pytest.raises(UnsupportedError, match="SlidingWindowLayer"):
            adopt(past)


# --- assisted decoding, and none that is cached


def _echoing(name: str, model: PreTrainedModel, padding: int = 0) -> dict:
    """A prompt whose end has been there before, so that candidates are found for the very first pass."""
    inputs = FAMILIES[name].inputs(model, "single")
    echo = torch.tensor([[40, 41, 42, 43, 44]])
    begin, rest = inputs["input_ids"][:, :1], inputs["input_ids"][:, 1:]
    before = torch.full((1, padding), PAD)
    inputs["input_ids"] = torch.cat([before, begin, echo, rest, torch.tensor([[35, 40, 41]])], 1)
    inputs["attention_mask"] = (inputs["input_ids"] != PAD).long()
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int()
    return inputs


def _assistant(kind: str, model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, or a small text model that has its weights and so guesses well sometimes."""
    if kind == "itself":
        return model
    config = text_config(model)
    settings = {name: getattr(config, name) for name in ("hidden_size", "intermediate_size", "num_attention_heads")}
    settings |= {"num_key_value_heads": config.num_key_value_heads, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
    torch.manual_seed(0)
    assistant = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**settings, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD)
    ).eval()
    assistant.model.embed_tokens.weight.data = model.get_input_embeddings().weight.data
    assistant.lm_head.weight.data = model.get_output_embeddings().weight.data
    return assistant


@pytest.mark.parametrize(
    ("name", "assistant", "attention"),
    [
        ("llava", "lookup", "sdpa"),
        ("llava", "lookup", "flash"),
        ("llava", "itself", "sdpa"),
        ("llava", "text model", "sdpa"),
        ("qwen2_5_vl", "lookup", "sdpa"),
        ("qwen2_5_vl", "itself", "flash"),
    ],
)
@every_spec
def test_assisted_decoding(
    name: str, assistant: str, attention: str, spec: typing.Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first pass reads candidates along with the prompt, and rejected ones leave the cache."""
    if assistant == "text model" and Version("5.19") > TRANSFORMERS:
        pytest.skip("transformers < 5.19 passes pixels on to assistants that read only text")
    model = FAMILIES[name].build("sdpa")
    inputs = _echoing(name, model, padding=2)
    how = (
        {"prompt_lookup_num_tokens": 3} if assistant == "lookup" else {"assistant_model": _assistant(assistant, model)}
    )
    with (
        fake_flash_attention(model) if attention == "flash" else nullcontext(),
        mmcompress.wrap(model, spec) as handle,
    ):
        expected = generate(model, inputs, steps=9)
        rows = handle.stats.rows_by_layer
        tails, cropped = [], []
        said, crop = Generation.said, PrunedCache.crop
        monkeypatch.setattr(Generation, "said", lambda *args: tails.append(said(*args)) or tails[-1])
        monkeypatch.setattr(PrunedCache, "crop", lambda *args: cropped.append(args[1]) or crop(*args))
        output = generate(model, inputs, steps=9, **how)
        assert handle.stats.rows_by_layer == rows
    assert max(tails) > 0 and min(cropped) < 0, "or the test shows nothing"
    assert_same(output, expected)
    assert_differs(output, model, inputs)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl"])
@every_spec
def test_generating_without_a_cache(name: str, spec: typing.Any) -> None:
    """Each pass reads the prompt and what was said; what is removed depends on the prompt alone."""
    model = built(name)
    inputs = FAMILIES[name].inputs(model, "mixed")
    with mmcompress.wrap(model, spec) as handle:
        expected = generate(model, inputs)
        stats = handle.stats
        output = generate(model, inputs, use_cache=False)
        assert (handle.stats.row_tokens, handle.stats.rows_by_layer) == (stats.row_tokens, stats.rows_by_layer)
    assert_same(output, expected)
    assert_differs(output, model, inputs)


@pytest.mark.parametrize(
    "how",
    [{"num_beams": 3}, {"num_beams": 3, "cache_implementation": "static"}, {"prompt_lookup_num_tokens": 3}],
    ids=str,
)
def test_nothing_is_chosen_after_the_prompt(how: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    model = built("llava")
    inputs = _echoing("llava", model)
    calls = []
    reduce = LLMMethod.reduce
    monkeypatch.setattr(LLMMethod, "reduce", lambda self, row, left: calls.append(row.layer) or reduce(self, row, left))
    with mmcompress.wrap(model, SPECS["several"]):
        generate(model, inputs, **how)
    assert calls == [layer for layer in (2, 3) for _ in range(how.get("num_beams", 1))]


@pytest.mark.parametrize("attention", ["sdpa", "flash"])
@every_spec
def test_an_answer_taken_back(attention: str, spec: typing.Any) -> None:
    model = built("llava")
    inputs = FAMILIES["llava"].inputs(model, "mixed")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    end = int((ids == IMAGE).any(0).nonzero().max()) + 1
    with (
        fake_flash_attention(model) if attention == "flash" else nullcontext(),
        mmcompress.wrap(model, spec),
        torch.no_grad(),
    ):
        first = generate(model, inputs)
        past = first.past_key_values
        with pytest.raises(UnsupportedError, match=f"crop a cache to 9 tokens: the first {end} are compressed"):
            past.crop(9 - past.get_seq_length())
        past.crop(ids.shape[1] - 2 - past.get_seq_length())  # the last two tokens of the prompts come again
        positions = (mask.cumsum(1) - 1)[:, -2:]
        again = model(input_ids=ids[:, -2:], attention_mask=mask, position_ids=positions, past_key_values=past)
    torch.testing.assert_close(again.logits[:, -1], first.logits[0], atol=TOLERANCE, rtol=0)


@every_spec
def test_caches_follow_their_rows(spec: typing.Any) -> None:
    model = built("llava")
    inputs = FAMILIES["llava"].inputs(model, "images")
    with mmcompress.wrap(model, spec), torch.no_grad():
        output = model(**inputs, use_cache=True)
        token = output.logits[:, -1:].argmax(-1)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
        step = {"attention_mask": mask, "position_ids": mask.sum(1, keepdim=True) - 1}
        expected = model(input_ids=token, past_key_values=copy.deepcopy(output.past_key_values), **step).logits
        chosen = torch.tensor([1, 0])
        output.past_key_values.batch_repeat_interleave(2)
        output.past_key_values.batch_select_indices(torch.tensor([3, 0]))
        step = {key: value[chosen] for key, value in step.items()}
        got = model(input_ids=token[chosen], past_key_values=output.past_key_values, **step).logits
    torch.testing.assert_close(got, expected[chosen], atol=TOLERANCE, rtol=0)


def test_a_cache_goes_on_with_the_layers_it_began_with() -> None:
    model = built("llava")
    inputs = FAMILIES["llava"].inputs(model, "single")
    token = torch.tensor([[40]])
    pasts = []
    for _ in range(2):
        with mmcompress.wrap(model, "fastv(keep=0.4)"), torch.no_grad():
            pasts.append(model(**inputs, use_cache=True).past_key_values)
            if len(pasts) == 2:
                expected = model(input_ids=token, past_key_values=pasts.pop()).logits
    for other in ("fastv(keep=0.4, layer=1)", "uniform(keep=4)"):
        with (
            mmcompress.wrap(model, other),
            torch.no_grad(),
            pytest.raises(UnsupportedError, match=r"before layers \[2\].*the method it began with"),
        ):
            model(input_ids=token, past_key_values=pasts[0])
    with mmcompress.wrap(model, "fastv(keep=0.9)"), torch.no_grad():
        torch.testing.assert_close(model(input_ids=token, past_key_values=pasts[0]).logits, expected)


# --- prompts in pieces


@pytest.mark.parametrize("given", ["argument", "config", "model"])
@every_spec
def test_a_prompt_in_pieces_is_refused_before_anything_ran(given: str, spec: typing.Any) -> None:
    model = FAMILIES["llava"].build("sdpa")
    inputs = FAMILIES["llava"].inputs(model, "single")
    calls: list[int] = []
    for part in (model.model.vision_tower, model.model.language_model):
        part.register_forward_pre_hook(lambda *args: calls.append(1))
    options: dict[str, typing.Any] = {"max_new_tokens": 2}
    if given == "argument":
        options["prefill_chunk_size"] = 20
    elif given == "config":
        options = {"generation_config": transformers.GenerationConfig(max_new_tokens=2, prefill_chunk_size=20)}
    else:
        model.generation_config.prefill_chunk_size = 20
    with mmcompress.wrap(model, spec):
        with pytest.raises(UnsupportedError, match=r"prefill_chunk_size=20 .* in pieces.*one piece"):
            model.generate(**inputs, **options)
        assert not calls


@pytest.mark.skipif(Version("5.20") > TRANSFORMERS, reason="transformers < 5.20 gets later turns in pieces wrong")
@every_spec
def test_a_later_turn_in_pieces(spec: typing.Any) -> None:
    model = built("llava")
    inputs = FAMILIES["llava"].inputs(model, "single")
    with mmcompress.wrap(model, spec):
        first = generate(model, inputs, steps=2)
        more = _second_turn(first, inputs, torch.tensor([[40, 41, 42, 43, 44]]))
        past = first.past_key_values
        chunked = generate(model, more, steps=2, prefill_chunk_size=2)
        past.crop(first.sequences.shape[1] - 1 - past.get_seq_length())
        assert_same(chunked, generate(model, more, steps=2))


def test_a_models_own_generate_comes_back() -> None:
    model = FAMILIES["llava"].build("sdpa")
    with mmcompress.wrap(model, "fastv(keep=0.4)"):
        assert "generate" in vars(model)
    assert "generate" not in vars(model)
    own = model.generate = lambda **kwargs: kwargs
    with mmcompress.wrap(model, "fastv(keep=0.4)"):
        assert model.generate(max_new_tokens=3) == {"max_new_tokens": 3}
        assert model.generate is not own
    assert model.generate is own


# --- weights that are not as they were


class Rounded(nn.Module):
    """A linear layer with weights in 8 bits, whose `weight` has neither the shape nor the type of one."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight / scale).round().to(torch.int8).flatten(), requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, states: Tensor) -> Tensor:
        weight = self.weight.view(len(self.scale), -1) * self.scale
        return nn.functional.linear(states, weight.to(states.dtype), self.bias)


def rounded(model: PreTrainedModel, make: typing.Callable[[nn.Linear], nn.Module]) -> PreTrainedModel:
    decoder = model.base_model.get_decoder()
    for name, module in list(decoder.named_modules()):
        if isinstance(module, nn.Linear):
            decoder.set_submodule(name, make(module))
    return model


def assert_agnostic(model: PreTrainedModel, spec: typing.Any) -> None:
    """Decoding follows from one pass without cache and padding over the prompt and what was said."""
    inputs = FAMILIES["llava"].inputs(model, "mixed")
    one = FAMILIES["llava"].inputs(model, "single")
    with mmcompress.wrap(model, spec):
        output = generate(model, inputs)
        assert_same(output, generate(model, inputs, use_cache=False))
        alone = generate(model, one)
    torch.testing.assert_close(logits_of(output)[:1], logits_of(alone), atol=1e-4, rtol=0)
    assert_differs(output, model, inputs)


@every_spec
def test_quantised_weights(spec: typing.Any) -> None:
    assert_agnostic(rounded(FAMILIES["llava"].build("sdpa"), Rounded), spec)


@pytest.mark.parametrize("bits", [4, 8])
@every_spec
def test_bitsandbytes(bits: int, spec: typing.Any) -> None:
    bnb = pytest.importorskip("bitsandbytes")

    def quantise(linear: nn.Linear) -> nn.Module:
        shape, bias = (linear.in_features, linear.out_features), linear.bias is not None
        if bits == 4:
            made = bnb.nn.Linear4bit(*shape, bias=bias, quant_type="nf4")
        else:
            made = bnb.nn.Linear8bitLt(*shape, bias=bias, has_fp16_weights=False)
        made.load_state_dict(linear.state_dict())
        return made.to("cpu")

    assert_agnostic(rounded(FAMILIES["llava"].build("sdpa"), quantise), spec)


@every_spec
def test_peft_models(spec: typing.Any) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False)
    adapted = get_peft_model(FAMILIES["llava"].build("sdpa"), lora).eval()
    inputs = _echoing("llava", adapted)
    with mmcompress.wrap(adapted, spec):
        expected = generate(adapted, inputs)
        assert_same(generate(adapted, inputs, prompt_lookup_num_tokens=3), expected)
    merged = adapted.merge_and_unload()
    with mmcompress.wrap(merged, spec):
        assert_same(generate(merged, inputs), expected)
    assert_differs(expected, merged, inputs)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@every_spec
def test_accelerate_offload(name: str, spec: typing.Any, tmp_path: typing.Any) -> None:
    from accelerate import dispatch_model

    model = FAMILIES[name].build("sdpa")
    inputs = FAMILIES[name].inputs(model, "mixed")
    with mmcompress.wrap(model, spec):
        expected = generate(model, inputs)
    text = "model.language_model"
    places = {key: "cpu" for key, _ in model.model.named_children() if key != "language_model"}
    places = {f"model.{key}": place for key, place in places.items()}
    places |= dict.fromkeys([f"{text}.embed_tokens", f"{text}.norm", f"{text}.rotary_emb", "lm_head"], "cpu")
    places |= {f"{text}.layers.{layer}": "cpu" if layer < 2 else "disk" for layer in range(4)}
    model = dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    assert next(model.model.language_model.layers[2].parameters()).is_meta
    with mmcompress.wrap(model, spec):
        assert_same(generate(model, inputs), expected)
        assert_same(generate(model, inputs, use_cache=False), expected)
