"""Names and shapes of each family's checkpoints elsewhere, one module per family; what they share is in ``common``.

Each family has up to four functions: ``from_official(state, **hints)``, ``to_official(config, state)``,
``from_diffusers(config_json, state)`` and ``to_diffusers(config, state)``. ``megadit.convert`` imports the one that
is asked for.
"""
