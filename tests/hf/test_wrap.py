"""Wrapping fails well and leaves no trace."""

from __future__ import annotations

import copy
import math
import pickle
import threading
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from hf.families import FAMILIES, IMAGE, SIDE
from hf.oracle import reference_items
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version
from torch import nn
from transformers.cache_utils import DynamicCache, StaticCache
from transformers.image_processing_utils import select_best_resolution

import mmcompress
from mmcompress import InputError, SpecError, UnsupportedError
from mmcompress.integrations.hf.renamed import CACHE


@cache
def built(name: str) -> Any:
    return FAMILIES[name].build("sdpa")


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that wrapping could touch."""
    seen: dict[str, Any] = {"state": {key: value.clone() for key, value in model.state_dict().items()}}
    for name, module in model.named_modules():
        seen[name] = {
            key: len(value) if "hooks" in key and isinstance(value, dict) else id(value)
            for key, value in vars(module).items()
            if key != "rope_deltas"  # Qwen's own note of the last forward pass
        }
    seen["config"] = model.config.to_dict()
    return seen


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before.keys() == after.keys()
    for key, value in before["state"].items():
        assert torch.equal(value, after["state"][key])
    for key in before.keys() - {"state"}:
        assert before[key] == after[key], key


def greedy(model: Any, inputs: dict) -> torch.Tensor:
    return model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)


BAD_REQUESTS = [
    (dict(method="toder", keep=0.5), SpecError, "unknown method 'toder'.*Did you mean 'todre'.*vtc-cls"),
    (dict(method="todre", keep=0.5, objectiv="max-sum"), SpecError, "'objectiv'.*Did you mean 'objective'"),
    (dict(method="todre", keep=0.5, objective="best"), SpecError, "'max-sum', 'k-center'"),
    (dict(method="random", keep=0.5, seed="x"), SpecError, "seed='x' must be int"),
    (dict(method="todre(keep=0.5", keep=0.5), SpecError, "cannot read"),
    (dict(method="todre(keep=0.5)", keep=0.5), SpecError, "keep is given twice"),
    (dict(method="todre"), SpecError, "todre needs keep="),
    (dict(method="todre", keep=0), SpecError, "keep=0 "),
    (dict(method="todre", keep=-1), SpecError, "keep=-1"),
    (dict(method="todre", keep=1.5), SpecError, "keep=1.5 is out of range"),
    (dict(method="todre", keep=float("nan")), SpecError, "keep=nan"),
    (dict(method="todre", keep=True), SpecError, "got True"),
    (dict(method="todre", keep="0.5"), SpecError, "got '0.5'"),
    (dict(method="todre", keep=0.5, pruning_rate=0.5), SpecError, "not both"),
    (dict(method="todre", pruning_rate=1.0), SpecError, "pruning_rate"),
    (dict(method="todre", keep=0.5, positions="orginal"), SpecError, "Did you mean 'original'"),
    (dict(method=None), SpecError, "give a method"),
    (dict(method=["todre(keep=0.5)", "random(keep=0.5)"]), SpecError, "both decide what enters the LLM"),
    (dict(method="todre", keep=0.5, kv="snapvk"), SpecError, "unknown KV policy 'snapvk'"),
    (dict(method="vtc-cls", keep=0.5, first_layer=2), SpecError, "first_layer=2 is out of range"),
    (dict(method="vtc-cls", keep=0.5, first_layer=-1), SpecError, "first_layer=-1 is out of range"),
]


@pytest.mark.parametrize(("request_", "error", "message"), BAD_REQUESTS)
def test_bad_requests_name_the_problem_and_touch_nothing(request_: dict, error: type, message: str) -> None:
    model = built("llava")
    before = snapshot(model)
    with pytest.raises(error, match=message):
        mmcompress.wrap(model, **request_)
    assert_same(before, snapshot(model))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(2, 2), "Linear is no transformers model"),
        ("llava", "str is no transformers model"),
        (
            transformers.LlamaForCausalLM(
                transformers.LlamaConfig(
                    hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8
                )
            ),
            "LlamaForCausalLM.*is no vision-language model",
        ),
    ],
)
def test_models_that_cannot_be_wrapped(model: Any, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message + ".*llava_next"):
        mmcompress.wrap(model, "todre", keep=0.5)


def test_an_unsupported_vision_language_model_is_named() -> None:
    config = transformers.VipLlavaConfig(
        vision_config=FAMILIES["llava"].build("sdpa").config.vision_config,
        text_config=FAMILIES["llava"].build("sdpa").config.text_config,
    )
    with pytest.raises(UnsupportedError, match=r"VipLlava.*\(vipllava\) is not supported"):
        mmcompress.wrap(transformers.VipLlavaForConditionalGeneration(config), "todre", keep=0.5)


def test_a_feature_strategy_that_keeps_the_cls_token_is_refused() -> None:
    config = transformers.LlavaConfig(
        vision_config=built("llava").config.vision_config,
        text_config=built("llava").config.text_config,
        vision_feature_select_strategy="full",
    )
    with pytest.raises(UnsupportedError, match="vision_feature_select_strategy='full' is not supported"):
        mmcompress.wrap(transformers.LlavaForConditionalGeneration(config), "todre", keep=0.5)


def test_sliding_window_models_are_refused() -> None:
    settings_ = built("llava_onevision").config.text_config.to_dict()
    settings_ |= {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "layer_types": None}
    config = transformers.LlavaOnevisionConfig(
        vision_config=built("llava_onevision").config.vision_config, text_config=transformers.Qwen2Config(**settings_)
    )
    with pytest.raises(UnsupportedError, match="DynamicSlidingWindowLayer"):
        mmcompress.wrap(transformers.LlavaOnevisionForConditionalGeneration(config), "todre", keep=0.5)


def test_wrapping_twice_is_an_error() -> None:
    model = built("llava")
    with mmcompress.wrap(model, "todre", keep=0.5):
        with pytest.raises(UnsupportedError, match=r"already wrapped: <mmcompress todre\(keep=0.5\)"):
            mmcompress.wrap(model, "random", keep=0.5)
        with pytest.raises(UnsupportedError, match="already wrapped"):
            mmcompress.wrap(model.model, "random", keep=0.5)
    mmcompress.wrap(model, "random", keep=0.5).unwrap()


def test_an_unwrapped_handle_says_so() -> None:
    handle = mmcompress.wrap(built("llava"), "todre", keep=0.5)
    handle.unwrap()
    handle.unwrap()
    for use in (lambda: handle.stats, lambda: handle.set(keep=0.1), lambda: handle.keep, lambda: handle.trace):
        with pytest.raises(UnsupportedError, match="unwrapped"):
            use()
    assert "unwrapped" in repr(handle)


def test_a_bad_budget_leaves_the_one_in_force() -> None:
    with mmcompress.wrap(built("llava"), "todre", keep=0.5) as handle:
        with pytest.raises(SpecError):
            handle.set(keep=0.0)
        assert handle.keep == 0.5


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_and_config_are_untouched_while_wrapped(name: str, tmp_path: Any) -> None:
    model = built(name)
    model.save_pretrained(tmp_path)  # which fills in the config
    before = snapshot(model)
    with mmcompress.wrap(model, "todre", keep=0.5):
        assert model.state_dict().keys() == before["state"].keys()
        assert model.config.to_dict() == before["config"]
        model.save_pretrained(tmp_path)
    assert_same(before, snapshot(model))


since_5_19 = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.19"), reason="forward passes take no encoder outputs yet"
)


class Failure(Exception):
    """Raised from inside a forward pass."""


ACTIONS = st.lists(
    st.sampled_from(["wrap", "generate", "fail in encoder", "fail in decoder", "fail in layer", "unwrap"]),
    min_size=2,
    max_size=8,
)


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "smolvlm"])
@settings(max_examples=12)
@given(actions=ACTIONS, spec=st.sampled_from(["todre", "vtc-cls(score=received)", "pool"]))
def test_any_history_of_wrapping_ends_with_the_original(name: str, actions: list[str], spec: str) -> None:
    model, before, plain, compressed = _facts(name, spec)
    inputs = FAMILIES[name].inputs(model, "images")
    handle = None
    for action in actions:
        if action == "wrap" and handle is None:
            handle = mmcompress.wrap(model, spec, keep=0.4)
        elif action == "unwrap" and handle is not None:
            handle.unwrap()
            handle = None
        elif action.startswith("fail"):
            _fail(model, action.removeprefix("fail in "), inputs)
        else:
            assert torch.equal(greedy(model, inputs), plain if handle is None else compressed)
    if handle is not None:
        assert torch.equal(greedy(model, inputs), compressed), "a failed forward pass left something behind"
        handle.unwrap()
    assert torch.equal(greedy(model, inputs), plain)
    assert_same(before, snapshot(model))


@cache
def _facts(name: str, spec: str) -> tuple[Any, dict, torch.Tensor, torch.Tensor]:
    model = FAMILIES[name].build("sdpa")
    inputs = FAMILIES[name].inputs(model, "images")
    plain = greedy(model, inputs)  # first: some models fill caches of their own on their first pass
    before = snapshot(model)
    with mmcompress.wrap(model, spec, keep=0.4):
        compressed = greedy(model, inputs)
    return model, before, plain, compressed


def _fail(model: Any, where: str, inputs: dict) -> None:
    base = model.base_model
    place = {
        "encoder": base.get_encoder("image"),
        "decoder": base.get_decoder(),
        "layer": base.get_decoder().layers[1],
    }[where]

    def fail(*args: Any) -> None:
        raise Failure

    hook = place.register_forward_pre_hook(fail)
    try:
        with pytest.raises(Failure):
            greedy(model, inputs)
    finally:
        hook.remove()


def test_text_only_prompts_pass_untouched() -> None:
    for name in FAMILIES:
        ids = {"input_ids": torch.tensor([[1, 20, 21, 22, 23]])}
        plain = greedy(built(name), ids)
        with mmcompress.wrap(built(name), "todre", keep=0.5) as handle:
            assert torch.equal(greedy(built(name), ids), plain)
            assert handle.stats is None


def test_a_generated_placeholder_is_not_an_image() -> None:
    """The model may emit the placeholder id; without features it is a token like any other."""
    model = built("llava")
    ids = torch.tensor([[1, 20, 4, 21]])
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        with mmcompress.wrap(model, "todre", keep=0.5):
            assert torch.equal(model(input_ids=ids).logits, plain)


def test_other_caches_are_refused_by_name() -> None:
    inputs = FAMILIES["llava"].inputs(built("llava"), "single")

    class QuantizedCache(DynamicCache):
        """Stands for caches that need packages of their own."""

    with mmcompress.wrap(built("llava"), "todre", keep=0.5), pytest.raises(UnsupportedError, match="QuantizedCache"):
        built("llava")(**inputs, past_key_values=QuantizedCache())


def test_nan_features_name_the_image() -> None:
    model = built("llava")
    inputs = FAMILIES["llava"].inputs(model, "images")
    inputs["pixel_values"][1] = torch.nan
    with mmcompress.wrap(model, "todre", keep=0.5), pytest.raises(InputError, match=r"image 1 \(row 1\).*NaN"):
        greedy(model, inputs)


def test_an_image_cut_by_chunked_prefill_is_refused() -> None:
    model = built("llava")
    inputs = FAMILIES["llava"].inputs(model, "single")
    with mmcompress.wrap(model, "todre", keep=0.5), pytest.raises(UnsupportedError, match="one piece"):
        model.generate(**inputs, max_new_tokens=2, prefill_chunk_size=8)


def test_custom_attention_masks_are_refused() -> None:
    model = built("llava")
    inputs = FAMILIES["llava"].inputs(model, "single")
    length = inputs["input_ids"].shape[1]
    inputs["attention_mask"] = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    with mmcompress.wrap(model, "todre", keep=0.5), pytest.raises(UnsupportedError, match="2-D attention mask"):
        model(**inputs)


@pytest.mark.parametrize("spec", ["todre", "tome"])
def test_threads_do_not_mix(spec: str) -> None:
    model = built("llava")
    batches = [FAMILIES["llava"].inputs(model, kind) for kind in ("single", "mixed")]
    with mmcompress.wrap(model, spec, keep=0.4):
        expected = [greedy(model, batch) for batch in batches]
        answers: dict[int, list[torch.Tensor]] = {0: [], 1: []}

        def work(number: int) -> None:
            for _ in range(5):
                answers[number].append(greedy(model, batches[number]))

        threads = [threading.Thread(target=work, args=(number,)) for number in answers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number, wanted in enumerate(expected):
        assert len(answers[number]) == 5
        assert all(torch.equal(answer, wanted) for answer in answers[number])


def test_stats_say_what_was_saved() -> None:
    model = built("llava")
    inputs = FAMILIES["llava"].inputs(model, "mixed")
    with mmcompress.wrap(model, "uniform", keep=4) as handle:
        greedy(model, inputs)
        stats = handle.stats
    assert (stats.tokens, stats.kept) == (48, 12)
    assert stats.tokens_per_layer == [4.0] * 4
    assert stats.kv_bytes < stats.kv_bytes_full
    assert stats.prefill_flops < stats.prefill_flops_full
    assert all(value > 0 for value in vars(stats.seconds).values())
    assert "12 of 48 visual tokens" in str(stats)


def test_vision_is_encoded_once_under_reuse() -> None:
    model = FAMILIES["llava"].build("sdpa")
    inputs = FAMILIES["llava"].inputs(model, "images")
    calls = []
    model.model.vision_tower.register_forward_hook(lambda *args: calls.append(1))
    with mmcompress.wrap(model, "vtc-cls", keep=0.5) as handle:
        fresh = greedy(model, inputs)
        assert len(calls) == 1
        with handle.reuse_vision():
            answers = [greedy(model, inputs) for _ in range(3)]
            assert len(calls) == 1 + 3, "three images, each encoded alone and once"
            changed = inputs | {"pixel_values": inputs["pixel_values"].roll(1, 0)}
            greedy(model, changed)
            assert len(calls) == 4, "other places, no other images"
            changed["pixel_values"][0] += 1
            greedy(model, changed)
            assert len(calls) == 5
        greedy(model, inputs)
        assert len(calls) == 6
    assert all(torch.equal(answer, fresh) for answer in answers)


@pytest.mark.parametrize("name", FAMILIES)
def test_reused_vision_changes_no_answer(name: str) -> None:
    model = built(name)
    inputs = FAMILIES[name].inputs(model, "mixed")
    with mmcompress.wrap(model, "vtc-cls(score=received)", keep=0.4) as handle:
        fresh = greedy(model, inputs)
        with handle.reuse_vision():
            assert all(torch.equal(greedy(model, inputs), fresh) for _ in range(2))


def test_items_are_counted_where_they_are() -> None:
    for name in FAMILIES:
        model = FAMILIES[name].build("sdpa")
        inputs = FAMILIES[name].inputs(model, "mixed")
        expected = reference_items(model, name, inputs)
        with mmcompress.wrap(model, "uniform", keep=0.5) as handle:
            greedy(model, inputs)
            counted = [(item.row, item.tokens, item.separators) for item in handle.stats.items]
        assert counted == [(item.row, len(item.item), len(item.separators)) for item in expected]


def test_an_interrupted_pass_leaves_nothing_to_the_next() -> None:
    """Torch skips a module's last hooks on KeyboardInterrupt."""
    model = built("llava")
    inputs = FAMILIES["llava"].inputs(model, "single")
    text = {"input_ids": torch.arange(inputs["input_ids"].shape[1])[None] + 30}

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    with torch.no_grad():
        plain = model(**text, use_cache=False).logits
        with mmcompress.wrap(model, "todre", keep=0.4):
            hook = model.model.language_model.layers[1].register_forward_pre_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                model.generate(**inputs)
            hook.remove()
            assert torch.equal(model(**text, use_cache=False).logits, plain)


