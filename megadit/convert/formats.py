"""Names of checkpoint formats. ``--help`` reads them, so nothing is imported here."""

OFFICIAL_FAMILIES = ("dit", "pixart", "uvit", "mmdit")  # whose authors' code has checkpoints of its own form

# What tools/convert_checkpoint.py offers; megadit.convert.conversion has a reader and a writer for each.
FORMATS = (
    "megadit",
    "safetensors",
    "fp32-state-dict",
    "deepspeed",
    "deepspeed-universal",
    *(f"official-{family}" for family in OFFICIAL_FAMILIES),
    "diffusers",
)
