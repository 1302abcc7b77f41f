"""Learned projectors whose token count is a dial, and what of that folder is not built."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from parity.handlers.base import Handler, Outputs, not_built
from torch import Tensor, nn

from mmcompress.projectors.m3 import M3
from mmcompress.projectors.mqt import MQT
from mmcompress.projectors.tokenflex import TokenFLEX
from mmcompress.projectors.tokenpacker import TokenPacker
from mmcompress.projectors.tokenpacker_hd import TokenPackerHD

if TYPE_CHECKING:
    from parity.cases import Case


def m3_pool(case: Case) -> Outputs:
    """Pooled tiles of every scale; the count is what the module says beforehand."""
    tiles = case.inputs["x"]
    side = _side(tiles.shape[1])
    outputs = {}
    for name in case.expected:
        scale = int(name.removeprefix("out_"))
        nested = scale in M3(side).budgets()
        m3 = M3(side, compat="none" if nested else "official")
        outputs[name] = m3(tiles, scale)
        assert m3.tokens_for((side, side), scale) == case.sidecar["counts"][str(scale)] == outputs[name].shape[1]
    return outputs


def m3_anyres(case: Case) -> Outputs:
    """Tokens of images in tiles at every scale, and how many there will be."""
    outputs: dict[str, Tensor] = {}
    for number, entry in enumerate(case.sidecar["cases"]):
        tiles = case.inputs[f"case{entry['case']}_feats"]
        resolutions = [(height, width) for width, height in case.sidecar["grid_pinpoints"]]
        tile = min(min(resolution) for resolution in resolutions)
        m3 = M3(_side(tiles.shape[1]), resolutions=resolutions, tile=tile)
        width, height = entry["image_size_wh"]
        assert m3.crops((height, width)) == (entry["grid_h"], entry["grid_w"])
        joined = m3.join(m3(tiles, entry["scale"]), (height, width), case.inputs["image_newline"])
        outputs[f"case{entry['case']}_out_{entry['scale']}"] = joined
        outputs[f"cases.{number}.n_visual"] = torch.tensor(m3.tokens_for((height, width), entry["scale"]))
    return outputs


def mqt(case: Case) -> Outputs:
    """Tokens of every number of queries, with the attention made beforehand and without."""
    x, config = case.inputs["x"], case.sidecar["config"]
    module = MQT(config["grid_size"], config["embed_dim"], config["num_heads"], config["kv_dim"])
    _load(module, case)
    outputs = {name: module(x, int(name.removeprefix("out_"))) for name in case.expected if name.startswith("out_")}
    module.precompute(x.shape[1])
    for name, output in outputs.items():
        torch.testing.assert_close(module(x, int(name.removeprefix("out_"))), output, rtol=2e-5, atol=2e-6)
    return outputs | {"kv_pos": module.places(x.shape[1])}


def mqt_fullsize(case: Case) -> Outputs:
    """The module at its published size, with weights in closed form."""
    config = case.sidecar["config"]
    module = MQT(config["grid_size"], config["embed_dim"], config["num_heads"], config["kv_dim"])
    _fill(module, case.sidecar["param_order"], keep=("pos_embed",))
    patches = case.sidecar["tgt_size"][0] * case.sidecar["tgt_size"][1]
    x = _wave(patches * config["kv_dim"], 0.37, 1e-6).view(1, patches, -1)
    outputs = {}
    for budget in {int(name.split("_")[1]) for name in case.expected}:
        tokens = module(x, budget)
        outputs[f"out_{budget}_first64"] = tokens[..., :64]
        outputs[f"out_{budget}_sum"] = tokens[0].double().sum(dim=-1)
    return outputs


def tokenpacker(case: Case) -> Outputs:
    """Packed tokens; here the queries' features are not among those of the keys."""
    module = _tokenpacker(case)
    _load(module, case)
    x = case.inputs["x"]
    sampled = module.sample(x)
    side = _side(sampled.shape[1])
    return {"out": module.pack(x, case.inputs["x_multi"]), "q_interp": sampled.unflatten(1, (side, side))}