@pytest.mark.parametrize("name", FAMILIES)
def test_generating_without_a_cache(name: str) -> None:
    model = built(name)
    inputs = FAMILIES[name].inputs(model, "images")
    with mmcompress.wrap(model, "todre", keep=0.4):
        cached = greedy(model, inputs)
        uncached = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False, use_cache=False)
    assert torch.equal(cached, uncached)


@pytest.mark.parametrize("name", ["llava", "internvl", "qwen3_vl"])
def test_reused_vision_survives_beam_search(name: str) -> None:
    model = built(name)
    inputs = FAMILIES[name].inputs(model, "single")
    with mmcompress.wrap(model, "todre", keep=0.4) as handle:
        fresh = model.generate(**inputs, max_new_tokens=3, num_beams=2, do_sample=False)
        with handle.reuse_vision():
            for _ in range(3):
                again = model.generate(**inputs, max_new_tokens=3, num_beams=2, do_sample=False)
                assert torch.equal(again, fresh)


@since_5_19
def test_precomputed_features_meet_their_own_statistics() -> None:
    model = built("llava")
    first, second = FAMILIES["llava"].inputs(model, "single"), FAMILIES["llava"].inputs(model, "single")
    second["pixel_values"] = second["pixel_values"].flip(-1)
    text = {key: value for key, value in first.items() if key != "pixel_values"}
    with mmcompress.wrap(model, "vtc-cls", keep=0.4), torch.no_grad():
        expected = model(**first).logits
        encoded = model.get_image_features(first["pixel_values"])
        model.get_image_features(second["pixel_values"])
        assert torch.equal(model(**text, mm_encoder_outputs={"image": encoded}).logits, expected)


