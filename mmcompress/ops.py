"""The only door to the kernels: everything above calls these names and knows no implementation."""

from mmcompress.kernels.attention_colsum.reference import attention_colsum, attention_lse, weighted_colsum
from mmcompress.kernels.attention_rows.reference import attention_rows
from mmcompress.kernels.dpp_select.reference import dpp_select
from mmcompress.kernels.greedy_select.reference import greedy_select
from mmcompress.kernels.kv_quant.reference import kv_dequant, kv_quant, pack_bits, unpack_bits

__all__ = [
    "attention_colsum",
    "attention_lse",
    "attention_rows",
    "dpp_select",
    "greedy_select",
    "kv_dequant",
    "kv_quant",
    "pack_bits",
    "unpack_bits",
    "weighted_colsum",
]
