"""Commands about files of weights, for the command line; ``python -m torch_ext`` imports each at its use."""