@since_5_19
def test_features_encoded_before_wrapping_are_refused() -> None:
    model = built("llava")
    inputs = FAMILIES["llava"].inputs(model, "single")
    with torch.no_grad():
        outputs = model.get_image_features(inputs.pop("pixel_values"))
        with (
            mmcompress.wrap(model, "todre", keep=0.4),
            pytest.raises(UnsupportedError, match="not encoded by the wrapped model"),
        ):
            model(**inputs, mm_encoder_outputs={"image": outputs})


def test_features_as_a_tuple_are_passed_through() -> None:
    model = built("llava")
    pixels = FAMILIES["llava"].inputs(model, "single")["pixel_values"]
    with mmcompress.wrap(model, "todre", keep=0.4), torch.no_grad():
        assert isinstance(model.get_image_features(pixels, return_dict=False), tuple)


def test_switching_between_positions_in_a_conversation() -> None:
    """Later turns count on from where the turns before them ended, whoever removed what."""
    model = built("llava")
    inputs = {key: value for key, value in FAMILIES["llava"].inputs(model, "single").items() if key != "attention_mask"}
    seen: list[torch.Tensor] = []
    decoder = model.model.language_model
    with mmcompress.wrap(model, "todre(parts=first)", keep=0.4, positions="renumber"):
        first = model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, return_dict_in_generate=True)
    stored = first.past_key_values.layers[0].keys.shape[-2]
    ids = torch.cat([first.sequences, inputs["input_ids"][:, 1:]], dim=1)
    with mmcompress.wrap(model, "todre(parts=first)", keep=0.4, positions="original"):
        hook = decoder.rotary_emb.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs.get("position_ids", args[1] if len(args) > 1 else None)),
            with_kwargs=True,
        )
        model.generate(
            input_ids=ids,
            pixel_values=inputs["pixel_values"],
            past_key_values=first.past_key_values,
            max_new_tokens=3,
            min_new_tokens=3,
        )
        hook.remove()
    ends = [int(positions.max()) for positions in seen]
    assert int(seen[0].min()) == stored, "the first turn took positions 0..stored-1"
    assert ends == list(range(ends[0], ends[0] + len(ends))), "every step goes on by one"


