"""The configuration is light: commands that only parse and check must answer at once."""

from __future__ import annotations

import subprocess
import sys


def test_neither_torch_nor_deepspeed_is_imported():
    script = (
        "import sys\n"
        "from megadit.config import load, merge_ds_config\n"
        "import megadit.config.schema.json_schema\n"
        "merge_ds_config(load('dit/xl-2-mup.yaml'), 'deepspeed/zero2.json', 8)\n"
        "heavy = {'torch', 'deepspeed', 'numpy', 'diffusers', 'transformers', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
