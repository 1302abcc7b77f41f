"""KV policies within vLLM: which blocks of tokens its scheduler frees, and what its attention reads."""
