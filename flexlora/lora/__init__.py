"""The kernel: tensors in, tensors out."""
