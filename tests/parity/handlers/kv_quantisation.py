"""Policies that hold the KV cache in few bits."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from parity.handlers.base import Handler, Kept, Outputs
from safetensors.torch import save_file
from torch import Tensor

from mmcompress import ops
from mmcompress.kv_policy import Block, KVRow, Packed, Quantiser
from mmcompress.policies.zipcache import ZipCache
from mmcompress.registry import POLICIES

if TYPE_CHECKING:
    from parity.cases import Case

SMALLEST_GAP = 1e-6
Pack, Unpack = Callable[[Block], Packed], Callable[[Packed], Tensor]


def kivi(case: Case) -> Outputs:
    """Codes, scales, offsets and what is read, at every number of bits."""
    outputs = {}
    for bits in _bits(case, r"k(\d+)_code"):
        options = {"bits": bits, "group": case.params["group"], "residual": case.params["residual_length"]}
        policy = POLICIES.build("kivi", options)
        for name, pack, unpack in _halves(policy):
            dim = -2 if name == "k" else -1
            packed = pack(Block(case.inputs[name]))
            codes, low, high = packed.parts
            # The published words run along the tokens for keys.
            along = ops.unpack_bits(codes, bits).transpose(dim, -1)
            outputs |= {
                f"{name}{bits}_code": ops.pack_bits(along, bits).view(torch.int32).transpose(dim, -1),
                f"{name}{bits}_scale": ((high - low) / (2**bits - 1)).unsqueeze(dim),
                f"{name}{bits}_min": low.unsqueeze(dim),
                f"{name}{bits}_deq": unpack(packed),
            }
    return outputs


def zipcache(case: Case) -> Outputs:
    """Saliency under either normaliser and of all queries, both classes of tokens, and all that is held of them."""
    params, inputs = case.params, case.inputs

    class Recorded(ZipCache):
        def probes(self, row: KVRow) -> Tensor:
            """The probes of the case."""
            return inputs["probe_ids"].long()

    options = {"high_bits": params["high_bits"], "low_bits": params["low_bits"]}
    policy = Recorded(**options, low_ratio=params["unimportant_ratio"], compat="official")
    key, value = inputs["k"], inputs["v"]
    _, heads, tokens, dim = key.shape
    place = torch.arange(tokens).expand(heads, -1)
    row = KVRow(0, 1, key[0], value[0], place, torch.zeros_like(place, dtype=torch.bool), tokens, dim**-0.5)
    row = replace(row, query=inputs["q"][0])
    saliency = policy.saliency(row)
    chosen = policy.pack_keys(Block(key, saliency=saliency[None])).parts[6]
    salient = ops.unpack_bits(chosen, 1)[0, :, :tokens].bool()
    outputs: dict[str, Tensor | Kept] = {
        "saliency_probe": saliency[None],
        "saliency_probe_exact_nnz": replace(policy, compat="none").saliency(row)[None],
        "saliency_full": ZipCache(recent=1.0, random=0.0).saliency(row)[None],
        "important_ids": Kept([head.nonzero()[:, 0] for head in salient], saliency),
        "unimportant_ids": Kept([(~head).nonzero()[:, 0] for head in salient], saliency),
    }
    # The published tensors have the tokens that are not salient in the order of their scores.
    unimportant = _up_to_ties(case.expected["unimportant_ids"].long(), saliency[None])
    classes = torch.ones_like(saliency[None]).scatter(-1, unimportant, 0.0)
    important = classes.argsort(dim=-1, descending=True, stable=True)[..., : tokens - unimportant.shape[-1]]
    order = torch.cat([important, unimportant], dim=-1)
    classes = classes.gather(-1, order)
    for name, pack, unpack in _halves(policy):
        packed = pack(Block(inputs[name].take_along_dim(order[..., None], dim=2), saliency=classes))
        read = unpack(packed).take_along_dim(order.argsort(dim=-1)[..., None], dim=2)
        high, low = (packed.parts[:3], options["high_bits"]), (packed.parts[3:6], options["low_bits"])
        for label, ((codes, least, most), bits) in (("imp", high), ("unimp", low)):
            held = {
                f"{name}_codes_{label}": _in_strides(codes, bits),
                f"{name}_min_{label}": least,
                f"{name}_step_{label}": (most - least) / (2**bits - 1),
            }
            outputs |= {entry: part.view(case.expected[entry].shape) for entry, part in held.items()}
        outputs[f"{name}_dequant"] = read
    outputs["v_channel_scale"] = packed.parts[7].flatten()[None, None]
    separable, plain = ZipCache(high_bits=4, low_ratio=0.0), POLICIES.build("int4", {})
    merged = value.transpose(1, 2).flatten(2)[:, None]
    merged = plain.unpack_values(plain.pack_values(Block(merged)))
    return outputs | {
        "v_cst4_dequant": separable.unpack_values(separable.pack_values(Block(value, saliency=classes))),
        "v_token4_dequant": merged.unflatten(3, (heads, dim))[:, 0].transpose(1, 2),
    }


def kvquant(case: Case) -> Outputs:
    """Outliers, and what is read with the centroids of the case, at every number of bits, with and without sinks."""
    states, outputs = {name: case.inputs[f"{name}_test"] for name in "kv"}, {}
    for bits in _bits(case, r"k_nuq(\d+)_dequant"):
        for name, pack, unpack in _halves(_calibrated(case, bits)):
            packed = pack(Block(states[name][None]))
            _, _, channels, counts = packed.parts[:4]
            token = torch.arange(len(states[name])).repeat_interleave(counts.long())
            mask = torch.zeros_like(states[name], dtype=torch.uint8)
            mask[token, channels.long()] = 1
            outputs |= {f"{name}_outlier_mask": mask, f"{name}_nuq{bits}_dequant": unpack(packed)[0]}
    for entry, bits, sinks in _numbers(case, r"k_nuq(\d+)_sink(\d+)_dequant"):
        policy = _calibrated(case, bits, sinks)
        packed = policy.pack_keys(Block(states["k"][None, policy.sinks :]))
        outputs[entry] = torch.cat([states["k"][: policy.sinks], policy.unpack_keys(packed)[0]])
    halves = [name for name, tensor in case.sidecar["tensors"].items() if tensor["dtype"] == "float16"]
    return {name: value.half() if name in halves else value for name, value in outputs.items()}


def _calibrated(case: Case, bits: int, sinks: int = 0) -> Quantiser:
    """The policy with a file of one layer, read before it goes."""
    tables = {
        "key_lower": case.inputs["k_thr_lower"],
        "key_upper": case.inputs["k_thr_upper"],
        "key_centroids": case.inputs[f"k_nuq{bits}_centroids_sorted"],
        "value_centroids": case.inputs[f"v_nuq{bits}_centroids_sorted"],
    }
    with TemporaryDirectory() as folder:
        path = str(Path(folder) / "calibration.safetensors")
        save_file({name: table[None].contiguous() for name, table in tables.items()}, path)
        options = {"calibration": path, "outliers": 1 - case.params["sparsity_threshold"], "sinks": sinks}
        policy: Quantiser = POLICIES.build("kvquant", options)
        policy.pack_keys(Block(case.inputs["k_test"][None]))
    return policy


def _halves(policy: Quantiser) -> Iterator[tuple[str, Pack, Unpack]]:
    yield "k", policy.pack_keys, policy.unpack_keys
    yield "v", policy.pack_values, policy.unpack_values


def _bits(case: Case, pattern: str) -> list[int]:
    return [bits for _, bits in _numbers(case, pattern)]


def _numbers(case: Case, pattern: str) -> list[tuple]:
    """Names of outputs that have the form `pattern`, with the numbers in them."""
    found = [re.fullmatch(pattern, name) for name in case.outputs]
    return [(match[0], *map(int, match.groups())) for match in found if match]


def _up_to_ties(published: Tensor, scores: Tensor) -> Tensor:
    """The lowest of `scores` in rising order; as published, if that differs from ours by near-ties alone."""
    order = scores.argsort(dim=-1, stable=True)[..., : published.shape[-1]]
    apart = (scores.gather(-1, order) - scores.gather(-1, published)).abs().max()
    return published if float(apart) < SMALLEST_GAP else order


def _in_strides(codes: Tensor, bits: int) -> Tensor:
    """Packed as published: a byte has one code of each of the equal parts that the channels are cut into."""
    parts = ops.unpack_bits(codes, bits).unflatten(-1, (8 // bits, -1))
    return ops.pack_bits(parts.transpose(-1, -2).flatten(-2), bits)


HANDLERS = {
    "kivi_": Handler("kivi", kivi, inputs=("k", "v")),
    "zipcache_": Handler("zipcache", zipcache, inputs=("q", "k", "v", "probe_ids"), others=("int4",)),
    "kvquant_": Handler(
        "kvquant",
        kvquant,
        unchecked={"k_int4_zp_dequant": "the authors' baseline, which is no policy here"},
        inputs=("?_calib", "?_fisher", "?_test", "k_thr_*", "*_centroids_sorted"),
    ),
}
