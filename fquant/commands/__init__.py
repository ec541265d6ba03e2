"""What the commands of `fquant.cli` do.

inspect    what a file holds
recipe     the YAML recipe of `fquant quantize`, read and checked
quantize   a recipe followed from the model to the files
table      tables on standard output
"""
