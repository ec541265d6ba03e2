"""Seeing the operations of a model while it runs, and putting others in their place.

    stack        which interpreter is running in this thread; marks that user code may set
    ops          which functions are operations, and where their operands are
    shadow       a copy of the module tree that tells the interpreter where it is
    interpreter  the mode that names operations `path/op#k` and hands operands on

Nothing here writes a module, a global of torch, or a tensor of the caller's.
"""
