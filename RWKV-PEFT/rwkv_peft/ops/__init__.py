"""What the model and the adapters compute beside matrix products: a folder or a file for each family of operations.

Each has a form in plain torch and kernels for some devices behind one signature; native/ compiles and loads these.
"""
