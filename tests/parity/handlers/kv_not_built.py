"""KV policies that others have published and that are not built here."""

from __future__ import annotations

from parity.handlers.base import not_built

HANDLERS = {
    "dkv_": not_built("dKV-Cache, for diffusion models"),
    "infinipot_": not_built("InfiniPot-V"),
    "kvzip_": not_built("KVzip"),
    "meda_": not_built("MEDA"),
    "mixkv_": not_built("MixKV"),
    "turboquant_": not_built("TurboQuant and UltraQuant"),
    "vlcache_": not_built("VL-Cache"),
}
