"""The Triton kernels, one file for each file beside this folder; importing a file imports triton.

Each file reads: constants, kernels, then the function that launches them. Sizes are run-time
arguments, so that a new N does not compile anew. Nothing synchronises with the host.
"""