def tokenpacker_fullsize(case: Case) -> Outputs:
    """The module at its published size, with weights in closed form."""
    module = _tokenpacker(case)
    _fill(module, case.sidecar["param_order"])
    patches, width = module.side**2, module.width
    coarse = _wave(patches * width, 0.37, 1e-6).view(1, patches, -1)
    fine = _wave(patches * 4 * width, 0.41, 1e-7).view(1, patches, -1)
    tokens = module.pack(coarse, fine)
    return {"out_first64": tokens[..., :64], "out_sum": tokens[0].double().sum(dim=-1)}


def tokenpacker_hd(case: Case) -> Outputs:
    """The grid of tiles of images of many sizes."""
    outputs = {}
    with torch.device("meta"):
        packer = TokenPacker()
    for number, entry in enumerate(case.sidecar["cases"]):
        rows, columns = TokenPackerHD(packer, entry["patch_num"]).grid((entry["h"], entry["w"]))
        outputs[f"cases.{number}.h_block"] = torch.tensor(rows)
        outputs[f"cases.{number}.w_block"] = torch.tensor(columns)
    return outputs


def tokenflex(case: Case) -> Outputs:
    """Tokens of every count."""
    config = case.sidecar["config"]
    module = TokenFLEX(config["grid"], config["vit_hidden"], config["llm_hidden"])
    _load(module, case)
    return {name: module(case.inputs["x"], int(name.removeprefix("out_"))) for name in case.expected}


def _tokenpacker(case: Case) -> TokenPacker:
    config = case.sidecar["config"]
    assert config["kv_dim"] == config["embed_dim"]
    return TokenPacker(
        config["scale_factor"], config["raw_grid"], config["kv_dim"], config["hidden_size"], config["num_heads"]
    ).eval()


def _side(tokens: int) -> int:
    return round(tokens**0.5)


def _load(module: nn.Module, case: Case) -> None:
    prefix = "sd."
    module.load_state_dict(
        {name.removeprefix(prefix): value for name, value in case.inputs.items() if name.startswith(prefix)}
    )
    module.eval()


def _fill(module: nn.Module, order: list[str], keep: tuple[str, ...] = ()) -> None:
    """Weights in the closed form that the sidecars of the full-size cases state."""
    parameters = dict(module.named_parameters())
    assert sorted(parameters) == sorted(order)
    for place, name in enumerate(order):
        if name in keep:
            continue
        parameter = parameters[name]
        k = torch.arange(parameter.numel(), dtype=torch.float64)
        value = torch.sin(0.7 * (place + 1) + k * (0.61803398875 + 0.01 * place)).view(parameter.shape)
        if parameter.dim() == 2:
            value = value / parameter.shape[-1] ** 0.5
        else:
            value = 0.1 * value + float(name.startswith("ln_") and name.endswith(".weight"))
        parameter.data.copy_(value)
    module.eval()


def _wave(count: int, pace: float, bend: float) -> Tensor:
    k = torch.arange(count, dtype=torch.float64)
    return torch.sin(0.3 + pace * k + bend * k * k).float()


HANDLERS = {
    "m3_pool": Handler("m3", m3_pool, inputs=("x",)),
    "m3_anyres": Handler(
        "m3",
        m3_anyres,
        inputs=("image_newline", "*_feats", "*.case", "*.image_size_wh", "*.grid_w", "*.grid_h", "*.scale"),
    ),
    "mqt_": Handler("mqt", mqt, inputs=("sd.*", "x")),
    # The sums are of 4096 values that nearly cancel.
    "mqt_fullsize_formula": Handler("mqt", mqt_fullsize, tolerance={"*_sum": "atol 2e-6"}),
    "tokenpacker_": Handler("tokenpacker", tokenpacker, inputs=("sd.*", "x", "x_multi")),
    "tokenpacker_fullsize_formula": Handler("tokenpacker", tokenpacker_fullsize, tolerance={"*_sum": "atol 2e-5"}),
    "tokenpacker_hd_grid": Handler("tokenpacker", tokenpacker_hd, inputs=("*.patch_num", "*.h", "*.w")),
    "tokenflex": Handler("tokenflex", tokenflex, inputs=("sd.*", "x")),
    "llavolta_": not_built("llavolta"),
    "vqtoken_": not_built("vqtoken"),
    "lavit_": not_built("lavit"),
    "yopo_": not_built("yopo"),
    "flash_sar_": not_built("flash-sar"),
    "token_recycling": not_built("token-recycling"),
    "internvl_vir": not_built("internvl-vir"),
}