def test_caches_follow_their_rows() -> None:
    model = built("llava")
    inputs = FAMILIES["llava"].inputs(model, "images")
    length = inputs["input_ids"].shape[1]
    with mmcompress.wrap(model, "todre", keep=0.4), torch.no_grad():
        output = model(**inputs, use_cache=True)
        token = output.logits[:, -1:].argmax(-1)
        whole = copy.deepcopy(output.past_key_values)
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], dim=1)
        where = {"position_ids": mask.sum(1, keepdim=True) - 1}
        expected = model(input_ids=token, past_key_values=whole, attention_mask=mask, **where).logits
        picked = output.past_key_values
        picked.batch_repeat_interleave(2)
        picked.batch_select_indices(torch.tensor([3, 0]))
        chosen = torch.tensor([1, 0])
        got = model(
            input_ids=token[chosen],
            past_key_values=picked,
            attention_mask=mask[chosen],
            position_ids=where["position_ids"][chosen],
        ).logits
    assert picked.get_seq_length() == length + 1
    torch.testing.assert_close(got, expected[chosen], atol=1e-5, rtol=0)


def test_a_compressed_cache_needs_a_wrapped_model() -> None:
    model = built("llava")
    inputs = FAMILIES["llava"].inputs(model, "images")
    with mmcompress.wrap(model, "todre", keep=0.4), torch.no_grad():
        output = model(**inputs, use_cache=True)
    with pytest.raises(UnsupportedError, match="go on with it on a wrapped model"), torch.no_grad():
        model(input_ids=torch.tensor([[40], [41]]), past_key_values=output.past_key_values)


