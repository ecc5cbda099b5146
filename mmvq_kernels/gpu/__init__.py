"""The Triton kernels, one file for each file beside this folder; importing a file imports triton.

Each file has constants, kernels, then the function that launches them, which has the name and the
arguments of the operation in torch. Sizes are run-time arguments. Nothing synchronises with the
host.
"""
