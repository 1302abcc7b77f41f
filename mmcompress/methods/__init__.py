"""Visual methods, one per file; a file named `vtc_cls` defines the method `vtc-cls`."""