def test_wrapped_models_are_not_copied() -> None:
    model = FAMILIES["llava"].build("sdpa")
    with mmcompress.wrap(model, "todre", keep=0.4):
        for attempt in (copy.deepcopy, pickle.dumps):
            with pytest.raises(UnsupportedError, match="unwrap it first"):
                attempt(model)
    copy.deepcopy(model)


@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_compiled_forward_passes(name: str) -> None:
    model = built(name)
    inputs = FAMILIES[name].inputs(model, "images")
    with mmcompress.wrap(model, "todre", keep=0.4), torch.no_grad():
        expected = model(**inputs, use_cache=False).logits
        torch.compiler.reset()
        compiled = torch.compile(model, backend="eager")(**inputs, use_cache=False).logits
    torch.testing.assert_close(compiled, expected, atol=1e-5, rtol=0)


def test_text_turns_are_not_booked_on_an_image() -> None:
    model = built("llava")
    with mmcompress.wrap(model, "todre", keep=0.4) as handle:
        greedy(model, FAMILIES["llava"].inputs(model, "single"))
        before = handle.stats.seconds
        greedy(model, {"input_ids": torch.tensor([[1, 20, 21, 22]])})
        model.get_image_features(FAMILIES["llava"].inputs(model, "single")["pixel_values"])
        assert handle.stats.seconds == before


