"""The only door to the kernels: everything above calls these names and knows no implementation."""

from mmcompress.kernels.attention_colsum import attention_colsum, attention_lse, weighted_colsum
from mmcompress.kernels.attention_decode_quant import attention_decode_quant
from mmcompress.kernels.attention_decode_sparse import attention_decode_sparse, page_bounds
from mmcompress.kernels.attention_rows import attention_rows
from mmcompress.kernels.bipartite_match import bipartite_match, merge_tokens
from mmcompress.kernels.compact import compact
from mmcompress.kernels.dpp_select import dpp_select
from mmcompress.kernels.greedy_select import greedy_select
from mmcompress.kernels.kv_quant import kv_dequant, kv_quant, pack_bits, unpack_bits

__all__ = [
    "attention_colsum",
    "attention_decode_quant",
    "attention_decode_sparse",
    "attention_lse",
    "attention_rows",
    "bipartite_match",
    "compact",
    "dpp_select",
    "greedy_select",
    "kv_dequant",
    "kv_quant",
    "merge_tokens",
    "pack_bits",
    "page_bounds",
    "unpack_bits",
    "weighted_colsum",
]
