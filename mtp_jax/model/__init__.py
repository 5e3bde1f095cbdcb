"""The transformer: layers, attention and its kernels, the trunk, arithmetic counts."""
