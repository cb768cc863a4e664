"""Adapters: layers that replace nn.Linear by name, train a few parameters, and merge back exactly.

One file a method, over method.py, which says what a method must tell; methods.py is the table of them. layer.py is the
layer, inject.py finds and replaces, and fills it from a file; tokens.py and block_affine.py hold what methods
share, product.py and quant.py how they multiply by a frozen weight, groups.py who learns how fast.
"""
