"""Policies that evict entries of the KV cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from parity.handlers.base import Handler, Kept, Outputs
from torch import Tensor
from torch.nn.functional import pad

from mmcompress import ops
from mmcompress.kv_policy import Evictor, KVRow, Rotation
from mmcompress.policies._rotary import rotate
from mmcompress.policies.keyformer import Keyformer
from mmcompress.registry import POLICIES

if TYPE_CHECKING:
    from parity.cases import Case

POOLING = {"avgpool": "avg", "maxpool": "max"}


def snapkv(case: Case) -> Outputs:
    """Scores and kept entries, of every query head where the case knows no groups."""
    params, grouped = case.params, "group_reduction" in case.params
    policy = _policy(case, {**_window_options(params), **_only(params, "group_reduction")})
    row = _row(case, policy, repeat=1 if grouped else case.inputs["q"].shape[1] // case.inputs["k"].shape[1])
    outputs = {
        "score_pooled": policy.score(row)[None, :, : -params["window"]],
        "kept_positions": _kept(policy, row, params["capacity_incl_window"]),
    }
    return outputs if grouped else {**outputs, "score_raw": policy.observed_attention(row)[None, :, 0]}


def adakv(case: Case) -> Outputs:
    """Scores, entries per head and kept entries, head after head."""
    params = case.params
    assert (params["normalize"], params["skip"]) == (None, 0)
    options = {"floor": params["floor_alpha"], "group_reduction": params["group_reduction"]}
    policy = _policy(case, {**_window_options(params), **options})
    row = _row(case, policy)
    kept = _kept(policy, row, params["base_capacity_incl_window"])
    lengths = torch.tensor([len(indices) for indices in kept.indices])
    return {
        # The published code averages over the window.
        "score_pooled": policy.score(row)[None, :, : -params["window"]] / params["window"],
        "head_lens": lengths,
        "cu_klen": torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]),
        "kept_flat": kept,
    }


def pyramidkv(case: Case) -> Outputs:
    """Budgets of all layers."""
    outputs = {}
    for number, given in enumerate(case.sidecar["rows"]):
        policy = _policy(case, {"window": given["window"], "beta": given["beta"]})
        states = torch.zeros(1, given["T"], 1)
        rows = [replace(_held(states, states), layer=layer, layers=given["L"]) for layer in range(given["L"])]
        budgets = torch.tensor([policy.budget(row, given["capacity_incl_window"]) for row in rows])
        outputs |= {f"rows.{number}.kept_per_layer_official": budgets, f"rows.{number}.total": budgets.sum()}
    return outputs


def h2o(case: Case) -> Outputs:
    """Column sums over a prompt, what normalises them, and kept entries before the window."""
    params = case.params
    options = {"recent": params["window"], "group_reduction": params["group_reduction"], "schedule": "prefill"}
    policy = _policy(case, options)
    row = _row(case, policy)
    row = replace(row, observed=policy.observe(row))
    kept = _kept(policy, row, params["capacity_incl_window"])
    return {
        "lse": ops.attention_lse(case.inputs["q"], case.inputs["k"], row.scaling, row.last_seen),
        "colsum": row.column_sums().flatten(0, 1)[None],
        "score_kvhead": policy.score(row)[None, :, : -params["window"]],
        "kept_prefix": Kept([indices[: -params["window"]] for indices in kept.indices], kept.scores),
    }


def h2o_streaming(case: Case) -> Outputs:
    """Scores and kept entries after every step; with the published masks also what the last token reads."""
    params = case.params
    heavy, recent = (int(params[f"{kind}_ratio"] * params["prompt"]) for kind in ("heavy", "recent"))
    masked = _policy(case, {"recent": recent, "compat": "official"})
    dropped = _policy(case, {"recent": params["recent_size"]})
    outputs: dict[str, Tensor | Kept] = {}
    for step, (row, kept) in enumerate(_steps(masked, case, heavy + recent)):
        with_oldest = torch.stack(replace(masked, compat="none").select(row, heavy + recent))
        outputs |= {
            f"mask_score_{step}": _by_place(row, with_oldest),
            f"mask_next_{step}": _next_mask(row, kept),
            f"mask_out_{step}": _read(row),
        }
    for step, (row, kept) in enumerate(_steps(dropped, case, params["hh_size"] + params["recent_size"])):
        outputs |= {
            f"drop_score_{step}": row.observed.gather(1, kept),
            f"drop_kept_{step}": Kept(list(row.place.gather(1, kept)), _by_place(row)),
        }
    return outputs


def keyformer(case: Case) -> Outputs:
    """Scores, kept entries and what the last token reads, after every step."""
    params = case.params
    keep = int(params["prompt"] * params["kv_cache_pct"] / 100)
    recent = int(keep * params["recent_pct"] / 100)
    assert params["req_tokens"] == [recent, keep - recent]

    class Recorded(Keyformer):
        def noise(self, row: KVRow, queries: Tensor) -> Tensor:
            """The noise of the case; none if it has none."""
            noise = case.inputs.get(f"noise_{row.generated}", torch.zeros(1, *row.query.shape[:2], row.seen))
            at_entries = row.place[:, None].expand(-1, len(queries), -1)
            return noise[0, :, queries - row.seen].gather(2, at_entries)[:, None]

    policy = Recorded(
        recent=recent,
        temperature=params["tau_init"],
        temperature_step=params["tau_delta"],
        compat="official",
    )
    outputs = {}
    for step, (row, kept) in enumerate(_steps(policy, case, keep)):
        outputs |= {
            f"score_{step}": _by_place(row, kept),
            f"mask_{step}": _next_mask(row, kept),
            f"out_{step}": _read(row)[None],
        }
    return outputs


def streamingllm(case: Case) -> Outputs:
    """Kept entries, with and without room for coming tokens, and keys rotated to where they come to stand."""
    params = case.params
    policy, keep = _policy(case, {"sinks": params["sink"]}), params["sink"] + params["recent"]
    row = _row(case, policy)
    outputs = {}
    for name in case.outputs:
        if name.startswith("kept"):
            room = int(name.removeprefix("kept").removeprefix("_evict_for_space_") or 0)
            outputs[name] = Kept(policy.select(row, keep - room)[:1], policy.score(row)[:1])
    keys, _ = policy.hold(row, policy.select(row, keep))
    stored = case.expected["k_rerotated"].shape[2]
    return {**outputs, "k_rerotated": torch.stack(keys)[None, :, :: keep // stored]}


def kvpress(case: Case) -> Outputs:
    """Scores and kept entries of the policies that are built."""
    params = case.params
    key, value, unrotated = (case.inputs[name][0] for name in ("k", "v", "q_pre"))
    rotation = _rotation(params["rope_theta"], key.shape[-1])
    query = rotate(unrotated, rotation(torch.arange(key.shape[1])))
    row = replace(_held(key, value), unrotated=unrotated, rotation=rotation)
    keep = int(row.entries * (1 - params["compression_ratio"]))
    expected = {"future": params["n_future_positions"], "sinks": params["n_sink"]}
    without = {**expected, "covariance": False, "epsilon": 0.01}  # which the sidecar does not tell
    policies = {
        "expected_attention": POLICIES.build("expected-attention", expected),
        "expected_attention_nocov": POLICIES.build("expected-attention", without),
        "keydiff": POLICIES.build("keydiff", {}),
        "snapkv_w32": POLICIES.build("snapkv", {"window": 32}),
    }
    outputs = {}
    for name, policy in policies.items():
        row = replace(row, query=_asked(policy, query))
        # kvpress averages over the window, and puts what must stay above all others.
        scores = policy.score(row) / (32 if name == "snapkv_w32" else 1)
        scores = scores.masked_fill(policy.protected(row, keep), float(scores.max()) + 1)
        outputs |= {f"score_{name}": scores[None], f"kept_{name}": Kept(policy.select(row, keep), scores)}
    moved = policies["keydiff"].select(row, case.expected["keyrerot_keydiff_k"].shape[2])
    held = POLICIES.build("streamingllm", {"compat": "official"}).hold(row, moved)
    return outputs | {
        f"keyrerot_keydiff_{name}": torch.stack(part)[None] for name, part in zip("kv", held, strict=True)
    }


def h2o_merge(case: Case) -> Outputs:
    """Kept entries before the window, and keys and values of what stays with the rest merged in."""
    params, window = case.params, case.params["window"]
    policy = _policy(case, {"recent": window, "group_reduction": params["group_reduction"]})
    row = _row(case, policy)
    row = replace(row, observed=policy.observe(row))
    kept = _kept(policy, row, params["capacity_incl_window"])
    ranked = _ranked(policy.score(row), window)[:, : params["capacity_incl_window"] - window]
    keys, values = _in_order(policy.hold(row, kept.indices), kept.indices, ranked, row)
    return {
        "kept_prefix": Kept([indices[:-window] for indices in kept.indices], kept.scores),
        "k_out": keys,
        "v_out": values,
    }


def lookm(case: Case) -> Outputs:
    """Kept entries, and keys and values of what stays with the rest merged in."""
    params = case.params
    tokens = case.inputs["k"].shape[2]
    heavy, recent = int(tokens * params["budget"] * 0.9), int(tokens * params["budget"] * 0.1)
    policy = _policy(case, {"recent": recent, "group_reduction": params["group_reduction"]})
    row = _row(case, policy)
    row = replace(row, observed=policy.observe(row), visual=case.inputs["image_mask"].bool().expand_as(row.visual))
    kept = policy.select(row, heavy + recent)
    keys, values = (torch.stack(part)[None] for part in policy.hold(row, kept))
    mask = torch.zeros_like(row.visual).scatter(1, torch.stack(kept), True)
    return {"keep_mask": mask, "k_out": keys, "v_out": values}


def ems(case: Case) -> Outputs:
    """Scores, the three classes of entries, and keys and values of what stays."""
    params, window = case.params, case.params["window"]
    important, merging = params["budget_incl_window"] - window, params["merge_sources"]
    options = {"window": window, "merged": merging / important, "threshold": params["tau"]}
    policy: Any = _policy(case, options)
    row = _row(case, policy)
    row = replace(row, observed=policy.observe(row))
    kept, scores = policy.select(row, params["budget_incl_window"]), policy.score(row)
    ranked = _ranked(scores, window)
    centres, sources = ranked[:, :important], ranked[:, important : important + merging]
    similarities = [policy.redundancy(*parts) for parts in zip(row.key, row.value, sources, centres, strict=True)]
    redundancy, target = (torch.stack(parts) for parts in zip(*similarities, strict=True))
    keys, values = _in_order(policy.hold(row, kept), kept, centres, row)
    overall, local = policy.attention(row)
    return {
        "score_global": overall[None],
        "score_local_aligned": local[None],
        "score": scores[None, :, :-window],
        "important": Kept([indices[:-window] for indices in kept], scores),
        "merge_src": Kept(list(sources.sort(dim=1).values), scores),
        "redundancy": redundancy[None],
        "merge_class": target.where(redundancy >= params["tau"], important)[None],
        "k_out": keys,
        "v_out": values,
    }


def tgv_kv(case: Case) -> Outputs:
    """What every layer keeps for all heads, by score and by how much its text attends to images."""
    params, layers = case.params, range(case.params["layers"])
    image = slice(params["image_start"], params["image_start"] + params["visual"])
    policy: Any = _policy(case, {"sinks": params["start_size"], "recent": params["protect"]})
    rows = []
    for layer in layers:
        query, key = (case.inputs[f"{name}_{layer}"][0] for name in "qk")
        row = _held(key, key, query[:, image.stop :])
        row.visual[:, image] = True
        rows.append(replace(row, layer=layer, layers=len(layers)))
    masses = torch.stack([policy.mass(row) for row in rows])
    rows = [replace(row, masses=masses) for row in rows]
    outputs: dict[str, Tensor | Kept] = {"layer_text_image_mass": masses}
    for layer, row in enumerate(rows):
        outputs[f"visual_score_{layer}"] = policy.score(row)[0, image]
    for ratio in (name.removeprefix("layer_forget_ratio_r") for name in case.outputs if "forget_ratio" in name):
        stay = 1 - float(ratio)
        outputs[f"layer_forget_ratio_r{ratio}"] = (1 - stay * len(layers) * masses / masses.sum()).clamp_min(0)
        for layer, row in enumerate(rows):
            kept = _kept(policy, row, round(stay * row.entries))
            outputs[f"kept_r{ratio}_{layer}"] = Kept(kept.indices[:1], kept.scores[:1])
    return outputs


def _policy(case: Case, options: Mapping[str, Any]) -> Evictor:
    policy: Evictor = POLICIES.build(case.handler.method, {**case.handler.options, **options})
    return policy


def _window_options(params: Mapping[str, Any]) -> dict[str, Any]:
    return {"window": params["window"], "kernel": params["kernel"], "pooling": POOLING[params["pooling"]]}


def _only(params: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: params[name] for name in names if name in params}


def _held(key: Tensor, value: Tensor, query: Tensor | None = None) -> KVRow:
    """A prompt `[kv_heads, tokens, dim]` of text."""
    place = torch.arange(key.shape[1]).expand(len(key), -1)
    visual = torch.zeros_like(place, dtype=torch.bool)
    return KVRow(0, 1, key, value, place, visual, key.shape[1], key.shape[2] ** -0.5, query=query)


def _row(case: Case, policy: Evictor, repeat: int = 1) -> KVRow:
    """The prompt of a case with the queries that are asked for, every KV head `repeat` times."""
    key, value = (case.inputs[name][0].repeat_interleave(repeat, dim=0) for name in "kv")
    rotation = _rotation(case.params.get("rope_theta", 10000.0), key.shape[-1])
    return replace(_held(key, value, _asked(policy, case.inputs["q"][0])), rotation=rotation)


def _asked(policy: Evictor, query: Tensor) -> Tensor:
    """Those of all queries of a prompt that are asked for."""
    count = policy.needs().queries
    return query if count == "all" else query[:, query.shape[1] - count :]


def _rotation(base: float, dim: int) -> Rotation:
    frequencies = base ** (-torch.arange(0, dim, 2) / dim)

    def rotation(places: Tensor) -> tuple[Tensor, Tensor]:
        angles = (places[..., None] * frequencies).repeat(*[1] * places.dim(), 2)
        return angles.cos(), angles.sin()

    return rotation


def _kept(policy: Evictor, row: KVRow, keep: int) -> Kept:
    """What stays, with scores that are infinite where there was no choice."""
    scores = policy.score(row).masked_fill(policy.protected(row, keep), torch.inf)
    return Kept(policy.select(row, keep), scores)


def _steps(policy: Evictor, case: Case, keep: int) -> Iterator[tuple[KVRow, Tensor]]:
    """What is held when the prompt and then each token has been read, and entries `[heads, kept]` that stay."""
    query, key, value = (case.inputs[name][0] for name in "qkv")
    prompt, heads = case.params["prompt"], len(key)
    place, observed = torch.arange(prompt).expand(heads, -1), torch.zeros(heads, prompt)
    for step in range(case.params["steps"] + 1):
        seen = prompt + step
        row = KVRow(
            layer=0,
            layers=1,
            key=key.gather(1, place[..., None].expand(-1, -1, key.shape[-1])),
            value=value.gather(1, place[..., None].expand(-1, -1, value.shape[-1])),
            place=place,
            visual=torch.zeros_like(place, dtype=torch.bool),
            seen=seen,
            scaling=key.shape[-1] ** -0.5,
            generated=step,
            query=query[:, seen - 1 : seen] if step else query[:, :prompt],
        )
        row = replace(row, observed=observed + policy.observe(row))
        assert row.observed is not None
        kept = torch.stack(policy.select(row, keep))
        yield row, kept
        place = pad(place.gather(1, kept), (0, 1), value=seen)
        observed = pad(row.observed.gather(1, kept), (0, 1))


def _ranked(scores: Tensor, window: int) -> Tensor:
    """Entries before the window, the best first."""
    return scores[:, :-window].argsort(dim=1, descending=True, stable=True)


def _in_order(
    held: tuple[list[Tensor], list[Tensor]], kept: Sequence[Tensor], ranked: Tensor, row: KVRow
) -> tuple[Tensor, Tensor]:
    """Keys and values of what stays as the published code lays them: `ranked` entries, then the window."""
    window = torch.arange(row.entries - len(kept[0]) + ranked.shape[1], row.entries).expand(len(ranked), -1)
    order = torch.cat([ranked, window], dim=1)
    places = [torch.searchsorted(indices, entries) for indices, entries in zip(kept, order, strict=True)]
    keys, values = (torch.stack([states[at] for states, at in zip(part, places, strict=True)]) for part in held)
    return keys[None], values[None]


def _by_place(row: KVRow, kept: Tensor | None = None) -> Tensor:
    """What was observed of the `kept` entries, all of them if None, and zero for all other tokens `[heads, seen]`."""
    assert row.observed is not None
    place, observed = (
        (row.place, row.observed) if kept is None else (row.place.gather(1, kept), row.observed.gather(1, kept))
    )
    return torch.zeros(len(place), row.seen).scatter(1, place, observed)


def _next_mask(row: KVRow, kept: Tensor) -> Tensor:
    """Which tokens the coming one may read, itself included `[heads, seen + 1]`."""
    mask = torch.zeros(len(kept), row.seen + 1, dtype=torch.bool).scatter(1, row.place.gather(1, kept), True)
    mask[:, -1] = True
    return mask


def _read(row: KVRow) -> Tensor:
    """What the last token reads, heads one behind the other."""
    return (row.grouped(row.rows(rows="sum", last=1)) @ row.value).flatten()


HANDLERS = {
    "snapkv_": Handler("snapkv", snapkv, inputs=("q", "k", "v")),
    "adakv_": Handler("adakv", adakv, {"compat": "official"}),
    "pyramidkv_budgets": Handler(
        "pyramidkv",
        pyramidkv,
        {"compat": "official"},
        {"rows.*.kvpress_*": "kvpress falls back to flat budgets without a word; it is no oracle"},
        inputs=("rows.*.L", "rows.*.capacity_incl_window", "rows.*.window", "rows.*.beta", "rows.*.T"),
    ),
    "h2o_oneshot_": Handler("h2o", h2o),
    "h2o_merge_pivot_": Handler("lookm", h2o_merge, {"text_first": False, "merge": "pivot"}),
    "h2o_merge_weighted_": Handler("lookm", h2o_merge, {"text_first": False, "merge": "weighted"}),
    "lookm_": Handler("lookm", lookm, inputs=("q", "k", "v", "image_mask")),
    "ems_reconstruction_": Handler("ems", ems),
    "tgvkv_": Handler("tgv-kv", tgv_kv, inputs=("q_*", "k_*")),
    "h2o_streaming_": Handler("h2o", h2o_streaming, inputs=("q", "k", "v")),
    "keyformer_": Handler("keyformer", keyformer, inputs=("q", "k", "v", "noise_*")),
    "streamingllm_": Handler("streamingllm", streamingllm, {"compat": "official"}),
    "kvpress_": Handler(
        "expected-attention",
        kvpress,
        unchecked={
            "*_knorm": "no policy here",
            "*_tova": "no policy here",
            "*_lagkv": "no policy here",
            "*_observed_attention": "no policy here; H2O does not divide by how many queries see an entry",
            "adakv_keydiff_pruned": "kvpress's own form of AdaKV, which saves no memory",
            "merging_keydiff_v": "a combination that is not built",
        },
        inputs=("q_pre", "k", "v"),
        others=("keydiff", "snapkv", "streamingllm"),
    ),
}
