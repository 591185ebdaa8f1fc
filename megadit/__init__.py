"""megadit: diffusion Transformers under the maximal update parametrization, trained through DeepSpeed.

The package is read in the direction of its data flow: ``config`` → ``data`` → ``diffusion`` →
``models`` → ``train``; ``mup`` and ``parallel`` serve models and training. Importing it is cheap:
deepspeed, diffusers, transformers and matplotlib are imported only where they are used.
"""

__version__ = "0.1.0"
