"""What is refused when vLLM starts, before there is an engine, and what the front end then does with images."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from configured import configured
from kept import make
from PIL import Image
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.multimodal import MULTIMODAL_REGISTRY

from mmcompress.errors import InputError
from mmcompress.evals.micro import model_path
from mmcompress.integrations.vllm.doctor import outlook
from mmcompress.integrations.vllm.model import _decode, _encode
from mmcompress.integrations.vllm.plugin import register
from mmcompress.integrations.vllm.settings import KEEP, Settings

pytestmark = pytest.mark.slow

PICTURE = Image.new("RGB", (224, 224), "red")
PROMPT = "<s> USER: <image> what is this ? ASSISTANT:"


def process(config: Any, prompt: str = PROMPT, pictures: int = 1, uuids: Any = None, **options: Any) -> Any:
    """What the front end makes of a prompt."""
    processor = MULTIMODAL_REGISTRY.create_processor(config.model_config)
    items = processor.info.parse_mm_data({"image": [PICTURE] * pictures})
    return processor(prompt, items, uuids, hf_processor_mm_kwargs=options)


@pytest.fixture(scope="module")
def qwen() -> Path:
    return model_path("micro-qwen2.5-vl")


def test_processors_of_one_server_share_what_they_need() -> None:
    """vLLM makes one for every request with an image."""
    config = configured({"method": "hired", "keep": 0.2}).model_config
    first, second = (MULTIMODAL_REGISTRY.create_processor(config) for _ in range(2))
    assert first.compression is second.compression
    other = MULTIMODAL_REGISTRY.create_processor(configured({"method": "hired", "keep": 0.3}).model_config)
    assert other.compression is not first.compression


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        ("hired", 'give {"method": "hired", "keep": 0.2}'),
        ({"method": "hired", "kep": 0.2}, "unknown config entry 'kep'. Did you mean 'keep'?"),
        ({"method": "hirde", "keep": 0.2}, "unknown method 'hirde'. Did you mean 'hired'?"),
        ({"keep": 0.2}, "keep and method options go with exactly one method"),
        ({}, 'give a "method"'),
        ({"method": "hired"}, "hired needs keep="),
        ({"method": "hired", "keep": float("nan")}, "keep=nan is out of range"),
        ({"method": "hired", "keep": 1.5}, "keep=1.5 is out of range"),
        ({"method": "hired(alpha=a)", "keep": 0.2}, "option"),
        ({"method": "fastv", "keep": 0.2}, "removes tokens inside the LLM"),
        ({"method": "tome", "keep": 0.2}, "between the layers of the vision encoder"),
        ({"method": "todre", "keep": 0.2}, "give todre(parts=first)"),
        ({"method": "pool", "keep": 0.2}, "vLLM must know their number"),
        ({"method": ["hired(keep=0.2)", "fastv(keep=0.5)"]}, "removes tokens inside the LLM"),
        ({"method": ["hired(keep=0.2)", "random(keep=0.5)"]}, "both decide what enters the LLM"),
        ({"method": "hired", "keep": 0.2, "kv": "snapkv(keep=64)"}, "KV policy snapkv lets layers or heads hold"),
        ({"method": "hired", "keep": 0.2, "positions": "original"}, "positions=original cannot be had"),
        ({"method": "hired", "keep": 0.2, "keep_range": 0.5}, "keep_range=0.5 must be"),
        ({"method": "hired", "keep": 0.2, "keep_range": [0.5, 0.1]}, "must ascend"),
        ({"method": "hired", "keep": 0.2, "keep_range": [1, 64]}, "keep must be a count from 1 to 64, not 0.2"),
        ({"method": "cdpruner", "keep": 0.2}, "cdpruner needs text_tower="),
        ({"method": "specpc(draft=nowhere)", "keep": 0.2}, "asks a smaller model first"),
    ],
    ids=str,
)
def test_wrong_requests_are_refused(wanted: Any, reason: str) -> None:
    with pytest.raises(Exception) as refused:
        configured(wanted)
    assert reason in str(refused.value)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"limit_mm_per_prompt": {"image": 0}}, "no images are allowed"),
        ({"mm_processor_kwargs": {KEEP: 0.1}}, "is for requests"),
        ({"enable_mm_embeds": True}, "embeddings that clients send"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "--speculative-config"),
        ({"enable_lora": True, "enable_tower_connector_lora": True}, "--enable-tower-connector-lora"),
        ({"compilation_config": {"cudagraph_mm_encoder": True}}, "cudagraph_mm_encoder"),
        ({"compilation_config": {"compile_mm_encoder": True}}, "compile_mm_encoder"),
        ({"mm_encoder_tp_mode": "data"}, "--mm-encoder-tp-mode data"),
        ({"pipeline_parallel_size": 2}, "use --tensor-parallel-size"),
        ({"ubatch_size": 2}, "--ubatch-size"),
        ({"compilation_config": {"cudagraph_mode": "FULL"}}, "FULL_AND_PIECEWISE"),
        ({"max_num_batched_tokens": 32, "max_num_seqs": 32}, "raise --max-num-batched-tokens above --max-num-seqs"),
        ({"long_prefill_token_threshold": 1}, "--long-prefill-token-threshold above 1"),
        ({"video_pruning_rate": 0.5}, "--video-pruning-rate"),
    ],
    ids=str,
)
def test_engines_that_stand_against_it_are_refused(settings: dict[str, Any], reason: str, qwen: Path) -> None:
    with pytest.raises(Exception) as refused:
        configured({"method": "hiprune", "keep": 0.2}, qwen, **settings)
    assert reason in str(refused.value)


def test_the_doctor_counts_the_tokens_of_the_model() -> None:
    assert "keeps 51 of 256 tokens" in outlook(str(model_path()), {"method": "hired", "keep": 0.2})


def test_methods_without_what_they_need_are_refused(qwen: Path) -> None:
    with pytest.raises(Exception, match="has no CLS token"):
        configured({"method": "hired", "keep": 0.2}, qwen)


def test_other_models_are_refused(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, LlamaConfig

    LlamaConfig(num_hidden_layers=1, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(model_path()).save_pretrained(tmp_path)
    with pytest.raises(Exception, match="LlamaForCausalLM cannot be compressed in vLLM; these can: Llava"):
        configured({"method": "hired", "keep": 0.2}, tmp_path, limit_mm_per_prompt={})


def test_other_releases_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.__version_tuple__", (0, 33, 1))
    with pytest.raises(Exception, match=r"which is made for 0\.32"):
        configured({"method": "hired", "keep": 0.2})


def test_a_vllm_of_another_shape_still_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(VllmConfig, "try_verify_and_update_config")
    register()


@pytest.mark.parametrize("name", ["mmcompres", "mm_compress", "MMCompress", "mm-compress"])
def test_our_entry_must_not_be_misspelt(name: str) -> None:
    config = {name: {"method": "hired", "keep": 0.2}}
    with pytest.raises(Exception, match=f"unknown entry '{name}' of the additional config. Did you mean 'mmcompress'"):
        EngineArgs(model=str(model_path()), max_model_len=1024, additional_config=config).create_engine_config()


def test_entries_of_others_are_theirs() -> None:
    arguments = EngineArgs(model=str(model_path()), max_model_len=1024, additional_config={"compress": 1, "mm": 2})
    config = arguments.create_engine_config()
    assert config.model_config.architecture == "LlavaForConditionalGeneration"


def test_a_server_that_is_refused_never_starts() -> None:
    arguments = ["--model", str(model_path()), "--additional-config.mmcompress.method", "hirde"]
    server = subprocess.run(
        [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments], capture_output=True, text=True
    )
    assert server.returncode != 0
    assert "Did you mean 'hired'?" in server.stderr
    assert "EngineCore" not in server.stdout + server.stderr


def test_one_line_says_what_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(logging.getLogger("vllm.mmcompress"), "info", lambda line, *parts: lines.append(line % parts))
    configured({"method": "hired", "keep": 0.2, "keep_range": [0.1, 0.5]})
    assert lines == [
        "mmcompress: hired(keep=0.2), 51 of 256 tokens of the largest image enter the LLM; "
        "requests may keep 0.1 to 0.5."
    ]


@pytest.mark.parametrize(("keep", "expected"), [(0.2, 51), (1, 1), (1.0, 256), (1e-9, 1), (9999, 256)])
def test_prompts_have_as_many_tokens_as_are_kept(keep: float, expected: int) -> None:
    processed = process(configured({"method": "uniform", "keep": keep}))
    (place,) = processed["mm_placeholders"]["image"]
    assert place.length == processed["prompt_token_ids"].count(place_token(processed, place)) == expected
    assert processed["mm_kwargs"]["image"][0]["mmcompress_counts"].data.tolist() == [expected, expected, 256]


def place_token(processed: Any, place: Any) -> int:
    return int(processed["prompt_token_ids"][place.offset])


def test_newlines_stay_and_are_not_counted(tmp_path: Path) -> None:
    config = configured({"method": "uniform", "keep": 0.25}, make("llava_next", tmp_path))
    (place,) = process(config)["mm_placeholders"]["image"]
    assert place.length == (16 + 64) // 4 + 8  # a thumbnail, 2 x 2 crops, and the ends of their rows


def test_hashes_tell_settings_and_releases_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def hashed(wanted: Any, uuids: Any = None) -> str:
        return str(process(configured(wanted), uuids=uuids)["mm_hashes"]["image"][0])

    one, other = {"method": "uniform", "keep": 0.2}, {"method": "uniform", "keep": 0.3}
    assert hashed(one) == hashed(dict(one))
    assert hashed(one) != hashed(other)
    assert hashed(one, {"image": ["mine"]}) != hashed(other, {"image": ["mine"]})
    before = hashed(one)
    monkeypatch.setattr("mmcompress.__version__", "0.0.0")
    assert hashed(one) != before


def test_requests_change_their_budget_within_the_range() -> None:
    config = configured({"method": "uniform", "keep": 0.2, "keep_range": [0.1, 0.5]})
    usual, less, more = process(config), process(config, **{KEEP: 0.1}), process(config, **{KEEP: 0.5})
    lengths = [processed["mm_placeholders"]["image"][0].length for processed in (usual, less, more)]
    assert lengths == [51, 25, 128]
    assert len({processed["mm_hashes"]["image"][0] for processed in (usual, less, more)}) == 3


@pytest.mark.parametrize("keep", [0.05, 0.6, 1, 64, True, "0.2", None, float("nan"), float("inf"), -1, [0.2], {}])
def test_other_budgets_of_requests_are_refused(keep: Any) -> None:
    config = configured({"method": "uniform", "keep": 0.2, "keep_range": [0.1, 0.5]})
    with pytest.raises(InputError, match="mmcompress_keep="):
        process(config, **{KEEP: keep})


def test_requests_have_no_say_without_a_range() -> None:
    with pytest.raises(InputError, match="lets no request change its budget"):
        process(configured({"method": "uniform", "keep": 0.2}), **{KEEP: 0.2})


def test_unknown_entries_of_requests_are_refused() -> None:
    with pytest.raises(InputError, match="Did you mean 'mmcompress_keep'"):
        process(configured({"method": "uniform", "keep": 0.2}), mmcompress_kep=0.2)


def test_settings_survive_their_way_to_the_workers() -> None:
    wanted = {"method": "vtc-cls(first_layer=1)", "keep": 0.2, "keep_range": [0.1, 0.5]}
    settings = Settings.parse(wanted)
    assert Settings.parse(settings.to_dict()) == settings
    assert configured(wanted).model_config.hf_config.mmcompress == settings.to_dict()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rows_and_columns_travel_exactly(dtype: torch.dtype) -> None:
    offsets = torch.stack([torch.arange(20_000), torch.arange(20_000).flip(0)], dim=1)
    assert torch.equal(_decode(_encode(offsets).to(dtype)), offsets)
