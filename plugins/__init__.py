"""The bundled sources: one module per kind. Installed as `relay.sources`."""
