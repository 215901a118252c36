"""Checkpoints as Hugging Face's tools name them: in, out, and evaluated from outside.

config.py reads and writes config.json; names.py says which tensor is which parameter; checkpoint.py opens a folder.
The commands are `python -m moe.model.hf import|export|evaluate`.
"""
