"""What stands in a generated file for modules that look for files or launch Triton kernels."""
