"""Adapters: layers that replace nn.Linear by name, train a few parameters, and merge back exactly.

One file a method, with a METHOD of method.py's form; methods.py is the table of them. layer.py is the layer; inject.py
puts layers into a model, and fills them from a file; tokens.py and block_affine.py are shared by methods; product.py
and quant.py multiply by a frozen weight; groups.py sets the learning rates of parameters.
"""