@pytest.mark.parametrize("size", [(10, 1000), (1000, 10)])
@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_extreme_aspect_ratios(name: str, size: tuple[int, int]) -> None:
    model = built(name)
    tiles = 1 + math.prod(side // SIDE for side in select_best_resolution(size, model.config.image_grid_pinpoints))
    media = {"pixel_values": torch.randn(1, tiles, 3, SIDE, SIDE), "image_sizes": torch.tensor([size])}
    tokens = len(model.get_image_features(**media).pooler_output[0])
    ids = torch.tensor([[1, 20, *[IMAGE] * tokens, 30, 31]])
    with mmcompress.wrap(model, "todre", keep=0.4) as handle:
        greedy(model, {"input_ids": ids, **media})
        (item,), (trace,) = handle.stats.items, handle.trace
    assert item.tokens + item.separators == tokens
    assert sum(rows * columns for rows, columns in trace.grids) == item.tokens
    assert all(rows and columns for rows, columns in trace.grids)


@pytest.mark.parametrize("name", FAMILIES)
def test_published_configurations_can_be_wrapped(name: str) -> None:
    """At the size a family's config class defaults to, without weights."""
    config = transformers.AutoConfig.for_model(name)
    text = config.get_text_config()
    text.num_hidden_layers, text.pad_token_id = 1, None
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(config)
    with mmcompress.wrap(model, "todre(parts=first)", keep=0.25) as handle:
        assert handle.positions == ("original" if name.startswith("qwen") else "renumber")
        assert handle.needs.cls_rows == {"llava": (22,), "llava_next": (22,), "internvl": (23,)}.get(name, ())


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl"])
def test_packed_sequences_are_refused(kind: str) -> None:
    model = built(kind)
    inputs = FAMILIES[kind].inputs(model, "single")
    twice = {"input_ids": inputs["input_ids"].repeat(1, 2), "pixel_values": torch.cat([inputs["pixel_values"]] * 2)}
    if "image_grid_thw" in inputs:
        twice["image_grid_thw"] = inputs["image_grid_thw"].repeat(2, 1)
    places = torch.arange(inputs["input_ids"].shape[1]).repeat(2)[None]
    places = places if kind == "llava" else places.expand(4, 1, -1)
    with mmcompress.wrap(model, "uniform", keep=1.0), torch.no_grad():
        with pytest.raises(UnsupportedError, match="packed into one row cannot be compressed"):
            model(**twice, position_ids=places, use_cache=False)
        with pytest.raises(UnsupportedError, match="packed into one row cannot be compressed"):
            model(**twice, cu_seq_lens_q=torch.tensor([0, 1]), use_cache=False)
        model(**inputs)


@since_5_19
def test_features_of_another_image_or_wrap_are_refused() -> None:
    """accelerate rebuilds outputs without their label: the last encoded are meant, if these are they."""
    model = built("llava")
    inputs = FAMILIES["llava"].inputs(model, "single")
    pixels = inputs.pop("pixel_values")
    with mmcompress.wrap(model, "vtc-cls", keep=0.4), torch.no_grad():
        first = model.get_image_features(pixels)
        expected = model(**inputs, mm_encoder_outputs={"image": first}).logits
        rebuilt = type(first)(**first)
        assert torch.equal(model(**inputs, mm_encoder_outputs={"image": rebuilt}).logits, expected)
        model.get_image_features(pixels.flip(-1))
        with pytest.raises(UnsupportedError, match="not encoded by the wrapped model"):
            model(**inputs, mm_encoder_outputs={"image": type(first)(**first)})
    with (
        mmcompress.wrap(model, "uniform", keep=0.9),
        torch.no_grad(),
        pytest.raises(UnsupportedError, match="not encoded by the wrapped model"),
    ):
        model(**inputs, mm_encoder_outputs={"image": first})


def test_positional_pixels_are_seen() -> None:
    model = built("llava")
    inputs = FAMILIES["llava"].inputs(model, "single")
    with mmcompress.wrap(model, "uniform", keep=0.4) as handle, torch.no_grad():
        expected = model.model(**inputs).last_hidden_state
        ids, pixels = inputs.pop("input_ids"), inputs.pop("pixel_values")
        assert torch.equal(model.model(ids, pixels, **inputs).last_hidden_state, expected)
        assert handle.stats is not None


@pytest.mark.parametrize("method", ["fastv", "sparsevlm"])
def test_what_goes_by_the_prompt_needs_the_model_that_knows_it(method: str) -> None:
    model = built("llava")
    with pytest.raises(UnsupportedError, match="LlavaModel does not know where it ends; wrap the model that generates"):
        mmcompress.wrap(model.model, method, keep=0.4)
    with pytest.raises(UnsupportedError, match="does not know where it ends"):
        mmcompress.wrap(model.model, kv="snapkv(keep=0.5)")
    mmcompress.wrap(model.model, "uniform", keep=0.4).unwrap()


def test_a_wrap_that_fails_leaves_no_hook() -> None:
    model = built("llava")
    hooks = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]
    with pytest.raises(SpecError, match="there is no such folder"):
        mmcompress.wrap(model, ["cdpruner(keep=0.4, text_tower=/nowhere)", "fastv(keep=0.4)"], kv="snapkv(keep=0.5)")
    assert [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()] == hooks
    assert not any("mmcompress_tap" in vars(getattr(module, "config", None) or object) for module in model.modules())
    copy.deepcopy(model)


@pytest.mark.parametrize("method", ["visionzip", "fastv", "tome"])
def test_parts_of_a_wrapped_model_are_not_copied(method: str) -> None:
    """PEFT's `modules_to_save` copies the projector."""
    model = built("llava")
    with mmcompress.wrap(model, method, keep=0.4):
        hooked = next(module for module in model.modules() if module._forward_pre_hooks or module._forward_hooks)
        with pytest.raises(UnsupportedError, match="cannot be copied or pickled, nor its parts"):
            copy.deepcopy(hooked)


def test_an_emptied_cache_is_anybodys() -> None:
    model = built("llava")
    inputs = FAMILIES["llava"].inputs(model, "single")
    expected = model.generate(**inputs, max_new_tokens=3)
    cache = StaticCache(config=model.config.text_config, max_cache_len=64)
    with mmcompress.wrap(model, "uniform", keep=0.4):
        model.generate(**inputs, **{CACHE: cache}, max_new_tokens=3)
    cache.reset()
    assert torch.equal(model.generate(**inputs, **{CACHE: cache}, max_new_tokens=3), expected)
