"""Operations of the models and the adapters that are more than one matrix product: a folder for each family.

Each operation has one signature over a form in plain torch and kernels for some devices, which native/ compiles and
loads.
"""
