"""The vLLM engine: a general plugin, switched on by `--additional-config '{"mmcompress": {...}}'`."""
